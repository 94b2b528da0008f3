"""The parts of a trial, one by one: `pytest bench --benchmark-only`."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState

from bench.context import Ping, fill, templates
from bench.servers import start_valkey
from optuna_dlock import RedisLockedStorage
from optuna_dlock.codec import pack_trial, unpack_trial
from optuna_dlock.distributions import DistributionTable, to_text

_FLOATS = 10
_FLOAT = FloatDistribution(-1.0, 1.0)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def server_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A private server without persistence."""
    folder: Path = tmp_path_factory.mktemp("bench")
    server = start_valkey(folder / "valkey")
    yield server.url
    server.stop()


@pytest.fixture
def storage(server_url: str) -> Iterator[RedisLockedStorage]:
    """A storage on a key space of its own."""
    with RedisLockedStorage(f"{server_url}?prefix=part{next(_numbers)}") as storage:
        yield storage


@pytest.fixture
def study_id(storage: RedisLockedStorage) -> int:
    """An empty study."""
    created: int = storage.create_new_study([StudyDirection.MINIMIZE], "bench")
    return created


_PARAMS = [(i, i / _FLOATS) for i in range(_FLOATS)]
_TIME = datetime.datetime(2024, 2, 29, 12, 0, 0, 123456)


def _record() -> bytes:
    return pack_trial(TrialState.COMPLETE, [0.5], _PARAMS, {}, {}, {}, _TIME, _TIME)


def test_pack_a_record(benchmark: Any) -> None:
    """A finished trial of ten floats into bytes."""
    assert benchmark(_record)[1] == TrialState.COMPLETE.value


def test_unpack_a_record(benchmark: Any) -> None:
    """The same bytes back into a FrozenTrial."""
    table = DistributionTable()
    table.extend([to_text(f"x{i}", _FLOAT).encode() for i in range(_FLOATS)])
    trial = benchmark(unpack_trial, _record(), 0, 0, table)
    assert len(trial.params) == _FLOATS


def test_bare_round_trip(benchmark: Any, server_url: str) -> None:
    """PING: what every call that waits takes at least."""
    benchmark(Ping(server_url))


def test_set_trial_param(benchmark: Any, storage: RedisLockedStorage, study_id: int) -> None:
    """A parameter of an own trial: sent, the reply read later."""
    trial_id = storage.create_new_trial(study_id)
    values = itertools.cycle([-0.5, 0.0, 0.5])
    benchmark(lambda: storage.set_trial_param(trial_id, "x", next(values), _FLOAT))
    assert storage.get_trial(trial_id).distributions == {"x": _FLOAT}


def test_create_new_trial(benchmark: Any, storage: RedisLockedStorage, study_id: int) -> None:
    """A number for one more trial."""
    benchmark(storage.create_new_trial, study_id)
    trials = storage.get_all_trials(study_id, deepcopy=False)
    assert [trial.number for trial in trials] == list(range(len(trials)))


@pytest.mark.parametrize("count", [100, 10_000])
def test_get_all_trials_when_nothing_changed(
    benchmark: Any, storage: RedisLockedStorage, study_id: int, count: int
) -> None:
    """A refresh without news: one round trip and the copy of a list."""
    fill(storage, study_id, templates(count))
    assert len(benchmark(storage.get_all_trials, study_id, deepcopy=False)) == count


def test_lock_acquire_and_release(benchmark: Any, storage: RedisLockedStorage) -> None:
    """The public lock, nobody else wanting it."""
    lock = storage.lock("bench")

    def acquire_and_release() -> None:
        lock.acquire()
        lock.release()

    benchmark(acquire_and_release)
    with lock:
        assert lock.held
