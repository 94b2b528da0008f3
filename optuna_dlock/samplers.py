"""Optuna's samplers with settings for many workers; `python -m bench samplers` measures what they do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from optuna.samplers import BaseSampler, NSGAIIISampler, NSGAIISampler, RandomSampler, TPESampler

Name = Literal["tpe", "nsgaii", "nsgaiii", "random"]

_KINDS: dict[str, Callable[..., BaseSampler]] = {
    "tpe": TPESampler,
    "nsgaii": NSGAIISampler,
    "nsgaiii": NSGAIIISampler,
    "random": RandomSampler,
}
_SMALLEST_POPULATION = 50  # Optuna's default


def cluster_sampler(
    name: Name, *, workers: int, seed: int | None = None, worker: int | None = None, **overrides: Any
) -> BaseSampler:
    """A sampler of Optuna with settings for a study that many workers share.

    It is the plain class of Optuna with these arguments and `overrides`, and works with any storage. Every
    worker makes its own.

    ============  ===============  =====================  ==============================================
    sampler       argument         value                  why
    ============  ===============  =====================  ==============================================
    tpe           constant_liar    True                   else nobody sees what others are trying now
                                                          (Optuna 5 does so by default, 4 does not)
    tpe           multivariate     Optuna 5: its default  one objective: all parameters are drawn at
                                   (None); 4: True        once, so that others see the whole of it
    nsgaii, -iii  population_size  max(50, workers)       Optuna's 50; with more workers than that most
                                                          of a generation would be bred from older
                                                          parents (reasoned, not measured)
    random                                                nothing to set
    ============  ===============  =====================  ==============================================

    With several objectives on Optuna 4 pass multivariate=False. Often advised and left alone, as the
    benchmark with 16 workers did not show that it helps: a larger `n_startup_trials` (few more distinct
    points, no better result), a larger `n_ei_candidates` (no steady effect), populations of 500 and more (no
    better than random search after 2 000 trials).

    There is no "qmc": Optuna's QMCSampler counts its points in a study attribute that it reads and then
    writes, so that several workers draw the same one.

    Args:
        name: "tpe", "nsgaii", "nsgaiii" or "random".
        workers: How many workers run trials of the study at the same time, over all hosts.
        seed: Makes the random stream repeatable, not the study: that depends on who is faster. Needs
            `worker`.
        worker: Which worker this is, from 0 to workers - 1: no other has the same stream. Without a seed the
            operating system gives each process another one.
        overrides: Arguments of the sampler's class; they go before the table's.

    Raises:
        ValueError: If the name is unknown, `workers` less than 1, or the worker of a seed missing or out of
            range.
        TypeError: If an override is none of that class.
    """
    if name not in _KINDS:
        hint = ": its points are the same in several workers" if str(name) == "qmc" else ""
        raise ValueError(f"no cluster sampler {name!r}{hint}; known: {', '.join(_KINDS)}")
    if workers < 1:
        raise ValueError(f"workers={workers}: a study has one worker at least")
    return _KINDS[name](seed=_seed(seed, worker, workers), **{**_settings(name, workers), **overrides})


def _settings(name: str, workers: int) -> dict[str, Any]:
    if name == "tpe":
        settings: dict[str, Any] = {"constant_liar": True}
        if inspect.signature(TPESampler).parameters["multivariate"].default is False:  # before Optuna 5
            settings["multivariate"] = True
        return settings
    if name in ("nsgaii", "nsgaiii"):
        return {"population_size": max(_SMALLEST_POPULATION, workers)}
    return {}


def _seed(seed: int | None, worker: int | None, workers: int) -> int | None:
    """A seed for one worker; the same seed in two would make them propose the same points."""
    if seed is None:
        return None
    if worker is None:
        raise ValueError(
            "seed=… needs worker=…: with the same seed all workers would propose the same points"
        )
    if not 0 <= worker < workers:
        raise ValueError(f"worker={worker} is not one of 0..{workers - 1}")
    return int(np.random.SeedSequence(seed, spawn_key=(worker,)).generate_state(1)[0])
