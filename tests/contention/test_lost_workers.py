"""Trials of workers that died: failed by others, or taken back by the worker once it was started again."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from optuna_dlock import RedisLockedStorage, TrialTakenError
from optuna_dlock.errors import UpdateFinishedTrialError
from optuna_dlock.runners import Runners
from optuna_dlock.scripts import TAKEN, script
from tests.contention.crew import PROCESSES, wait_until

WAITING, RUNNING, COMPLETE, FAIL = (
    *(TrialState.WAITING, TrialState.RUNNING),
    *(TrialState.COMPLETE, TrialState.FAIL),
)
pytestmark = pytest.mark.filterwarnings(
    "ignore:Heartbeat of storage is supposed to be used with Study.optimize"
)


def _storage(url: str, **options: Any) -> RedisLockedStorage:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return RedisLockedStorage(url, **options)


def _load(url: str, **options: Any) -> tuple[RedisLockedStorage, optuna.Study]:
    storage = _storage(url, **options)
    sampler = optuna.samplers.RandomSampler()
    return storage, optuna.load_study(study_name="s", storage=storage, sampler=sampler)


@pytest.fixture
def url(any_url: str) -> str:
    """A key space with an empty study named 's'."""
    with _storage(any_url) as storage:
        optuna.create_study(study_name="s", storage=storage)
    return any_url


Start = Callable[..., BaseProcess]


@pytest.fixture
def start(url: str, tmp_path: Path) -> Iterator[Start]:
    """Starts processes, which are ended with the test."""
    started: list[BaseProcess] = []

    def start(body: Callable[..., None], *args: Any) -> BaseProcess:
        process = PROCESSES.Process(target=body, args=(url, tmp_path, *args))
        process.start()
        started.append(process)
        return process

    yield start
    (tmp_path / "end").touch()
    for process in started:
        process.join(10)
        process.kill()
        process.join()
        process.close()


def _ask(url: str, folder: Path, name: str, n: int, options: dict[str, Any], ready: str) -> None:
    """Body of a worker that asks for trials, says so, and lasts until the file `end` is there."""
    storage, study = _load(url, worker_name=name, **options)
    if storage._heartbeats is not None:
        storage._heartbeats.interval = 0.1  # so that tests need not wait: a grace period lasts a second
    for _ in range(n):
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.report(0.5, 1)
        trial.set_user_attr("epoch", 1)
    storage.remove_session()
    (folder / ready).touch()
    wait_until((folder / "end").exists, "told to end")


def _asked(start: Start, folder: Path, name: str, n: int = 1, **options: Any) -> BaseProcess:
    ready = f"ready{len(list(folder.iterdir()))}"
    process = start(_ask, name, n, options, ready)
    wait_until((folder / ready).exists, "it has its trials")
    return process


# -- failed by others ----------------------------------------------------------------------------------


def test_the_trials_of_a_killed_ask_and_tell_worker_are_failed_and_those_of_a_live_one_are_not(
    url: str, start: Start, tmp_path: Path
) -> None:
    beats = {"heartbeat_interval": 1, "grace_period": 1}
    dead = _asked(start, tmp_path, "dead", 3, **beats)
    _asked(start, tmp_path, "live", 2, **beats)  # it does nothing: its trials hang, and its process lives
    dead.kill()
    storage, study = _load(url, **beats)
    with storage:
        workers = storage.get_trial_workers(study._study_id)
        lost = {number for number, worker in workers.items() if worker.name == "dead"}
        assert len(lost) == 3

        def failed() -> set[int]:
            optuna.storages.fail_stale_trials(study)
            return {trial.number for trial in study.trials if trial.state is FAIL}

        wait_until(lambda: failed() == lost, "they are failed", timeout=20)
        until = time.monotonic() + 1.5  # the live one has to be left alone for longer than the grace period
        while time.monotonic() < until:
            assert failed() == lost
            time.sleep(0.05)


# -- taken back ----------------------------------------------------------------------------------------


def test_a_restarted_worker_goes_on_with_its_trials(url: str, start: Start, tmp_path: Path) -> None:
    former = _asked(start, tmp_path, "w1", 2)
    _asked(start, tmp_path, "w2", 1)
    storage, study = _load(url, worker_name="w1")
    with storage:
        assert storage.take_back_trials(study) == [], "it still lives"
        before = study.trials
        former.kill()
        former.join()
        trials = storage.take_back_trials(study)
        assert [trial.number for trial in trials] == [0, 1]
        assert storage.take_back_trials(study) == [], "they are ours now"
        for trial in trials:
            assert trial.params == before[trial.number].params
            assert trial.suggest_float("x", 0, 1) == before[trial.number].params["x"]
            assert trial.user_attrs == {"epoch": 1}
            trial.report(0.25, 2)
            study.tell(trial, 2.0)
        assert [t.state for t in study.trials] == [COMPLETE, COMPLETE, RUNNING]
        assert study.trials[0].intermediate_values == {1: 0.5, 2: 0.25}
        found = storage.get_trial_workers(study._study_id)
        assert found[0] == found[1] == storage.worker
        assert found[2].name == "w2"


def test_trials_are_put_back_in_the_queue_with_their_parameters(
    url: str, start: Start, tmp_path: Path
) -> None:
    former = _asked(start, tmp_path, "w1", 2)
    former.kill()
    former.join()
    storage, study = _load(url, worker_name="w1")
    other, others = _load(url)
    with storage, other:
        others.get_trials()  # it knows them as RUNNING
        params = [trial.params for trial in study.trials]
        assert storage.requeue_trials(study) == [0, 1]
        assert storage.requeue_trials(study) == []
        for trial in others.trials:
            assert (trial.state, trial.params) == (WAITING, params[trial.number])
            assert trial.intermediate_values == {}
            assert trial.user_attrs == {"epoch": 1}
        assert storage.get_trial_workers(study._study_id) == {}
        seen = []

        def objective(trial: optuna.Trial) -> float:
            seen.append({"x": trial.suggest_float("x", 0, 1)})
            trial.report(1.0, 1)
            return 1.0

        others.optimize(objective, n_trials=2)
        assert seen == params
        assert [(t.number, t.state) for t in study.trials] == [(0, COMPLETE), (1, COMPLETE)]
        assert set(storage.get_trial_workers(study._study_id).values()) == {other.worker}


def _take_all(url: str, folder: Path, requeue: bool, number: int) -> None:
    """Body of a restarted worker that takes what it can, with others of its name."""
    storage, study = _load(url, worker_name="w1")
    with storage:
        study.get_trials()
        (folder / f"ready-{number}").touch()
        wait_until((folder / "go").exists, "all are ready")
        if requeue:
            taken = storage.requeue_trials(study)
        else:
            taken = [trial.number for trial in storage.take_back_trials(study)]
        (folder / f"taken-{number}").write_text(json.dumps(taken))
        wait_until((folder / "end").exists, "told to end")  # so that it is no former process itself


@pytest.mark.parametrize("requeue", [False, True])
def test_of_several_restarted_workers_of_one_name_one_gets_each_trial(
    url: str, start: Start, tmp_path: Path, requeue: bool
) -> None:
    former = _asked(start, tmp_path, "w1", 30)
    former.kill()
    former.join()
    for number in range(4):
        start(_take_all, requeue, number)
    wait_until(lambda: len(list(tmp_path.glob("ready-*"))) == 4, "all are ready")
    (tmp_path / "go").touch()
    wait_until(
        lambda: len([p for p in tmp_path.glob("taken-*") if p.read_text()]) == 4, "all have taken theirs"
    )
    taken = [json.loads(path.read_text()) for path in tmp_path.glob("taken-*")]
    assert sorted(itertools.chain(*taken)) == list(range(30))


def test_who_decided_to_take_a_trial_before_another_one_did_gets_nothing(
    url: str, start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interleaving that the race above may miss: both have looked, then both take."""
    former = _asked(start, tmp_path, "w1")
    former.kill()
    former.join()
    (one, first), (two, second) = _load(url, worker_name="w1"), _load(url, worker_name="w1")
    taken: list[int] = []
    take_back = Runners.take_back

    def wait_for_the_other(self: Runners, *args: Any) -> bool:
        if self._client == one._client:
            taken.extend(trial.number for trial in two.take_back_trials(second))
        return take_back(self, *args)

    monkeypatch.setattr(Runners, "take_back", wait_for_the_other)
    with one, two:
        assert one.take_back_trials(first) == []
        assert taken == [0]
        assert one.get_trial_workers(first._study_id) == {0: two.worker}
        second.tell(0, 1.0)


