"""One of three masters is killed under load, and comes back empty: what workers notice, when it votes."""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import optuna
import redis
from optuna.trial import TrialState, create_trial

from bench.servers import Server, start_valkey
from optuna_dlock import RedisLockedStorage

_BUCKET = 0.1  # seconds
_BEFORE, _AFTER = 2.0, 4.0  # seconds of load before and after the kill
_ENOUGH = 0.7  # times the throughput of before


def report(folder: Path, processes: int, finished: int) -> bool:
    """Run both and print; whether a number was lost or given twice, or a worker met an error."""
    kill = _Killed(folder / "killed")
    failed = kill.run(processes)
    for line in kill.lines():
        print(f"  {line}", flush=True)
    print(f"  {_come_back(folder / 'back', finished)}", flush=True)
    return failed


@contextlib.contextmanager
def _three(folder: Path) -> Iterator[list[Server]]:
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        servers = []
        for index in range(3):
            servers.append(start_valkey(folder / str(index)))
            stack.callback(servers[-1].stop)
        # All contenders ask the first one first, in the order of addresses: that is the worst to lose.
        yield sorted(servers, key=lambda server: server.url)


class _Killed:
    """Processes that create trials while one of three masters is killed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._moments: list[float] = []  # of creations, in seconds after the kill
        self._errors: list[str] = []

    def run(self, processes: int) -> bool:
        """Measure; whether something went wrong."""
        with _three(self._folder) as servers:
            urls = [server.url for server in servers]
            with RedisLockedStorage(urls) as storage:
                study_id = optuna.create_study(storage=storage)._study_id
            context = multiprocessing.get_context("fork")
            results: Any = context.Queue()
            barrier = context.Barrier(processes + 1)
            workers = [
                context.Process(target=_create, args=(urls, study_id, barrier, results))
                for _ in range(processes)
            ]
            for worker in workers:
                worker.start()
            barrier.wait()
            time.sleep(_BEFORE)
            killed_at = time.monotonic()
            servers[0].kill()
            numbers: list[int] = []
            for _ in workers:
                found, error = results.get(timeout=120)
                numbers += [number for number, _ in found]
                self._moments += [moment - killed_at for _, moment in found]
                self._errors += [error] if error else []
            for worker in workers:
                worker.join()
            with RedisLockedStorage(urls) as storage:
                n = storage.get_n_trials(study_id)
        return bool(self._errors) or sorted(numbers) != list(range(n))

    def lines(self) -> Iterator[str]:
        """What was found."""
        counts = {
            at: len(list(group))
            for at, group in groupby(sorted(self._moments), key=lambda moment: int(moment // _BUCKET))
        }
        before = self._rate(-1.0, 0.0)
        yield f"{'creations/s in the second before the kill':<52}{before:>9.1f}"
        shown = range(round(-0.5 / _BUCKET), round(2.5 / _BUCKET))
        buckets = " ".join(f"{'| ' if at == 0 else ''}{counts.get(at, 0)}" for at in shown)
        yield f"creations per {_BUCKET * 1000:g} ms, the kill at |: {buckets}"
        back = next(
            (at * _BUCKET for at in range(round((_AFTER - 0.5) / _BUCKET)) if self._is_back(at, before)), None
        )
        late = "not within the run" if back is None else f"{back:.1f}"
        yield f"{f'seconds until {_ENOUGH:g} x that again (over 0.5 s)':<52}{late:>9}   (target 2)"
        yield f"{'errors that workers met':<52}{len(self._errors):>9}   (target 0)"
        yield from self._errors[:3]

    def _rate(self, start: float, end: float) -> float:
        return sum(start <= moment < end for moment in self._moments) / (end - start)

    def _is_back(self, at: int, before: float) -> bool:
        return self._rate(at * _BUCKET, at * _BUCKET + 0.5) >= _ENOUGH * before


def _create(urls: Sequence[str], study_id: int, barrier: Any, results: Any) -> None:
    storage = RedisLockedStorage(urls)
    storage.get_all_studies()
    barrier.wait()
    end, found, error = time.monotonic() + _BEFORE + _AFTER, [], ""
    try:
        while time.monotonic() < end:
            found.append((storage.create_new_trial(study_id) & 0xFFFFFFFF, time.monotonic()))
    except Exception as problem:  # whatever it is, it is what is counted here
        error = f"{type(problem).__name__}: {problem}"
    results.put((found, error))


def _come_back(folder: Path, finished: int) -> str:
    """Seconds from when a master that lost its data answers until it votes in a study of so many trials."""
    with _three(folder) as servers:
        urls = [server.url for server in servers]
        storage = RedisLockedStorage(urls)
        study_id = optuna.create_study(storage=storage)._study_id
        template = create_trial(state=TrialState.COMPLETE, value=1.0)
        for _ in range(finished):
            storage.create_new_trial(study_id, template)
        servers[0].kill()
        storage.create_new_trial(study_id, template)
        servers[0] = start_valkey(folder / "again", port=servers[0].port)
        start = time.monotonic()
        with _busy(storage, study_id), redis.Redis.from_url(servers[0].url) as client:
            while not _votes(client, study_id):
                if time.monotonic() > start + 120:
                    return f"back empty, {finished} finished trials: no vote within 120 s"
                time.sleep(0.005)
            seconds = time.monotonic() - start
            servers[1].kill()  # from here on nothing is decided without its vote
        storage.create_new_trial(study_id, template)
        whole = storage.get_n_trials(study_id) > finished
        storage.close()
        servers[0].stop()
    title = f"seconds until it votes, back empty, {finished} finished trials"
    return f"{title:<52}{seconds:>9.2f}   (target 10){'' if whole else ' TRIALS ARE MISSING'}"


@contextlib.contextmanager
def _busy(storage: RedisLockedStorage, study_id: int) -> Iterator[None]:
    """A worker goes on meanwhile: it is workers who notice that a master is back."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            storage.create_new_trial(study_id)
            time.sleep(0.001)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _votes(client: redis.Redis, study_id: int) -> bool:
    """Whether a master has the whole state of the study in its present run."""
    keys = client.keys(f"optuna@*:{{{study_id}}}:ballots")
    return any(client.hexists(key, "s") for key in keys)
