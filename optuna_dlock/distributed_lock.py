"""The lock that users hold: `with storage.lock(name) as token:`."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import EllipsisType, TracebackType
from typing import Protocol

from optuna_dlock.errors import DLockError, LockError, LockLostError, LockNotAcquiredError
from optuna_dlock.keys import lock_keys
from optuna_dlock.lease import Lease

MIN_TTL = 0.1

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


class LockBackend(Protocol):
    """Who talks to the server for the locks; `LockManager` is one."""

    prefix: str
    epoch: object  # another one in a forked child

    def acquire(self, lock: DistributedLock, limit: float | None) -> Lease:
        """Get the lock within `limit` seconds, or raise LockNotAcquiredError."""

    def release(self, lock: DistributedLock, lease: Lease) -> bool:
        """Give the lock back; whether it was still held."""

    def holder(self, name: str) -> HolderInfo | None:
        """Who holds the lock now."""

    def lock(self, name: str, ttl: float = 30.0, timeout: float | None = None) -> DistributedLock:
        """The lock of this name, not acquired yet."""

    def holder_key(self, name: str) -> str:
        """The key that exists exactly while somebody holds the lock."""

    def holds(self, name: str) -> bool:
        """Whether this process holds the lock, as far as is known here."""

    def free_if_dead(self, name: str) -> None:
        """While waiting for the lock: free it if its holder died, where no server does so by itself."""

    def close(self) -> None:
        """Close connections; what is held ends with its lease."""


class DistributedLock:
    """A lock that one thread of one process on one host holds at a time; `manager.lock(...)` makes it.

    It excludes others as long as its lease lasts. A holder that is paused for longer than `ttl` and goes
    on before it looks at `lost` or `check()` overlaps with the next holder: what must not happen then
    has to be refused by the fencing token, which is higher for each later holder. Not reentrant. The
    object may be shared by threads, of which one holds it at a time; a forked child does not hold
    what its parent holds.

    Args:
        backend: What talks to the server.
        name: The same name is the same lock, for all clients of the same server and prefix.
        ttl: Seconds after which the lock of a dead holder is free again.
        timeout: Seconds that `with` and `acquire()` wait; None: for ever, 0: try once.
        on_lost: Called with this lock, by the renewal thread, when the lease was lost.

    Attributes:
        lost: Set once the lease was lost, until the next acquire.
    """

    def __init__(
        self,
        backend: LockBackend,
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
        self.keys = lock_keys(backend.prefix, name)
        self._backend = backend
        self._epoch = backend.epoch
        self._turn = threading.Lock()  # held while this object holds the lock, or waits for it
        self._thread = 0
        self._lease: Lease | None = None

    def __repr__(self) -> str:
        state = f"held, token {self.token}" if self.held else "lost" if self.lost.is_set() else "not held"
        return f"<DistributedLock {self.name!r} {state}>"

    @property
    def token(self) -> int | None:
        """Fencing token of the current hold: each later holder's is higher. None if not held."""
        lease = self._lease
        return None if lease is None else lease.token

    @property
    def held(self) -> bool:
        """Whether the lease lasts, as far as is known here without asking the server."""
        lease = self._lease
        return lease is not None and self._epoch is self._backend.epoch and time.monotonic() < lease.end

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
        backend = self._backend
        if self._epoch is not backend.epoch:  # in a forked child: the parent's hold is not ours
            self._epoch, self._turn = backend.epoch, threading.Lock()
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
            self._lease = lease = backend.acquire(self, limit)
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
            if not self._backend.release(self, lease):
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
        except DLockError as problem:
            if error is None:
                raise
            _logger.warning("%s (while %s was on its way)", problem, type(error).__name__)

    def _wait_turn(self, limit: float | None) -> float | None:
        """Wait until no other thread uses this object; what is left of the time to wait."""
        start = time.monotonic()
        if not self._turn.acquire(timeout=-1 if limit is None else min(limit, threading.TIMEOUT_MAX)):
            raise not_acquired(self, limit, self._backend.holder(self.name))
        return None if limit is None else max(0.0, limit - (time.monotonic() - start))

    def _end_turn(self) -> None:
        self._lease, self._thread = None, 0
        self._turn.release()

    def _own_lease(self) -> Lease:
        lease = self._lease
        if lease is None or self._epoch is not self._backend.epoch:
            raise LockError(f"lock {self.name!r} is not held by this object", name=self.name)
        return lease

    def _lost_error(self, lease: Lease) -> LockLostError:
        return LockLostError(
            f"lock {self.name!r} was lost: its lease of {self.ttl:g} s ended before it was renewed; "
            f"others may have held it since (fencing token {lease.token})",
            name=self.name,
            token=lease.token,
        )


def not_acquired(
    lock: DistributedLock, limit: float | None, holder: HolderInfo | None
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


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is not None and (isinstance(timeout, bool) or not timeout >= 0):
        raise ValueError(f"timeout is in seconds, 0 or more, or None to wait for ever; got {timeout!r}")
    return None if timeout == float("inf") else timeout
