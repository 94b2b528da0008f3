"""`lock="pottery"` on several masters: `pottery.Redlock` over all of them keeps contenders apart.

It is held in front of what is safe without it: the ballots of sections, and the replicated lease of a user's
lock, from which fencing tokens come. pottery gives a lock one name on all masters. Where masters replicate
among each other (KeyDB), they overwrite each other's votes, releases fail, and a released lock is in the way
until its time is over; so nobody waits for ever for a Redlock that guards nothing.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import redis

from optuna_dlock.channel import Connection
from optuna_dlock.distributed_lock import DistributedLock, not_acquired
from optuna_dlock.ensemble import Ensemble
from optuna_dlock.ensemble_lock import EnsembleLocks
from optuna_dlock.keys import turn_key
from optuna_dlock.lease import Lease
from optuna_dlock.pottery_lock import RETRY_DELAY, Pool, import_pottery, make_redlock
from optuna_dlock.spacing import Spacing

_TURN = 2.0  # seconds after which the turn of a process that died is free again, as a section's lease
_PATIENCE = 2.0  # seconds that anybody waits for a Redlock before asking whether it guards anything
_REPLY = 0.5  # seconds; a paused master must not hold up the majority

Factories = Sequence[Callable[[], Connection]]


class _Redlocks:
    """Makes the Redlocks of one process. That one cannot be had or was lost is no error here."""

    def __init__(self, make_connections: Factories, address: str) -> None:
        self._pottery = import_pottery(address)
        self._pools = [_pool(make) for make in make_connections]

    def make(self, key: str, ttl: float) -> Any:
        """A Redlock over all masters, not acquired yet."""
        clients = {redis.Redis(connection_pool=pool) for pool in self._pools}
        return make_redlock(self._pottery, key, clients, ttl)

    def acquire(self, redlock: Any, **options: Any) -> bool | None:
        """Whether it was acquired; None if no majority of the masters answers."""
        try:
            return bool(redlock.acquire(**options))
        except self._pottery.QuorumIsImpossible:
            return None

    def quietly(self, call: Callable[[], None]) -> None:
        """Release or extend a Redlock which may be lost."""
        lost = self._pottery.ReleaseUnlockedLock, self._pottery.ExtendUnlockedLock
        with contextlib.suppress(*lost, self._pottery.QuorumIsImpossible):
            call()

    def close(self) -> None:
        """Close idle connections."""
        for pool in self._pools:
            pool.disconnect()


def _pool(make_connection: Callable[[], Connection]) -> Pool:
    def make_brisk_connection() -> Connection:
        connection = make_connection()
        for name in ("socket_timeout", "socket_connect_timeout"):
            usual = getattr(connection, name, None)
            setattr(connection, name, _REPLY if usual is None else min(usual, _REPLY))
        return connection

    return Pool(make_brisk_connection)


class PotterySpacing(Spacing):
    """Who wants a ballot holds a `pottery.Redlock` from before asking for it until the section was run.

    Args:
        make_connections: Connection factory of each master.
        address: How the masters are named in messages.

    Raises:
        ServerConfigurationError: If pottery is not installed.
    """

    opens = False

    def __init__(self, make_connections: Factories, address: str) -> None:
        self._make = functools.partial(_Redlocks, make_connections, address)
        self.forget()

    def forget(self) -> None:
        """See `Spacing`."""
        self._redlocks = self._make()
        self._taken: dict[str, Any] = {}  # None where we go on without

    def take(self, name: str) -> None:
        """See `Spacing`."""
        if name not in self._taken:
            redlock = self._redlocks.make(turn_key(name), _TURN)
            got = self._redlocks.acquire(redlock, timeout=_PATIENCE)
            self._taken[name] = redlock if got else None

    def give_back(self, name: str) -> None:
        """See `Spacing`."""
        redlock = self._taken.pop(name, None)
        if redlock is not None:
            self._redlocks.quietly(redlock.release)

    def close(self) -> None:
        """See `Spacing`."""
        self._redlocks.close()


class PotteryEnsembleLocks(EnsembleLocks):
    """Users' locks on several masters, each behind a `pottery.Redlock` of its own.

    A holder has both, the Redlock and the replicated lease; it has lost the lock when it has lost the lease.
    A Redlock that nobody gives up, though the lease is free, is waited for no longer than two seconds.

    Args:
        ensemble: The masters; used by nobody else.
        make_connections: Connection factory of each master.
    """

    def __init__(self, ensemble: Ensemble, make_connections: Factories) -> None:
        self._make = functools.partial(_Redlocks, make_connections, ensemble.address)
        super().__init__(ensemble)

    def forget(self) -> None:
        """Start as a process that holds nothing."""
        super().forget()
        self._redlocks = self._make()

    def acquire(self, lock: DistributedLock, limit: float | None) -> Lease:
        """Get the lock within `limit` seconds."""
        redlock = self._redlocks.make(lock.keys.holder, lock.ttl)
        start = time.monotonic()
        while self._redlocks.acquire(redlock, blocking=False) is False:
            waited = time.monotonic() - start
            if limit is not None and waited >= limit:
                raise not_acquired(lock, limit, self.holder(lock.name))
            if waited >= _PATIENCE and self.holder(lock.name) is None:
                break  # its holder died, or KeyDB has brought it back
            pause = random.uniform(0, RETRY_DELAY)
            time.sleep(pause if limit is None else min(pause, limit - waited))
        left = None if limit is None else max(0.0, start + limit - time.monotonic())
        try:
            lease = super().acquire(lock, left)
        except BaseException:
            self._redlocks.quietly(redlock.release)
            raise
        lease.backing = redlock
        return lease

    def release(self, lock: DistributedLock, lease: Lease) -> bool:
        """Give the lock back; whether it was still held."""
        try:
            return super().release(lock, lease)
        finally:
            self._redlocks.quietly(lease.backing.release)

    def renew(self, leases: Sequence[Lease]) -> list[bool]:
        """Tell that we live; which of these leases are still held."""
        for lease in leases:
            if lease.backing is not None:  # it was granted just now
                self._redlocks.quietly(lease.backing.extend)
        return super().renew(leases)

    def close(self) -> None:
        """Close the connections and stop renewing: what is still held ends with its lease."""
        super().close()
        self._redlocks.close()
