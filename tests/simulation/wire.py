"""The network of a schedule: connections whose every message arrives late, or never, as the seed wants.

Messages of one connection stay in order, as in TCP; those of different connections overtake each other.
"""

from __future__ import annotations

import functools
import math
import random
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hiredis
import redis.exceptions as redis_errors

from tests.simulation.scheduler import Process, Scheduler
from tests.simulation.server import SimulatedMaster, Words

_EOF = b""


def _start_of(words: Words, reply: bytes) -> bytes:
    """What a trace shows of a reply; the order of SCAN differs from server to server."""
    return reply[:12] if words[0] == b"SCAN" else reply[:64]


@dataclass
class Weather:
    """How bad the network is; times in microseconds.

    Attributes:
        latency: Mean of a message's way, if nothing holds it up.
        tail: How often something does.
        longest: For how long at most then.
        cut: How often a message costs its connection: lost before, or after it was executed.
        swallow: How often it does so silently: nothing comes through any more, and nobody is told.
        preempt: How often a process is held up between two messages that it sends.
        crash: How often a process dies between two messages that it sends.
        forget: How often a master does not know a script any more.
    """

    latency: int = 100
    tail: float = 0.0
    longest: int = 1000
    cut: float = 0.0
    swallow: float = 0.0
    preempt: float = 0.0
    crash: float = 0.0
    forget: float = 0.0


class Network:
    """All connections of a schedule.

    Args:
        rng: Decides all delays and losses.
    """

    def __init__(
        self, scheduler: Scheduler, rng: random.Random, weather: Weather, masters: list[SimulatedMaster]
    ) -> None:
        self.scheduler = scheduler
        self.masters = masters
        self.weather = weather
        self.on_crash: Callable[[Process], None] = lambda process: None
        self.cut_off: set[tuple[str, int]] = set()
        self._rng = rng
        self._links: dict[int, Link] = {}  # by what stands for its file number
        self._files = 100
        self.messages = 0

    def delay(self) -> int:
        """How long a message takes."""
        rng, weather = self._rng, self.weather
        delay = rng.expovariate(1.0) * weather.latency
        if rng.random() < weather.tail:
            delay += self._long(weather.longest)
        return int(delay) + 1

    def _long(self, longest: int) -> float:
        return math.exp(self._rng.uniform(math.log(500), math.log(longest)))

    def chance(self, probability: float) -> bool:
        """Whether something happens this time."""
        return probability > 0 and self._rng.random() < probability

    def connect(self, process: Process, address: str) -> Link:
        """Open a connection; takes its time.

        Raises:
            ConnectionError: If the master is down or cut off.
        """
        scheduler = self.scheduler
        scheduler.wait(scheduler.now + self.delay())
        master = next(master for master in self.masters if master.address == address)
        if not master.up or (process.name, master.number) in self.cut_off:
            raise redis_errors.ConnectionError(f"{address}: connection refused")
        self._files += 1
        link = self._links[self._files] = Link(self, process, master, self._files)
        scheduler.trace("connect", process.name, master.number)
        return link

    def forget(self, link: Link) -> None:
        """A connection is closed."""
        self._links.pop(link.file, None)

    def readable(self, files: list[int]) -> list[int]:
        """Which of these have something to read."""
        return [file for file in files if (link := self._links.get(file)) is None or link.readable]

    def wait_for(self, files: list[int], deadline: int | None) -> list[int]:
        """Wait until there is something to read; empty when the time is over."""
        scheduler = self.scheduler
        while not (found := self.readable(files)):
            if deadline is not None and scheduler.now >= deadline:
                break
            task = scheduler.current
            links = [self._links[file] for file in files]
            for link in links:
                link.reader = task
            scheduler.wait(deadline)
            for link in links:
                link.reader = None
        return found

    def cut(self, condition: Callable[[Link], bool]) -> None:
        """Break connections."""
        for link in [link for link in self._links.values() if condition(link)]:
            link.reset()

    def preempt(self) -> None:
        """Perhaps hold up the process that is about to send."""
        if self.chance(self.weather.preempt):
            self.scheduler.wait(self.scheduler.now + int(self._long(max(1000, self.weather.longest))))


