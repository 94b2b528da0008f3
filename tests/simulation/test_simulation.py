"""No schedule breaks a guarantee, and every mistake that we can think of is noticed.

A failure names its seed; `python -m tests.simulation SEED --masters KIND` prints the whole schedule.
`SIMULATION_SCHEDULES=20000` runs so many plain ones, and others in
proportion; `SIMULATION_FIRST=1000000` takes other seeds than usual.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from tests.servers import find_binary
from tests.simulation import seams
from tests.simulation.mistakes import MISTAKES
from tests.simulation.pool import Pool
from tests.simulation.schedule import Result

pytestmark = pytest.mark.skipif(not find_binary("valkey"), reason="no valkey server here")

_SCHEDULES = int(os.environ.get("SIMULATION_SCHEDULES", "1200"))
_FIRST = int(os.environ.get("SIMULATION_FIRST", "0"))
_SHARES = {"plain": 1.0, "replicated": 0.25, "keydb": 0.45}
_ENOUGH = 600  # schedules with a mistake, of which one in a hundred notices it, or far more
_REPEATED = range(8)


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """Two processes that run schedules."""
    with Pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def noticed(pool: Pool) -> dict[str, Future[list[Result]]]:
    """What became of each mistake."""
    return {mistake: pool.notice(mistake, range(_FIRST, _FIRST + _ENOUGH)) for mistake in MISTAKES}


@pytest.mark.parametrize("masters", _SHARES)
def test_no_schedule_breaks_a_guarantee(pool: Pool, masters: str) -> None:
    """G1-G4, G6, and G5 at each read; in the end, whichever minority is away."""
    seeds = range(_FIRST, _FIRST + int(_SCHEDULES * _SHARES[masters]))
    results = list(pool.run(masters, seeds))
    broken = [result for result in results if result.problem is not None]
    assert not broken, "\n".join(
        f"python -m tests.simulation {result.seed} --masters {masters}: {result.problem}" for result in broken
    )
    assert len(results) == len(seeds)
    # What was checked is worth it: each schedule has seen trials come and be read, in the mean.
    assert sum(result.trials for result in results) > 4 * len(seeds)
    assert sum(result.reads for result in results) > 4 * len(seeds)
    assert sum(result.messages for result in results) > 100 * len(seeds)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_noticed(noticed: dict[str, Future[list[Result]]], mistake: str) -> None:
    """Some schedule breaks a guarantee if the code makes it."""
    results = noticed[mistake].result()
    print(f"{mistake}: after {len(results)} schedules, seed {results[-1].seed}: {results[-1].problem}")
    assert results[-1].is_violation, f"{len(results)} schedules did not notice: {mistake}"


def test_the_same_seed_gives_the_same_schedule(pool: Pool) -> None:
    """Two processes with hash seeds of their own, and after other schedules than the first time."""
    first = list(pool.run("keydb", _REPEATED))
    again = [result for seed in reversed(_REPEATED) for result in pool.run("keydb", range(seed, seed + 1))]
    assert [r.trace_hash for r in first] == [r.trace_hash for r in reversed(again)]
    assert len({r.trace_hash for r in first}) == len(_REPEATED)


def test_no_module_takes_its_time_or_chance_from_elsewhere(pool: Pool) -> None:
    """What a storage on several masters imports is all in the simulated world, but for what is listed."""
    taken = pool.real_parts()
    missing = taken - seams.REPLACED - seams.UNUSED
    assert not missing, "to be exchanged in seams.py, or listed there as unused"
    assert ("ensemble", "time") in taken, "nothing was looked at"