def _go_on(url: str, folder: Path, deferred: bool) -> None:
    """Body of a worker that is paused with its trial, and says how its later writes end."""
    storage, study = _load(url, worker_name="w1", deferred_writes=deferred, heartbeat_interval=1)
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    storage.remove_session()
    (folder / "started").touch()
    wait_until((folder / "go on").exists, "told to go on")
    outcomes = []

    def report() -> None:
        trial.report(0.5, 1)
        storage.remove_session()
        trial.report(0.5, 2)  # the first one may have been sent without waiting

    for write in (
        report,
        lambda: trial.suggest_float("late", 0, 1),
        lambda: trial.set_user_attr("late", 1),
        lambda: storage.set_trial_state_values(trial._trial_id, WAITING),
        lambda: study.tell(trial, 99.0),
    ):
        try:
            write()
            outcomes.append("accepted")
        except TrialTakenError:
            outcomes.append("refused")
    (folder / "outcomes.new").write_text(json.dumps(outcomes))
    (folder / "outcomes.new").rename(folder / "outcomes")


@pytest.mark.parametrize("deferred", [True, False])
def test_a_former_worker_that_was_only_paused_is_refused(
    url: str, start: Start, tmp_path: Path, deferred: bool
) -> None:
    former = start(_go_on, deferred)
    wait_until((tmp_path / "started").exists, "it has a trial")
    assert former.pid is not None
    os.kill(former.pid, signal.SIGSTOP)
    storage, study = _load(url, worker_name="w1", heartbeat_interval=1, grace_period=1)
    with storage:
        taken: list[optuna.Trial] = []

        def take() -> bool:
            taken.extend(storage.take_back_trials(study))
            return bool(taken)

        wait_until(take, "its heartbeats ended")
        os.kill(former.pid, signal.SIGCONT)
        (tmp_path / "go on").touch()
        wait_until((tmp_path / "outcomes").exists, "it has tried")
        assert json.loads((tmp_path / "outcomes").read_text()) == ["refused"] * 5
        [trial] = taken
        trial.report(0.25, 3)
        assert study.trials[0].state is RUNNING
        study.tell(trial, 1.0)
        [finished] = study.trials
        assert (finished.values, finished.user_attrs) == ([1.0], {})
        assert (set(finished.params), finished.intermediate_values) == ({"x"}, {3: 0.25})


