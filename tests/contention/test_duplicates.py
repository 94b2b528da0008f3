"""Many processes on a small space: each point is trained by one trial at a time, and again only after its
death.

The detector is independent of the storage: every training notes its begin and its end in one list on a
server, whose order is that of the events.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import optuna
import pytest
import redis
from optuna.trial import FrozenTrial, Trial, TrialState

from optuna_dlock import RedisLockedStorage, claim_or_skip, skip_duplicates
from tests.contention.crew import PROCESSES, wait_until
from tests.masters import Masters
from tests.servers import Server

COMPLETE, FAIL, RUNNING = TrialState.COMPLETE, TrialState.FAIL, TrialState.RUNNING
INTERVAL, GRACE = 1, 2


@dataclass(frozen=True)
class Job:
    """What a worker does.

    Attributes:
        list_url: The server with the list of trainings.
        columns: The space is this many times ten points.
        trials: How many this worker makes.
        on_running: See `claim_params`.
        hanging: So many trainings, over all workers, go on until their worker is killed.
        failing: Every so many-th training raises; 0 for none.
    """

    url: str
    list_url: str
    folder: Path
    columns: int
    trials: int
    on_running: Any
    seed: int = 0
    hanging: int = 0
    failing: int = 0


def _optimize(job: Job) -> None:
    """Body of a worker."""
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    heartbeats = {"heartbeat_interval": INTERVAL, "grace_period": GRACE} if job.hanging else {}
    storage = RedisLockedStorage(job.url, **heartbeats)  # type: ignore[arg-type]
    sampler = optuna.samplers.RandomSampler(seed=job.seed)
    study = optuna.load_study(study_name="s", storage=storage, sampler=sampler)
    noted = redis.Redis.from_url(job.list_url)
    trainings = 0

    def note(what: str, trial: Trial) -> None:
        entry = {"what": what, "point": trial.params, "trial": trial.number, "at": time.time()}
        noted.rpush("trainings", json.dumps(entry))

    @skip_duplicates(on_running=job.on_running)
    def objective(trial: Trial) -> float:
        nonlocal trainings
        trial.suggest_int("x", 0, job.columns - 1)
        trial.suggest_categorical("y", list("abcdefghij"))
        claim_or_skip(trial)
        note("begin", trial)
        trainings += 1
        if noted.incr("hanging") <= job.hanging:
            (job.folder / f"hangs{trial.number}").write_text(str(os.getpid()))
            time.sleep(600)
        time.sleep(0.002)
        note("end", trial)
        if job.failing and trainings % job.failing == 0:
            raise ZeroDivisionError
        return float(trial.number)  # so that a value tells who has trained it

    (job.folder / f"ready{job.seed}").touch()
    wait_until((job.folder / "go").exists, "all are ready")
    study.optimize(objective, n_trials=job.trials, catch=[ZeroDivisionError])
    storage.close()


@dataclass
class Workers:
    """The workers of a test, by process id, and what they have left behind."""

    processes: dict[int, BaseProcess]
    job: Job
    noted: redis.Redis

    def run(self) -> None:
        """Let them work; those that hang are killed."""
        folder = self.job.folder
        n = len(self.processes)
        wait_until(lambda: len(list(folder.glob("ready*"))) == n, "all are ready")
        (folder / "go").touch()
        if self.job.hanging:
            wait_until(lambda: len(_pids(folder)) == self.job.hanging, "some hang")
            for pid in _pids(folder):
                self.processes[pid].kill()
        for process in self.processes.values():
            process.join(120)
            assert process.exitcode in ((0, -9) if self.job.hanging else (0,))

    def trainings(self, what: str) -> list[dict[str, Any]]:
        """The begins or the ends, in the order in which the server heard of them."""
        entries = [json.loads(entry) for entry in self.noted.lrange("trainings", 0, -1)]
        return [entry for entry in entries if entry["what"] == what]


def _pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("hangs*") if path.read_text()]


@pytest.fixture
def list_server() -> Iterator[Server]:
    with Server("valkey") as server:
        yield server


def _start(n: int, job: Job) -> Workers:
    jobs = [replace(job, seed=seed) for seed in range(n)]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with RedisLockedStorage(jobs[0].url) as storage:
        optuna.create_study(storage=storage, study_name="s")
    processes = [PROCESSES.Process(target=_optimize, args=(job,)) for job in jobs]
    for process in processes:
        process.start()
    by_pid: dict[int, BaseProcess] = {process.pid or 0: process for process in processes}
    return Workers(by_pid, jobs[0], redis.Redis.from_url(jobs[0].list_url))


def _judge(workers: Workers) -> list[FrozenTrial]:
    """No two trainings of a point while a claim stands; all other trials say whom they duplicate, rightly."""
    with RedisLockedStorage(workers.job.url) as storage:
        study = optuna.load_study(storage=storage, study_name="s")
        trials, duplicates = study.trials, storage.get_duplicates(study._study_id)
    begins = workers.trainings("begin")
    assert [b for b in begins if trials[b["trial"]].params != b["point"]] == []
    last: dict[str, dict[str, Any]] = {}
    for begin in begins:
        before = last.get(str(begin["point"]))
        if before is not None:
            owner = trials[before["trial"]]
            assert owner.state is FAIL, f"{before} has trained, and {begin} has again"
            assert owner.datetime_complete is not None
            assert owner.datetime_complete.timestamp() <= begin["at"], f"{before} lived when {begin} began"
        last[str(begin["point"])] = begin
    trained = {begin["trial"] for begin in begins}
    for trial in trials:
        assert (trial.number in duplicates) is (trial.number not in trained)
        if trial.number in trained:
            assert trial.state is FAIL or trial.value == trial.number
            continue
        duplicate = duplicates[trial.number]
        assert trials[duplicate.owner].params == trial.params
        assert duplicate.owner in trained
        if trial.state is COMPLETE:
            assert duplicate.state is COMPLETE
            assert trial.value == duplicate.owner
        else:
            assert (trial.state, duplicate.state) == (FAIL, RUNNING)
    return trials


def test_2_000_trials_of_16_processes_on_50_points_train_each_point_once(
    valkey_url: str, list_server: Server, tmp_path: Path
) -> None:
    workers = _start(16, Job(valkey_url, list_server.url, tmp_path, columns=5, trials=125, on_running="fail"))
    workers.run()
    trials = _judge(workers)
    assert len(trials) == 2000
    assert len(workers.trainings("begin")) == len(workers.trainings("end")) == 50


def test_three_masters_train_each_point_once_and_those_who_wait_get_its_value(
    list_server: Server, tmp_path: Path
) -> None:
    with Masters("valkey", 3) as masters:
        workers = _start(
            6, Job(masters.url, list_server.url, tmp_path, columns=2, trials=40, on_running="wait")
        )
        workers.run()
        trials = _judge(workers)
    assert {trial.state for trial in trials} == {COMPLETE}
    assert len(workers.trainings("begin")) == 20


def test_what_killed_workers_held_is_trained_again_after_they_were_reaped(
    valkey_url: str, list_server: Server, tmp_path: Path
) -> None:
    """Exactly one of those who wait takes over; trainings that raise are taken over at once."""
    job = Job(valkey_url, list_server.url, tmp_path, columns=5, trials=125, on_running="wait")
    _kill_some_and_judge(_start(16, replace(job, hanging=4, failing=3)))


def test_three_masters_train_again_what_killed_workers_held(list_server: Server, tmp_path: Path) -> None:
    with Masters("valkey", 3) as masters:
        job = Job(masters.url, list_server.url, tmp_path, columns=1, trials=30, on_running="wait")
        _kill_some_and_judge(_start(8, replace(job, hanging=3, failing=3)))


def _kill_some_and_judge(workers: Workers) -> None:
    workers.run()
    trials = _judge(workers)
    killed = [int(path.name.removeprefix("hangs")) for path in workers.job.folder.glob("hangs*")]
    assert len(killed) == workers.job.hanging
    begins, ends = workers.trainings("begin"), workers.trainings("end")
    assert len(begins) == len(ends) + len(killed)
    for number in killed:
        assert trials[number].state is FAIL
        again = [b for b in begins if b["point"] == trials[number].params and b["trial"] != number]
        assert again, f"the point of trial {number} was not trained again"
    assert _points(trials, (COMPLETE,)) == _points(trials, tuple(TrialState))


def _points(trials: Sequence[FrozenTrial], states: Sequence[TrialState]) -> set[str]:
    return {str(trial.params) for trial in trials if trial.state in states}
