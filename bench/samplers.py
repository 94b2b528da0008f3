"""What settings of Optuna's samplers do for a cluster: `python -m bench samplers`.

Worker processes optimize one study together through a private Valkey, with Optuna's defaults, with
`cluster_sampler`, and with one setting changed at a time. What is measured does not depend on how fast the
machine is, as long as all workers have a trial running most of the time.

With `--one-process` one process plays all workers, each with a sampler of its own: all have a trial
running, one of them at random finishes it and begins the next. Samplers cannot tell the difference, unless
they race.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, QMCSampler, RandomSampler, TPESampler

from bench.environment import describe
from bench.servers import start_valkey
from optuna_dlock import RedisLockedStorage
from optuna_dlock.samplers import cluster_sampler

_Make = Callable[[int, int], BaseSampler]  # of the number of workers, and which of them this is
_HARTMANN6_BEST = -3.32237
_numbers = itertools.count()


@dataclass(frozen=True)
class Problem:
    """What the workers optimize.

    Attributes:
        trials: How many, over all workers.
        measure: What is made of all trials; it is told in `unit`.
        seconds: Mean duration of a trial; each lasts between a third and five thirds of it.
    """

    title: str
    unit: str
    directions: tuple[Literal["minimize"], ...]
    objective: Callable[[optuna.Trial], Any]
    measure: Callable[[Sequence[optuna.trial.FrozenTrial]], float]
    trials: int
    seconds: float = 0.03


def _grid(trial: optuna.Trial) -> float:
    """100 points, one best, uneven enough for one parameter to matter more."""
    x, y = trial.suggest_int("x", 0, 9), trial.suggest_int("y", 0, 9)
    return (x - 6) ** 2 + 0.3 * (y - 3) ** 2


def _hartmann6(trial: optuna.Trial) -> float:
    """Hartmann's function of six parameters (Dixon and Szegö 1978)."""
    x = [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(6)]
    return -sum(
        c * math.exp(-sum(a * (xi - p) ** 2 for a, xi, p in zip(row, x, centre, strict=True)))
        for c, row, centre in zip(_H_C, _H_A, _H_P, strict=True)
    )


_H_C = (1.0, 1.2, 3.0, 3.2)
_H_A = (
    (10, 3, 17, 3.5, 1.7, 8),
    (0.05, 10, 17, 0.1, 8, 14),
    (3, 3.5, 1.7, 10, 17, 8),
    (17, 8, 0.05, 10, 0.1, 14),
)
_H_P = (
    (0.1312, 0.1696, 0.5569, 0.0124, 0.8283, 0.5886),
    (0.2329, 0.4135, 0.8307, 0.3736, 0.1004, 0.9991),
    (0.2348, 0.1451, 0.3522, 0.2883, 0.3047, 0.6650),
    (0.4047, 0.8828, 0.8732, 0.5743, 0.1091, 0.0381),
)


def _zdt1(trial: optuna.Trial) -> tuple[float, float]:
    """ZDT1 of ten parameters (Zitzler, Deb and Thiele 2000): the best front is g = 1."""
    x = [trial.suggest_float(f"x{i}", 0.0, 1.0) for i in range(10)]
    g = 1 + 9 * sum(x[1:]) / 9
    return x[0], g * (1 - math.sqrt(x[0] / g))