# -- what a take-back promises, call by call -----------------------------------------------------------


def test_force_asks_nobody_and_fences_the_living(url: str) -> None:
    (one, first), (two, second) = _load(url, worker_name="w1"), _load(url, worker_name="w1")
    with one, two:
        ours = first.ask()
        assert two.take_back_trials(second) == []
        [theirs] = two.take_back_trials(second, force=True)
        with pytest.raises(TrialTakenError) as raised:
            first.tell(ours, 1.0)
        assert raised.value.trial_id == ours._trial_id
        assert isinstance(raised.value, UpdateFinishedTrialError)
        assert pickle.loads(pickle.dumps(raised.value)).trial_id == ours._trial_id
        # Back again: the fence is for those who do not run it.
        [again] = one.take_back_trials(first, force=True)
        with pytest.raises(TrialTakenError):
            second.tell(theirs, 1.0)
        again.suggest_float("x", 0, 1)
        first.tell(again, 3.0)
        assert [t.values for t in second.trials] == [[3.0]]


def test_a_fenced_worker_may_claim_the_trial_from_the_queue_as_anybody(url: str) -> None:
    (one, first), (two, second) = _load(url, worker_name="w1"), _load(url, worker_name="w1")
    with one, two:
        lost = first.ask()
        lost.suggest_float("x", 0, 1)
        assert two.requeue_trials(second, force=True) == [0]
        with pytest.raises(TrialTakenError):
            one.set_trial_state_values(lost._trial_id, COMPLETE, [1.0])
        again = first.ask()
        assert (again.number, again.params) == (0, lost.params)
        again.set_user_attr("a", 1)
        first.tell(again, 2.0)
        [trial] = second.trials
        assert (trial.values, trial.user_attrs) == ([2.0], {"a": 1})


