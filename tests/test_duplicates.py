"""Duplicate parameters: what counts as the same, who may train, and what becomes of the others."""

from __future__ import annotations

import logging
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, Trial, TrialState, create_trial

import optuna_dlock.claims
import optuna_dlock.twins
from optuna_dlock import (
    ClaimError,
    Duplicate,
    FinishedTrialError,
    NotSerializableError,
    RedisLockedStorage,
    StudyNotFoundError,
    claim_finished,
    claim_or_skip,
    claim_params,
    skip_duplicates,
)
from optuna_dlock.duplicates import duplicate_of, fingerprint
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import script
from optuna_dlock.twins import OnRunning
from tests.masters import Masters
from tests.proxy import CuttingProxy
from tests.servers import Server

COMPLETE, FAIL, PRUNED, RUNNING, WAITING = (
    *(TrialState.COMPLETE, TrialState.FAIL, TrialState.PRUNED),
    *(TrialState.RUNNING, TrialState.WAITING),
)
INT, FLOAT = IntDistribution(0, 9), FloatDistribution(0, 9)
ABC = CategoricalDistribution(["a", "b", "c"])


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna_dlock.twins._warned.clear()
    yield
    optuna.logging.set_verbosity(before)


Connect = Callable[..., RedisLockedStorage]


@pytest.fixture
def study(any_url: str, connect: Connect) -> optuna.Study:
    return optuna.create_study(storage=connect(any_url), study_name="s")


@pytest.fixture
def elsewhere(study: optuna.Study, any_url: str, connect: Connect) -> optuna.Study:
    """The same study, as another process has it."""
    return optuna.load_study(storage=connect(any_url), study_name="s")


def storage_of(study: optuna.Study) -> RedisLockedStorage:
    assert isinstance(study._storage, RedisLockedStorage)
    return study._storage


def ask(study: optuna.Study, **params: Any) -> Trial:
    """A trial with just these parameters."""
    space: dict[str, BaseDistribution] = {}
    for name, value in params.items():
        kind = type(value)
        space[name] = (
            IntDistribution(value, value)
            if kind is int
            else FloatDistribution(value, value)
            if kind is float
            else ABC
        )
    study.enqueue_trial(params)
    return study.ask(space)


def recorded(study: optuna.Study) -> dict[int, Duplicate]:
    found: dict[int, Duplicate] = storage_of(study).get_duplicates(study._study_id)
    return found


# -- what is the same ------------------------------------------------------------------------------------


GOLDEN = "c2fd8b32cdb0288f4f107a0991aa99f7"
GOLDEN_EXTRA = "3772092cfe79012cc97f8c0a43080503"


def test_the_fingerprint_is_the_same_for_ever() -> None:
    """It is on the servers: workers of two versions must not train the same set, each its own way."""
    params = [("lr", FloatDistribution(0, 1), 0.1), ("n", INT, 3.0), ("opt", ABC, 1.0), ("ä", INT, 0.0)]
    assert fingerprint(params).hex() == GOLDEN
    assert fingerprint(params, {"data": "v2"}).hex() == GOLDEN_EXTRA


