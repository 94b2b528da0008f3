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
from typing import Any

from optuna_dlock.channel import Connection
from optuna_dlock.distributed_lock import DistributedLock, HolderInfo, not_acquired
from optuna_dlock.errors import CorruptRecordError, DLockError
from optuna_dlock.keys import LockKeys, lock_keys
from optuna_dlock.lease import Lease, Renewal
from optuna_dlock.node import Argument, Node
from optuna_dlock.scripts import FOREIGN, OK, script

__all__ = ["DistributedLock", "HolderInfo", "LockManager"]

_IDLE_LINES = 8  # connections kept open for the next acquire
_POLL = 1.0  # seconds after which a waiter asks again, should its wake-up have been lost
_HOT = 0.05  # seconds; after a wait shorter than this, the next one is expected to be short too
_CLEAN_UP = 2.0  # seconds to try to leave nothing behind when a wait is interrupted

_ACQUIRE = script("acquire_lock")
_RELEASE = script("release_lock")
_LEAVE = script("leave_lock")
_RENEW = script("renew_lock")

_logger = logging.getLogger(__name__)


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

    def holds(self, name: str) -> bool:
        """Whether this process holds this lock, as far as is known here."""
        return self._renewal.holds(name)

    def free_if_dead(self, name: str) -> None:
        """Nothing to do: the server ends leases by itself."""

    def holder(self, name: str) -> HolderInfo | None:
        """Who holds this lock now; None if nobody does."""
        key = lock_keys(self.prefix, name).holder
        text, left, now = self._ask((("GET", key), ("PTTL", key), ("TIME",)))
        return None if text is None else parse_holder(text, left, now)

    def close(self) -> None:
        """Close idle connections and stop renewing: what is still held ends with its lease.

        The next call opens connections again.
        """
        self._renewal.stop()
        while self._lines:
            self._lines.pop().node.close()
        line, self._renewal_line = self._renewal_line, None
        if line is not None:
            with line.node.lock:  # the renewal thread may be at it
                line.node.close()

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
                if reply[0] == FOREIGN:
                    raise CorruptRecordError(
                        f"key {keys.holder!r} on {self.address} is not a lock of ours", key=keys.holder
                    )
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
        self._put_back(line)
        holder = HolderInfo(_text(reply[1]), None, max(0.0, reply[2] / 1000), max(0.0, reply[3] / 1000))
        raise not_acquired(lock, limit, holder)

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

    def _owner_text(self) -> str:
        return self._owner + threading.current_thread().name

    def _take_line(self) -> _Line:
        try:
            return self._lines.pop()
        except IndexError:
            return _Line(self._make_node(self._make_patient_connection), f"{self._uid}:{next(self._numbers)}")

    def _granted(
        self,
        lock: DistributedLock,
        line: _Line,
        ticket: str,
        token: int,
        since: float,
        backing: Any = None,
    ) -> Lease:
        on_lost = None if lock.on_lost is None else functools.partial(lock.on_lost, lock)
        lease = Lease(lock.name, lock.keys.holder, ticket, token, lock.ttl, since, lock.lost, on_lost)
        lease.backing = backing
        self._renewal.add(lease)
        self._put_back(line)
        return lease

    def _put_back(self, line: _Line) -> None:
        if len(self._lines) < _IDLE_LINES:
            self._lines.append(line)
        else:
            line.node.close()

    def _make_node(self, make_connection: Callable[[], Connection]) -> Node:
        return Node(make_connection, self.address, self.timeout, on_connect=self._on_connect)

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
        """After Ctrl-C: neither hold the lock nor queue for it, as nobody knows this ticket any more."""
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

    def _ask(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        line = self._take_line()
        line.node.timeout = self.timeout
        try:
            replies = line.node.commands(commands)
        except BaseException:
            line.node.close()
            raise
        self._put_back(line)
        return replies


def parse_holder(text: bytes, left_ms: int, now: Sequence[bytes]) -> HolderInfo:
    """What a lock's key says, with the replies to PTTL and TIME."""
    _, token, since, owner = _text(text).split(" ", 3)
    held_for = int(now[0]) + int(now[1]) / 1e6 - int(since) / 1000
    return HolderInfo(owner, int(token), max(0.0, held_for), max(0.0, left_ms / 1000))


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
