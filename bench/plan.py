"""Which workload runs with which peers and numbers, and what it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import parallel, workloads
from bench.context import Context, Figure
from bench.peers import (
    INMEMORY,
    JOURNAL_FILE,
    JOURNAL_REDIS,
    MYSQL,
    OURS,
    POSTGRES,
    SLOW,
    SQLITE,
    UNPICKLING,
)

SAME, SPLIT, ANY = "same", "split", "any"  # client on the server's CPU, on another one, wherever
_STORAGES = (OURS, INMEMORY, JOURNAL_REDIS, JOURNAL_FILE, SQLITE, POSTGRES, MYSQL)
_LIGHT = (OURS, INMEMORY, JOURNAL_REDIS, JOURNAL_FILE)


@dataclass(frozen=True)
class Target:
    """What our figure has to reach.

    Attributes:
        text: As the table shows it.
        bound: The limit; `at_least` says on which side of it to be.
        peer: Whose figure ours is divided by; None: the figure itself.
        case: Case of that figure; default the same.
        extra: Name of the extra figure that is meant; None: the main one.
        inverse: Divide the other figure by ours.
    """

    text: str
    bound: float
    at_least: bool
    peer: str | None = None
    case: str | None = None
    extra: str | None = None
    inverse: bool = False


@dataclass(frozen=True)
class Case:
    """One workload with fixed numbers: one block of the table.

    Attributes:
        key: Its name in the table and in the JSON.
        group: What `--only` selects it by.
        slow: Numbers that replace `params` for the SQL databases.
        prepare: Fills the name space before, in a process of its own.
        reads_only: All repeats may read what was prepared once.
        repeats: Fewer repeats than asked for, where one takes very long.
    """

    key: str
    group: str
    title: str
    unit: str
    function: Callable[[Context], Figure]
    peers: Sequence[str]
    params: Mapping[str, Any]
    cpu: str = ANY
    slow: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Context], Figure] | None = None
    reads_only: bool = False
    targets: Sequence[Target] = ()
    repeats: int = 99

    @property
    def higher_is_better(self) -> bool:
        """Rates are better when higher; times and sizes when lower."""
        return self.unit.endswith("/s")

    def params_for(self, peer: str) -> dict[str, Any]:
        """The workload's numbers for this peer."""
        return {**self.params, **(self.slow if peer in SLOW else {})}


def faster(peer: str, bound: float) -> Target:
    """Ours reaches `bound` times the peer's rate."""
    return Target(f">= {bound:g} x {peer}", bound, True, peer)


def at_most(bound: float, unit: str, extra: str | None = None) -> Target:
    """The figure itself, or an extra one, stays below `bound`."""
    return Target(f"{extra or 'value'} <= {bound:g} {unit}".replace("value ", ""), bound, False, extra=extra)


def plan(*, quick: bool) -> list[Case]:
    """All cases, in the order of the table; `quick` makes them small and skips the large sizes."""
    return [
        *_worker_loop(quick),
        *_many_processes(quick),
        *_refresh(quick),
        *_cold(quick),
        *_samplers(quick),
        *_queue(quick),
        *_fill(quick),
        *_round_trips_and_memory(quick),
    ]


def groups() -> list[str]:
    """The names `--only` knows."""
    return [*dict.fromkeys(case.group for case in plan(quick=True)), "locks"]


def _worker_loop(quick: bool) -> list[Case]:
    numbers = {"trials": 200 if quick else 500, "rounds": 1 if quick else 3}
    slow = {"trials": 30 if quick else 100, "rounds": 1}
    title = "worker loop, random sampler, 10 floats"
    same = (faster(INMEMORY, 0.45), faster(JOURNAL_REDIS, 4.5), faster(POSTGRES, 30))
    split = (faster(INMEMORY, 0.25), faster(JOURNAL_REDIS, 7))
    some = (OURS, INMEMORY, JOURNAL_REDIS, POSTGRES)
    loop = workloads.worker_loop
    return [
        Case("W1 same", "W1", title, "trials/s", loop, _STORAGES, numbers, SAME, slow, targets=same),
        Case("W1 split", "W1", title, "trials/s", loop, some, numbers, SPLIT, slow, targets=split),
    ]


def _many_processes(quick: bool) -> list[Case]:
    per = 30 if quick else 100
    slow = {"trials": 5 if quick else 20}
    many = 16 if quick else 64
    title = "{} processes x {} ask/tell on one study, 2 floats (InMemory: one process)"
    run = parallel.ask_and_tell
    no_slower = Target("no slower than with 8", 0.95, True, OURS, "W2")
    return [
        Case(
            *("W2", "W2", title.format(8, per), "trials/s", run, _STORAGES),
            {"processes": 8, "trials": per},
            slow=slow,
            targets=(faster(JOURNAL_REDIS, 4),),
        ),
        Case(
            *(f"W2 {many}", "W2", title.format(many, per), "trials/s", run, (OURS,)),
            {"processes": many, "trials": per},
            targets=(no_slower,),
        ),
    ]


