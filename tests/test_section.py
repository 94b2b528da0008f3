"""Waiting for the section lock of a study."""

from __future__ import annotations

import time
from typing import Any

import pytest

import optuna_dlock.section
from optuna_dlock.errors import LockNotAcquiredError
from optuna_dlock.scripts import BUSY, OK, script
from optuna_dlock.section import Section


class Node:
    """Answers BUSY so many times; a call that begins with `pause` takes that long."""

    timeout = 0.2

    def __init__(self, *pauses: float) -> None:
        self._pauses = iter(pauses)

    def run(self, *_: Any) -> list[int]:
        pause = next(self._pauses, None)
        time.sleep(pause or 0.0)
        return [OK if pause is None else BUSY]


class Locks:
    """Held by somebody else."""

    def holds(self, name: str) -> bool:
        return False

    def free_if_dead(self, name: str) -> None:
        pass

    def holder(self, name: str) -> None:
        pass


def section_of(node: Node) -> Section:
    section = Section.__new__(Section)
    section.name, section._node, section._locks = "study:1", node, Locks()  # type: ignore[assignment]
    return section


def test_a_pause_of_the_process_is_no_wait_for_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """G7: who was stopped for longer than the timeout looks again, instead of giving up at once."""
    monkeypatch.setattr(optuna_dlock.section, "_STOOD_STILL", 0.3)
    assert section_of(Node(0.0, 0.0, 0.4, 0.0)).run(script("create_trial"), [], []) == [OK]


def test_a_lock_that_is_held_for_longer_than_the_timeout_is_an_error() -> None:
    with pytest.raises(LockNotAcquiredError, match="held by others"):
        section_of(Node(*[0.001] * 10_000)).run(script("create_trial"), [], [])
