"""Crews for the tests of this folder, and the places where they work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_dlock import RedisLockedStorage
from tests.contention.crew import Crew
from tests.contention.places import ONE, SEVERAL, Place, groups, place_on, slow
from tests.contention.worker import Job
from tests.masters import Masters
from tests.servers import Server

CrewMaker = Callable[..., Crew]
_numbers = itertools.count()


@pytest.fixture
def make_crew(tmp_path: Path) -> CrewMaker:
    """Makes a new study on a server and a crew of so many for it; more arguments go to each `Job`."""

    def make(url: str, size: int, **options: Any) -> Crew:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        folder = tmp_path / f"crew{next(_numbers)}"
        folder.mkdir()
        with RedisLockedStorage(url) as storage:
            optuna.create_study(storage=storage, study_name=folder.name)
        return Crew([Job(slot, url, folder.name, folder, **options) for slot in range(size)])

    return make


@pytest.fixture(scope="module", params=groups(ONE, *SEVERAL))
def group(request: pytest.FixtureRequest) -> Iterator[Server | Masters]:
    """One server, and several masters of each kind, which no test stops: the test runs once with each."""
    kind, n = request.param
    if (kind, n) == ONE:
        yield request.getfixturevalue("valkey")
        return
    with Masters(kind, n) as masters:
        yield masters


@pytest.fixture
def place(group: Server | Masters) -> Place:
    """A key space that no other test uses, on each group."""
    return place_on(group, f"c{next(_numbers)}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slower of two locks takes minutes: one group of masters, and no queue, is enough for every run."""
    for item in items:
        is_pottery = "pottery" in item.name and "one-" not in item.name
        if is_pottery and ("replicated" in item.name or "drain_a_queue" in item.name):
            item.add_marker(slow)
