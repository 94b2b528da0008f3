"""Several masters: who is refused, what is said when they are away, and what a fenced section does."""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator

import optuna
import pytest
from optuna.trial import TrialState

import optuna_dlock.ensemble
import optuna_dlock.master
from optuna_dlock import RedisLockedStorage
from optuna_dlock.ensemble import Ensemble, _Object
from optuna_dlock.errors import (
    AccessDeniedError,
    InvalidURLError,
    LockNotAcquiredError,
    MembershipError,
    QuorumError,
    ServerConfigurationError,
)
from optuna_dlock.keys import object_of
from optuna_dlock.master import Request
from optuna_dlock.scripts import OK, masters_script
from optuna_dlock.spacing import Spacing
from tests.contention.routes import OwnRoute
from tests.masters import Masters, create, ensemble_of, level
from tests.proxy import CuttingProxy
from tests.servers import Server

_numbers = itertools.count()


@pytest.fixture(scope="module")
def three() -> Iterator[Masters]:
    """Three plain masters that no test stops."""
    with Masters("valkey", 3) as masters:
        yield masters


@pytest.fixture
def url(three: Masters) -> str:
    """Their URL, with a key space of its own."""
    return f"{three.url}?prefix=e{next(_numbers)}"


def keys_of(masters: Masters) -> list[bytes]:
    return [key for server in masters.servers for key in server.command("KEYS", "*")]


# -- who is refused --------------------------------------------------------------------------------


def test_a_worker_with_another_list_is_refused_and_told_the_right_one(three: Masters, url: str) -> None:
    """G8."""
    with RedisLockedStorage(url):
        pass
    short = url.replace(f",127.0.0.1:{three.servers[2].port}", "")
    with pytest.raises(MembershipError, match="give all workers the same list") as caught:
        RedisLockedStorage(short, timeout=5.0)
    assert len(caught.value.members) == 3
    assert str(three.servers[2].port) in str(caught.value)


def test_the_url_of_one_master_is_refused(three: Masters, url: str) -> None:
    """G8: this worker would count trials of its own."""
    with RedisLockedStorage(url):
        pass
    single = f"{three.urls[0]}?prefix={url.partition('prefix=')[2]}"
    with pytest.raises(MembershipError, match="give their whole list"):
        RedisLockedStorage(single, timeout=5.0)


def test_masters_that_hold_studies_of_a_single_server_are_refused(three: Masters, url: str) -> None:
    with RedisLockedStorage(f"{three.urls[1]}?prefix={url.partition('prefix=')[2]}") as storage:
        create(storage)
    with pytest.raises(MembershipError, match="single server"):
        RedisLockedStorage(url, timeout=5.0)


def test_the_same_server_under_two_names_is_refused_and_nothing_is_written(valkey: Server) -> None:
    before = valkey.command("DBSIZE")
    with pytest.raises(ServerConfigurationError, match="the same server"):
        RedisLockedStorage(
            f"redis://127.0.0.1:{valkey.port},localhost:{valkey.port}/0?prefix=twice", timeout=5.0
        )
    assert valkey.command("DBSIZE") == before


