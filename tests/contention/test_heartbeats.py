"""Heartbeats across processes: the dead are reaped and retried, the living are not, the late are refused."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import optuna
import pytest
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock import RedisLockedStorage
from tests.contention.crew import PROCESSES, wait_until
from tests.contention.places import Place

INTERVAL, GRACE = 1, 2
# The first name is that of Optuna 4.9 and later.
_names = ("RetryHeartbeatStaleTrialCallback", "RetryFailedTrialCallback")
Retry = next(getattr(optuna.storages, name) for name in _names if hasattr(optuna.storages, name))


def _storage(url: str) -> RedisLockedStorage:
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return RedisLockedStorage(
        url, heartbeat_interval=INTERVAL, grace_period=GRACE, heartbeat_stale_trial_callback=Retry()
    )


def _optimize(url: str, folder: Path) -> None:
    """Body of a worker: one trial that lasts until the file `end` is there; then it reports, and returns."""

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        (folder / f"started{trial.number}").write_text(str(os.getpid()))
        wait_until((folder / "end").exists, "told to end")
        refused = []
        for step in range(3):
            try:
                trial.report(0.5, step)
                trial.study._storage.get_trial(trial._trial_id)
            except UpdateFinishedTrialError:
                refused.append(step)
        (folder / f"refused{trial.number}").write_text(json.dumps(refused))
        return x

    study = optuna.load_study(study_name="s", storage=_storage(url))
    study.optimize(objective, n_trials=1)


def _tell(url: str, folder: Path) -> None:
    """Body of a worker that does nothing but tell, once the file `end` is there."""
    study = optuna.load_study(study_name="s", storage=_storage(url))
    trial = study.ask()
    study._storage.record_heartbeat(trial._trial_id)  # type: ignore[attr-defined]
    (folder / f"started{trial.number}").write_text(str(os.getpid()))
    wait_until((folder / "end").exists, "told to end")
    try:
        study._storage.set_trial_state_values(trial._trial_id, TrialState.COMPLETE, [1.0])
        outcome = "accepted"
    except UpdateFinishedTrialError:
        outcome = "refused"
    (folder / "told").write_text(outcome)


def _reap(url: str, folder: Path) -> None:
    """Body of a reaper, until the file `reaped` is there."""
    study = optuna.load_study(study_name="s", storage=_storage(url))
    while not (folder / "reaped").exists():
        optuna.storages.fail_stale_trials(study)
        time.sleep(0.01)


Start = Callable[[Callable[[str, Path], None]], BaseProcess]


@pytest.fixture
def study(place: Place) -> optuna.Study:
    return optuna.create_study(study_name="s", storage=_storage(place.url))


@pytest.fixture
def start(study: optuna.Study, place: Place, tmp_path: Path) -> Iterator[Start]:
    """Starts processes, which are ended with the test."""
    started: list[BaseProcess] = []

    def start(body: Callable[[str, Path], None]) -> BaseProcess:
        process = PROCESSES.Process(target=body, args=(place.url, tmp_path))
        process.start()
        started.append(process)
        return process

    yield start
    for name in ("end", "reaped"):
        (tmp_path / name).touch()
    for process in started:
        process.join(10)
        process.kill()
        process.join()
        process.close()


def _wait_for_trials(folder: Path, n: int) -> dict[int, int]:
    """Wait until so many trials have started; process id by trial number."""
    wait_until(lambda: len(list(folder.glob("started*"))) >= n, f"{n} trials have started")
    wait_until(lambda: all(p.read_text() for p in folder.glob("started*")), "they say who they are")
    return {int(p.name.removeprefix("started")): int(p.read_text()) for p in folder.glob("started*")}


def _retries(study: optuna.Study) -> list[FrozenTrial]:
    return [t for t in study.get_trials(deepcopy=False) if "failed_trial" in t.system_attrs]


def test_the_trial_of_a_killed_worker_is_failed_once_by_many_reapers_and_retried_while_a_live_one_goes_on(
    study: optuna.Study, start: Start, tmp_path: Path, place: Place
) -> None:
    workers = [start(_optimize), start(_optimize)]
    pids = _wait_for_trials(tmp_path, 2)
    dead = next(number for number, pid in pids.items() if pid == workers[0].pid)
    live = 1 - dead
    workers[0].kill()
    killed_at = time.monotonic()
    for _ in range(3):
        start(_reap)
    wait_until(lambda: study.trials[dead].state is TrialState.FAIL, "the dead worker's trial is failed")
    assert time.monotonic() - killed_at > GRACE - INTERVAL
    wait_until(lambda: bool(_retries(study)), "it is retried")
    time.sleep(2 * GRACE)  # a live worker has to be left alone for longer than the grace period
    (tmp_path / "reaped").touch()
    (retry,) = _retries(study)
    assert retry.system_attrs["failed_trial"] == dead
    assert retry.params == study.trials[dead].params
    assert retry.state is TrialState.WAITING
    assert study.trials[live].state is TrialState.RUNNING
    (tmp_path / "end").touch()
    wait_until(lambda: study.trials[live].state.is_finished(), "the live one finishes")
    assert study.trials[live].state is TrialState.COMPLETE
    assert json.loads((tmp_path / f"refused{live}").read_text()) == []
    popped = optuna.load_study(study_name="s", storage=RedisLockedStorage(place.url)).ask()
    assert (popped.number, popped.params) == (retry.number, retry.params)


def test_a_worker_that_is_reaped_while_it_is_paused_is_refused_when_it_goes_on(
    study: optuna.Study, start: Start, tmp_path: Path
) -> None:
    """G3: at its next write, and when it tells its result; the trial stays failed."""
    workers = [start(_optimize), start(_tell)]
    pids = _wait_for_trials(tmp_path, 2)
    optimizing = next(number for number, pid in pids.items() if pid == workers[0].pid)
    for pid in pids.values():
        os.kill(pid, signal.SIGSTOP)
    start(_reap)
    wait_until(lambda: all(t.state is TrialState.FAIL for t in study.trials[:2]), "both are failed")
    before = study.trials[:2]
    (tmp_path / "end").touch()
    for pid in pids.values():
        os.kill(pid, signal.SIGCONT)
    for worker in workers:
        worker.join(30)
    # The first report is sent without waiting, so that the call after it is the one to be refused.
    refused = json.loads((tmp_path / f"refused{optimizing}").read_text())
    assert refused[-2:] == [1, 2]
    assert (tmp_path / "told").read_text() == "refused"
    assert study.trials[:2] == before
    assert len(_retries(study)) == 2
