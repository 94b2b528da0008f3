"""`lock="pottery"`: the same lock over `pottery.Redlock`, for sites that standardise on it."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import redis
import redis.exceptions as redis_errors

from optuna_dlock.channel import Connection
from optuna_dlock.distributed_lock import DistributedLock, HolderInfo, not_acquired
from optuna_dlock.errors import DLockError, ServerConfigurationError, StorageUnavailableError
from optuna_dlock.keys import LockKeys, lock_keys
from optuna_dlock.lease import Lease
from optuna_dlock.lock import LockManager, parse_holder
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import OK, script

RETRY_DELAY = 0.2  # seconds, at most, between two tries: pottery's own

_NOTE = script("note_holder")


def import_pottery(address: str) -> Any:
    """The package, which comes with an extra.

    Raises:
        ServerConfigurationError: If it is not installed.
    """
    try:
        import pottery
    except ImportError:
        raise ServerConfigurationError(
            'lock="pottery" needs the package pottery: pip install "optuna-dlock[pottery]"',
            address=address,
        ) from None
    return pottery


def make_redlock(pottery: Any, key: str, masters: Iterable[redis.Redis], ttl: float) -> Any:
    """A Redlock, not acquired yet, that may be extended as often as needed; its ttl is in seconds."""
    return pottery.Redlock(
        key=key,
        masters=masters,
        raise_on_redis_errors=True,
        auto_release_time=ttl,
        num_extensions=sys.maxsize,
    )


class PotteryLockManager(LockManager):
    """Locks of which `pottery.Redlock` decides who holds them. The arguments are those of `LockManager`.

    What differs: waiters poll, so that neither their order nor any longest wait is promised. The fencing
    token is drawn after the lock was acquired. Later holders get higher tokens, but a holder that is
    paused for its whole ttl before it draws gets one that belongs to a time when somebody else holds
    the lock. A release whose reply is lost raises LockLostError although it happened: pottery cannot tell.

    Raises:
        ServerConfigurationError: If pottery is not installed.
    """

    def __init__(
        self,
        make_connection: Callable[[], Connection],
        address: str,
        timeout: float,
        prefix: str,
    ) -> None:
        self._pottery = import_pottery(address)
        super().__init__(make_connection, address, timeout, prefix)

    def forget(self) -> None:
        """Start as a process that holds nothing."""
        super().forget()
        self._client = redis.Redis(connection_pool=Pool(self._make_connection))

    def close(self) -> None:
        """Close idle connections and stop renewing: what is still held ends with its lease."""
        super().close()
        self._client.connection_pool.disconnect()

    def holder_key(self, name: str) -> str:
        """The key that exists exactly while somebody holds this lock; pottery puts its own prefix first."""
        return "redlock:" + lock_keys(self.prefix, name).holder

    def holder(self, name: str) -> HolderInfo | None:
        """Who holds this lock now; None if nobody does, or has not said yet who it is."""
        key, note = self.holder_key(name), _note(lock_keys(self.prefix, name))
        held, text, left, now = self._ask((("GET", key), ("GET", note), ("PTTL", key), ("TIME",)))
        if held is None or text is None or not text.startswith(held + b" "):
            return None  # a note without its Redlock is that of an earlier holder
        return parse_holder(text, left, now)

    def acquire(self, lock: DistributedLock, limit: float | None) -> Lease:
        """Get the lock within `limit` seconds."""
        redlock = make_redlock(self._pottery, lock.keys.holder, {self._client}, lock.ttl)
        start = time.monotonic()
        while True:
            asked = time.monotonic()
            if self._reaching(lambda: redlock.acquire(blocking=False), limit):
                lease = self._noted(lock, redlock, asked)
                if lease is not None:
                    return lease
            left = None if limit is None else start + limit - time.monotonic()
            if left is not None and left <= 0:
                raise not_acquired(lock, limit, self.holder(lock.name))
            pause = random.uniform(0, RETRY_DELAY)
            time.sleep(pause if left is None else min(pause, left))

    def release(self, lock: DistributedLock, lease: Lease) -> bool:
        """Give the lock back; whether it was still held."""
        if not self._renewal.remove(lease.ticket):
            return False
        try:
            self._reaching(lease.backing.release, None)
        except self._pottery.ReleaseUnlockedLock:
            return False
        return True

    def renew(self, leases: Sequence[Lease]) -> list[bool]:
        """Start these leases anew; which are still held."""
        kept = []
        for lease in leases:
            try:
                lease.backing.extend()
                kept.append(True)
            except self._pottery.ExtendUnlockedLock:
                kept.append(False)
        notes = [(_note(lock_keys(self.prefix, lease.name)), int(lease.ttl * 1000)) for lease in leases]
        self._ask([("PEXPIRE", note, ttl) for note, ttl in notes])
        return kept

    def _noted(self, lock: DistributedLock, redlock: Any, asked: float) -> Lease | None:
        """Draw the fencing token. None if the lock was lost before."""
        line = self._take_line()
        line.node.timeout = self.timeout
        keys = ("redlock:" + lock.keys.holder, _note(lock.keys), lock.keys.fence)
        try:
            reply = line.node.run(_NOTE, keys, (self._owner_text(), int(lock.ttl * 1000)))
        except BaseException:
            line.node.close()
            self._give_up(redlock)
            raise
        if reply[0] != OK:
            self._put_back(line)
            return None
        return self._granted(lock, line, line.ticket(), reply[1], asked, redlock)

    def _reaching(self, call: Callable[[], Any], limit: float | None) -> Any:
        """Do this, going on while the server is away."""
        waiting: Backoff | None = None
        while True:
            try:
                return call()
            except self._pottery.QuorumIsImpossible as error:
                causes = list(error.redis_errors)
                for cause in causes:
                    if isinstance(cause, redis_errors.ResponseError | redis_errors.AuthenticationError):
                        raise DLockError(f"{self.address}: {cause}") from cause
                timeout = self.timeout if limit is None else min(self.timeout, max(limit, 1.0))
                waiting = waiting or Backoff(timeout)
                if not waiting.wait():
                    raise StorageUnavailableError(
                        f"{self.address} did not answer for {timeout:g} s ({causes}); is the server up?",
                        address=self.address,
                        timeout=timeout,
                    ) from error

    def _give_up(self, redlock: Any) -> None:
        try:
            redlock.release()
        except self._pottery.ReleaseUnlockedLock:
            pass
        except self._pottery.QuorumIsImpossible:
            pass  # it ends with its ttl


def _note(keys: LockKeys) -> str:
    return keys.wake("pottery")


class Pool(redis.ConnectionPool):
    """Hands out the connections that all others of this package use too: TLS, passwords, databases."""

    def __init__(self, make_connection: Callable[[], Connection]) -> None:
        self._make = make_connection
        super().__init__(protocol=2)

    def make_connection(self) -> Any:
        """A new connection."""
        return self._make()
