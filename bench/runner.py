"""Runs the cases: one fresh process for each measurement, the peers taking turns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from bench.context import WARM_UP_PART, Context, Figure
from bench.environment import cpus
from bench.peers import Access, remove_namespace
from bench.plan import ANY, SPLIT, Case
from bench.servers import Server, pin

_ROOT = Path(__file__).resolve().parent.parent
_PATIENCE = 420.0


@dataclass
class Outcome:
    """All measurements of one peer in one case."""

    figures: list[Figure] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def value(self) -> float | None:
        """Median of the main figure."""
        return median([f.value for f in self.figures]) if self.figures else None

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest measurement."""
        values = [f.value for f in self.figures]
        return min(values), max(values)

    @property
    def extra(self) -> dict[str, float]:
        """Medians of the extra figures."""
        names = self.figures[0].extra if self.figures else {}
        return {name: median([f.extra[name] for f in self.figures]) for name in names}

    @property
    def audit(self) -> str | None:
        """What was wrong in any measurement, else "ok", else None where nothing is audited."""
        found = [f.audit for f in self.figures if f.audit is not None]
        wrong = [text for text in found if text != "ok"]
        return wrong[0] if wrong else (found[0] if found else None)


Outcomes = dict[str, Outcome]


class Runner:
    """Measures cases on given servers.

    Args:
        access: How the workers reach the servers.
        servers: Servers that may be pinned to a CPU; those that are not ours have no pid.
        say: Told what is going on.

    Attributes:
        can_pin: Whether "same" and "split" are what they say; else all run wherever they like.
    """

    def __init__(self, access: Access, servers: Sequence[Server], say: Callable[[str], None]) -> None:
        self._access = access
        self._servers = [server for server in servers if server.pid is not None]
        self._say = say
        self._cpus = cpus()
        # Half pinned would measure neither: a server of somebody else stays where it is.
        all_ours = len(self._servers) == len(servers)
        self.can_pin = all_ours and len(self._cpus) > 1 and hasattr(os, "sched_setaffinity")
        self._count = 0
        self._name = f"bench_{time.time_ns():x}"  # the server may be somebody else's

    def measure(self, case: Case, peers: Sequence[str], repeat: int) -> Outcomes:
        """Run one case with these peers, each `repeat` times, in turns, each time on an empty name space."""
        cpu = self._place(case.cpu)
        outcomes = {peer: Outcome() for peer in peers}
        prepared: dict[str, str] = {}
        for turn in range(min(repeat, case.repeats)):
            for peer in _rotated(peers, turn):
                outcome = outcomes[peer]
                if outcome.failures:
                    continue  # it would fail again, and a time-out is long
                namespace = prepared.get(peer) or self._namespace()
                if case.prepare is not None and peer not in prepared:
                    self._run(case, peer, case.prepare, namespace, cpu, Outcome(), outcome)
                    if case.reads_only:
                        prepared[peer] = namespace
                if not outcome.failures:
                    self._run(case, peer, case.function, namespace, cpu, outcome, outcome)
                self._clean(peer, namespace, keep=peer in prepared)
        for peer, namespace in prepared.items():
            self._clean(peer, namespace)
        return outcomes

    def _run(
        self,
        case: Case,
        peer: str,
        function: Callable[[Context], Figure],
        namespace: str,
        cpu: int | None,
        results: Outcome,
        failures: Outcome,
    ) -> None:
        step = "" if function is case.function else ", preparing"
        self._say(f"{case.key}: {peer}{step}")
        specification = {
            "peer": peer,
            "namespace": namespace,
            "access": asdict(self._access),
            "params": case.params_for(peer),
            "cpu": cpu,
            "module": function.__module__,
            "function": function.__name__,
        }
        try:
            results.figures.append(run_worker(specification))
        except RuntimeError as error:
            failures.failures.append(f"{error}{step}")

    def _namespace(self) -> str:
        self._count += 1
        return f"{self._name}_{self._count}"

    def _clean(self, peer: str, namespace: str, *, keep: bool = False) -> None:
        """Remove what a measurement left, or only what stands beside it."""
        for part in (WARM_UP_PART,) if keep else ("", WARM_UP_PART):
            remove_namespace(peer, self._access, namespace + part)

    def _place(self, wanted: str) -> int | None:
        """Pin the servers and return the CPU for the client; None where all may run anywhere."""
        if wanted == ANY or not self.can_pin:
            for server in self._servers:
                pin(server.pid or 0, self._cpus)
            return None
        for server in self._servers:
            pin(server.pid or 0, self._cpus[:1])
        return self._cpus[1 if wanted == SPLIT else 0]


def _rotated(peers: Sequence[str], turn: int) -> list[str]:
    start = turn % len(peers)
    return [*peers[start:], *peers[:start]]


def run_worker(specification: dict[str, Any], patience: float = _PATIENCE) -> Figure:
    """Run one measurement in a fresh process.

    Raises:
        RuntimeError: With the worker's last line if it failed, or the time it was given.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.worker"],
            cwd=_ROOT,
            input=json.dumps(specification),
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"not done in {patience:g} s") from None
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"exit code {done.returncode}")
    return Figure(**json.loads(done.stdout.strip().splitlines()[-1]))
