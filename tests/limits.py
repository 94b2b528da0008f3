"""What the tests of budgets, grids and stops share: one server or three, and quiet studies on them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import optuna
import pytest
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from optuna_dlock import RedisLockedStorage
from tests.masters import Masters
from tests.servers import Server

COMPLETE, PRUNED, FAIL = TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL
RUNNING, WAITING = TrialState.RUNNING, TrialState.WAITING
PLACES = ("one server", "three masters")
Join = Callable[..., optuna.Study]

_numbers = itertools.count()


@pytest.fixture(scope="module")
def three() -> Iterator[Masters]:
    """Three plain masters for a module."""
    with Masters("valkey", 3) as masters:
        yield masters


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, valkey: Server) -> str:
    """URL of a key space that no other test uses: on one server, and on three masters."""
    url = valkey.url if request.param == PLACES[0] else request.getfixturevalue("three").url
    return f"{url}?prefix=limits{next(_numbers)}"


@pytest.fixture
def join(place: str) -> Iterator[Join]:
    """Joins the study of this test, each time with a storage of its own: to the server, another process."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storages: list[RedisLockedStorage] = []

    def make(sampler: BaseSampler | None = None, heartbeat_interval: int | None = None) -> optuna.Study:
        storages.append(
            RedisLockedStorage(place, heartbeat_interval=heartbeat_interval, grace_period=heartbeat_interval)
        )
        return optuna.create_study(storage=storages[-1], study_name="s", sampler=sampler, load_if_exists=True)

    yield make
    for storage in storages:
        storage.close()
    optuna.logging.set_verbosity(before)


def count(study: optuna.Study, *states: TrialState) -> int:
    """How many trials are in these states."""
    return len(study.get_trials(deepcopy=False, states=states))


def storage_of(study: optuna.Study) -> RedisLockedStorage:
    """The storage of a study of ours."""
    storage = study._storage
    assert isinstance(storage, RedisLockedStorage)
    return storage
