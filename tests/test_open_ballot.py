"""Open ballots: what contenders share, and what becomes of it when one of them or a master goes away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from optuna.trial import TrialState

import optuna_dlock.ensemble
from optuna_dlock import RedisLockedStorage
from optuna_dlock.ensemble import Ensemble, _Object
from optuna_dlock.open_ballot import OpenBallot
from tests.contention.crew import wait_until
from tests.contention.routes import OwnRoute
from tests.masters import KINDS, Masters, create, ensemble_of, level
from tests.proxy import CuttingProxy


@pytest.fixture(params=KINDS)
def masters(request: pytest.FixtureRequest) -> Iterator[Masters]:
    with Masters(request.param, 3) as masters:
        yield masters


def _dies(self: OpenBallot, *args: object) -> bool:
    raise KeyboardInterrupt


class Two:
    """Two workers that have found each other at work on a study.

    Attributes:
        study: Its id.
        numbers: Those of the trials that they have created.
        first: The number of the server that is asked first.
    """

    def __init__(self, masters: Masters) -> None:
        self.storages = [RedisLockedStorage(masters.url, timeout=20.0) for _ in range(2)]
        self.study = create(self.storages[0])
        self.numbers: list[int] = []
        for _ in range(3):
            self.create()
        assert all(self.object(at).opened for at in range(2)), "they do not share a ballot"
        ports = [server.port for server in masters.servers]
        self.first = ports.index(int(ensemble_of(self.storages[0]).members[0].rpartition(":")[2]))

    def create(self) -> None:
        """One trial each."""
        for storage in self.storages:
            self.numbers.append(storage.create_new_trial(self.study) & 0xFFFFFFFF)

    def create_without_passing_on(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A trial of the first one, which dies when only the sequencer has it."""
        with monkeypatch.context() as patch:
            patch.setattr(OpenBallot, "pass_on", _dies)
            with pytest.raises(KeyboardInterrupt):
                self.storages[0].create_new_trial(self.study)

    def object(self, at: int) -> _Object:
        """What one knows of the study."""
        return ensemble_of(self.storages[at])._object(
            self.storages[at]._registry.study_keys(self.study).ballots
        )

    def check(self, masters: Masters) -> None:
        """All masters come to the same state, and no number is missing or there twice."""
        assert len(set(self.numbers)) == len(self.numbers)
        wait_until(lambda: level(self.storages[0], self.study), "all masters have run the same", 20.0)
        with RedisLockedStorage(masters.url) as storage:
            found = [trial.number for trial in storage.get_all_trials(self.study)]
        assert found == list(range(len(found)))
        assert set(self.numbers) <= set(found)


@pytest.fixture
def two(masters: Masters) -> Iterator[Two]:
    two = Two(masters)
    yield two
    for storage in two.storages:
        storage.close()


@pytest.fixture
def votes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the objects for which somebody asks for votes."""
    asked: list[str] = []
    ask = Ensemble._ask_for_votes

    def noted(self: Ensemble, obj: _Object, *args: object) -> object:
        asked.append(obj.name)
        return ask(self, obj, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Ensemble, "_ask_for_votes", noted)
    return asked


def test_contenders_share_a_ballot_and_ask_for_no_votes(masters: Masters, two: Two, votes: list[str]) -> None:
    votes.clear()
    for _ in range(50):
        two.create()
    assert votes == []
    assert two.numbers == list(range(106))
    two.check(masters)


def test_who_is_alone_again_has_a_ballot_of_its_own(
    masters: Masters, two: Two, votes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_dlock.ensemble, "_ALONE", 0.05)
    two.storages[0].create_new_trial(two.study)
    time.sleep(0.1)
    two.storages[0].create_new_trial(two.study)
    assert two.object(0).ballot
    votes.clear()
    two.storages[0].create_new_trial(two.study)
    assert votes == []
    two.create()  # the other one finds that its ballot is closed
    two.check(masters)


def test_what_a_dead_client_has_not_passed_on_is_passed_on_by_the_next(
    masters: Masters, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    two.create_without_passing_on(monkeypatch)
    assert two.storages[1].create_new_trial(two.study) & 0xFFFFFFFF == len(two.numbers) + 1
    assert two.storages[1].get_n_trials(two.study) == len(two.numbers) + 2
    two.check(masters)


def test_what_only_the_first_master_has_run_is_not_seen_and_may_be_lost_with_it(
    masters: Masters, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was not acknowledged. What is acknowledged after the loss has its number."""
    two.create_without_passing_on(monkeypatch)
    with RedisLockedStorage(masters.url) as storage:
        assert storage.get_n_trials(two.study) == len(two.numbers)
    masters.kill(two.first)
    assert two.storages[1].create_new_trial(two.study) & 0xFFFFFFFF == len(two.numbers)
    two.numbers.append(len(two.numbers))
    masters.restart_empty(two.first)
    two.check(masters)


@pytest.mark.parametrize("away", [0, 1, 2])
@pytest.mark.parametrize("stop", [Masters.kill, Masters.pause])
def test_others_go_on_without_any_one_master(
    masters: Masters, two: Two, away: int, stop: Callable[[Masters, int], None]
) -> None:
    stop(masters, away)
    for _ in range(20):
        two.create()
    if stop is Masters.kill:
        masters.start(away)
    else:
        masters.resume(away)
    for _ in range(20):
        two.create()
    assert two.numbers == list(range(86))
    two.check(masters)


