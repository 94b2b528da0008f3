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

from collections.abc import Container, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import Protocol

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.report_hosts import (
    HostReport,
    HostStatistics,
    datetime_of,
    host_report,
    idle_of,
    seconds_of,
    span_of,
    throughput_of,
)

UNKNOWN_HOST = "?"
WINDOW = 600.0


class Worker(Protocol):
    """Who ran a trial, as the storage recorded it."""

    @property
    def host(self) -> str:
        """Name of the machine."""


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
        hosts = [host_report(name, host, at, window) for name, host in self.hosts.items()]
        # By the mean, as the notes do; who finished nothing comes last.
        hosts.sort(key=lambda h: (inf if h.mean is None else h.mean, h.host))
        everywhere = list(self.hosts.values())
        first, last = span_of(everywhere)
        throughput, recent = throughput_of(everywhere, at, window)
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
            idle=idle_of(everywhere),
            best=list(self._best),
            first_start=datetime_of(first) if first < inf else None,
            last_end=datetime_of(last) if last > -inf else None,
            hosts=hosts,
        )


def _host_attribute(trial: FrozenTrial) -> Mapping[str, object]:
    """The HOST attribute of the notes: {"host": …, "msg": None | "COMPLETE" | "RUNNING", …}."""
    marked = trial.user_attrs.get("HOST")
    return marked if isinstance(marked, Mapping) else {}


def _is_feasible(trial: FrozenTrial) -> bool:
    # Under this key Optuna's samplers keep what constraints_func returned; above 0 is a violation.
    constraints = trial.system_attrs.get("constraints")
    return not constraints or all(c <= 0 for c in constraints)
