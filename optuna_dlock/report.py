"""Statistics of a study by host, from its trials alone: pure, and brought up to date by what changed.

Definitions (times are those of `datetime_start` and `datetime_complete`, by the clocks of the workers):

- *skipped*: a trial that trained nothing because its parameters were those of another one.
- *finished*: COMPLETE and not skipped. Mean and median duration are those of finished trials.
- *throughput*: trials that ended COMPLETE or PRUNED and not skipped, per minute; from the first start to the
  last end of the host (or study), and over the last `window` seconds before now.
- *idle share*: 1 - busy / available, over ended trials of any state. A worker is busy with a trial that it
  does not skip: to wait for the twin is not work. It is available from its first start to its last end, once
  for each trial it had under way at the same time at most (`n_jobs`). So the gap between two trials of a
  process is idle, and the gap between a process and its successor is not. Where the storage does not know the
  workers, a host counts as one. A RUNNING trial counts once it has ended: that of a killed worker never does.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from math import inf
from statistics import fmean, median
from typing import Protocol

import numpy as np
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

UNKNOWN_HOST = "?"
WINDOW = 600.0
_EPOCH = datetime(1970, 1, 1)
_WORKED = (TrialState.COMPLETE, TrialState.PRUNED)


class Worker(Protocol):
    """Who ran a trial, as the storage recorded it."""

    @property
    def host(self) -> str:
        """Name of the machine."""


@dataclass(frozen=True)
class HostReport:
    """One host in one study; None where nothing is known yet.

    Attributes:
        host: Its name, "?" for trials of which nobody knows.
        workers: Processes that ended a trial there; None if the storage does not know them.
        finished: COMPLETE trials that it trained.
        running, pruned, failed, skipped: How many trials; those skipped are in no other count.
        mean, median: Seconds of a finished trial.
        throughput, recent: Trials per minute, over all and within the window.
        idle: Share of the time, 0 to 1.
    """

    host: str
    workers: int | None
    finished: int
    running: int
    pruned: int
    failed: int
    skipped: int
    mean: float | None
    median: float | None
    throughput: float | None
    recent: float | None
    idle: float | None


@dataclass(frozen=True)
class StudyReport:
    """One study and its hosts, fastest first.

    Attributes:
        number: Its place among the studies of the storage, oldest 0.
        complete: All COMPLETE trials, skipped ones too, as Optuna counts them.
        best: The best value of each objective among feasible COMPLETE trials.
        first_start, last_end: Of its ended trials.
    """

    number: int
    name: str
    directions: list[str]
    trials: int
    complete: int
    running: int
    waiting: int
    pruned: int
    failed: int
    skipped: int
    throughput: float | None
    recent: float | None
    idle: float | None
    best: list[float | None]
    first_start: datetime | None
    last_end: datetime | None
    hosts: list[HostReport]


@dataclass
class _Usage:
    """When one worker was busy.

    Attributes:
        slots: The most trials that it had under way at once.
        spans: (end, start) of its trials, by end; those of `fresh` are not in it yet.
    """

    busy: float = 0.0
    first: float = inf
    last: float = -inf
    slots: int = 0
    spans: list[tuple[float, float]] = field(default_factory=list)
    fresh: list[tuple[float, float]] = field(default_factory=list)

    def add(self, start: float, end: float, busy: bool) -> None:
        self.busy += end - start if busy else 0.0
        self.first = min(self.first, start)
        self.last = max(self.last, end)
        self.fresh.append((end, start))

    @property
    def available(self) -> float:
        """Seconds for which its slots were there."""
        if self.fresh:
            # Only what ended after the first of the new ones began can overlap with one of them.
            since = min(start for _, start in self.fresh)
            near = np.sort(self.spans[bisect_right(self.spans, (since, inf)) :] + self.fresh, axis=0)
            ended = np.searchsorted(near[:, 0], near[:, 1], side="right")
            under_way = np.arange(1, len(near) + 1) - ended
            self.slots = max(self.slots, 1, int(under_way.max()))
            self.spans += self.fresh
            self.spans.sort()
            self.fresh = []
        return self.slots * (self.last - self.first)


@dataclass
class HostStatistics:
    """What is kept of one host: counts, and lists in order once `settle` was called.

    Attributes:
        durations: Seconds of each finished trial that has a start and an end.
        mean, median: Of the durations.
        ends: When each trial ended that counts for the throughput, in seconds since 1970 local time.
    """

    finished: int = 0
    running: int = 0
    pruned: int = 0
    failed: int = 0
    skipped: int = 0
    durations: list[float] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)
    usage: dict[Hashable, _Usage] = field(default_factory=dict)
    mean: float | None = None
    median: float | None = None
    _settled: bool = True

    def add(self, trial: FrozenTrial, skipped: bool, worker: Hashable) -> None:
        """Count a trial that ended."""
        worked = False
        if skipped:
            self.skipped += 1
        elif trial.state is TrialState.COMPLETE:
            self.finished += 1
            worked = True
        elif trial.state is TrialState.PRUNED:
            self.pruned += 1
            worked = True
        else:
            self.failed += 1
        if trial.datetime_complete is None:
            return
        self._settled = False
        end = seconds_of(trial.datetime_complete)
        if worked:
            self.ends.append(end)
        if trial.datetime_start is None:
            return
        start = seconds_of(trial.datetime_start)
        if start > end:
            return  # a clock was set back: not a duration
        if worked and trial.state is TrialState.COMPLETE:
            self.durations.append(end - start)
        usage = self.usage.get(worker)
        if usage is None:
            usage = self.usage[worker] = _Usage()
        usage.add(start, end, not skipped)

    def settle(self) -> None:
        """Put what was added in order; to sort a list that is nearly in order takes one pass."""
        if not self._settled:
            self.durations.sort()
            self.ends.sort()
            if self.durations:
                self.mean, self.median = fmean(self.durations), median(self.durations)
            self._settled = True


class StudyStatistics:
    """A study by host; `update` takes in what changed, `report` tells what is known.

    Attributes:
        hosts: What is kept of each host, by name.
        results: (end, number, values) of each feasible COMPLETE trial with an end, in the order of arrival.
    """

    def __init__(self, number: int, name: str, directions: Sequence[StudyDirection]) -> None:
        self.number = number
        self.name = name
        self.directions = list(directions)
        self.hosts: dict[str, HostStatistics] = {}
        self.results: list[tuple[float, int, Sequence[float]]] = []
        self._best: list[float | None] = [None] * len(directions)
        self._open: list[int] = []  # numbers of the trials that had not ended
        self._read = 0
        self._waiting = 0
        self._complete = 0

    @property
    def first_open(self) -> int:
        """The lowest number of a trial that had not ended, or was not there, at the last update."""
        return self._open[0] if self._open else self._read

    def update(
        self,
        trials: Sequence[FrozenTrial],
        workers: Mapping[int, Worker] | None = None,
        duplicates: Container[int] = (),
    ) -> None:
        """Take in the trials of the study; what it costs depends on the open and the new ones only.

        Args:
            trials: All of them, the one with number n at index n.
            workers: Who ran those from `first_open` on, by number, as far as the storage knows.
            duplicates: Numbers of skipped trials, besides those whose user attribute HOST says so.
        """
        workers = workers or {}
        pending = [trials[number] for number in self._open] + list(trials[self._read :])
        self._read = len(trials)
        self._open = []
        self._waiting = 0
        for host in self.hosts.values():
            host.running = 0
        for trial in pending:
            if trial.state is TrialState.WAITING:
                self._waiting += 1
                self._open.append(trial.number)
                continue
            worker = workers.get(trial.number)
            marked = _host_attribute(trial)
            name = worker.host if worker is not None else str(marked.get("host") or UNKNOWN_HOST)
            host = self.hosts.setdefault(name, HostStatistics())
            if trial.state is TrialState.RUNNING:
                host.running += 1
                self._open.append(trial.number)
                continue
            skipped = bool(marked.get("msg")) or trial.number in duplicates
            host.add(trial, skipped, worker if isinstance(worker, Hashable) else None)
            self._complete += trial.state is TrialState.COMPLETE
            self._note_result(trial)

    def _note_result(self, trial: FrozenTrial) -> None:
        values = trial.values
        if trial.state is not TrialState.COMPLETE or not values or not _is_feasible(trial):
            return
        for at, direction in enumerate(self.directions):
            best = self._best[at]
            better = min if direction is StudyDirection.MINIMIZE else max
            self._best[at] = values[at] if best is None else better(best, values[at])
        if trial.datetime_complete is not None:
            self.results.append((seconds_of(trial.datetime_complete), trial.number, values))

    def report(self, now: datetime, window: float = WINDOW) -> StudyReport:
        """What is known at `now` (local, naive: as Optuna's times)."""
        at = seconds_of(now)
        hosts = [_host_report(name, host, at, window) for name, host in self.hosts.items()]
        # By the mean, as the notes do; who finished nothing comes last.
        hosts.sort(key=lambda h: (inf if h.mean is None else h.mean, h.host))
        everywhere = list(self.hosts.values())
        first, last = _span(everywhere)
        throughput, recent = _throughput(everywhere, at, window)
        return StudyReport(
            number=self.number,
            name=self.name,
            directions=[direction.name.lower() for direction in self.directions],
            trials=self._read,
            complete=self._complete,
            running=sum(h.running for h in hosts),
            waiting=self._waiting,
            pruned=sum(h.pruned for h in hosts),
            failed=sum(h.failed for h in hosts),
            skipped=sum(h.skipped for h in hosts),
            throughput=throughput,
            recent=recent,
            idle=_idle(everywhere),
            best=list(self._best),
            first_start=datetime_of(first) if first < inf else None,
            last_end=datetime_of(last) if last > -inf else None,
            hosts=hosts,
        )


def seconds_of(time: datetime) -> float:
    """Seconds since 1970 of a naive time, without any time zone."""
    return (time - _EPOCH).total_seconds()


def datetime_of(seconds: float) -> datetime:
    """The inverse of `seconds_of`."""
    return _EPOCH + timedelta(seconds=seconds)


def _host_report(name: str, host: HostStatistics, now: float, window: float) -> HostReport:
    host.settle()
    throughput, recent = _throughput([host], now, window)
    return HostReport(
        host=name,
        workers=len(host.usage) if None not in host.usage else None,
        finished=host.finished,
        running=host.running,
        pruned=host.pruned,
        failed=host.failed,
        skipped=host.skipped,
        mean=host.mean,
        median=host.median,
        throughput=throughput,
        recent=recent,
        idle=_idle([host]),
    )


def _span(hosts: Sequence[HostStatistics]) -> tuple[float, float]:
    usage = [worker for host in hosts for worker in host.usage.values()]
    return min((w.first for w in usage), default=inf), max((w.last for w in usage), default=-inf)


def _throughput(
    hosts: Sequence[HostStatistics], now: float, window: float
) -> tuple[float | None, float | None]:
    first, last = _span(hosts)
    if last <= first:
        return None, None
    total = sum(len(host.ends) for host in hosts)
    late = sum(len(host.ends) - bisect_right(host.ends, now - window) for host in hosts)
    length = min(window, now - first)
    return total / (last - first) * 60, late / length * 60 if length > 0 else None


def _idle(hosts: Sequence[HostStatistics]) -> float | None:
    usage = [worker for host in hosts for worker in host.usage.values()]
    available = sum(worker.available for worker in usage)
    if available <= 0:
        return None
    return max(0.0, 1 - sum(worker.busy for worker in usage) / available)  # rounding may bring it below 0


def _host_attribute(trial: FrozenTrial) -> Mapping[str, object]:
    """The HOST attribute of the notes: {"host": …, "msg": None | "COMPLETE" | "RUNNING", …}."""
    marked = trial.user_attrs.get("HOST")
    return marked if isinstance(marked, Mapping) else {}


def _is_feasible(trial: FrozenTrial) -> bool:
    # Under this key Optuna's samplers keep what constraints_func returned; above 0 is a violation.
    constraints = trial.system_attrs.get("constraints")
    return not constraints or all(c <= 0 for c in constraints)
