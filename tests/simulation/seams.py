"""Where the package meets the world: clocks, threads, sockets, chance. Replaced by simulated ones meanwhile.

Every module takes these from module attributes of its own (`time.sleep` through its `time`), which are
exchanged. `test_simulation.py` sees to it that no module is forgotten.
"""

from __future__ import annotations

import contextlib
import functools
import random
import select
import sys
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

from optuna_dlock.ensemble import Ensemble
from optuna_dlock.retry import Backoff
from optuna_dlock.worker import Worker, WorkerProcess
from tests.simulation.scheduler import Scheduler, Task
from tests.simulation.wire import Network, SimulatedConnection

# What is exchanged, by module.
_EXCHANGED = {
    "budget": ("time", "Backoff"),
    "ensemble": ("time", "secrets", "threading", "_TTL_MS"),
    "ensemble_lock": ("time", "random", "secrets", "threading"),
    "fanout": ("time", "select", "threading", "Backoff"),
    "master": ("time", "threading", "all_masters_scripts"),
    "open_ballot": ("time",),
    "quorum": ("random",),
    "repair": ("time", "threading", "_TTL_MS"),
    "retry": ("random",),
    "section": ("Backoff", "time"),
    "server": ("connection_factory",),
    "storage": ("secrets", "Ensemble", "this_worker"),
    "studies": ("secrets",),
    "trials": ("os", "datetime"),
    "twins": ("time", "Backoff"),
}
REPLACED = {(module, name) for module, names in _EXCHANGED.items() for name in names}
# What is not, as no schedule comes there.
UNUSED = {
    *(("codec", "datetime"), ("live_trial", "datetime")),  # converted, and never asked for the time
    *(("quorum", "time"), ("retry", "time")),  # defaults of arguments that are always given
    *(("ensemble_lock", "os"), ("storage", "os"), ("url", "os")),  # the process's number, the environment
    *(("worker", "os"), ("worker", "secrets")),  # `this_worker` is exchanged
    *(("heartbeats", "threading"), ("runners", "os")),  # no heartbeats, nothing is taken back
    *(("graceful_stop", "os"), ("graceful_stop", "threading")),  # for programs, not for storages
    *(("signal_watch", "os"), ("signal_watch", "threading"), ("signal_watch", "time")),
    *(("lock", "os"), ("lock", "secrets"), ("lock", "threading"), ("lock", "time")),  # one master only
    *(("node", "os"), ("node", "threading")),  # one master only
    # The user's lock is not held in any schedule.
    *(
        ("distributed_lock", "threading"),
        ("distributed_lock", "time"),
        ("lease", "threading"),
        ("lease", "time"),
    ),
}
EPOCH = 1_700_000_000_000_000  # microseconds: when every schedule begins
_STARTS = datetime(2024, 1, 15, 12)


class Clock:
    """Stands for `time`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def monotonic(self) -> float:
        return self._scheduler.now / 1e6

    def time(self) -> float:
        return (EPOCH + self._scheduler.now + self._scheduler.current.process.skew) / 1e6

    def sleep(self, seconds: float) -> None:
        self._scheduler.wait(self._scheduler.now + max(int(seconds * 1e6), 1))


class Poll:
    """Stands for what `select.poll()` gives."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._files: list[int] = []

    def register(self, file: int, events: int) -> None:
        self._files.append(file)

    def poll(self, milliseconds: float) -> list[tuple[int, int]]:
        deadline = self._network.scheduler.now + max(int(milliseconds * 1000), 1)
        return [(file, select.POLLIN) for file in self._network.wait_for(self._files, deadline)]


class Select:
    """Stands for `select`."""

    POLLIN = select.POLLIN

    def __init__(self, network: Network) -> None:
        self.poll = functools.partial(Poll, network)