SAME: list[
    tuple[str, list[tuple[str, BaseDistribution, float]], list[tuple[str, BaseDistribution, float]]]
] = [
    ("order", [("a", INT, 1.0), ("b", INT, 2.0)], [("b", INT, 2.0), ("a", INT, 1.0)]),
    ("bounds", [("a", INT, 1.0)], [("a", IntDistribution(1, 99, step=7), 1.0)]),
    ("zeros", [("a", FLOAT, 0.0)], [("a", FLOAT, -0.0)]),
    ("nan", [("a", FLOAT, math.nan)], [("a", FLOAT, struct.unpack("<d", b"\x01" * 6 + b"\xf8\xff")[0])]),
]
DIFFERENT: list[
    tuple[str, list[tuple[str, BaseDistribution, float]], list[tuple[str, BaseDistribution, float]]]
] = [
    ("last bit", [("a", FLOAT, 0.1 + 0.2)], [("a", FLOAT, 0.3)]),
    ("int and float", [("a", INT, 1.0)], [("a", FLOAT, 1.0)]),
    ("int and choice", [("a", INT, 1.0)], [("a", ABC, 1.0)]),
    ("choice", [("a", ABC, 0.0)], [("a", ABC, 1.0)]),
    ("choices", [("a", ABC, 0.0)], [("a", CategoricalDistribution(["b", "a", "c"]), 0.0)]),
    (
        "types of choices",
        [("a", CategoricalDistribution([1]), 0.0)],
        [("a", CategoricalDistribution([True]), 0.0)],
    ),
    ("swapped", [("a", INT, 1.0), ("b", INT, 2.0)], [("a", INT, 2.0), ("b", INT, 1.0)]),
    ("absent", [("a", INT, 0.0)], [("a", INT, 0.0), ("b", INT, 0.0)]),
    ("name", [("a", INT, 0.0)], [("A", INT, 0.0)]),
    ("unicode", [("é", INT, 0.0)], [("e\u0301", INT, 0.0)]),
    ("lone surrogates", [("\ud800", INT, 0.0)], [("\ud801", INT, 0.0)]),
    ("where a name ends", [("aI", INT, 0.0)], [("a", INT, 0.0)]),
    ("infinite", [("a", FLOAT, math.inf)], [("a", FLOAT, -math.inf)]),
]


@pytest.mark.parametrize(("one", "other"), [pair for _, *pair in SAME], ids=[name for name, *_ in SAME])
def test_what_is_the_same_set(one: Any, other: Any) -> None:
    assert fingerprint(one) == fingerprint(other)


@pytest.mark.parametrize(
    ("one", "other"), [pair for _, *pair in DIFFERENT], ids=[name for name, *_ in DIFFERENT]
)
def test_what_is_another_set(one: Any, other: Any) -> None:
    assert fingerprint(one) != fingerprint(other)


def test_extra_keys_tell_sets_apart_and_have_no_order() -> None:
    params = [("a", INT, 1.0)]
    extras = [None, "", 0, 0.0, False, [], {}, "v1", ["v1"], {"v": 1, "w": 2}]
    assert len({fingerprint(params, extra) for extra in extras}) == len(extras)
    assert fingerprint(params, {"v": 1, "w": 2}) == fingerprint(params, {"w": 2, "v": 1})
    assert len(fingerprint(params)) >= 16
    with pytest.raises(NotSerializableError, match="extra"):
        fingerprint(params, object())


_param = st.tuples(
    st.sampled_from(["a", "b", "ab", "ba", "ä"]),
    st.sampled_from([INT, FLOAT, ABC, CategoricalDistribution(["a", "b"])]),
    st.sampled_from([0.0, 1.0, 2.0, 5e-324]),
)
_params = st.lists(_param, max_size=3, unique_by=lambda param: param[0])


@given(_params, _params)
def test_sets_share_a_fingerprint_if_and_only_if_they_are_equal(one: Any, other: Any) -> None:
    def plain(params: Any) -> set[Any]:
        return {(name, type(d), getattr(d, "choices", None), value) for name, d, value in params}

    assert (fingerprint(one) == fingerprint(other)) is (plain(one) == plain(other))


# -- who may train ---------------------------------------------------------------------------------------


def test_the_first_one_trains_and_asking_again_changes_nothing(
    study: optuna.Study, elsewhere: optuna.Study
) -> None:
    first, second, other = ask(study, x=1), ask(elsewhere, x=1), ask(elsewhere, x=2)
    assert claim_params(first) is None
    assert claim_params(second) == Duplicate(first.number, RUNNING)
    assert claim_params(other) is None
    assert claim_params(first) is None
    assert claim_params(second) == Duplicate(first.number, RUNNING)
    assert recorded(study) == {second.number: Duplicate(first.number, RUNNING)}


