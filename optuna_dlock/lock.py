"""The public lock on one master: first come first served, fenced, renewed by itself.

A waiter queues on the server, and the release hands the lock over to it in the same script; no one
polls for it except to notice the dead. A holder's lease is renewed by one thread per manager.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import EllipsisType, TracebackType
from typing import Any

from optuna_dlock.errors import (
    DLockError,
    LockError,
    LockLostError,
    LockNotAcquiredError,
    StorageUnavailableError,
)
from optuna_dlock.keys import LockKeys, lock_keys
from optuna_dlock.lease import Lease, Renewal
from optuna_dlock.node import Argument, Connection, Node
from optuna_dlock.scripts import OK, script

MIN_TTL = 0.1
_IDLE_LINES = 8  # connections kept open for the next acquire
_POLL = 1.0  # seconds after which a waiter asks again, should its wake-up have been lost
_HOT = 0.05  # seconds; after a wait shorter than this, the next one is expected to be short too
_CLEAN_UP = 2.0  # seconds to try to leave nothing behind when a wait is interrupted

_ACQUIRE = script("acquire_lock")
_RELEASE = script("release_lock")
_LEAVE = script("leave_lock")
_RENEW = script("renew_lock")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HolderInfo:
    """Who holds a lock.

    Attributes:
        owner: host:pid:thread.
        token: Its fencing token; None where only the rest was told.
        held_for: Seconds since it got the lock, by the server's clock.
        ttl: Seconds until its lease ends, if it is not renewed.
    """

    owner: str
    token: int | None
    held_for: float
    ttl: float


class DistributedLock:
    """A lock that one thread of one process on one host holds at a time; `manager.lock(...)` makes it.

    It excludes others as long as its lease lasts. A holder that is paused for longer than `ttl` and goes
    on before it looks at `lost` or `check()` overlaps with the next holder: what must not happen then
    has to be refused by the fencing token, which is higher for each later holder. Not reentrant. The
    object may be shared by threads, of which one holds it at a time; a forked child does not hold
    what its parent holds.

    Args:
        manager: What talks to the server.
        name: The same name is the same lock, for all clients of the same server and prefix.
        ttl: Seconds after which the lock of a dead holder is free again.
        timeout: Seconds that `with` and `acquire()` wait; None: for ever, 0: try once.
        on_lost: Called with this lock, by the renewal thread, when the lease was lost.

    Attributes:
        lost: Set once the lease was lost, until the next acquire.
    """

    def __init__(
        self,
        manager: LockManager,
        name: str,
        ttl: float = 30.0,
        timeout: float | None = None,
        on_lost: Callable[[DistributedLock], None] | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of a lock is a string that is not empty; got {name!r}")
        if isinstance(ttl, bool) or not MIN_TTL <= ttl < 1e9:
            raise ValueError(f"ttl is in seconds, at least {MIN_TTL:g}; got {ttl!r}")
        self.name = name
        self.ttl = ttl
        self.timeout = _checked_timeout(timeout)
        self.on_lost = on_lost
        self.lost = threading.Event()
        self.keys = lock_keys(manager.prefix, name)
        self._manager = manager
        self._epoch = manager.epoch
        self._turn = threading.Lock()  # held while this object holds the lock, or waits for it
        self._thread = 0
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        state = f"held, token {self.token}" if self.held else "lost" if self.lost.is_set() else "not held"
        return f"<DistributedLock {self.name!r} {state}>"

    @property
    def token(self) -> int | None:
        """Fencing token of the current hold: each later holder's is higher. None if never acquired."""
        lease = self._lease
        return None if lease is None else lease.token

    @property
    def held(self) -> bool:
        """Whether the lease lasts, as far as is known here without asking the server."""
        lease = self._lease
        return lease is not None and self._epoch is self._manager.epoch and time.monotonic() < lease.end

    def check(self) -> None:
        """Raise unless the lock is held, as far as is known here without asking the server.

        Raises:
            LockLostError: If the lease was lost.
            LockError: If the lock was not acquired.
        """
        lease = self._own_lease()
        if time.monotonic() >= lease.end:
            raise self._lost_error(lease)

    def acquire(self, timeout: float | EllipsisType | None = ...) -> int:
        """Wait for the lock.

        Args:
            timeout: Seconds to wait at most; None: for ever, 0: try once. As given to the lock by default.

        Returns:
            The fencing token.

        Raises:
            LockNotAcquiredError: If somebody else still holds it; it says who, and for how long.
            StorageUnavailableError: If the server does not answer.
            LockError: If this thread holds it already.
        """
        limit = self.timeout if isinstance(timeout, EllipsisType) else _checked_timeout(timeout)
        manager = self._manager
        if self._epoch is not manager.epoch:  # in a forked child: the parent's hold is not ours
            self._epoch, self._turn = manager.epoch, threading.Lock()
            self._thread, self._lease, self.lost = 0, None, threading.Event()
        thread = threading.get_ident()
        if not self._turn.acquire(False):
            if self._thread == thread:
                if not self.lost.is_set():
                    raise LockError(
                        f"lock {self.name!r} is held by this thread already; it is not reentrant",
                        name=self.name,
                    )
                self._end_turn()
            limit = self._wait_turn(limit)
        self._thread = thread
        try:
            if self.lost.is_set():
                self.lost.clear()
            self._lease = lease = manager.acquire(self, limit)
        except BaseException:
            self._end_turn()
            raise
        return lease.token

    def release(self) -> None:
        """Give the lock back, to the next one in the queue if there is one.

        Raises:
            LockLostError: If the lease was lost before; somebody else may have been in the section.
            LockError: If this object does not hold the lock.
            StorageUnavailableError: If the server does not answer; the lock is free when its lease ends.
        """
        lease = self._own_lease()
        try:
            if not self._manager.release(self, lease):
                self.lost.set()
                raise self._lost_error(lease)
        finally:
            self._end_turn()

    def __enter__(self) -> int:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.release()
        except (LockError, StorageUnavailableError) as problem:
            if error is None:
                raise
            _logger.warning("%s (while %s was on its way)", problem, type(error).__name__)

    def _wait_turn(self, limit: float | None) -> float | None:
        """Wait until no other thread uses this object; what is left of the time to wait."""
        start = time.monotonic()
        if not self._turn.acquire(timeout=-1 if limit is None else min(limit, threading.TIMEOUT_MAX)):
            raise self._manager.not_acquired(self, limit, self._manager.holder(self.name))
        return None if limit is None else max(0.0, limit - (time.monotonic() - start))

    def _end_turn(self) -> None:
        self._lease, self._thread = None, 0
        self._turn.release()

    def _own_lease(self) -> Lease:
        lease = self._lease
        if lease is None or self._epoch is not self._manager.epoch:
            raise LockError(f"lock {self.name!r} is not held by this object", name=self.name)
        return lease

    def _lost_error(self, lease: Lease) -> LockLostError:
        return LockLostError(
            f"lock {self.name!r} was lost: its lease of {self.ttl:g} s ended before it was renewed; "
            f"others may have held it since (fencing token {lease.token})",
            name=self.name,
            token=lease.token,
        )