@pytest.mark.parametrize(
    ("urls", "what"),
    [
        (["redis://h:1", "redis://h:1"], "listed twice"),
        (["redis://h:1?prefix=a", "redis://h:2?prefix=b"], "different prefixes"),
        (["redis://h:1", "embedded:x"], "embedded"),
        ([], "empty list"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(urls: list[str], what: str) -> None:
    with pytest.raises(InvalidURLError, match=what):
        RedisLockedStorage(urls)


def test_a_master_that_evicts_keys_is_refused() -> None:
    with Masters("valkey", 3) as masters:
        masters.servers[1].command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
        with pytest.raises(ServerConfigurationError, match="noeviction"):
            RedisLockedStorage(masters.url, timeout=5.0)


def test_a_wrong_password_is_told_at_once_and_not_shown() -> None:
    with Server("valkey", password="right") as one, Server("valkey", password="right") as two:  # noqa: S106
        start = time.monotonic()
        with pytest.raises(AccessDeniedError) as caught:
            RedisLockedStorage(f"redis://:wrong1@127.0.0.1:{one.port},127.0.0.1:{two.port}/0", timeout=20.0)
        assert time.monotonic() - start < 10
        assert "wrong1" not in str(caught.value)
        with RedisLockedStorage(f"redis://:right@127.0.0.1:{one.port},127.0.0.1:{two.port}/0") as storage:
            assert "right" not in repr(storage)


# -- masters that are away -------------------------------------------------------------------------


def test_without_a_majority_a_call_waits_and_then_names_each_master() -> None:
    with Masters("valkey", 3) as masters:
        storage = RedisLockedStorage(masters.url, timeout=1.0)
        study_id = create(storage)
        masters.kill(0)
        masters.kill(1)
        with pytest.raises(QuorumError) as caught:
            storage.create_new_trial(study_id)
        error = caught.value
        assert (error.needed, error.answered, len(error.nodes)) == (2, 1, 3)
        assert all(f"127.0.0.1:{server.port}" in str(error) for server in masters.servers)
        assert pickle.loads(pickle.dumps(error)).nodes == error.nodes


def test_a_call_that_waits_goes_on_as_soon_as_a_majority_is_back() -> None:
    with Masters("valkey", 3, appendonly=True) as masters:
        storage = RedisLockedStorage(masters.url, timeout=30.0)
        study_id = create(storage)
        masters.kill(0)
        assert storage.create_new_trial(study_id) & 0xFFFF == 0
        made: list[int] = []
        masters.pause(1)
        thread = threading.Thread(target=lambda: made.append(storage.create_new_trial(study_id)))
        thread.start()
        time.sleep(0.3)
        assert not made
        masters.resume(1)
        thread.join(20)
        assert [trial_id & 0xFFFF for trial_id in made] == [1]


def test_a_new_ensemble_begins_only_with_all_masters() -> None:
    with Masters("valkey", 3) as masters:
        masters.kill(2)
        with pytest.raises(QuorumError):
            RedisLockedStorage(masters.url, timeout=1.0)
        assert keys_of_running(masters) == []


def keys_of_running(masters: Masters) -> list[bytes]:
    return [key for server in masters.servers[:2] for key in server.command("KEYS", "*")]


def test_two_of_three_that_lost_their_data_are_not_taken_for_a_majority() -> None:
    """G2, G8: what only the third one has would be lost."""
    with Masters("valkey", 3) as masters:
        storage = RedisLockedStorage(masters.url, timeout=2.0)
        study_id = create(storage)
        storage.create_new_trial(study_id)
        storage.close()
        for index in (0, 1):
            masters.kill(index)
        for index in (0, 1):
            masters.start(index)
        with pytest.raises(QuorumError):
            RedisLockedStorage(masters.url, timeout=2.0).get_all_trials(study_id)


def _study_of(masters: Masters, trials: int) -> int:
    with RedisLockedStorage(masters.url) as storage:
        study_id = create(storage)
        for _ in range(trials):
            storage.create_new_trial(study_id)
    return study_id


def test_two_of_three_that_restart_with_their_data_go_on_with_the_third() -> None:
    """As when two hosts are rebooted in a row."""
    with Masters("valkey", 3, appendonly=True, extra=("--appendfsync", "always")) as masters:
        study_id = _study_of(masters, 3)
        for index in (0, 1):
            masters.kill(index)
            masters.start(index)
        with RedisLockedStorage(masters.url, timeout=10.0) as storage:
            assert storage.create_new_trial(study_id) & 0xFFFF == 3
            _wait_until(lambda: level(storage, study_id), "all vote again")


@pytest.mark.parametrize("lost", [0, 2])
def test_after_all_went_down_two_of_three_go_on_though_the_third_is_lost(
    lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_dlock.ensemble, "_WAITED_FOR_ALL", 1.0)
    with Masters("valkey", 3, appendonly=True, extra=("--appendfsync", "always")) as masters:
        study_id = _study_of(masters, 3)
        for index in range(3):
            masters.kill(index)
        for index in {0, 1, 2} - {lost}:
            masters.start(index)
        with RedisLockedStorage(masters.url, timeout=20.0) as storage:
            assert storage.create_new_trial(study_id) & 0xFFFF == 3
            masters.restart_empty(lost)
            _wait_until(lambda: level(storage, study_id), "all vote again")


def test_of_what_masters_kept_the_latest_counts_and_promises_of_before_do_not() -> None:
    """One missed the last trials; another kept the promise of a client whose clock is ahead."""
    with Masters("valkey", 3, appendonly=True, extra=("--appendfsync", "always")) as masters:
        study_id = _study_of(masters, 2)
        masters.kill(0)
        ahead = RedisLockedStorage(masters.url)
        ensemble = ensemble_of(ahead)
        ensemble.ballots._clock = lambda: time.time() + 1e6
        ahead.create_new_trial(study_id)
        late = ensemble.ballots.next()
        obj = ensemble._object(ahead._registry.study_keys(study_id).ballots)
        with ensemble.lock:
            ensemble._ask_for_votes(obj, late, ensemble.masters)
        for index in (1, 2):
            masters.kill(index)
        for index in range(3):
            masters.start(index)
        with RedisLockedStorage(masters.url, timeout=10.0) as storage:
            assert [t.number for t in storage.get_all_trials(study_id)] == [0, 1, 2]
            _wait_until(lambda: level(storage, study_id), "all vote again")
            count = storage.get_n_trials(study_id)
            with ensemble.lock:
                for master in ensemble.masters:
                    master.close()
                ensemble.command("PING")
                obj.ballot, obj.base = late, (3, obj.base[1])
                assert ahead._trials(study_id).create(None) == count, "it has to ask for the turn again"
            assert storage.get_n_trials(study_id) == count + 1
            assert ensemble._object(obj.name).highest > "0001"  # of a new epoch


def test_who_reaches_no_majority_leaves_the_turn_to_those_who_do() -> None:
    with Masters("valkey", 3) as masters, contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(CuttingProxy(server.port)) for server in masters.servers[:2]]
        detour = {s.port: p.port for s, p in zip(masters.servers, proxies, strict=False)}
        near, far = RedisLockedStorage(masters.url), OwnRoute(masters.url, detour=detour, timeout=1.0)
        study_id = create(near)
        far.create_new_trial(study_id)
        near.create_new_trial(study_id)
        for proxy in proxies:
            proxy.refuse()
            proxy.cut_all()
        _wait_until(lambda: _connected(far) == 1, "it notices")
        assert near.create_new_trial(study_id) & 0xFFFF == 2
        (key,) = masters.servers[2].command("KEYS", f"*{{{study_id}}}:ballots")
        promised = masters.servers[2].command("HGET", key, "p")
        with pytest.raises(QuorumError):
            far.create_new_trial(study_id)
        assert masters.servers[2].command("HGET", key, "p") == promised


def _connected(storage: RedisLockedStorage) -> int:
    ensemble = ensemble_of(storage)
    ensemble.receive(0.01)
    return sum(master.connected for master in ensemble.masters)


def test_replies_that_nobody_has_read_for_long_are_no_reason_to_connect_anew(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial may take hours after its last write."""
    monkeypatch.setattr(optuna_dlock.master, "_PATIENCE", 0.5)
    storage = RedisLockedStorage(url)
    trial = optuna.create_study(storage=storage).ask()
    trial.set_user_attr("a", 1)
    before = [master._channel for master in ensemble_of(storage).masters]
    assert ensemble_of(storage).outstanding == 1
    time.sleep(0.6)
    assert storage.get_trial(trial._trial_id).user_attrs == {"a": 1}
    assert [master._channel for master in ensemble_of(storage).masters] == before


def test_a_lease_that_is_granted_after_the_turn_was_lost_elsewhere_is_given_back() -> None:
    """Else all others wait until it has run out."""
    with Masters("valkey", 3) as masters:
        holder, late = RedisLockedStorage(masters.url), RedisLockedStorage(masters.url)
        study_id = create(holder)
        late.create_new_trial(study_id)
        ports = [int(master.address.rpartition(":")[2]) for master in ensemble_of(holder).masters]
        first, second = ([s.port for s in masters.servers].index(port) for port in ports[:2])
        masters.kill(first)
        holder.create_new_trial(study_id)
        late.get_n_trials(study_id)
        obj = ensemble_of(late)._object(late._registry.study_keys(study_id).ballots)
        ballot = ensemble_of(holder).ballots.next()
        request, script = Request(), masters_script("acquire_ballot")
        holding = ensemble_of(holder).masters[2]
        holding.send_script(script, [obj.ballots_key], [ballot, 60_000], request)
        assert ensemble_of(holder).reply_of(holding, request, 5.0)[0] == OK
        masters.pause(second)
        obj.ballot = None
        assert not ensemble_of(late)._acquire(obj)
        masters.resume(second)
        server = masters.servers[second]
        (key,) = server.command("KEYS", f"*{{{study_id}}}:ballots")
        mine = b"%012d" % ensemble_of(late).ballots._client
        _wait_until(lambda: server.command("HGET", key, "p").endswith(mine), "it was granted")
        _wait_until(lambda: server.command("HGET", key, "l") == b"0", "it was given back")


# -- sections --------------------------------------------------------------------------------------


def test_a_holder_that_was_paused_past_its_lease_is_refused_and_goes_on(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G1, G7: 200 rounds in which the lease runs out between acquire and commit."""
    monkeypatch.setattr(Spacing, "opens", False)
    monkeypatch.setattr(optuna_dlock.ensemble, "_TTL_MS", 1)
    slow, quick = RedisLockedStorage(url), RedisLockedStorage(url)
    study_id = create(slow)
    ensemble = ensemble_of(slow)
    real, refused = ensemble._send_section, 0
    numbers: list[int] = []

    def overtaken(*args: object) -> object:
        nonlocal refused
        monkeypatch.setattr(ensemble, "_send_section", real)
        time.sleep(0.003)  # three times the lease
        numbers.append(quick.create_new_trial(study_id) & 0xFFFF)
        request = real(*args)  # type: ignore[arg-type]
        refused += not ensemble.wait_for_majority(request)
        return request

    for _ in range(200):
        monkeypatch.setattr(ensemble, "_send_section", overtaken)
        numbers.append(slow.create_new_trial(study_id) & 0xFFFF)
    assert sorted(numbers) == list(range(400))
    assert [t.number for t in quick.get_all_trials(study_id)] == list(range(400))
    assert refused == 200, "a section is run under a ballot that is the promised one, or not at all"


def test_a_section_is_refused_once_somebody_else_was_promised_the_turn(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though nothing was run meanwhile: the other one has seen the state without it."""
    monkeypatch.setattr(optuna_dlock.ensemble, "_TTL_MS", 1)
    first, second = (ensemble_of(RedisLockedStorage(url)) for _ in range(2))
    objects = [ensemble._object(ensemble.keys.info) for ensemble in (first, second)]
    assert first._acquire(objects[0])
    time.sleep(0.005)
    assert second._acquire(objects[1])
    assert objects[0].base == objects[1].base
    assert _run_empty_section(first, objects[0]) < 2
    assert _run_empty_section(second, objects[1]) >= 2


@pytest.mark.parametrize("base", [(7, ""), None])
def test_a_section_is_refused_where_it_does_not_follow_what_was_run_last(
    url: str, base: tuple[int, str] | None
) -> None:
    ensemble = ensemble_of(RedisLockedStorage(url))
    obj = ensemble._object(ensemble.keys.info)
    assert ensemble._acquire(obj)
    obj.base = base or (obj.base[0], "another one")
    assert _run_empty_section(ensemble, obj) == 0


def _run_empty_section(ensemble: Ensemble, obj: _Object) -> int:
    """How many masters take it."""
    assert obj.ballot is not None
    request = ensemble._send_section(obj, obj.ballot, "confirm_state", [obj.ballots_key], [])
    ensemble.wait_for_all(request, 5.0)
    return ensemble.count(request, 0)


def test_a_section_that_reached_one_master_only_is_adopted_or_never_seen(url: str) -> None:
    """G1: what a client left behind is on a minority; the next one takes it over: no number is skipped."""
    dying, next_one = RedisLockedStorage(url), RedisLockedStorage(url)
    study_id = create(dying)
    dying.create_new_trial(study_id)
    masters = ensemble_of(dying).masters
    kept = [master.send_script for master in masters[1:]]
    for master in masters[1:]:
        master.send_script = lambda *args, index=master.index: args[3].lost.add(index)  # type: ignore[method-assign]
    thread = threading.Thread(target=lambda: _ignore_quorum(dying, study_id), daemon=True)
    thread.start()
    time.sleep(0.05)
    numbers = [next_one.create_new_trial(study_id) & 0xFFFF for _ in range(3)]
    trials = next_one.get_all_trials(study_id)
    assert [t.number for t in trials] == list(range(len(trials)))
    assert numbers == list(range(numbers[0], numbers[0] + 3))
    for master, send in zip(masters[1:], kept, strict=True):
        master.send_script = send  # type: ignore[method-assign]
    thread.join(20)
    assert [t.number for t in next_one.get_all_trials(study_id)] == list(
        range(len(trials) + (numbers[0] == 1))
    )


def _ignore_quorum(storage: RedisLockedStorage, study_id: int) -> None:
    storage.create_new_trial(study_id)


def test_alone_a_section_is_one_round_trip_and_writes_wait_for_nothing(url: str) -> None:
    storage = RedisLockedStorage(url)
    study = optuna.create_study(storage=storage, sampler=optuna.samplers.RandomSampler())
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    trial = study.ask()
    node = storage._node
    before = node.waits
    trial.suggest_float("x", 0, 1)
    trial.set_user_attr("a", 1)
    trial.report(0.5, 1)
    assert node.waits == before
    assert node.outstanding == 3
    storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
    assert node.waits == before + 1
    assert node.outstanding == 0


def test_writes_wait_for_nothing_while_others_have_the_turn_and_take_one_turn_together(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_dlock.ensemble, "_FLUSHED_AFTER", 60.0)
    monkeypatch.setattr(Spacing, "opens", False)
    turns = []
    acquire = Ensemble._acquire
    monkeypatch.setattr(
        Ensemble,
        "_acquire",
        lambda self, *args: turns.append(self) or acquire(self, *args),  # type: ignore[func-returns-value]
    )
    mine, other = RedisLockedStorage(url), RedisLockedStorage(url)
    study_id = create(mine)
    trial_id = mine.create_new_trial(study_id)
    ensemble = ensemble_of(mine)
    obj = ensemble._object(mine._registry.study_keys(study_id).ballots)
    for sent in (True, False):
        other.create_new_trial(study_id)
        if not sent:
            obj.ballot = None  # as after a section that was refused
        waits, turns[:] = ensemble.waits, []
        for number in range(10):
            mine.set_trial_user_attr(trial_id, f"{sent} {number}", number)
        assert ensemble.waits == waits
        assert (ensemble.outstanding, ensemble._unsent) == (10, 0 if sent else 10)
        mine.set_trial_user_attr(trial_id, "last", sent)
        mine.get_n_trials(study_id)
        assert turns.count(ensemble) == 1
        assert len(other.get_trial(trial_id).user_attrs) == (11 if sent else 21)


def test_a_write_that_had_no_turn_reaches_others_though_its_worker_calls_nothing_more(url: str) -> None:
    mine, other = RedisLockedStorage(url), RedisLockedStorage(url)
    study_id = create(mine)
    trial_id = mine.create_new_trial(study_id)
    other.create_new_trial(study_id)
    ensemble = ensemble_of(mine)
    ensemble._object(mine._registry.study_keys(study_id).ballots).ballot = None
    mine.set_trial_user_attr(trial_id, "a", 1)
    _wait_until(lambda: other.get_trial(trial_id).user_attrs == {"a": 1}, "it is sent")
    assert ensemble.outstanding == 0


def test_a_master_that_missed_little_and_one_that_missed_much_catch_up() -> None:
    """By replaying sections, and by a copy."""
    with Masters("valkey", 3) as masters:
        storage = RedisLockedStorage(masters.url)
        study_id = create(storage)
        for missed in (10, 1500):
            masters.pause(2)
            for _ in range(missed):
                storage.create_new_trial(study_id)
            masters.resume(2)
            _wait_until(lambda: level(storage, study_id), f"a master that missed {missed} sections")


def test_a_master_that_restarts_with_its_data_gets_a_copy_and_its_earlier_run_is_swept() -> None:
    """Its run changed: it may have forgotten promises, so it does not go on with what it kept."""
    with Masters("valkey", 3, appendonly=True) as masters:
        storage = RedisLockedStorage(masters.url)
        study_id = create(storage)
        for _ in range(20):
            storage.create_new_trial(study_id)
        before = set(masters.servers[0].command("KEYS", "optuna@*{*"))
        masters.kill(0)
        storage.create_new_trial(study_id)
        masters.start(0)
        assert set(masters.servers[0].command("KEYS", "optuna@*{*")) == before
        _wait_until(lambda: level(storage, study_id), "the master votes again")
        _wait_until(
            lambda: not before & set(masters.servers[0].command("KEYS", "optuna@*{*")),
            "the earlier run is swept",
        )
        masters.kill(1)
        assert storage.create_new_trial(study_id) & 0xFFFF == storage.get_n_trials(study_id) - 1


def _wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def test_who_works_on_a_study_that_another_has_deleted_is_told_in_every_call(url: str) -> None:
    one, two = RedisLockedStorage(url), RedisLockedStorage(url)
    study_id = create(one)
    running, waiting = (
        two.create_new_trial(study_id, optuna.trial.create_trial(state=state))
        for state in (TrialState.RUNNING, TrialState.WAITING)
    )
    one.delete_study(study_id)
    calls: list[Callable[[], object]] = [
        lambda: two.set_trial_state_values(waiting, TrialState.RUNNING),
        lambda: two.set_trial_state_values(running, TrialState.COMPLETE, [1.0]),
        lambda: two.create_new_trial(study_id),
        lambda: two.get_all_trials(study_id),
        lambda: two.set_study_user_attr(study_id, "a", 1),
    ]
    for call in calls:
        with pytest.raises(KeyError):
            call()
    assert two._locks.holder(f"study:{study_id}") is None
    two._locks.free_if_dead(f"study:{study_id}")


# -- locks -----------------------------------------------------------------------------------------


def test_the_lock_of_several_masters_excludes_and_its_tokens_rise(url: str) -> None:
    one, two = RedisLockedStorage(url), RedisLockedStorage(url)
    with one.lock("data") as first, pytest.raises(LockNotAcquiredError, match=f":{os.getpid()}:"):
        two.lock("data").acquire(timeout=0)
    with two.lock("data") as second:
        assert second == first + 1


def test_a_lock_whose_holder_died_is_free_after_its_ttl(url: str) -> None:
    dead, alive = RedisLockedStorage(url), RedisLockedStorage(url)
    token = dead.lock("data", ttl=0.3).acquire()
    dead._locks._renewal.stop()
    start = time.monotonic()
    assert alive.lock("data").acquire(timeout=10) == token + 1
    assert time.monotonic() - start > 0.25


def test_while_a_study_is_locked_others_wait_and_the_holder_goes_on(url: str) -> None:
    holder, other = RedisLockedStorage(url), RedisLockedStorage(url, timeout=0.5)
    study_id = create(holder)
    with holder.lock(f"study:{study_id}"):
        holder.create_new_trial(study_id)
        with pytest.raises(LockNotAcquiredError):
            other.create_new_trial(study_id)
    assert other.create_new_trial(study_id) & 0xFFFF == 1


def test_a_forked_child_has_connections_and_ballots_of_its_own(url: str) -> None:
    storage = RedisLockedStorage(url)
    study_id = create(storage)
    storage.create_new_trial(study_id)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if storage.create_new_trial(study_id) & 0xFFFF in (1, 2) else 1
        finally:
            os._exit(status)
    storage.create_new_trial(study_id)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.get_n_trials(study_id) == 3


def test_pickling_keeps_the_configuration(url: str) -> None:
    storage = RedisLockedStorage(url)
    study_id = create(storage)
    again = pickle.loads(pickle.dumps(storage))
    again.create_new_trial(study_id)
    assert storage.get_n_trials(study_id) == 1


def test_a_study_that_only_a_minority_has_begun_can_be_used() -> None:
    """The registry was copied from the one master that ran the section that made it (seen by simulation)."""
    with Masters("valkey", 3) as masters:
        with RedisLockedStorage(masters.url) as storage:
            study_id = create(storage)
        for server in masters.servers[:2]:
            (ballots,) = server.command("KEYS", f"*{{{study_id}}}:ballots")
            base = ballots[: -len(b"ballots")]
            server.command("DEL", ballots, base + b"meta")
        with RedisLockedStorage(masters.url, timeout=10.0) as storage:
            assert [storage.create_new_trial(study_id) & 0xFFFF for _ in range(3)] == [0, 1, 2]
            _wait_until(lambda: level(storage, study_id), "all vote")


def test_a_master_that_has_the_study_before_the_section_that_makes_it_runs_that_section_too() -> None:
    with Masters("valkey", 3) as masters:
        with RedisLockedStorage(masters.url) as storage:
            create(storage)
            (away,) = (m for m in ensemble_of(storage).masters if str(masters.servers[0].port) in m.address)
            away.close()
            away._next_attempt = float("inf")
            study_id = create(storage)
            storage.create_new_trial(study_id)
            away._next_attempt = 0.0
            ensemble = ensemble_of(storage)
            _wait_until(lambda: bool(away.tend() or away.connected), "it is back")
            ensemble.rebuild(object_of(storage._registry.study_keys(study_id).ballots), away.index)
            ensemble.repair(away.index)
        with RedisLockedStorage(masters.url) as storage:
            registries = [
                server.command("HGETALL", server.command("KEYS", "*{registry}:studies")[0])
                for server in masters.servers
            ]
            assert registries[0] == registries[1] == registries[2]
