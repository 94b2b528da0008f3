"""Statistics of one host: counts and lists that grow with each trial. Pure; `report` defines the words."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from math import inf
from statistics import fmean, median

import numpy as np
from optuna.trial import FrozenTrial, TrialState

_EPOCH = datetime(1970, 1, 1)


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


def seconds_of(time: datetime) -> float:
    """Seconds since 1970 of a naive time, without any time zone."""
    return (time - _EPOCH).total_seconds()


def datetime_of(seconds: float) -> datetime:
    """The inverse of `seconds_of`."""
    return _EPOCH + timedelta(seconds=seconds)


def host_report(name: str, host: HostStatistics, now: float, window: float) -> HostReport:
    """What is known of a host at `now`, in seconds as of `seconds_of`."""
    host.settle()
    throughput, recent = throughput_of([host], now, window)
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
        idle=idle_of([host]),
    )


def span_of(hosts: Sequence[HostStatistics]) -> tuple[float, float]:
    """First start and last end on these hosts; (inf, -inf) if nothing ended."""
    usage = [worker for host in hosts for worker in host.usage.values()]
    return min((w.first for w in usage), default=inf), max((w.last for w in usage), default=-inf)


def throughput_of(
    hosts: Sequence[HostStatistics], now: float, window: float
) -> tuple[float | None, float | None]:
    """Trials per minute of these hosts together, over all and within the window before now."""
    first, last = span_of(hosts)
    if last <= first:
        return None, None
    total = sum(len(host.ends) for host in hosts)
    late = sum(len(host.ends) - bisect_right(host.ends, now - window) for host in hosts)
    length = min(window, now - first)
    return total / (last - first) * 60, late / length * 60 if length > 0 else None


def idle_of(hosts: Sequence[HostStatistics]) -> float | None:
    """Idle share of these hosts together."""
    usage = [worker for host in hosts for worker in host.usage.values()]
    available = sum(worker.available for worker in usage)
    if available <= 0:
        return None
    return max(0.0, 1 - sum(worker.busy for worker in usage) / available)  # rounding may bring it below 0