def _distinct(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    return len({tuple(sorted(trial.params.items())) for trial in trials})


def _regret(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    return min(trial.value for trial in trials if trial.value is not None) - _HARTMANN6_BEST


def _hypervolume(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    """Area that the trials dominate below (1.1, 1.1); ZDT1's own front has 0.8767."""
    area, height = 0.0, 1.1
    for first, second in sorted(tuple(trial.values) for trial in trials):
        if first < 1.1 and second < height:
            area += (1.1 - first) * (height - second)
            height = second
    return area


GRID = Problem("100 points, 100 trials", "distinct points", ("minimize",), _grid, _distinct, 100)
HARTMANN = Problem("Hartmann6, 300 trials", "regret", ("minimize",), _hartmann6, _regret, 300)
ZDT = Problem("ZDT1, 2000 trials", "hypervolume", ("minimize",) * 2, _zdt1, _hypervolume, 2000, 0.01)


def _tpe(**options: Any) -> _Make:
    return lambda workers, worker: TPESampler(**options)


def _cluster(name: Literal["tpe", "nsgaii", "nsgaiii"]) -> _Make:
    return lambda workers, worker: cluster_sampler(name, workers=workers)


def _population(kind: Callable[..., BaseSampler], size: int) -> _Make:
    return lambda workers, worker: kind(population_size=size)


_OLD = {"constant_liar": False, "multivariate": False}  # Optuna 4.0's defaults
TPE_SETTINGS: dict[str, _Make] = {
    "random": lambda workers, worker: RandomSampler(),
    "TPE, Optuna 4.0 default": _tpe(**_OLD),
    "  + n_startup_trials 50": _tpe(**_OLD, n_startup_trials=50),
    "  + n_ei_candidates 96": _tpe(**_OLD, n_ei_candidates=96),
    "  + constant_liar": _tpe(constant_liar=True, multivariate=False),
    "  + constant_liar, multivariate": _tpe(constant_liar=True, multivariate=True),
    "    and n_startup_trials 50": _tpe(constant_liar=True, multivariate=True, n_startup_trials=50),
    "    and n_ei_candidates 96": _tpe(constant_liar=True, multivariate=True, n_ei_candidates=96),
    "cluster_sampler('tpe')": _cluster("tpe"),
    "QMC, scrambled, one seed": lambda workers, worker: QMCSampler(scramble=True, seed=1),
}
GENETIC_SETTINGS: dict[str, _Make] = {
    "random": lambda workers, worker: RandomSampler(),
    **{f"NSGA-II, population {size}": _population(NSGAIISampler, size) for size in (25, 50, 100, 500)},
    "cluster_sampler('nsgaii')": _cluster("nsgaii"),
    **{f"NSGA-III, population {size}": _population(NSGAIIISampler, size) for size in (50, 500)},
    "cluster_sampler('nsgaiii')": _cluster("nsgaiii"),
}
PLAN: tuple[tuple[Problem, dict[str, _Make]], ...] = (
    (GRID, TPE_SETTINGS),
    (HARTMANN, TPE_SETTINGS),
    (ZDT, GENETIC_SETTINGS),
)


def main(argv: Sequence[str]) -> int:
    """Run and print; always 0."""
    parser = argparse.ArgumentParser(prog="python -m bench samplers", description=__doc__)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=7, help="runs of each setting; the median counts")
    parser.add_argument("--one-process", action="store_true", help="see above; much faster")
    parser.add_argument("--only", default="", help="settings and problems whose name contains this")
    parser.add_argument(
        "--quick", action="store_true", help="one run with a fifth of the trials: a smoke test"
    )
    options = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as name, contextlib.ExitStack() as stack:
        server = start_valkey(Path(name) / "valkey")
        stack.callback(server.stop)
        for title, text in describe(server.url).items():
            print(f"{title:<14}{text}")
        for problem, settings in PLAN:
            chosen = {
                label: make for label, make in settings.items() if options.only in f"{problem.title} {label}"
            }
            if chosen:
                _report(server.url, problem, chosen, options)
    return 0


def _report(url: str, problem: Problem, settings: dict[str, _Make], options: argparse.Namespace) -> None:
    trials = problem.trials // (5 if options.quick else 1)
    repeat = 1 if options.quick else options.repeat
    print(f"\n{problem.title}, {options.workers} workers: {problem.unit}, median (least to most) of {repeat}")
    found: dict[str, list[float]] = {label: [] for label in settings}
    busy: dict[str, list[float]] = {label: [] for label in settings}
    for _ in range(repeat):  # the settings take turns
        for label, make in settings.items():
            result = (
                play(problem, make, options.workers, trials)
                if options.one_process
                else run(url, problem, make, options.workers, trials)
            )
            found[label].append(problem.measure(result))
            print(f"    {label}: {found[label][-1]:.4g}", file=sys.stderr, flush=True)
            busy[label].append(_concurrency(result))
    for label, values in found.items():
        print(
            f"  {label:<34}{statistics.median(values):>9.4g}  ({min(values):.4g} to {max(values):.4g})"
            f"   {statistics.median(busy[label]):.1f} running",
            flush=True,
        )


def run(url: str, problem: Problem, make: _Make, workers: int, trials: int) -> list[optuna.trial.FrozenTrial]:
    """All trials of a study that so many processes worked off together."""
    prefix = f"samplers{next(_numbers)}"
    with RedisLockedStorage(url, prefix=prefix) as storage:
        optuna.create_study(storage=storage, study_name=prefix, directions=problem.directions)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(workers)
    shares = [trials // workers + (index < trials % workers) for index in range(workers)]
    crew = [
        context.Process(target=_work, args=(url, prefix, problem, make, workers, index, share, barrier))
        for index, share in enumerate(shares)
    ]
    for process in crew:
        process.start()
    for process in crew:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a worker ended with {process.exitcode}")
    with RedisLockedStorage(url, prefix=prefix) as storage:
        study = optuna.load_study(storage=storage, study_name=prefix)
        found = study.get_trials(deepcopy=False)
        optuna.delete_study(storage=storage, study_name=prefix)
    return found


def play(problem: Problem, make: _Make, workers: int, trials: int) -> list[optuna.trial.FrozenTrial]:
    """The same, played by this process."""
    storage = optuna.storages.InMemoryStorage()
    optuna.create_study(storage=storage, study_name="s", directions=problem.directions)
    studies = [
        optuna.load_study(study_name="s", storage=storage, sampler=make(workers, index))
        for index in range(workers)
    ]
    running: list[tuple[optuna.Study, optuna.Trial, Any]] = []
    for number in range(trials):
        if number < workers:
            study = studies[number]
        else:
            study, trial, value = running.pop(random.randrange(workers))
            study.tell(trial, value)
        trial = study.ask()
        running.append((study, trial, problem.objective(trial)))
    for study, trial, value in running:
        study.tell(trial, value)
    return studies[0].get_trials(deepcopy=False)


def _work(
    url: str, prefix: str, problem: Problem, make: _Make, workers: int, worker: int, share: int, barrier: Any
) -> None:
    storage = RedisLockedStorage(url, prefix=prefix)
    study = optuna.load_study(storage=storage, study_name=prefix, sampler=make(workers, worker))
    chance = random.Random()  # durations only

    def objective(trial: optuna.Trial) -> Any:
        value = problem.objective(trial)
        time.sleep(problem.seconds * chance.uniform(1 / 3, 5 / 3))
        return value

    barrier.wait()
    study.optimize(objective, n_trials=share)


def _concurrency(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    """How many trials were running at once, on average."""
    starts = [trial.datetime_start for trial in trials if trial.datetime_start]
    ends = [trial.datetime_complete for trial in trials if trial.datetime_complete]
    span = (max(ends) - min(starts)).total_seconds()
    return sum(_durations(trials)) / span


def _durations(trials: Sequence[optuna.trial.FrozenTrial]) -> Iterator[float]:
    for trial in trials:
        assert trial.duration is not None
        yield trial.duration.total_seconds()
