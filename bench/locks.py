"""Locks against each other: `python -m bench.locks [--url URL]`.

Two workloads, nothing in the section: one process alone, and eight that all want the same lock. Every
lock has its turn in each round, in the same processes, on the same server; the medians count.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import redis

from bench.environment import describe
from bench.servers import start_valkey

PROCESSES = 8
ROUNDS = 3
OURS = "optuna_dlock"
REDIS_PY = "redis-py Lock, sleep 0.1"
REDIS_LOCK = "python-redis-lock"
POTTERY = "pottery.Redlock"
OURS_POTTERY = 'optuna_dlock, lock="pottery"'
_TTL = 30
_PATIENCE = 120.0


class Lock(Protocol):
    """What all of them have in common."""

    def acquire(self) -> Any:
        """Wait for the lock."""

    def release(self) -> Any:
        """Give it back."""


def _ours(url: str, name: str) -> Lock:
    from optuna_dlock.lock import LockManager
    from optuna_dlock.node import connection_factory

    return LockManager(connection_factory(url, 60.0), url, 60.0, "bench").lock(name, ttl=_TTL)


def _ours_pottery(url: str, name: str) -> Lock:
    from optuna_dlock.node import connection_factory
    from optuna_dlock.pottery_lock import PotteryLockManager

    return PotteryLockManager(connection_factory(url, 60.0), url, 60.0, "bench").lock(name, ttl=_TTL)


def _redis_py(url: str, name: str) -> Lock:
    from redis.lock import Lock as RedisPyLock

    found: Lock = RedisPyLock(redis.Redis.from_url(url), name, timeout=_TTL, sleep=0.1)
    return found


def _redis_lock(url: str, name: str) -> Lock:
    from redis_lock import Lock as RedisLock

    found: Lock = RedisLock(redis.StrictRedis.from_url(url), name, expire=_TTL)
    return found


def _pottery(url: str, name: str) -> Lock:
    from pottery import Redlock

    found: Lock = Redlock(key=name, masters={redis.Redis.from_url(url)}, auto_release_time=_TTL)
    return found


LOCKS: dict[str, Callable[[str, str], Lock]] = {
    OURS: _ours,
    REDIS_PY: _redis_py,
    REDIS_LOCK: _redis_lock,
    POTTERY: _pottery,
    OURS_POTTERY: _ours_pottery,
}
# figure, of ours, compared with, what it has to be: "at least" or "at most" so many times the other's.
TARGETS: tuple[tuple[str, str, str, float], ...] = (
    ("alone", POTTERY, ">=", 4.0),
    ("alone", REDIS_PY, ">=", 1.2),
    ("together", REDIS_LOCK, ">=", 1.5),
    ("max", REDIS_PY, "<=", 0.1),
    ("max", POTTERY, "<=", 0.1),
)
FAIR_SHARE = 0.8


def bench_locks(url: str, seconds: float) -> list[dict[str, Any]]:
    """Measure all locks on one server.

    Args:
        url: The server, as redis-py takes it; its keys under the names used here are left to expire.
        seconds: For each measurement; at least 2, or the rare long waits are not seen.

    Returns:
        For each lock: `lock`; `alone` and `together`, pairs of acquire and release per second; `p50`,
        `p99` and `max`, milliseconds waited in acquire with all processes; `share`, the smallest number
        of turns of a process divided by the largest. Or `lock` and `error`.
    """
    url = url.partition("?")[0]
    with _Park() as park:
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in LOCKS}
        failed: dict[str, str] = {}
        for turn in range(ROUNDS):
            for name in LOCKS:
                if name in failed:
                    continue
                try:
                    samples[name].append(
                        _sample(park, url, name, f"bench-{time.time_ns():x}-{turn}", seconds)
                    )
                except RuntimeError as error:
                    failed[name] = str(error)
    rows: list[dict[str, Any]] = []
    for name, found in samples.items():
        if name in failed:
            rows.append({"lock": name, "error": failed[name]})
        else:
            rows.append({"lock": name} | {k: statistics.median(s[k] for s in found) for k in found[0]})
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> list[tuple[str, bool]]:
    """Each target in words, and whether this run meets it."""
    by_name = {row["lock"]: row for row in rows if "error" not in row}
    ours = by_name[OURS]
    found = []
    for figure, other, sense, factor in TARGETS:
        if other in by_name:
            ratio = ours[figure] / by_name[other][figure]
            met = ratio >= factor if sense == ">=" else ratio <= factor
            found.append((f"{figure}: {ratio:.3g} x {other}, {sense} {factor:g}", met))
    found.append(
        (
            f"smallest share / largest share: {ours['share']:.2f}, >= {FAIR_SHARE:g}",
            ours["share"] >= FAIR_SHARE,
        )
    )
    return found


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'':<28}{'alone':>9}{f'{PROCESSES} procs':>9}{'wait p50':>10}{'p99':>9}{'max':>9}{'share':>7}",
        f"{'':<28}{'pairs/s':>9}{'pairs/s':>9}{'ms':>10}{'ms':>9}{'ms':>9}",
    ]
    for row in rows:
        if "error" in row:
            lines.append(f"{row['lock']:<28}  {row['error']}")
        else:
            lines.append(
                f"{row['lock']:<28}{row['alone']:>9.0f}{row['together']:>9.0f}{row['p50']:>10.2f}"
                f"{row['p99']:>9.2f}{row['max']:>9.1f}{row['share']:>7.2f}"
            )
    return "\n".join(lines)


def _sample(park: _Park, url: str, name: str, key: str, seconds: float) -> dict[str, float]:
    (alone,) = park.run(1, (name, url, key + "-alone", seconds))
    shares = park.run(PROCESSES, (name, url, key, seconds))
    waits = sorted(wait for waits, _ in shares for wait in waits)
    turns = [len(waits) for waits, _ in shares]
    return {
        "alone": len(alone[0]) / alone[1],
        "together": sum(turns) / max(taken for _, taken in shares),
        "p50": waits[len(waits) // 2] * 1000,
        "p99": waits[len(waits) * 99 // 100] * 1000,
        "max": waits[-1] * 1000,
        "share": min(turns) / max(turns),
    }


class _Park:
    """The processes. They are started once: starting is not what is measured."""

    def __enter__(self) -> _Park:
        spawn: Any = multiprocessing.get_context("spawn")
        self._barriers = {count: spawn.Barrier(count, timeout=_PATIENCE) for count in (1, PROCESSES)}
        self._pipes = []
        self._processes = []
        for _ in range(PROCESSES):
            ours, theirs = spawn.Pipe()
            self._pipes.append(ours)
            self._processes.append(
                spawn.Process(target=_work, args=(theirs, self._barriers), daemon=True, name="bench")
            )
            self._processes[-1].start()
        for pipe in self._pipes:
            pipe.recv()  # it has its modules
        return self

    def run(self, count: int, order: tuple[str, str, str, float]) -> list[tuple[list[float], float]]:
        """Give `count` processes the same order; the waits of each, and the seconds it took."""
        for pipe in self._pipes[:count]:
            pipe.send((count, order))
        answers = [pipe.recv() for pipe in self._pipes[:count]]
        for answer in answers:
            if isinstance(answer, str):
                raise RuntimeError(answer.strip().splitlines()[-1])
        return answers

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10.0)
            process.kill()


def _work(pipe: Any, barriers: dict[int, Any]) -> None:
    import optuna_dlock.pottery_lock  # noqa: F401, importing it takes a second, which no measurement may contain

    pipe.send(None)
    while (message := pipe.recv()) is not None:
        count, (name, url, key, seconds) = message
        try:
            lock = LOCKS[name](url, key)
            lock.acquire()
            lock.release()
            barriers[count].wait()
            pipe.send(_measure(lock, seconds))
        except BaseException:
            barriers[count].abort()
            pipe.send(traceback.format_exc())


def _measure(lock: Lock, seconds: float) -> tuple[list[float], float]:
    clock, waits = time.perf_counter, []
    start = now = clock()
    end = start + seconds
    while now < end:
        lock.acquire()
        waits.append(clock() - now)
        lock.release()
        now = clock()
    return waits, now - start


def main(argv: Sequence[str] | None = None) -> int:
    """Run and print; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m bench.locks", description=__doc__)
    parser.add_argument("--url", help="server to use; default: a private Valkey without persistence")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as folder:
        server = None if options.url else start_valkey(Path(folder) / "valkey")
        try:
            url = options.url or (server.url if server else "")
            for name, text in describe(url).items():
                print(f"{name:<14}{text}")
            rows = bench_locks(url, options.seconds)
        finally:
            if server:
                server.stop()
    print(f"\n{table(rows)}\n")
    found = verdicts(rows)
    for text, met in found:
        print(("met     " if met else "MISSED  ") + text)
    return 0 if all(met for _, met in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