@pytest.mark.parametrize("values", [[0.5], [0.5, math.inf]])
def test_a_complete_one_gives_its_values(any_url: str, connect: Connect, values: list[float]) -> None:
    """Single- and multi-objective; what is returned makes the duplicate COMPLETE with the same values."""
    directions = [StudyDirection.MINIMIZE] * len(values)
    study = optuna.create_study(storage=connect(any_url), directions=directions)
    first, second = ask(study, x=1), ask(study, x=1)
    assert claim_params(first) is None
    study.tell(first, values)
    twin = claim_params(second)
    assert twin == Duplicate(first.number, COMPLETE, tuple(values))
    assert twin.value == (values[0] if len(values) == 1 else values)
    study.tell(second, twin.value)
    assert [t.values for t in study.trials] == [values, values]
    assert recorded(study) == {second.number: Duplicate(first.number, COMPLETE)}
    # A duplicate never owns, even though it is COMPLETE with these parameters.
    third = claim_params(ask(study, x=1))
    assert third is not None
    assert third.owner == first.number


@pytest.mark.parametrize("end", [FAIL, PRUNED, WAITING])
def test_an_owner_that_ends_without_values_leaves_the_claim_to_the_next_one(
    study: optuna.Study, elsewhere: optuna.Study, end: TrialState
) -> None:
    first, second, third = ask(study, x=1), ask(elsewhere, x=1), ask(study, x=1)
    assert claim_params(first) is None
    assert claim_params(second) == Duplicate(first.number, RUNNING)
    study._storage.set_trial_state_values(first._trial_id, end)
    assert claim_params(second) is None
    assert claim_params(third) == Duplicate(second.number, RUNNING)
    assert recorded(study) == {third.number: Duplicate(second.number, RUNNING)}


def test_a_reaped_owner_is_refused(study: optuna.Study, elsewhere: optuna.Study) -> None:
    """It was paused and goes on: its parameters are another one's by now."""
    first, second = ask(study, x=1), ask(elsewhere, x=1)
    elsewhere._storage.set_trial_state_values(first._trial_id, FAIL)
    assert claim_params(second) is None
    with pytest.raises(FinishedTrialError):
        claim_params(first)


def test_a_trial_that_went_back_into_the_queue_claims_nothing(
    study: optuna.Study, elsewhere: optuna.Study
) -> None:
    first = ask(study, x=1)
    elsewhere._storage.set_trial_state_values(first._trial_id, WAITING)
    with pytest.raises(ClaimError, match="trial 0 is not RUNNING") as raised:
        claim_params(first)
    assert raised.value.number == 0
    assert claim_params(ask(study, x=1)) is None


def test_conditional_parameters_belong_to_the_set(study: optuna.Study) -> None:
    small, large = ask(study, n=1, a=0), ask(study, n=1)
    assert claim_params(small) is None
    assert claim_params(large) is None
    assert recorded(study) == {}


def test_extra_is_part_of_the_claim(study: optuna.Study) -> None:
    trials = [ask(study, x=1) for _ in range(3)]
    extras = ["v1", "v2", "v1"]
    found = [claim_params(trial, extra=extra) for trial, extra in zip(trials, extras, strict=True)]
    assert found == [None, None, Duplicate(0, RUNNING)]


def test_parameters_that_another_process_has_set_are_claimed_too(
    study: optuna.Study, elsewhere: optuna.Study
) -> None:
    """A trial of two processes: the claim is for all it has, or else two trials train the same."""
    first = ask(study, x=1)
    elsewhere._storage.set_trial_param(first._trial_id, "y", 2.0, INT)
    assert claim_params(first) is None
    assert claim_params(ask(study, x=1)) is None
    assert claim_params(ask(elsewhere, x=1, y=2)) == Duplicate(first.number, RUNNING)


def test_a_claim_before_the_suggestions_is_refused(study: optuna.Study) -> None:
    with pytest.raises(ClaimError, match="no parameters yet"):
        claim_params(study.ask())


