"""Samplers for clusters: the table of `cluster_sampler`, and seeds that no two workers share."""

from __future__ import annotations

import inspect
import multiprocessing
import re
from typing import Any

import optuna
import pytest
from optuna.samplers import NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler

from optuna_dlock import RedisLockedStorage
from optuna_dlock.samplers import cluster_sampler

optuna.logging.set_verbosity(optuna.logging.ERROR)
NAMES = ("tpe", "nsgaii", "nsgaiii", "random")
IS_OPTUNA_5 = inspect.signature(TPESampler).parameters["multivariate"].default is None


def _draws(sampler: Any, trials: int = 5) -> list[float]:
    study = optuna.create_study(sampler=sampler)
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=trials)
    return [trial.params["x"] for trial in study.trials]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("tpe", TPESampler), ("nsgaii", NSGAIISampler), ("nsgaiii", NSGAIIISampler), ("random", RandomSampler)],
)
def test_it_is_the_plain_sampler_of_optuna_and_works(name: Any, kind: type) -> None:
    sampler = cluster_sampler(name, workers=3)
    assert type(sampler) is kind
    assert len(set(_draws(sampler, 60))) > 1


@pytest.mark.parametrize("workers", [1, 64])
def test_tpe_has_the_settings_of_the_table(workers: int) -> None:
    sampler: Any = cluster_sampler("tpe", workers=workers)
    assert sampler._constant_liar is True
    assert sampler._multivariate is (None if IS_OPTUNA_5 else True)
    assert sampler._n_startup_trials == 10
    assert sampler._n_ei_candidates == 24


@pytest.mark.parametrize("name", ["nsgaii", "nsgaiii"])
@pytest.mark.parametrize(("workers", "size"), [(1, 50), (50, 50), (51, 51), (200, 200)])
def test_a_population_is_no_smaller_than_the_crew(name: Any, workers: int, size: int) -> None:
    sampler: Any = cluster_sampler(name, workers=workers)
    assert sampler._population_size == size


def test_the_table_tells_all_settings() -> None:
    doc = cluster_sampler.__doc__ or ""
    told = set(re.findall(r"^ *(?:tpe|nsgaii, -iii) +(\w+)", doc, re.MULTILINE))
    assert told == {"constant_liar", "multivariate", "population_size"}


def test_overrides_go_before_the_table_and_unknown_ones_are_refused() -> None:
    sampler: Any = cluster_sampler("tpe", workers=40, n_startup_trials=7, constant_liar=False, group=True)
    assert (sampler._n_startup_trials, sampler._constant_liar, sampler._group) == (7, False, True)
    with pytest.raises(TypeError, match="population_size"):
        cluster_sampler("tpe", workers=2, population_size=50)


@pytest.mark.parametrize("name", NAMES)
def test_each_worker_of_a_seed_has_a_stream_of_its_own_that_comes_again(name: Any) -> None:
    streams = [_draws(cluster_sampler(name, workers=3, seed=7, worker=worker)) for worker in range(3)]
    assert len({tuple(stream) for stream in streams}) == 3
    assert len({value for stream in streams for value in stream}) == 15
    assert _draws(cluster_sampler(name, workers=3, seed=7, worker=1)) == streams[1]
    assert _draws(cluster_sampler(name, workers=3, seed=8, worker=1)) != streams[1]
    assert _draws(cluster_sampler(name, workers=9, seed=7, worker=1)) == streams[1]


def _work(url: str, name: str, barrier: Any) -> None:
    storage = RedisLockedStorage(url)
    study = optuna.load_study(study_name="s", storage=storage, sampler=cluster_sampler(name, workers=4))  # type: ignore[arg-type]
    barrier.wait()
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=5)


@pytest.mark.parametrize("name", NAMES)
def test_forked_workers_without_a_seed_never_propose_the_same(name: str, valkey_url: str) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    with RedisLockedStorage(valkey_url) as storage:
        study = optuna.create_study(storage=storage, study_name="s")
        workers = [context.Process(target=_work, args=(valkey_url, name, barrier)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        assert len({trial.params["x"] for trial in study.trials}) == 20


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"name": "cma", "workers": 2}, "no cluster sampler 'cma'; known: tpe, nsgaii, nsgaiii, random"),
        ({"name": "qmc", "workers": 2}, "'qmc': its points are the same in several workers"),
        ({"name": "tpe", "workers": 0}, "workers=0"),
        ({"name": "tpe", "workers": 2, "seed": 1}, "needs worker"),
        ({"name": "tpe", "workers": 2, "seed": 1, "worker": 2}, "not one of 0..1"),
        ({"name": "tpe", "workers": 2, "seed": 1, "worker": -1}, "not one of 0..1"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        cluster_sampler(**arguments)
