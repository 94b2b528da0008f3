"""A crew of worker processes around one study: started together, killed, paused, sent home, and audited."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.contention import board as entries
from tests.contention.board import Board
from tests.contention.facts import Record, read_records
from tests.contention.verdict import Problem, judge_server
from tests.contention.worker import Job, work

# Each worker is forked from a clean process that has imported everything: 40 of them start in a second.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["pytest", "tests.contention.worker", "tests.contention.verdict"])
_HASTE = 60.0  # seconds that anything may take on a busy machine before the test gives up


def wait_until(condition: Callable[[], bool], what: str, timeout: float = _HASTE) -> None:
    """Wait for something that other processes do."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.005)


class Crew:
    """Workers on one study, and the faults they have to live with.

    Args:
        jobs: What each is to do; all with the same folder and study.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = list(jobs)
        self.folder: Path = jobs[0].folder
        self.board = Board(self.folder / "board")
        self.killed: set[str] = set()
        self._processes: dict[str, BaseProcess] = {}
        self._paused: set[str] = set()

    def __enter__(self) -> Crew:
        self.start(self.jobs)
        wait_until(lambda: sum(self.board.column(entries.READY)) >= len(self.jobs), "all workers are ready")
        self.board.go()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.board.stop()
        for process in self._processes.values():
            if kind is not None:
                process.kill()
            process.join(_HASTE)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    def start(self, jobs: Iterable[Job]) -> None:
        """Start workers; they wait until the whole crew may begin."""
        for job in jobs:
            process = PROCESSES.Process(target=work, args=(job,), name=job.name)
            process.start()
            self._processes[job.name] = process

    def kill(self, jobs: Iterable[Job]) -> None:
        """SIGKILL."""
        for job in jobs:
            self._processes[job.name].kill()
            self.killed.add(job.name)
        for job in jobs:
            self._processes[job.name].join(_HASTE)

    def pause(self, jobs: Iterable[Job]) -> None:
        """SIGSTOP."""
        for job in jobs:
            os.kill(self._pid(job), signal.SIGSTOP)

    def resume(self, jobs: Iterable[Job]) -> None:
        """SIGCONT."""
        for job in jobs:
            os.kill(self._pid(job), signal.SIGCONT)

    def _pid(self, job: Job) -> int:
        pid = self._processes[job.name].pid
        assert pid is not None
        return pid

    def done(self, jobs: Iterable[Job]) -> list[int]:
        """How many facts each of these has noted."""
        return [self.board.get(job.slot, entries.DONE) for job in jobs]

    def wait_for_more(self, jobs: Sequence[Job], facts: int = 5) -> None:
        """Wait until each of these workers has been told that many more facts."""
        goals = [done + facts for done in self.done(jobs)]
        wait_until(
            lambda: all(done >= goal for done, goal in zip(self.done(jobs), goals, strict=True)),
            f"each of {len(jobs)} workers goes on",
        )

    def finish(self) -> None:
        """Send all home and wait for them."""
        self.board.stop()
        for name, process in self._processes.items():
            process.join(_HASTE)
            assert process.exitcode is not None, f"{name} does not stop"

    def records(self) -> dict[str, Record]:
        """What the workers were told."""
        return read_records(self.folder)

    def problems(self, **changes: Any) -> list[Problem]:
        """What a fresh process finds wrong on the server; `changes` are made to the job it is opened with."""
        path = self.folder / "verdict.json"
        usual = {"storage_class": "optuna_dlock:RedisLockedStorage", "timeout": 20.0, "options": {}}
        job = replace(self.jobs[0], **{**usual, **changes})
        process = PROCESSES.Process(target=judge_server, args=(job, sorted(self.killed), path))
        process.start()
        process.join(_HASTE)
        assert process.exitcode == 0, f"the audit ended with {process.exitcode}"
        process.close()
        return [Problem(*problem) for problem in json.loads(path.read_text())]