def test_values_of_a_trial_that_claimed_too_early_are_not_taken_over(study: optuna.Study) -> None:
    first = ask(study, x=1)
    assert claim_params(first) is None
    first.suggest_float("late", 0, 1)
    study.tell(first, 1.0)
    with pytest.raises(ClaimError, match=r"trial 0 .* then suggested 'late': claim after the last"):
        claim_params(ask(study, x=1))


def test_trials_of_no_study_just_train() -> None:
    assert claim_params(FixedTrial({"x": 1})) is None
    assert claim_params(create_trial(value=1.0)) is None
    with pytest.raises(TypeError, match="not str"):
        claim_params("trial")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [InMemoryStorage, lambda: RDBStorage("sqlite:///:memory:")])
def test_another_storage_is_named_in_the_error(kind: Callable[[], Any]) -> None:
    storage = kind()
    trial = ask(optuna.create_study(storage=storage), x=1)
    with pytest.raises(ClaimError, match=r"in a (InMemory|RDB)Storage.*embedded:"):
        claim_params(trial)
    if isinstance(storage, RDBStorage):
        storage.remove_session()
        storage.engine.dispose()


def test_a_storage_behind_optunas_cache_is_found(study: optuna.Study) -> None:
    """No release of Optuna puts it there, but a user's code may."""
    cached = optuna.storages._CachedStorage(study._storage)  # type: ignore[arg-type]
    assert optuna_dlock.twins.locked_storage(cached) is study._storage


def test_a_proxy_that_hides_the_storage_is_named_in_the_error() -> None:
    pytest.importorskip("grpc")
    if not hasattr(optuna.storages, "GrpcStorageProxy"):
        pytest.skip("this Optuna has no GrpcStorageProxy")
    proxy = optuna.storages.GrpcStorageProxy(port=1)  # connects with the first call
    with pytest.raises(ClaimError, match="in a GrpcStorageProxy: connect to the server itself"):
        optuna_dlock.twins.locked_storage(proxy)
    proxy.close()


def test_a_deleted_study_leaves_no_claims_behind(valkey: Server, valkey_url: str, connect: Connect) -> None:
    study = optuna.create_study(storage=connect(valkey_url), study_name="s")
    claim_params(ask(study, x=1))
    claim_params(ask(study, x=1))
    pattern = f"{valkey_url.rpartition('=')[2]}:*"
    kept = {key.decode().rpartition(":")[2] for key in valkey.command("KEYS", pattern)}
    assert {"sets", "duplicates"} <= kept
    optuna.delete_study(study_name="s", storage=study._storage)
    kept = {key.decode().rpartition(":")[2] for key in valkey.command("KEYS", pattern)}
    assert not {"sets", "duplicates"} & kept


def test_masters_that_come_back_empty_get_the_claims_too(connect: Connect) -> None:
    """One after the other, so that in the end all of them know of the claim from a copy."""
    with Masters("valkey", 3) as masters:
        study = optuna.create_study(storage=connect(masters.url), study_name="s")
        first, second = ask(study, x=1), ask(study, x=1)
        assert claim_params(first) is None
        assert claim_params(second) == Duplicate(first.number, RUNNING)
        for index, server in enumerate(masters.servers):
            masters.restart_empty(index)
            deadline = time.monotonic() + 60
            while not _has_all(server):
                assert time.monotonic() < deadline, f"master {index} got no copy"
                study._storage.get_all_trials(study._study_id)
        assert claim_params(ask(study, x=1)) == Duplicate(first.number, RUNNING)
        assert recorded(study)[second.number] == Duplicate(first.number, RUNNING)


def _has_all(server: Server) -> bool:
    """Whether a master votes on the registry and on the study."""
    run = server.command("INFO", "server")["run_id"][:8]
    ballots = server.command("KEYS", f"optuna@127.0.0.1:{server.port}.{run}:*ballots")
    return len(ballots) >= 2 and all(server.command("HEXISTS", key, "s") for key in ballots)