def test_anybody_else_may_still_write_to_a_trial_that_was_taken_back(url: str) -> None:
    """A dashboard, a reaper: the fence is for the former process alone."""
    (one, first), (two, second), (other, others) = (
        *(_load(url, worker_name="w1"), _load(url, worker_name="w1")),
        _load(url),
    )
    with one, two, other:
        first.ask()
        two.take_back_trials(second, force=True)
        other.set_trial_user_attr(others.trials[0]._trial_id, "seen", True)
        others.tell(0, state=FAIL)
        assert (second.trials[0].state, second.trials[0].user_attrs) == (FAIL, {"seen": True})


def test_the_former_worker_does_not_keep_the_trial_alive(url: str) -> None:
    (one, first), (two, second) = (
        _load(url, worker_name="w1", heartbeat_interval=60),
        _load(url, worker_name="w1"),
    )
    with one, two:
        trial = first.ask()
        two.take_back_trials(second, force=True)
        call = one._studies[first._study_id].heartbeat_call()
        assert call is not None, "it does not know yet"
        assert one._node.run(script("record_heartbeat"), *call) == [0, 0]
        one.record_heartbeat(trial._trial_id)
        keys = one._registry.study_keys(first._study_id)
        assert one._node.command("ZRANGE", keys.heartbeats, 0, -1) == []


def test_a_write_that_comes_in_between_is_not_lost(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (one, first), (two, second), (other, others) = (
        *(_load(url, worker_name="w1"), _load(url, worker_name="w1")),
        _load(url),
    )
    with one, two, other:
        trial_id = first.ask()._trial_id
        others.get_trials()
        pack = Runners._pack_again
        packed: list[bytes] = []

        def write_first(self: Runners, *args: Any) -> bytes:
            record = pack(self, *args)
            if not packed:
                other.set_trial_user_attr(trial_id, "late", 1)
            packed.append(record)
            return record

        monkeypatch.setattr(Runners, "_pack_again", write_first)
        [trial] = two.take_back_trials(second, force=True)
        assert len(packed) == 2
        assert trial.user_attrs == {"late": 1}


def test_a_take_back_that_is_sent_twice_is_executed_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """G6: the reply to the first one was lost."""
    (one, first), (two, second) = _load(url, worker_name="w1"), _load(url, worker_name="w1")
    with one, two:
        first.ask()
        run, replies = two._node.run, []

        def run_twice(called: Any, *args: Any) -> Any:
            if called.name == "take_back_trial":
                replies.append(run(called, *args))
            return run(called, *args)

        monkeypatch.setattr(two._node, "run", run_twice)
        [trial] = two.take_back_trials(second, force=True)
        assert [reply[0] for reply in replies] == [0]
        second.tell(trial, 1.0)
        assert len(second.trials) == 1
        # Another process's call is another call: it finds that the trial is taken.
        assert TAKEN not in replies[0]


def test_only_running_trials_of_this_name_are_taken(url: str) -> None:
    (one, first), (two, second) = _load(url, worker_name="w1"), _load(url, worker_name="w1")
    (other, others) = _load(url, worker_name="w2")
    with one, two, other:
        first.tell(first.ask(), 1.0)
        first.add_trial(create_trial(state=WAITING))
        others.ask()  # claims it
        first.enqueue_trial({})
        assert two.take_back_trials(second, force=True) == []
        assert two.requeue_trials(second, force=True) == []
        assert [t.state for t in second.trials] == [COMPLETE, RUNNING, WAITING]


def test_a_worker_without_a_name_of_its_own_has_no_past(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage, study = _load(url)
    with storage:
        for take in (storage.take_back_trials, storage.requeue_trials):
            with pytest.raises(ValueError, match=r"worker_name.*OPTUNA_DLOCK_WORKER"):
                take(study)
    monkeypatch.setenv("OPTUNA_DLOCK_WORKER", "w1")
    storage, study = _load(url)
    with storage:
        assert storage.take_back_trials(study) == []
