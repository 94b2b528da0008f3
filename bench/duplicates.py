"""What `skip_duplicates` saves: `python -m bench duplicates`.

Processes on a small space, where each training is a sleep. Shown are the trainings, how many of them repeat
a point that was trained before, and the time that all took together. It reports, and exits with 1 only if a
point was trained twice although duplicates were to be skipped, which is a failure of correctness.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import TrialState

from bench.context import quiet
from bench.environment import describe
from bench.servers import foreign_server, start_valkey
from optuna_dlock import RedisLockedStorage, skip_duplicates
from optuna_dlock.skipping import suggest_all
from optuna_dlock.twins import OnRunning

_SPACE: dict[str, BaseDistribution] = {
    "x": IntDistribution(0, 9),
    "y": CategoricalDistribution(["a", "b", "c", "d", "e"]),
}
_POINTS = 50
_Objective = Callable[[optuna.Trial], Any]


@dataclass(frozen=True)
class _Row:
    """One way to work on the space."""

    title: str
    constant_liar: bool
    on_running: OnRunning | None  # None: duplicates are trained again


_ROWS = [
    _Row("TPE", False, None),
    _Row("TPE, constant_liar", True, None),
    _Row('TPE, skip_duplicates("fail")', False, "fail"),
    _Row('TPE, skip_duplicates("wait")', False, "wait"),
    _Row('TPE, constant_liar, skip_duplicates("fail")', True, "fail"),
    _Row('TPE, constant_liar, skip_duplicates("wait")', True, "wait"),
]


@dataclass(frozen=True)
class _Result:
    """What came of a row."""

    trained: int
    distinct: int
    failed: int
    seconds: float


def main(argv: Sequence[str]) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench duplicates", description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--trials", type=int, default=320, help="in all, for each row")
    parser.add_argument("--seconds", type=float, default=0.2, help="that each training takes")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--url", help="Redis server to use; default: a private one without persistence")
    options = parser.parse_args(argv)
    quiet()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)  # it tells of each FAIL, twice
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as folder:
        server = foreign_server(options.url) if options.url else start_valkey(Path(folder) / "valkey")
        try:
            return _report(server.url, options)
        finally:
            server.stop()


def _report(url: str, options: argparse.Namespace) -> int:
    for name, text in describe(url).items():
        print(f"{name:<14}{text}")
    print(
        f"\n{options.trials} trials of {options.processes} processes on {_POINTS} points, "
        f"{options.seconds:g} s for each training, medians of {options.repeat}",
        flush=True,
    )
    print(f"  {'':<46}{'trained':>8}{'distinct':>9}{'again':>7}{'FAIL':>6}{'seconds':>9}{'':>7}")
    wrong, first = False, 0.0
    for row in _ROWS:
        results = [_measure(url, row, options) for _ in range(options.repeat)]
        wrong |= row.on_running is not None and any(r.trained > r.distinct for r in results)
        result = sorted(results, key=lambda r: r.seconds)[len(results) // 2]
        first = first or result.seconds
        again = result.trained - result.distinct
        print(
            f"  {row.title:<46}{result.trained:>8}{result.distinct:>9}{again:>7}{result.failed:>6}"
            f"{result.seconds:>9.1f}{first / result.seconds:>5.1f} x",
            flush=True,
        )
    print("no point trained twice where duplicates are skipped:", "FAILED" if wrong else "passed")
    return int(wrong)


def _measure(url: str, row: _Row, options: argparse.Namespace) -> _Result:
    name = f"bench{time.time_ns():x}"
    with RedisLockedStorage(url, prefix=name) as storage:
        optuna.create_study(storage=storage, study_name=name)
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    barrier = context.Barrier(options.processes + 1)
    per_worker = options.trials // options.processes
    workers = [
        context.Process(
            target=_work, args=(url, name, row, seed, per_worker, options.seconds, barrier, results)
        )
        for seed in range(options.processes)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    start = time.monotonic()
    trained: Counter[str] = Counter()
    for _ in workers:
        trained.update(results.get(timeout=600))
    seconds = time.monotonic() - start
    for worker in workers:
        worker.join()
    with RedisLockedStorage(url, prefix=name) as storage:
        study = optuna.load_study(storage=storage, study_name=name)
        failed = len(study.get_trials(deepcopy=False, states=(TrialState.FAIL,)))
        optuna.delete_study(storage=storage, study_name=name)
    return _Result(sum(trained.values()), len(trained), failed, seconds)


def _work(
    url: str,
    name: str,
    row: _Row,
    seed: int,
    trials: int,
    seconds: float,
    barrier: Any,
    results: Any,
) -> None:
    trained: list[str] = []

    def train(_: optuna.Trial, params: dict[str, Any]) -> float:
        trained.append(str(params))
        time.sleep(seconds)
        return float((params["x"] - 6) ** 2 + 3 * "cadbe".index(params["y"]))

    def plain(trial: optuna.Trial) -> float:
        return train(trial, suggest_all(trial, _SPACE))

    objective: _Objective = plain
    if row.on_running is not None:
        objective = skip_duplicates(suggest=_SPACE, on_running=row.on_running)(train)
    storage = RedisLockedStorage(url, prefix=name, heartbeat_interval=60)
    sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=row.constant_liar)
    study = optuna.load_study(study_name=name, storage=storage, sampler=sampler)
    barrier.wait()
    study.optimize(objective, n_trials=trials)
    results.put(trained)
