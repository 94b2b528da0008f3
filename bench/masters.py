"""Several masters beside one, and beside the obvious fix: `python -m bench masters`.

Processes that all want the next number of one study; one worker loop; the price of `lock="pottery"`; one of
three masters that is killed under load and comes back empty. A KeyDB pair in active-replica mode is measured
where `--keydb` names its program. It exits with 1 only if a number was lost or given twice, or a worker met
an error.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
import redis
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalRedisBackend

from bench import masters_faults
from bench.environment import describe
from bench.servers import Server, start_valkey
from optuna_dlock import RedisLockedStorage

_Work = Callable[[Sequence[str], int, float, Any], list[int]]
_ONE, _THREE, _KEYDB = "1 Valkey", "3 Valkey", "2 KeyDB, active-replica"
_CREATE, _LOOP, _JOURNAL = "creations/s, ", "worker loop, trials/s, ", "worker loop, trials/s, JournalRedis"
_LOOPS = "worker loops on one study, trials/s, "
_COUNT = "pottery.Redlock + counter, "
_RATIOS = (
    ("creations, 3 Valkey : 1 Valkey", _CREATE + _THREE, _CREATE + _ONE, 0.35),
    ("creations : pottery.Redlock + counter, 2 KeyDB", _CREATE + _KEYDB, _COUNT + _KEYDB, 60),
    ("worker loop, 3 Valkey : 1 Valkey", _LOOP + _THREE, _LOOP + _ONE, 0.4),
    ("worker loop, 3 Valkey : JournalRedis", _LOOP + _THREE, _JOURNAL, 1.5),
)


def main(argv: Sequence[str]) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench masters", description=__doc__)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    parser.add_argument(
        "--repeat", type=int, default=3, help="measurements of each figure; the median counts"
    )
    parser.add_argument(
        "--finished", type=int, default=50_000, help="trials that a master gets back which lost them"
    )
    parser.add_argument("--keydb", metavar="BINARY", help="keydb-server; without it that row is left out")
    options = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        groups = {f"{n} Valkey": list(_valkeys(stack, folder, n)) for n in (1, 2, 3)}
        if options.keydb:
            groups[_KEYDB] = list(_keydb_pair(stack, folder, options.keydb))
        for title, text in describe(groups[_ONE][0].url).items():
            print(f"{title:<14}{text}")
        failed = _report(groups, options)
        print(f"\none of 3 Valkey killed under load, {options.processes} processes that create trials")
        failed |= masters_faults.report(folder, options.processes, options.finished)
        print("audit of our numbers:", "FAILED" if failed else "passed")
        return int(failed)


def _valkeys(stack: contextlib.ExitStack, folder: Path, n: int) -> Iterator[Server]:
    for index in range(n):
        server = start_valkey(folder / f"valkey{n}.{index}")
        stack.callback(server.stop)
        yield server


def _keydb_pair(stack: contextlib.ExitStack, folder: Path, binary: str) -> Iterator[Server]:
    flags = ("--active-replica", "yes", "--multi-master", "yes")
    servers = [start_valkey(folder / f"keydb{index}", binary, flags) for index in range(2)]
    for server, peer in (servers, servers[::-1]):
        stack.callback(server.stop)
        client = redis.Redis.from_url(server.url)
        client.execute_command("REPLICAOF", "127.0.0.1", peer.port)  # type: ignore[no-untyped-call]
        client.close()
    time.sleep(3)  # they connect to each other once a second
    yield from servers


def _report(groups: dict[str, list[Server]], options: argparse.Namespace) -> bool:
    print(
        f"\n{options.processes} processes, {options.seconds:g} s each, medians of {options.repeat}",
        flush=True,
    )
    rows: list[tuple[str, str, int, _Work]] = [
        *((_CREATE + group, group, options.processes, _create) for group in groups),
        *(
            (f'the same, lock="pottery", {group}', group, options.processes, _create_with_pottery)
            for group in groups
            if group != _ONE
        ),
        *((_LOOP + group, group, 1, _optimize) for group in groups),
        (_JOURNAL, _ONE, 1, _optimize_journal),
        *((_LOOPS + group, group, options.processes, _optimize) for group in groups),
        (_LOOPS + "JournalRedis", _ONE, options.processes, _optimize_journal),
        *((_COUNT + group, group, options.processes, _count) for group in groups),
    ]
    failed = False
    measured: dict[str, list[float]] = {title: [] for title, *_ in rows}
    for _ in range(options.repeat):  # the rows take turns
        for title, group, processes, work in rows:
            urls = [server.url for server in groups[group]]
            rate, numbers = _measure(work, urls, processes, options.seconds)
            measured[title].append(rate)
            if work in _OURS and sorted(numbers) != list(range(len(numbers))):
                failed = True
                print(f"  {title}: AUDIT: {len(numbers)} numbers are not 0..n-1", flush=True)
    for title, rates in measured.items():
        print(f"  {title:<52}{sorted(rates)[len(rates) // 2]:>9.1f}")
    medians = {title: sorted(rates)[len(rates) // 2] for title, rates in measured.items()}
    for title, part, whole, target in _RATIOS:
        if part in medians and medians[whole]:
            print(f"  {title:<52}{medians[part] / medians[whole]:>9.2f} x (target {target:g})")
    return failed


def _measure(work: _Work, urls: Sequence[str], processes: int, seconds: float) -> tuple[float, list[int]]:
    """Numbers per second in all, and the numbers."""
    name = f"bench{time.time_ns():x}"
    study_id = 0
    if work in _OURS:
        with RedisLockedStorage(list(urls), prefix=name) as storage:
            study_id = optuna.create_study(storage=storage, study_name=name)._study_id
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    barrier = context.Barrier(processes)
    workers = [
        context.Process(target=_child, args=(work, urls, study_id, seconds, name, barrier, results))
        for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    numbers = [number for _ in workers for number in results.get(timeout=seconds + 120)]
    for worker in workers:
        worker.join()
    return len(numbers) / seconds, numbers


def _child(
    work: _Work, urls: Sequence[str], study_id: int, seconds: float, name: str, barrier: Any, results: Any
) -> None:
    results.put(work([*urls, name], study_id, seconds, barrier))


def _create(
    urls: Sequence[str],
    study_id: int,
    seconds: float,
    barrier: Any,
    lock: Literal["redlock", "pottery"] = "redlock",
) -> list[int]:
    storage = RedisLockedStorage(urls[:-1], prefix=urls[-1], lock=lock)
    storage.get_all_studies()
    barrier.wait()
    end, numbers = time.monotonic() + seconds, []
    while time.monotonic() < end:
        numbers.append(storage.create_new_trial(study_id) & 0xFFFFFFFF)
    return numbers


def _create_with_pottery(urls: Sequence[str], study_id: int, seconds: float, barrier: Any) -> list[int]:
    return _create(urls, study_id, seconds, barrier, "pottery")


def _optimize(urls: Sequence[str], study_id: int, seconds: float, barrier: Any) -> list[int]:
    return _run_trials(RedisLockedStorage(urls[:-1], prefix=urls[-1]), urls[-1], seconds, barrier)


def _optimize_journal(urls: Sequence[str], study_id: int, seconds: float, barrier: Any) -> list[int]:
    return _run_trials(
        JournalStorage(JournalRedisBackend(urls[0], prefix=urls[-1])), urls[-1], seconds, barrier
    )


def _run_trials(storage: BaseStorage, name: str, seconds: float, barrier: Any) -> list[int]:
    """A worker with ten parameters."""
    sampler = optuna.samplers.RandomSampler(seed=1)
    study = optuna.create_study(study_name=name, storage=storage, sampler=sampler, load_if_exists=True)
    numbers: list[int] = []

    def objective(trial: optuna.Trial) -> float:
        numbers.append(trial.number)
        return sum(trial.suggest_float(f"x{i}", 0, 1) for i in range(10))

    barrier.wait()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        study.optimize(objective, n_trials=20)
    return numbers


def _count(urls: Sequence[str], _: int, seconds: float, barrier: Any) -> list[int]:
    """`pottery.Redlock` on all masters around a counter that is read near and written near."""
    from pottery import Redlock, ReleaseUnlockedLock

    clients = [redis.Redis.from_url(url) for url in urls[:-1]]
    lock = Redlock(key=f"{urls[-1]}:lock", masters=set(clients), auto_release_time=10.0)
    key = f"{urls[-1]}:counter"
    barrier.wait()
    end, numbers = time.monotonic() + seconds, []
    while time.monotonic() < end:
        if not lock.acquire(timeout=seconds):
            continue
        number = int(clients[0].get(key) or 0)
        clients[0].set(key, number + 1)
        numbers.append(number)
        with contextlib.suppress(ReleaseUnlockedLock):
            lock.release()
    return numbers


_OURS = (_create, _create_with_pottery, _optimize)
