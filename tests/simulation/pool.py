"""Schedules in two processes: each has a server of its own, and one schedule at a time."""

from __future__ import annotations

import multiprocessing
import os
import random
import secrets
import select
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from datetime import datetime
from multiprocessing.util import Finalize

from tests.simulation.mistakes import MISTAKES
from tests.simulation.schedule import Result, Runner, Setup

_PROCESSES = 2
_AT_ONCE = 25  # schedules in one go

_runner: Runner | None = None


def _begin() -> None:
    global _runner
    _runner = Runner()
    Finalize(None, _runner.close, exitpriority=10)  # a child of multiprocessing runs no atexit


def _run(masters: str, mistake: str, seeds: Iterable[int], until_noticed: bool) -> list[Result]:
    assert _runner is not None
    setup = MISTAKES[mistake] if mistake else Setup(masters=masters)
    results = []
    for seed in seeds:
        results.append(_runner.run(seed, setup))
        if until_noticed and results[-1].is_violation:
            break
    assert setup.mutations.missing == [], "the script has changed: the mistake was not made"
    return results


def _real_parts() -> set[tuple[str, str]]:
    real = (time, random, secrets, select, threading, datetime, os)
    return {
        (name.removeprefix("optuna_dlock."), attribute)
        for name, module in list(sys.modules.items())
        if name.startswith("optuna_dlock.")
        for attribute, value in vars(module).items()
        if any(value is one for one in real)
    }


class Pool:
    """Runs schedules; a context manager."""

    def __init__(self) -> None:
        self._executor = ProcessPoolExecutor(_PROCESSES, multiprocessing.get_context("spawn"), _begin)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()

    def run(self, masters: str, seeds: range) -> Iterator[Result]:
        """Run the schedules of these seeds."""
        jobs = [
            self._executor.submit(_run, masters, "", seeds[at : at + _AT_ONCE], False)
            for at in range(0, len(seeds), _AT_ONCE)
        ]
        for job in jobs:
            yield from job.result()

    def notice(self, mistake: str, seeds: range) -> Future[list[Result]]:
        """Run schedules with a mistake until one of them breaks a guarantee; the last result is that one."""
        return self._executor.submit(_run, "", mistake, seeds, True)

    def real_parts(self) -> set[tuple[str, str]]:
        """What modules of the package take of clocks, threads and chance, outside of schedules."""
        return self._executor.submit(_real_parts).result()