def test_what_is_gone_is_said(study: optuna.Study, elsewhere: optuna.Study) -> None:
    trial = ask(study, x=1)
    optuna.delete_study(study_name="s", storage=elsewhere._storage)
    with pytest.raises(StudyNotFoundError):
        claim_params(trial)
    with pytest.raises(StudyNotFoundError):
        storage_of(elsewhere).get_duplicates(study._study_id)


def test_a_claim_is_one_round_trip_and_collects_what_was_deferred(valkey_url: str, connect: Connect) -> None:
    study = optuna.create_study(storage=connect(valkey_url))
    storage = storage_of(study)
    for state in (COMPLETE, None, FAIL):
        trial = ask(study, x=1)
        node, waits = storage._node, storage._node.waits
        claim_params(trial)
        assert node.waits == waits + 1
        assert node.outstanding == 0
        if state is not None:
            storage.set_trial_state_values(trial._trial_id, state, [1.0] if state is COMPLETE else None)


def test_a_claim_steps_aside_for_a_holder_of_the_study(study: optuna.Study, elsewhere: optuna.Study) -> None:
    """`storage.lock("study:<id>")` keeps claims out as it does creations."""
    trial, done = ask(study, x=1), threading.Event()

    def claim() -> None:
        claim_params(trial)
        done.set()

    thread = threading.Thread(target=claim)
    with storage_of(elsewhere).lock(f"study:{study._study_id}"):
        thread.start()
        assert not done.wait(0.3)
    thread.join(20)
    assert done.is_set()


def test_a_reply_that_is_lost_leaves_one_claim(valkey: Server, valkey_url: str, connect: Connect) -> None:
    """G6: the second try finds its own claim, or its own duplicate."""
    with CuttingProxy(valkey.port) as proxy:
        prefix = valkey_url.partition("?")[2]
        study = optuna.create_study(storage=connect(f"{proxy.url}?{prefix}"))
        first, second = ask(study, x=1), ask(study, x=1)
        storage = storage_of(study)
        storage._node.collect()
        sha = script("claim_params").sha.encode()
        proxy.cut_next_reply(sha)
        assert claim_params(first) is None
        proxy.cut_next_reply(sha)
        assert claim_params(second) == Duplicate(first.number, RUNNING)
        assert recorded(study) == {second.number: Duplicate(first.number, RUNNING)}


def test_trials_of_before_own_their_parameters_once_that_is_asked_for(study: optuna.Study) -> None:
    """The first of equal ones; not those that the notes' way has skipped, nor those with another end."""
    space: dict[str, BaseDistribution] = {"x": INT}
    skipped = {"HOST": {"msg": "COMPLETE", "number": 1}}
    for x, value, attrs in ((0, 0.0, {}), (1, 1.0, skipped), (1, 2.0, {}), (1, 3.0, {})):
        study.add_trial(create_trial(params={"x": x}, distributions=space, value=value, user_attrs=attrs))
    study.add_trial(create_trial(params={"x": 2}, distributions=space, state=FAIL))
    study.add_trial(create_trial(value=4.0))
    running = ask(study, x=0)
    assert claim_params(running) is None
    assert claim_finished(study) == 1
    assert claim_finished(study) == 0
    assert claim_params(ask(study, x=1)) == Duplicate(2, COMPLETE, (2.0,))
    assert claim_params(ask(study, x=2)) is None
    assert claim_params(ask(study, x=0)) == Duplicate(running.number, RUNNING)
    assert claim_params(ask(study, x=1), extra="v2") is None


def test_many_trials_of_before_are_claimed_in_batches(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_dlock.claims, "_BATCH", 3)
    for x in range(8):
        space: dict[str, BaseDistribution] = {"x": INT}
        study.add_trial(create_trial(params={"x": x}, distributions=space, value=float(x)))
    assert claim_finished(study) == 8
    owners = [claim_params(ask(study, x=x)) for x in range(8)]
    assert owners == [Duplicate(x, COMPLETE, (float(x),)) for x in range(8)]


# -- waiting ---------------------------------------------------------------------------------------------


