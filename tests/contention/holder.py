"""Workers that use `storage.lock(...)` around a read and a write, and resources that notice an overlap."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import LockLostError
from tests.contention.worker import Job, Worker

TTL = 0.5


class Holder(Worker):
    """Operations `tick`, `fenced_tick` and `freeze_study`; see the tests of locks."""

    def __init__(self, job: Job, storage: RedisLockedStorage) -> None:
        super().__init__(job, storage)
        self._counter = job.folder / "counter"
        self._occupied = job.folder / "occupied"

    def tick(self) -> None:
        """Raise the counter by one; overlaps are seen by who enters, and by the counter."""
        with self._storage.lock("counter", ttl=TTL), self._alone():
            value = int(self._counter.read_text() or "0") if self._counter.exists() else 0
            time.sleep(self._random.uniform(0, 0.002))
            _replace(self._counter, str(value + 1))
        self._ledger.note("ticked", value=value + 1)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._occupied.open("w") as file:  # the kernel frees it when its holder is killed
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._ledger.remark("stale", text="somebody else is in the section")
            yield

    def fenced_tick(self) -> None:
        """Raise a counter that refuses tokens lower than the highest it has seen."""
        try:
            with self._storage.lock("fenced", ttl=TTL) as token:
                value = self._fenced(token, None)
                if value is None:
                    self._ledger.note("fenced off")
                    return
                time.sleep(self._random.uniform(0, 0.005))
                accepted = self._fenced(token, value + 1)
                if accepted is None:
                    self._ledger.note("fenced off")
                else:
                    self._ledger.note("ticked", value=value + 1)
        except LockLostError:
            self._ledger.note("lock lost")

    def freeze_study(self) -> None:
        """Hold the lock of the study itself: meanwhile nobody creates or finishes a trial."""
        try:
            with self._storage.lock(f"study:{self._study_id}", ttl=TTL):
                before = self._finished_or_not()
                time.sleep(0.01)
                after = self._finished_or_not()
        except LockLostError:
            self._ledger.note("lock lost")
            return
        self._ledger.note("froze")
        if before != after:
            self._ledger.remark("stale", text="the study changed while its lock was held")

    def _finished_or_not(self) -> list[bool]:
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        return [trial.state.is_finished() for trial in trials]

    def _fenced(self, token: int, new: int | None) -> int | None:
        """Read, or write `new`; None if a higher token was here."""
        with self._occupied.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            state: dict[str, Any] = {"token": 0, "value": 0}
            if self._counter.exists():
                state = json.loads(self._counter.read_text())
            if token < state["token"]:
                return None
            state["token"] = token
            if new is not None:
                state["value"] = new
            _replace(self._counter, json.dumps(state))
            value: int = state["value"]
            return value


def _replace(path: Path, text: str) -> None:
    """Write in one step: a SIGKILL leaves the old text or the new one."""
    new = path.with_suffix(f".{os.getpid()}")
    new.write_text(text)
    new.replace(path)
