"""The short benchmark for CI: processes that all want the next number of one study.

`python -m bench contention`. It reports throughput and exits with 1 only if our storage lost a
number or gave one twice, which is a failure of correctness, not of speed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import parallel
from bench.context import Context, Figure
from bench.environment import describe
from bench.peers import JOURNAL_REDIS, OURS, Access, remove_namespace
from bench.runner import run_worker
from bench.servers import foreign_server, start_valkey

_NAIVE = "naive pottery.Redlock"
# What is shown, the storage, what its processes do.
_RUNS: tuple[tuple[str, str, Callable[[Context], Figure]], ...] = (
    ("ask/tell, ours", OURS, parallel.ask_and_tell),
    ("ask/tell, JournalRedis", JOURNAL_REDIS, parallel.ask_and_tell),
    ("creation, ours", OURS, parallel.create_trials),
    ("creation, JournalRedis", JOURNAL_REDIS, parallel.create_trials),
    (f"creation, {_NAIVE}", OURS, parallel.naive_redlock),
)


def main(argv: Sequence[str]) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench contention", description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument("--url", help="Redis server to use; default: a private one without persistence")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as folder:
        server = foreign_server(options.url) if options.url else start_valkey(Path(folder) / "valkey")
        try:
            return _report(Access(server.url, folder), options.processes, options.seconds)
        finally:
            server.stop()


def _report(access: Access, processes: int, seconds: float) -> int:
    for name, text in describe(access.redis_url).items():
        print(f"{name:<14}{text}")
    print(f"\n{processes} processes on one study, {seconds:g} s each; per second in all", flush=True)
    rates: dict[str, float] = {}
    lost = False
    for index, (name, peer, function) in enumerate(_RUNS):
        namespace = f"contention-{time.time_ns():x}-{index}"
        try:
            figure = _measure(access, namespace, peer, function, processes, seconds)
        except RuntimeError as error:
            print(f"  {name:<34}{'-':>8}  {error}", flush=True)
            lost |= "ours" in name  # what cannot be measured was not audited either
            continue
        finally:
            remove_namespace(peer, access, namespace)
        rates[name] = figure.value
        lost |= "ours" in name and figure.audit != "ok"
        audit = "numbers 0..n-1, none lost or twice" if figure.audit == "ok" else f"AUDIT: {figure.audit}"
        print(f"  {name:<34}{figure.value:>8.0f}  {audit}", flush=True)
    for kind, other in (("ask/tell", JOURNAL_REDIS), ("creation", JOURNAL_REDIS), ("creation", _NAIVE)):
        ours, peer_rate = rates.get(f"{kind}, ours"), rates.get(f"{kind}, {other}")
        if ours and peer_rate:
            print(f"  {kind}: {ours / peer_rate:.1f} x {other}")
    print("audit of our numbers:", "FAILED" if lost else "passed")
    return 1 if lost else 0


def _measure(
    access: Access,
    namespace: str,
    peer: str,
    function: Callable[[Context], Figure],
    processes: int,
    seconds: float,
) -> Figure:
    specification = {
        "peer": peer,
        "namespace": namespace,
        "access": asdict(access),
        "params": {"processes": processes, "seconds": seconds},
        "cpu": None,
        "module": function.__module__,
        "function": function.__name__,
    }
    return run_worker(specification, patience=seconds + 60)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