class Waits:
    """Runs something at each wait instead of sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> None:
        self.seconds: list[float] = []
        self._now = 0.0
        self._actions = list(actions)
        monkeypatch.setattr(optuna_dlock.twins, "Backoff", self._backoff)

    def _backoff(self, timeout: float, **options: Any) -> Backoff:
        return Backoff(timeout, clock=lambda: self._now, sleep=self._sleep, **options)

    def _sleep(self, seconds: float) -> None:
        self._now += seconds
        self.seconds.append(seconds)
        if self._actions:
            self._actions.pop(0)()


def _nothing() -> None:
    pass


def test_who_waits_takes_over_the_value(
    study: optuna.Study, elsewhere: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = ask(study, x=1), ask(elsewhere, x=1)
    assert claim_params(first, on_running="wait") is None
    waits = Waits(monkeypatch, *[_nothing] * 20, lambda: study.tell(first, 0.5))
    assert claim_params(second, on_running="wait") == Duplicate(first.number, COMPLETE, (0.5,))
    assert len(waits.seconds) == 21
    assert max(waits.seconds) <= 1.0
    assert recorded(study) == {second.number: Duplicate(first.number, COMPLETE)}


@pytest.mark.parametrize("end", [FAIL, PRUNED])
def test_of_those_who_wait_one_takes_over_and_the_others_wait_for_it(
    study: optuna.Study, elsewhere: optuna.Study, end: TrialState, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = ask(study, x=1), ask(elsewhere, x=1), ask(study, x=1)
    assert claim_params(first) is None
    taken: list[Duplicate | None] = []

    def end_and_take_over() -> None:
        study.tell(first, state=end)
        taken.append(claim_params(second))

    Waits(monkeypatch, end_and_take_over, _nothing, lambda: study.tell(second, 2.0))
    assert claim_params(third, on_running="wait") == Duplicate(second.number, COMPLETE, (2.0,))
    assert taken == [None]
    assert recorded(study) == {third.number: Duplicate(second.number, COMPLETE)}


def test_who_has_waited_long_enough_gives_up(study: optuna.Study, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = ask(study, x=1), ask(study, x=1)
    assert claim_params(first) is None
    waits = Waits(monkeypatch)
    twin = claim_params(second, on_running="wait", timeout=7.0)
    assert twin == Duplicate(first.number, RUNNING)
    assert twin.value is None
    assert sum(waits.seconds) == pytest.approx(7.0)


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed")
def test_who_waits_reaps_for_all_others_may_wait_too(any_url: str, connect: Connect) -> None:
    """Optuna looks for dead workers before each new trial; a cluster that only waits begins none."""
    storage = connect(any_url, heartbeat_interval=1, grace_period=3)
    study = optuna.create_study(storage=storage)
    dying = optuna.load_study(study_name=study.study_name, storage=connect(any_url))
    first, second = ask(dying, x=1), ask(study, x=1)
    assert claim_params(first) is None
    storage.record_heartbeat(first._trial_id)  # its last one
    assert claim_params(second, on_running="wait") is None
    assert study.trials[first.number].state is FAIL


def test_without_heartbeats_and_timeout_a_wait_is_warned_of_once(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        first, second = ask(study, x=1), ask(study, x=1)
        assert claim_params(first) is None
        Waits(monkeypatch, lambda first=first: study.tell(first, state=FAIL))  # type: ignore[misc]
        assert claim_params(second, on_running="wait") is None
        study.tell(second, state=FAIL)
    assert [r.message.partition(",")[0] for r in caplog.records if r.levelno >= logging.WARNING] == [
        "trial 1 waits for trial 0"
    ]


# -- objectives ------------------------------------------------------------------------------------------


def _by_claim_params(trained: list[int], on_running: OnRunning = "fail") -> Callable[[Trial], Any]:
    def objective(trial: Trial) -> Any:
        x = trial.suggest_int("x", 0, 4)
        twin = claim_params(trial, on_running=on_running)
        if twin is not None:
            return twin.value
        trained.append(x)
        return float(x)

    return objective


def _by_claim_or_skip(trained: list[int], on_running: OnRunning = "fail") -> Callable[[Trial], Any]:
    @skip_duplicates(on_running=on_running)
    def objective(trial: Trial) -> float:
        x = trial.suggest_int("x", 0, 4)
        try:
            claim_or_skip(trial)
        except Exception as error:  # must not catch what ends the objective
            raise AssertionError from error
        trained.append(x)
        return float(x)

    return objective


def _by_space(trained: list[int], on_running: OnRunning = "fail") -> Callable[[Trial], Any]:
    @skip_duplicates(suggest={"x": IntDistribution(0, 4)}, on_running=on_running)
    def objective(trial: Trial, params: dict[str, int]) -> float:
        trained.append(params["x"])
        return float(params["x"])

    return objective


def _by_function(trained: list[int], on_running: OnRunning = "fail") -> Callable[[Trial], Any]:
    class Model:
        @skip_duplicates(suggest=lambda trial: trial.suggest_int("x", 0, 4), on_running=on_running)
        def objective(self, trial: Trial, x: int) -> float:
            trained.append(x)
            return float(x)

    return Model().objective


FORMS = [_by_claim_params, _by_claim_or_skip, _by_space, _by_function]


@pytest.mark.parametrize("form", FORMS)
def test_an_objective_of_each_form_trains_every_point_once(form: Any, study: optuna.Study) -> None:
    trained: list[int] = []
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    study.optimize(form(trained), n_trials=60)
    assert sorted(trained) == list(range(5))
    assert all(t.state is COMPLETE and t.value == t.params["x"] for t in study.trials)
    assert len(recorded(study)) == 55


@pytest.mark.parametrize(("on_running", "state"), [("fail", FAIL), ("prune", PRUNED)])
@pytest.mark.parametrize("form", FORMS)
def test_what_runs_elsewhere_is_failed_or_pruned(
    form: Any, on_running: str, state: TrialState, study: optuna.Study
) -> None:
    trained: list[int] = []
    assert claim_params(ask(study, x=3)) is None
    study.enqueue_trial({"x": 3})
    study.optimize(form(trained, on_running), n_trials=1)
    assert study.trials[1].state is state
    assert study.trials[1].values is None
    assert trained == []
    assert recorded(study) == {1: Duplicate(0, RUNNING)}


@pytest.mark.parametrize("form", FORMS[1:])
def test_objectives_run_without_a_study_too(form: Any) -> None:
    trained: list[int] = []
    assert form(trained)(FixedTrial({"x": 3})) == 3.0
    assert trained == [3]


def test_the_decorator_without_brackets_keeps_the_name_and_errors(study: optuna.Study) -> None:
    @skip_duplicates
    def objective(trial: Trial) -> float:
        """Trains."""
        trial.suggest_int("x", 0, 4)
        claim_or_skip(trial)
        raise ZeroDivisionError

    assert (objective.__name__, objective.__doc__) == ("objective", "Trains.")
    with pytest.raises(ZeroDivisionError):
        study.optimize(objective, n_trials=1)
    assert study.trials[0].state is FAIL


def test_threads_of_one_process_train_each_point_once(study: optuna.Study) -> None:
    trained: list[int] = []
    study.sampler = optuna.samplers.RandomSampler(seed=1)
    study.optimize(_by_claim_or_skip(trained, "wait"), n_trials=40, n_jobs=4)
    assert sorted(trained) == list(range(5))
    assert all(t.state is COMPLETE for t in study.trials)


def test_attributes_are_taken_over_where_that_is_asked_for(study: optuna.Study) -> None:
    first, second, third = ask(study, x=1), ask(study, x=1), ask(study, x=1)
    assert claim_params(first) is None
    first.set_user_attr("constraint", [0.5])
    first.set_user_attr("worker", 1)
    study.tell(first, 1.0)
    second.set_user_attr("worker", 2)
    claim_params(second, copy_user_attrs=True)
    claim_params(third)
    attrs = [t.user_attrs for t in study.trials]
    assert attrs[1:] == [{"constraint": [0.5], "worker": 2}, {}]


def test_claim_or_skip_outside_of_a_decorated_objective_is_an_error(study: optuna.Study) -> None:
    for _ in range(2):  # before one, and after
        with pytest.raises(ClaimError, match="has the decorator @skip_duplicates"):
            claim_or_skip(ask(study, x=1))
        _by_claim_or_skip([])(study.ask())


def test_extra_can_be_given_where_it_is_known(study: optuna.Study) -> None:
    versions = [1, 2, 1]

    @skip_duplicates(extra="none")
    def objective(trial: Trial) -> float:
        trial.suggest_int("x", 0, 0)
        claim_or_skip(trial, extra=versions[trial.number])
        return float(versions[trial.number])

    study.optimize(objective, n_trials=3)
    assert [t.value for t in study.trials] == [1.0, 2.0, 1.0]
    assert recorded(study) == {2: Duplicate(0, COMPLETE)}


def test_an_objective_that_forgets_to_claim_is_told_once(
    study: optuna.Study, caplog: pytest.LogCaptureFixture
) -> None:
    @skip_duplicates
    def objective(trial: Trial) -> float:
        return float(trial.suggest_int("x", 0, 4))

    study.optimize(objective, n_trials=3)
    warned = [record.message for record in caplog.records if "claim_or_skip" in record.message]
    assert len(warned) == 1
    assert "objective has @skip_duplicates and did not call" in warned[0]


def test_wrong_options_are_refused_before_the_first_trial() -> None:
    with pytest.raises(ValueError, match="on_running is one of 'fail', 'prune', 'wait', not 'skip'"):
        skip_duplicates(on_running="skip")  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="timeout"):
        skip_duplicates(on_running="wait", timeout=-1)
    with pytest.raises(TypeError, match="no distribution"):
        skip_duplicates(suggest={"x": 1})(lambda _, __: 0)(FixedTrial({"x": 1}))  # type: ignore[dict-item]


def test_all_kinds_of_distributions_are_suggested() -> None:
    space = {
        "step": FloatDistribution(0, 1, step=0.25),
        "log": FloatDistribution(1e-5, 1, log=True),
        "n": IntDistribution(2, 10, step=2),
        "c": ABC,
    }
    study = optuna.create_study()
    trial = study.ask()
    params = optuna_dlock.skipping.suggest_all(trial, space)
    assert trial.params == params
    assert trial.distributions == space


# -- what is written down --------------------------------------------------------------------------------


def _noted(**host: Any) -> FrozenTrial:
    return create_trial(value=1.0, user_attrs={"HOST": {"host": "m8", **host}})


@pytest.mark.parametrize(
    ("trial", "found"),
    [
        (_noted(), None),
        (_noted(msg=None, number=None, HOST_s=None), None),
        (_noted(msg="COMPLETE", number=3, HOST_s="m9"), Duplicate(3, COMPLETE, host="m9")),
        (_noted(msg="RUNNING", number=0, HOST_s=""), Duplicate(0, RUNNING)),
        (_noted(msg="COMPLETE", number="3"), None),
        (_noted(msg="COMPLETE", number=True), None),
        (_noted(msg=["x"], number=3), None),
        (create_trial(value=1.0, user_attrs={"HOST": "m8"}), None),
        (create_trial(value=1.0), None),
    ],
)
def test_what_objectives_noted_by_hand_is_understood(trial: FrozenTrial, found: Duplicate | None) -> None:
    assert duplicate_of(trial, {}) == found


def test_what_the_storage_recorded_counts_first() -> None:
    trial = _noted(msg="COMPLETE", number=3, HOST_s="m9")
    trial.number = 5
    recorded = Duplicate(2, RUNNING)
    assert duplicate_of(trial, {5: recorded}) is recorded
    assert duplicate_of(trial, {4: recorded}) == Duplicate(3, COMPLETE, host="m9")
