"""Requests to several masters, and waiting for their replies: nobody waits for a slow one."""

from __future__ import annotations

import itertools
import select
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optuna_dlock.channel import Connection, RefusalError
from optuna_dlock.errors import (
    AccessDeniedError,
    CorruptRecordError,
    DLockError,
    QuorumError,
    ServerConfigurationError,
)
from optuna_dlock.master import Master, Request
from optuna_dlock.quorum import majority
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import OK


class Fanout:
    """N masters that are asked at once.

    Args:
        servers: Address and connection factory of each master.
        prefix: Key space.
        timeout: Seconds for which a call goes on trying while no majority answers.

    Attributes:
        q: How many masters are a majority.
        lock: Held by the thread that asks.
        is_stopped: Whether nothing is to be tried any more, as nobody wants it.
    """

    def __init__(
        self, servers: Sequence[tuple[str, Callable[[], Connection]]], prefix: str, timeout: float
    ) -> None:
        self.members = [address for address, _ in servers]
        self.prefix = prefix
        self.address = ",".join(self.members)
        self.timeout = timeout
        self.lock = threading.RLock()
        self.masters = [
            Master(index, address, factory, prefix, self.members)
            for index, (address, factory) in enumerate(servers)
        ]
        self.q = majority(len(self.masters))
        self.is_stopped = False
        self._poll, self._polled = select.poll(), set[int]()

    def accepted(self, request: Request) -> bool:
        """Whether a majority has run it."""
        return self.count(request, OK) >= self.q

    @staticmethod
    def count(request: Request, code: int) -> int:
        """How many masters replied with a code."""
        return sum(isinstance(r, list) and r[0] == code for r in request.replies.values())

    def is_refused(self, request: Request) -> bool:
        """Whether no majority can accept it any more."""
        refused = len(request.replies) - self.count(request, OK)
        return len(self.masters) - refused - len(request.lost) < self.q

    def all_answered(self, request: Request, or_slow: bool = False) -> bool:
        """Whether no reply is to be expected any more; `or_slow`: but from masters that are slow."""
        slow = {m.index for m in self.masters if m.slow} if or_slow else set()
        return len(request.replies.keys() | request.lost | slow) == len(self.masters)

    # -- waiting ---------------------------------------------------------------------------------

    def wait(self, request: Request, done: Callable[[], bool], limit: float = 10.0) -> bool:
        """Take replies as they come, until it is done or for so many seconds."""
        deadline = 0.0
        while not done():
            now = time.monotonic()
            if not deadline:
                deadline = now + limit
            elif now >= deadline:
                return False
            self.receive(min(deadline - now, 0.25))
        return True

    def wait_for(self, master: Master, request: Request, limit: float) -> Any:
        """The reply of one master; None if it does not come."""
        index = master.index
        self.wait(request, lambda: index in request.replies or index in request.lost, limit)
        return request.replies.get(index)

    def wait_for_majority(self, request: Request) -> bool:
        """Wait until a majority has run a section, or none will; whether it has."""
        self.wait(request, lambda: self.accepted(request) or self.is_refused(request))
        return self.accepted(request)

    def wait_for_all(self, request: Request, limit: float, or_slow: bool = False) -> None:
        """Wait until all have answered, for so many seconds at most."""
        self.wait(request, lambda: self.all_answered(request, or_slow), limit)

    def receive(self, seconds: float) -> None:
        """Wait for replies, and take them; connections that were lost are made again meanwhile."""
        for master in self.masters:
            if master.tend():
                self._check_names()
        by_file = {master.fileno(): master for master in self.masters if master.connected}
        if len(by_file) < len(self.masters):
            seconds = min(seconds, 0.005)
        if not by_file:
            time.sleep(seconds)
            return
        if by_file.keys() != self._polled:
            self._poll, self._polled = select.poll(), set(by_file)
            for file in by_file:
                self._poll.register(file, select.POLLIN)
        for file, _ in self._poll.poll(max(seconds * 1000, 0.1)):
            by_file[file].receive()

    def trying(self, longest: float = 0.1, first: float = 0.002) -> Iterator[int]:
        """Pauses between tries; raises when the time is over."""
        waiting = Backoff(self.timeout, first=first, longest=longest)
        for number in itertools.count():
            if sum(master.tend() for master in self.masters):
                self._check_names()
            self._raise_fatal()
            if self.is_stopped or not waiting.wait():
                raise self._quorum_error()
            yield number

    def _quorum_error(self) -> QuorumError:
        nodes = {
            m.address: "connected"
            if m.connected
            else f"{type(m.problem).__name__}: {m.problem}"
            if m.problem
            else "not reached yet"
            for m in self.masters
        }
        answered = sum(m.connected for m in self.masters)
        what = "; ".join(f"{address}: {text}" for address, text in nodes.items())
        return QuorumError(
            f"{answered} of {len(nodes)} masters can be used and {self.q} are needed; none were for "
            f"{self.timeout:g} s ({what})",
            address=self.address,
            timeout=self.timeout,
            needed=self.q,
            answered=answered,
            nodes=nodes,
        )

    def _raise_fatal(self) -> None:
        fatal = [m.fatal for m in self.masters if m.fatal is not None]
        for error in fatal:
            if isinstance(error, ServerConfigurationError):
                raise error
        if len(fatal) > len(self.masters) - self.q:
            raise fatal[0]

    def raise_refusals(self, request: Request, keys: Sequence[str]) -> None:
        """Raise what so many masters say that no majority is left to say otherwise."""
        errors = {i: r for i, r in request.replies.items() if isinstance(r, RefusalError)}
        if len(errors) <= len(self.masters) - self.q:
            return
        index, error = next(iter(errors.items()))
        address, code = self.masters[index].address, error.code
        if code in ("WRONGPASS", "NOAUTH", "NOPERM"):
            raise AccessDeniedError(f"{address} refused access: {error}", address=address)
        if code in ("OOM", "MISCONF"):
            raise ServerConfigurationError(
                f"{address} takes no writes: {error}; raise its maxmemory, or see that it can save its data",
                address=address,
            )
        if "WRONGTYPE" in str(error):
            raise CorruptRecordError(
                f"one of the keys {', '.join(keys)} on {address} is of another type: somebody else's data "
                "stands under our prefix; choose another one with ?prefix=NAME",
                key=keys[0],
            )
        if code == "ERR":
            raise DLockError(f"{address}: {error}")

    def _check_names(self) -> None:
        runs: dict[str, str] = {}
        for master in self.masters:
            if master.connected and master.run in runs:
                error = master.fatal = ServerConfigurationError(
                    f"{runs[master.run]} and {master.address} are the same server: list every master once",
                    address=master.address,
                )
                master.close()  # it must not be counted twice
                raise error
            runs[master.run] = master.address

    def reply_of(self, master: Master, request: Request, limit: float) -> Any:
        """The reply of one master.

        Raises:
            ConnectionError: If it does not come, or is a refusal.
        """
        reply = self.wait_for(master, request, limit)
        if master.index not in request.replies or isinstance(reply, RefusalError):
            raise ConnectionError(f"{master.address} does not answer: {reply}")
        return reply