def _refresh(quick: bool) -> list[Case]:
    cases = []
    for trials, peers in (
        (1_000, _STORAGES),
        (10_000, (*_LIGHT, SQLITE)),
        (100_000, (OURS, INMEMORY)),
    ):
        for cpu in (SAME, SPLIT):
            if quick and (trials > 1_000 or cpu == SPLIT):
                continue
            cases.append(
                Case(
                    f"W3 {trials} {cpu}",
                    "W3",
                    f"refresh of {trials:,} trials after one new one",
                    "ms",
                    workloads.warm_refresh,
                    peers if cpu == SAME else (OURS,),
                    {"trials": trials, "samples": 100 if trials == 1_000 else 300},
                    cpu,
                    {"samples": 50},
                    prepare=workloads.prepare_finished,
                    targets=(at_most(2.5, "bare", "round trips"),),
                )
            )
    return cases


def _cold(quick: bool) -> list[Case]:
    cases = []
    for trials, rounds, peers in (
        (1_000, 5, (OURS, UNPICKLING, JOURNAL_REDIS, JOURNAL_FILE, SQLITE, POSTGRES, MYSQL)),
        (10_000, 3, (OURS, UNPICKLING, JOURNAL_REDIS, JOURNAL_FILE, SQLITE)),
        (50_000, 1, (OURS, UNPICKLING)),
    ):
        if quick and trials > 1_000:
            continue
        floor = Target(f"<= 1.3 x {UNPICKLING}", 1.3, False, UNPICKLING)
        others = tuple(
            Target(f">= {bound} x as fast as {peer}", bound, True, peer, inverse=True)
            for peer, bound in ((JOURNAL_REDIS, 3), (SQLITE, 40))
            if peer in peers
        )
        cases.append(
            Case(
                f"W4 {trials}",
                "W4",
                f"cold load of {trials:,} finished trials",
                "s",
                workloads.cold_load,
                peers,
                {"trials": trials, "rounds": rounds},
                SAME,
                {"rounds": 1},
                prepare=workloads.prepare_finished,
                reads_only=True,
                targets=(floor, *others),
            )
        )
    return cases


def _samplers(quick: bool) -> list[Case]:
    before = 200 if quick else 1_000
    return [
        Case(
            *("W5", "W5", f"TPE, 5 floats, {before:,} trials before", "trials/s", workloads.tpe, _STORAGES),
            {"before": before, "trials": 30 if quick else 100},
            SAME,
            {"trials": 10 if quick else 30},
            targets=(faster(INMEMORY, 0.9),),
        ),
        Case(
            *("W6", "W6", "report + should_prune, 100 trials x 100 steps before", "calls/s"),
            *(workloads.pruning, _STORAGES),
            {"before": 100, "steps": 1_000, "rounds": 1 if quick else 3},
            SAME,
            {"steps": 200, "rounds": 1},
            targets=(faster(JOURNAL_REDIS, 2.5), at_most(1.25, "x", "flat, storage calls")),
        ),
    ]


def _queue(quick: bool) -> list[Case]:
    trials = 200 if quick else 500
    title = f"{trials} enqueued trials drained by {{}} processes (InMemory: one)"
    return [
        Case(
            *("W7", "W7", title.format(4), "trials/s", parallel.drain, _STORAGES),
            {"processes": 4, "trials": trials},
            slow={"trials": 40 if quick else 100},
            targets=(faster(JOURNAL_REDIS, 3.5),),
        ),
        Case(
            *("W7 16", "W7", title.format(16), "trials/s", parallel.drain, (OURS,)),
            {"processes": 16, "trials": trials},
        ),
    ]


def _fill(quick: bool) -> list[Case]:
    numbers = {"trials": 1_000 if quick else 10_000, "seconds": 4 if quick else 8}
    at_least = Target(">= 3000 trials/s", 3_000, True)
    title = f"of {numbers['trials']:,} finished templates"
    return [
        Case(
            *("fill", "fill", f"add_trials {title}", "trials/s", workloads.add_trials, _STORAGES, numbers),
            SAME,
            targets=(at_least,),
        ),
        Case(
            *("fill copy", "fill", f"copy_study {title}", "trials/s", workloads.copy_study),
            *((OURS, INMEMORY), numbers, SAME),
            targets=(at_least,),
        ),
    ]


def _round_trips_and_memory(quick: bool) -> list[Case]:
    both = (OURS, JOURNAL_REDIS)
    return [
        Case(
            *("latency", "latency", "trial of 10 floats, 1 ms added to each round trip", "ms"),
            *(workloads.latency, both, {"trials": 20 if quick else 50}),
            targets=(at_most(6, "per trial", "waits"),),
        ),
        Case(
            *("memory", "memory", "server bytes per finished trial of 10 floats", "bytes"),
            *(workloads.memory_per_trial, both, {"trials": 500 if quick else 5_000}),
            targets=(at_most(500, "bytes"),),
            repeats=1,
        ),
        Case(
            *("memory calls", "memory", "server bytes left by one overwritten attribute", "bytes"),
            *(workloads.memory_per_call, (OURS,) if quick else both, {"calls": 10_000}),
            targets=(at_most(1, "byte"),),
            repeats=1,
        ),
    ]
