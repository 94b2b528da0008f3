"""One thread at a time, in virtual time: the order of events alone decides who goes on.

A task is a thread that runs only while it has the baton. Whoever has to wait takes the next events out of the
queue itself, until they make some task ready; that one gets the baton. So a run depends on its events alone.
"""

from __future__ import annotations

import contextlib
import functools
import heapq
import itertools
import threading
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any

_MOST_EVENTS = 400_000  # of one schedule; beyond, nothing gets on


class Stopped(BaseException):
    """The task's process was killed, or the schedule is over."""


class Stuck(AssertionError):
    """Nothing happens any more, or far too much does."""


class Process:
    """What several tasks share that stop, pause or die together.

    Attributes:
        paused_until: Until when nothing of it runs (SIGSTOP), in virtual microseconds.
        alive: Whether it was not killed.
        skew: By how much its clocks go wrong, in microseconds.
    """

    def __init__(self, name: str, skew: int = 0) -> None:
        self.name = name
        self.paused_until = 0
        self.alive = True
        self.skew = skew


class Task:
    """A thread of a process."""

    def __init__(self, name: str, process: Process, work: Callable[[], object]) -> None:
        self.name = name
        self.process = process
        self.work = work
        self.baton = threading.Lock()
        self.turn = 0
        self.waiting = True
        self.stopped = False
        self.done = False
        self.thread: object = None  # as the simulated code knows it


class Scheduler:
    """Virtual time, what will happen in it, and the tasks that live in it.

    Args:
        keeps_trace: Whether to keep every line of the trace, and not only their hash.

    Attributes:
        now: Virtual microseconds since the schedule began.
        trace_hash: Of all that has happened so far.
    """

    def __init__(self, keeps_trace: bool = False) -> None:
        self.now = 0
        self.trace_hash = 0
        self.lines: list[str] | None = [] if keeps_trace else None
        self.tasks: list[Task] = []
        self.main = self.current = Task("main", Process("main"), lambda: None)
        self.main.baton.acquire()
        self.main.waiting = False
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._ready: deque[Task] = deque()
        self._numbers = itertools.count()
        self._error: BaseException | None = None

    def trace(self, *what: object) -> None:
        """Note what happened."""
        line = f"{self.now:>10} {' '.join(map(str, what))}"
        self.trace_hash = zlib.crc32(line.encode(), self.trace_hash)
        if self.lines is not None:
            self.lines.append(line)

    def at(self, time: int, action: Callable[[], None]) -> None:
        """Let something happen at a time, or now if that is over."""
        heapq.heappush(self._events, (max(time, self.now), next(self._numbers), action))

    def spawn(self, name: str, process: Process, work: Callable[[], object]) -> Task:
        """A new task, which begins when its turn comes."""
        task = Task(name, process, work)
        self.tasks.append(task)
        self._ready.append(task)
        task.waiting = False
        worker = _idle.pop() if _idle else _Worker()
        task.baton = worker.baton
        worker.job = functools.partial(self._run, task, worker)
        return task

    def wait(self, deadline: int | None = None) -> None:
        """Let others go on, until this task is woken or a time has come.

        Raises:
            Stopped: If its process was killed meanwhile.
        """
        task = self.current
        if task.stopped:
            raise Stopped
        task.turn += 1
        if deadline is not None:
            self.at(deadline, functools.partial(self._time_out, task, task.turn))
        task.waiting = True
        chosen = self._choose()
        if chosen is not task:
            chosen.baton.release()
            task.baton.acquire()
        if task is self.main and self._error is not None:
            error, self._error = self._error, None
            raise error
        if task.stopped:
            raise Stopped

    def wake(self, task: Task) -> None:
        """Let a task go on that waits."""
        if task.waiting:
            task.waiting = False
            self._ready.append(task)

    def stop(self, process: Process | None = None) -> None:
        """Stop the tasks of a process, or of all."""
        for task in self.tasks:
            if process is None or task.process is process:
                task.stopped = True
                self.wake(task)

    def close(self) -> None:
        """Main only: end all tasks."""
        self.stop()
        while self.tasks:
            self._error = None
            with contextlib.suppress(BaseException):
                self.wait()

    def join(self, tasks: list[Task], deadline: int) -> bool:
        """Main only: let all happen until these tasks are done; False if a time comes before."""
        while not all(task.done for task in tasks):
            if self.now >= deadline:
                return False
            self.wait(deadline)
        return True

    def _time_out(self, task: Task, turn: int) -> None:
        if task.turn == turn:
            self.wake(task)

    def _choose(self) -> Task:
        """Let events happen until a task is ready; the one that goes on."""
        if self._error is None:
            try:
                self.current = self._next_ready()
                return self.current
            except BaseException as error:
                self._error = error
        self.current = self.main
        self.main.waiting = False
        return self.main

    def _next_ready(self) -> Task:
        while True:
            while self._ready:
                task = self._ready.popleft()
                until = task.process.paused_until
                if until <= self.now or task.stopped:
                    return task
                self.at(until, functools.partial(self._ready.append, task))
            if not self._events:
                raise Stuck("nothing is left to happen")
            self.now, number, action = heapq.heappop(self._events)
            if number > _MOST_EVENTS:
                raise Stuck(f"{number} events")
            action()

    def _run(self, task: Task, worker: _Worker) -> None:
        try:
            if not task.stopped:
                task.work()
        except Stopped:
            pass
        except BaseException as error:
            self._error = self._error or error
        task.done = True
        self.tasks.remove(task)
        if self.main.waiting and task.process is not self.main.process:
            self.wake(self.main)
        _idle.append(worker)
        self._choose().baton.release()


class _Worker(threading.Thread):
    """A real thread, which is given one task after the other: to start one for each costs more."""

    def __init__(self) -> None:
        super().__init__(name="simulated", daemon=True)
        self.baton = threading.Lock()
        self.baton.acquire()
        self.job: Callable[[], Any] = lambda: None
        self.start()

    def run(self) -> None:
        while True:
            self.baton.acquire()
            self.job()


_idle: list[_Worker] = []
