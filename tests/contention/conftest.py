"""Crews for the tests of this folder."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_dlock import RedisLockedStorage
from tests.contention.crew import Crew
from tests.contention.worker import Job

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