class Thread:
    """Stands for `threading.Thread`."""

    def __init__(
        self,
        scheduler: Scheduler,
        target: Callable[..., object],
        args: tuple[Any, ...] = (),
        name: str = "",
        daemon: bool = True,
    ) -> None:
        self.name = name
        self._scheduler = scheduler
        self._work = functools.partial(target, *args)
        self._task: Task | None = None

    def start(self) -> None:
        process = self._scheduler.current.process
        self._task = self._scheduler.spawn(f"{process.name}: {self.name}", process, self._work)
        self._task.thread = self

    def is_alive(self) -> bool:
        return self._task is not None and not self._task.done


class RLock:
    """Stands for `threading.RLock`: who waits for it lets others go on."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Task | None = None
        self._depth = 0
        self._waiting: list[Task] = []

    def __enter__(self) -> None:
        task = self._scheduler.current
        while self._owner not in (None, task):
            self._waiting.append(task)
            self._scheduler.wait()
        self._owner = task
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            self._owner = None
            waiting, self._waiting = self._waiting, []
            for task in waiting:
                self._scheduler.wake(task)


class Threading:
    """Stands for `threading`."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self.Thread = functools.partial(Thread, scheduler)
        self.RLock = functools.partial(RLock, scheduler)

    def current_thread(self) -> Any:
        return self._scheduler.current.thread or self._scheduler.current


class Chance:
    """Stands for `random`, `secrets` and the random part of `os`."""

    def __init__(self, rng: random.Random) -> None:
        self.uniform = rng.uniform
        self.randrange = rng.randrange
        self.urandom = rng.randbytes
        self._rng = rng

    def SystemRandom(self) -> random.Random:
        return self._rng

    def token_hex(self, n: int) -> str:
        return self._rng.randbytes(n).hex()

    def token_urlsafe(self, n: int) -> str:
        return self._rng.randbytes(n).hex()


class Calendar:
    """Stands for `datetime`: no two calls get the same time, so that it tells which call made a record."""

    def __init__(self, scheduler: Scheduler, on_stamp: Callable[[datetime], None]) -> None:
        self._scheduler = scheduler
        self._last = 0
        self._on_stamp = on_stamp

    def now(self) -> datetime:
        self._last = max(self._last + 1, self._scheduler.now)
        stamp = _STARTS + timedelta(microseconds=self._last)
        self._on_stamp(stamp)
        return stamp


@contextlib.contextmanager
def simulated(
    scheduler: Scheduler,
    network: Network,
    rng: random.Random,
    ttl_ms: int,
    on_stamp: Callable[[datetime], None],
) -> Iterator[None]:
    """Let the package run in the simulated world.

    Args:
        ttl_ms: Of the leases of sections and copies; safety does not depend on it.
        on_stamp: Called with each time that is written into a record.
    """
    clock, chance = Clock(scheduler), Chance(rng)
    stand_ins: dict[str, Any] = {
        "time": clock,
        "select": Select(network),
        "threading": Threading(scheduler),
        "secrets": chance,
        "random": chance,
        "os": chance,
        "datetime": Calendar(scheduler, on_stamp),
        "Backoff": functools.partial(Backoff, clock=clock.monotonic, sleep=clock.sleep),
        "Ensemble": functools.partial(Ensemble, clock=clock.time),
        "this_worker": _worker,
        "connection_factory": lambda url, timeout: functools.partial(_connection, network, url),
        # Loading the scripts is half of all messages, and no part of the protocol: masters have them.
        "all_masters_scripts": tuple,
        "_TTL_MS": ttl_ms,
    }
    modules = [(vars(sys.modules["optuna_dlock." + module]), names) for module, names in _EXCHANGED.items()]
    saved = [{name: module[name] for name in names} for module, names in modules]
    try:
        for module, names in modules:
            module.update({name: stand_ins[name] for name in names})
        yield
    finally:
        for (module, _), values in zip(modules, saved, strict=True):
            module.update(values)


def _worker(name: str | None, client: str, forked: bool = False) -> WorkerProcess:
    return WorkerProcess(Worker("host", 1, client), client, "place", "0")


def _connection(network: Network, url: str) -> SimulatedConnection:
    return SimulatedConnection(network, url.partition("//")[2].partition("/")[0])