class _Line:
    """A connection, and the tickets drawn on it. No two threads use one at the same time."""

    __slots__ = ("name", "node", "tickets")

    def __init__(self, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        self.tickets = 0

    def ticket(self) -> str:
        self.tickets += 1
        return f"{self.name}.{self.tickets}"


class LockManager:
    """All locks of one process on one server: the connections they use, and their renewal.

    Args:
        make_connection: Gives a new connection, see `node.connection_factory`.
        address: How the server is named in messages.
        timeout: Seconds for which a call goes on trying while the server is away.
        prefix: Key space.
        on_connect: Called with the node after each connect, see `Node`.

    Attributes:
        epoch: Another object in a forked child.
    """

    def __init__(
        self,
        make_connection: Callable[[], Connection],
        address: str,
        timeout: float,
        prefix: str,
        on_connect: Callable[[Node], None] | None = None,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.prefix = prefix
        self._make_connection = make_connection
        self._on_connect = on_connect
        self._poll = _POLL
        self.forget()
        _managers.add(self)

    def forget(self) -> None:
        """Start as a process that holds nothing: at first, and in a forked child."""
        self.epoch = object()
        self._uid = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._owner = f"{socket.gethostname()}:{os.getpid()}:"
        self._lines: list[_Line] = []
        self._renewal_line: _Line | None = None
        self._hot = ""  # name of the lock that was waited for last, if shortly
        self._renewal = Renewal(self.renew)

    def lock(
        self,
        name: str,
        ttl: float = 30.0,
        timeout: float | None = None,
        on_lost: Callable[[DistributedLock], None] | None = None,
    ) -> DistributedLock:
        """The lock `name`, not acquired yet; see `DistributedLock` for what it promises and what not."""
        return DistributedLock(self, name, ttl, timeout, on_lost)

    def holder_key(self, name: str) -> str:
        """The key that exists exactly while somebody holds this lock."""
        return lock_keys(self.prefix, name).holder

    def holder(self, name: str) -> HolderInfo | None:
        """Who holds this lock now; None if nobody does."""
        return self._read_holder(lock_keys(self.prefix, name).holder)

    def close(self) -> None:
        """Close idle connections and stop renewing: what is still held ends with its lease.

        The next call opens connections again.
        """
        self._renewal.stop()
        while self._lines:
            self._lines.pop().node.close()

    # -- the backend: what another kind of lock replaces -------------------------------------------

    def acquire(self, lock: DistributedLock, limit: float | None) -> Lease:
        """Get the lock within `limit` seconds; one round trip if it is free."""
        line, keys = self._take_line(), lock.keys
        node, ticket = line.node, line.ticket()
        wake = keys.wake(ticket)
        all_keys = (keys.holder, keys.fence, keys.queue, wake, wake + ":waits")
        args: list[Argument] = [ticket, int(lock.ttl * 1000), self._owner_text(), keys.wake("")]
        node.timeout = self.timeout if limit is None else min(self.timeout, max(limit, _CLEAN_UP))
        mode = 0 if limit == 0 else 2 if self._hot == lock.name else 1
        start = asked = time.monotonic()
        woken: Any = None
        try:
            while True:
                if mode == 2:
                    # Likely to wait a moment: ask and listen in one go, which saves this process a turn.
                    ask = ("EVALSHA", _ACQUIRE.sha, len(all_keys), *all_keys, *args, mode)
                    reply, woken = node.commands((ask, ("BLPOP", wake, _seconds(min(_HOT, self._poll)))))
                else:
                    reply, woken = node.run(_ACQUIRE, all_keys, (*args, mode)), None
                if reply[0] == OK:
                    if mode == 2:
                        self._hot = ""
                    return self._granted(lock, line, ticket, reply[1], asked)
                if mode == 0:
                    break
                if woken is None:
                    block = self._poll if reply[3] < 0 else min(self._poll, reply[3] / 1000 + 0.001)
                    if limit is not None:
                        block = min(block, start + limit - time.monotonic())
                    woken = node.command("BLPOP", wake, _seconds(block))
                now = time.monotonic()
                # A lease runs from the hand-over, which was after `asked`. If that is long ago, ask again.
                if woken is not None and now - asked < lock.ttl / 2:
                    self._hot = lock.name if now - start < _HOT else ""
                    return self._granted(lock, line, ticket, int(woken[1]), asked)
                mode = 0 if limit is not None and now - start >= limit else 1
                asked = now
        except BaseException as error:
            self._renewal.remove(ticket)
            self._clean_up(line, keys, ticket, error)
            raise
        self._lines.append(line)
        holder = HolderInfo(_text(reply[1]), None, reply[2] / 1000, reply[3] / 1000)
        raise self.not_acquired(lock, limit, holder)

    def release(self, lock: DistributedLock, lease: Lease) -> bool:
        """Give the lock back, in one round trip; whether it was still held."""
        if not self._renewal.remove(lease.ticket):
            return False
        line, keys = self._take_line(), lock.keys
        line.node.timeout = self.timeout
        all_keys = (keys.holder, keys.fence, keys.queue, keys.wake(line.name))
        remember = int(self.timeout * 2000) + 60_000  # longer than the call is retried
        try:
            reply = line.node.run(_RELEASE, all_keys, (lease.ticket, keys.wake(""), remember))
        except BaseException as error:
            self._clean_up(line, keys, lease.ticket, error)
            raise
        self._put_back(line)
        return bool(reply[0] == OK)

    def renew(self, leases: Sequence[Lease]) -> list[bool]:
        """Start these leases anew, in one round trip; which are still held."""
        line = self._renewal_line
        if line is None:
            line = self._renewal_line = _Line(self._make_node(self._make_brisk_connection), "")
        line.node.timeout = self._renewal.shortest / 3
        calls = [((lease.key,), (lease.ticket, int(lease.ttl * 1000))) for lease in leases]
        return [reply[0] == OK for reply in line.node.run_many(_RENEW, calls)]

    # -- helpers -----------------------------------------------------------------------------------

    def not_acquired(
        self, lock: DistributedLock, limit: float | None, holder: HolderInfo | None
    ) -> LockNotAcquiredError:
        """The error that says who held the lock, and for how long."""
        who = "another holder, just gone" if holder is None else f"{holder.owner} for {holder.held_for:.1f} s"
        tried = f"in {limit:g} s" if limit else "at once"
        return LockNotAcquiredError(
            f"lock {lock.name!r} not acquired {tried}: held by {who}",
            name=lock.name,
            timeout=limit,
            holder=None if holder is None else holder.owner,
            held_for=None if holder is None else holder.held_for,
        )

    def _owner_text(self) -> str:
        return self._owner + threading.current_thread().name

    def _take_line(self) -> _Line:
        try:
            return self._lines.pop()
        except IndexError:
            return _Line(self._make_node(self._make_patient_connection), f"{self._uid}:{next(self._numbers)}")

    def _granted(self, lock: DistributedLock, line: _Line, ticket: str, token: int, since: float) -> Lease:
        on_lost = None if lock.on_lost is None else functools.partial(lock.on_lost, lock)
        lease = Lease(lock.name, lock.keys.holder, ticket, token, lock.ttl, since, lock.lost, on_lost)
        self._renewal.add(lease)
        self._put_back(line)
        return lease

    def _put_back(self, line: _Line) -> None:
        if len(self._lines) < _IDLE_LINES:
            self._lines.append(line)
        else:
            line.node.close()

    def _make_node(self, make_connection: Callable[[], Connection]) -> Node:
        return Node(make_connection, self.address, self.timeout, self._on_connect)

    def _make_patient_connection(self) -> Connection:
        connection = self._make_connection()
        patience = getattr(connection, "socket_timeout", None)
        if patience:
            self._poll = min(_POLL, patience / 2)  # a reply that comes later counts as lost
        return connection

    def _make_brisk_connection(self) -> Connection:
        """For renewal, which has to notice in time that the server does not answer."""
        connection = self._make_connection()
        for name in ("socket_timeout", "socket_connect_timeout"):
            usual = getattr(connection, name, None)
            if usual is not None:
                setattr(connection, name, min(usual, self._renewal.shortest / 3))
        return connection

    def _clean_up(self, line: _Line, keys: LockKeys, ticket: str, error: BaseException) -> None:
        """After Ctrl-C: neither hold the lock nor queue for it, as nobody knows of this ticket any more."""
        line.node.close()
        if isinstance(error, DLockError):
            return  # the server is away or refuses us
        line.node.timeout = _CLEAN_UP
        wake = keys.wake(ticket)
        all_keys = (keys.holder, keys.fence, keys.queue, wake, wake + ":waits")
        try:
            line.node.run(_LEAVE, all_keys, (ticket, keys.wake("")))
        except DLockError as problem:
            _logger.debug("lock ticket %s left behind: %s", ticket, problem)
        line.node.close()

    def _read_holder(self, key: str) -> HolderInfo | None:
        line = self._take_line()
        line.node.timeout = self.timeout
        try:
            text, left, now = line.node.commands((("GET", key), ("PTTL", key), ("TIME",)))
        except BaseException:
            line.node.close()
            raise
        self._put_back(line)
        if text is None:
            return None
        _, token, since, owner = _text(text).split(" ", 3)
        held_for = int(now[0]) + int(now[1]) / 1e6 - int(since) / 1000
        return HolderInfo(owner, int(token), max(0.0, held_for), max(0.0, left / 1000))


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and (isinstance(timeout, bool) or not timeout >= 0):
        raise ValueError(f"timeout is in seconds, 0 or more, or None to wait for ever; got {timeout!r}")
    return None if timeout == float("inf") else timeout


def _seconds(value: float) -> str:
    return f"{max(value, 0.001):.3f}"  # 0 would mean for ever


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")


_managers: weakref.WeakSet[LockManager] = weakref.WeakSet()


def _after_fork() -> None:
    for manager in list(_managers):
        manager.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