def test_who_cannot_reach_the_first_master_gets_through_and_so_do_the_others(
    masters: Masters, two: Two
) -> None:
    port = masters.servers[two.first].port
    with CuttingProxy(port) as proxy, OwnRoute(masters.url, detour={port: proxy.port}) as cut:
        cut.create_new_trial(two.study)
        proxy.refuse()
        proxy.cut_all()
        for _ in range(10):
            two.numbers.append(cut.create_new_trial(two.study) & 0xFFFFFFFF)
            two.create()
    assert sorted({*two.numbers, 6}) == list(range(37))
    two.check(masters)


def test_a_master_that_missed_more_than_is_passed_on_is_looked_after(
    masters: Masters, two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna_dlock.ensemble, "_ALONE", 1000.0)
    masters.pause(2)
    for _ in range(300):
        two.create()
    masters.resume(2)
    two.create()
    two.check(masters)


def test_writes_wait_for_nothing_and_reach_others_though_nothing_more_is_called(
    masters: Masters, two: Two
) -> None:
    mine, other = two.storages
    trial_id = mine.create_new_trial(two.study)
    ensemble, waits = ensemble_of(mine), ensemble_of(mine).waits
    with ensemble.lock:  # so that no other thread passes them on meanwhile
        for number in range(10):
            mine.set_trial_user_attr(trial_id, str(number), number)
        assert (ensemble.waits, ensemble.outstanding, ensemble._unsent) == (waits, 10, 0)
    wait_until(lambda: len(other.get_trial(trial_id).user_attrs) == 10, "they are passed on", 5.0)
    assert ensemble.outstanding == 0
    mine.set_trial_user_attr(trial_id, "last", 1)
    mine.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert len(other.get_trial(trial_id).user_attrs) == 11
    two.check(masters)


def test_a_write_that_was_refused_while_a_later_one_was_not_is_kept(masters: Masters, two: Two) -> None:
    """The first master is out of memory for a moment."""
    mine, other = two.storages
    trial_id = mine.create_new_trial(two.study)
    ensemble, server = ensemble_of(mine), masters.servers[two.first]
    with ensemble.lock:
        server.command("CONFIG", "SET", "maxmemory", "1")
        mine.set_trial_user_attr(trial_id, "refused", 1)
        ensemble.receive(0.5)
        server.command("CONFIG", "SET", "maxmemory", "0")
        mine.set_trial_user_attr(trial_id, "accepted", 2)
    mine.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert other.get_trial(trial_id).user_attrs == {"refused": 1, "accepted": 2}
    two.check(masters)


def test_a_write_that_was_lost_before_a_later_one_was_not_is_kept(masters: Masters, two: Two) -> None:
    """The connection to the first master breaks between the two."""
    other, port = two.storages[1], masters.servers[two.first].port
    with (
        CuttingProxy(port) as proxy,
        OwnRoute(masters.url, detour={port: proxy.port}, timeout=20.0) as mine,
    ):
        trial_id = mine.create_new_trial(two.study)
        ensemble = ensemble_of(mine)
        with ensemble.lock:
            proxy.black_hole()
            mine.set_trial_user_attr(trial_id, "lost", 1)
            time.sleep(0.1)
            proxy.restore()
            wait_until(lambda: _is_connected_anew(ensemble), "it is connected again", 10.0)
            mine.set_trial_user_attr(trial_id, "later", 2)
        mine.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert other.get_trial(trial_id).user_attrs == {"lost": 1, "later": 2}
    two.check(masters)


def _is_connected_anew(ensemble: Ensemble) -> bool:
    ensemble.receive(0.01)
    return ensemble.masters[0].connected and not ensemble.masters[0].owes


def test_a_worker_reads_its_trial_with_all_that_it_wrote(masters: Masters, two: Two) -> None:
    """What is asked before the others have run the writes would be an older trial."""
    mine = two.storages[0]
    trial_id = mine.create_new_trial(two.study)
    two.create()
    ensemble = ensemble_of(mine)
    with ensemble.lock:
        for number in range(5):
            mine.set_trial_user_attr(trial_id, str(number), number)
        waits = ensemble.waits
        assert len(mine.get_trial(trial_id).user_attrs) == 5
        mine.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
        assert ensemble.waits == waits + 2


def test_what_a_majority_alone_disagrees_about_is_read_without_a_turn(
    masters: Masters, two: Two, votes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One master is away, and one of the others lacks what was not passed on."""
    masters.kill(next(index for index in range(3) if index != two.first))
    two.create()
    two.create_without_passing_on(monkeypatch)
    assert all(two.object(at).opened for at in range(2))
    votes.clear()
    sections: list[str] = []
    share = Ensemble._share
    monkeypatch.setattr(
        Ensemble,
        "_share",
        lambda self, *args: sections.append(args[0].name) or share(self, *args),  # type: ignore[func-returns-value]
    )
    assert two.storages[1].get_n_trials(two.study) == len(two.numbers) + 1
    assert (votes, sections) == ([], [])