class Link:
    """One connection between a process and a master."""

    def __init__(self, network: Network, process: Process, master: SimulatedMaster, file: int) -> None:
        self.network = network
        self.process = process
        self.master = master
        self.file = file
        self.reader: Any = None
        self._generation = master.generation
        self._inbox: list[bytes] = []
        self._up = self._down = 0  # when the last message arrives, each way
        self._requests: deque[Words] = deque()  # under way
        self._serving = True  # whether the master still takes what comes
        self._replying = True  # whether what it answers goes anywhere
        self._open = True  # whether the process has not closed it
        self._transaction: list[Words] | None = None

    @property
    def readable(self) -> bool:
        """Whether there is something to read, or the end."""
        return bool(self._inbox) or not self._open

    def send(self, packed: bytes) -> None:
        """Send one command."""
        network, scheduler = self.network, self.network.scheduler
        if network.chance(network.weather.crash):
            network.on_crash(self.process)
        network.preempt()
        if not self._open or (self._inbox and self._inbox[-1] is _EOF):
            raise ConnectionResetError("reset by peer")
        if network.chance(network.weather.swallow):
            scheduler.trace("swallow", self.process.name, self.master.number)
            self._serving = False
        reader = hiredis.Reader()
        reader.feed(packed)
        words = reader.gets()
        self._up = max(self._up + 1, scheduler.now + network.delay())
        self._requests.append(words)
        scheduler.at(self._up, self._arrive)

    def _arrive(self) -> None:
        network, scheduler, master = self.network, self.network.scheduler, self.master
        if master.paused_until > scheduler.now:
            scheduler.at(master.paused_until, self._arrive)
            return
        words = self._requests.popleft()
        if (self.process.name, master.number) in network.cut_off:
            self._serving = self._replying = False  # nothing comes through, and nobody is told
        if not self._serving or not master.up or master.generation != self._generation:
            return
        if network.chance(network.weather.cut):
            scheduler.trace("lost request", self.process.name, master.number)
            self.reset()
            return
        network.messages += 1
        if words[0] == b"EVALSHA" and network.chance(network.weather.forget):
            reply = b"-NOSCRIPT No matching script.\r\n"
        else:
            reply = self._execute(words)
        scheduler.trace(self.process.name, master.number, master.describe(words), _start_of(words, reply))
        if network.chance(network.weather.cut):
            scheduler.trace("lost reply", self.process.name, master.number)
            self.reset(network.chance(0.5))
            return
        if self._replying:
            self._down = max(self._down + 1, scheduler.now + network.delay())
            scheduler.at(self._down, functools.partial(self._deliver, reply))

    def _execute(self, words: Words) -> bytes:
        if words[0] == b"MULTI":
            self._transaction = []
            return b"+OK\r\n"
        if self._transaction is None:
            return self.master.execute(words)
        if words[0] != b"EXEC":
            self._transaction.append(words)
            return b"+QUEUED\r\n"
        transaction, self._transaction = self._transaction, None
        return self.master.execute_transaction(transaction)

    def _deliver(self, reply: bytes) -> None:
        if (self.process.name, self.master.number) in self.network.cut_off:
            self._serving = self._replying = False
        if not self._replying and reply is not _EOF:
            return
        if self._open and not (self._inbox and self._inbox[-1] is _EOF):
            self._inbox.append(reply)
            if self.reader is not None:
                self.network.scheduler.wake(self.reader)

    def receive(self, wait: bool, limit: int) -> bytes:
        """The bytes that have arrived; none at the end."""
        if wait:
            scheduler = self.network.scheduler
            if not self.network.wait_for([self.file], scheduler.now + limit):
                raise BlockingIOError
        elif not self.readable:
            raise BlockingIOError
        if not self._open or self._inbox[0] is _EOF:
            return _EOF
        whole = b"".join(self._inbox)
        self._inbox = [_EOF] if self._inbox[-1] is _EOF else []
        return whole

    def reset(self, serving: bool = False) -> None:
        """Break it: replies are lost, and what is under way to the master too, unless it is `serving`."""
        self._serving = self._serving and serving
        self._replying = False
        network = self.network
        network.scheduler.at(network.scheduler.now + network.delay(), functools.partial(self._deliver, _EOF))

    def close(self) -> None:
        """Close it, as the process: what it sent may still arrive."""
        self._open = False
        self.network.forget(self)


class SimulatedSocket(socket.socket):
    """A socket without a file: only what `SocketChannel` uses."""

    _TIMEOUT = 10_000_000

    def __init__(self, link: Link) -> None:
        self._link = link  # and no super().__init__(): that would ask the kernel for a file

    def fileno(self) -> int:
        return self._link.file

    def gettimeout(self) -> float | None:
        return None  # ours is below

    def sendall(self, data: Any, flags: int = 0) -> None:
        self._link.send(data)

    def recv(self, size: int, flags: int = 0) -> bytes:
        return self._link.receive(not flags & socket.MSG_DONTWAIT, self._TIMEOUT)

    def close(self) -> None:
        self._link.close()


class SimulatedConnection:
    """Stands for redis-py's connection."""

    protocol = 2

    def __init__(self, network: Network, address: str) -> None:
        self._network = network
        self._address = address
        self._sock: SimulatedSocket | None = None

    def connect(self) -> None:
        process = self._network.scheduler.current.process
        self._sock = SimulatedSocket(self._network.connect(process, self._address))

    def disconnect(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:
        raise NotImplementedError("SocketChannel sends")

    def read_response(self, disable_decoding: bool = False) -> Any:
        raise NotImplementedError("SocketChannel reads")
