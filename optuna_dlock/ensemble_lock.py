"""The public lock on several masters: its holder is part of the registry's (or the study's) replicated state.

No master's clock ends a lease: who waits sees whether the holder renews it, and takes it over when it did not
for its whole ttl by the waiter's own clock. So no two clocks have to agree, and tokens rise without gaps.
"""

from __future__ import annotations

import functools
import itertools
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence

from optuna_dlock.distributed_lock import DistributedLock, HolderInfo, not_acquired
from optuna_dlock.ensemble import Ensemble
from optuna_dlock.keys import RegistryKeys, StudyKeys
from optuna_dlock.lease import Lease, Renewal
from optuna_dlock.node import forget_in_children
from optuna_dlock.scripts import OK, masters_script

_LONGEST_PAUSE = 0.1  # seconds between two looks at a lock that somebody holds

_TAKE = masters_script("take_lease")
_RENEW = masters_script("renew_lease")
_DROP = masters_script("drop_lease")


class EnsembleLocks:
    """All locks of one process on several masters.

    Waiters look again and again, so that they are served in no order.

    Args:
        ensemble: The masters; used by nobody else, as the thread that renews must not wait for others.

    Attributes:
        epoch: Another object in a forked child.
    """

    def __init__(self, ensemble: Ensemble) -> None:
        self.prefix = ensemble.prefix
        self._ensemble = ensemble
        self.forget()
        forget_in_children(self)

    def forget(self) -> None:
        """Start as a process that holds nothing: at first, and in a forked child."""
        self.epoch = object()
        self._client = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._renewal = Renewal(self.renew)
        # Locks that others hold, as last seen: ticket and renewals, and since when these have not changed.
        self._seen: dict[str, tuple[tuple[str, str], float]] = {}

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
        """The key that exists exactly while somebody holds this lock of a study."""
        return self._keys(name)[0]

    def _keys(self, name: str) -> tuple[str, str, str]:
        """Keys of the holder, of fencing tokens, and of what was released."""
        kind, _, study_id = name.partition(":")
        if kind == "study" and study_id.isdecimal():
            study = StudyKeys(self.prefix, int(study_id))
            return study.lock, study.fences, study.released
        registry = RegistryKeys(self.prefix)
        return registry.leases, registry.fences, registry.released

    def holds(self, name: str) -> bool:
        """Whether this process holds this lock, as far as is known here."""
        return self._renewal.holds(name)

    def holder(self, name: str) -> HolderInfo | None:
        """Who holds this lock now; None if nobody does."""
        held = self._ensemble.command("HGET", self._keys(name)[0], _text(name))
        return None if held is None else self._holder(name, held)

    def _holder(self, name: str, held: bytes) -> HolderInfo:
        _, token, _, ttl, since, owner = held.decode("utf-8", "replace").split(" ", 5)
        left = int(ttl) / 1000 - (time.monotonic() - self._unchanged_since(name, held))
        return HolderInfo(owner, int(token), max(0.0, time.time() - int(since) / 1000), max(0.0, left))

    def _unchanged_since(self, name: str, held: bytes) -> float:
        """Since when, as seen from here, the holder has not renewed its lease."""
        ticket, _, renewals, _ = held.decode("utf-8", "replace").split(" ", 3)
        seen = self._seen.get(name)
        if seen is None or seen[0] != (ticket, renewals):
            seen = self._seen[name] = (ticket, renewals), time.monotonic()
        return seen[1]

    def _dead(self, name: str, held: bytes) -> tuple[str, str]:
        """Ticket and renewals of a holder that has not renewed its lease for its ttl; else empty texts."""
        since = self._unchanged_since(name, held)
        ttl = int(held.split(b" ", 4)[3]) / 1000
        return self._seen[name][0] if time.monotonic() - since > ttl else ("", "")

    def free_if_dead(self, name: str) -> None:
        """Free a study's lock whose holder did not renew it for its whole ttl while we looked."""
        leases, _, released = self._keys(name)
        held = self._ensemble.command("HGET", leases, _text(name))
        if held is not None:
            ticket, renewals = self._dead(name, held)
            if ticket:
                self._ensemble.run(_DROP, [leases, released], [_text(name), ticket, renewals, self._client])

    def acquire(self, lock: DistributedLock, limit: float | None) -> Lease:
        """Get the lock within `limit` seconds."""
        leases, fences, _ = self._keys(lock.name)
        ticket = f"{self._client}.{next(self._numbers)}"
        owner = f"{socket.gethostname()}:{os.getpid()}:{threading.current_thread().name}"
        start, pause, dead = time.monotonic(), 0.001, ("", "")
        while True:
            asked = time.monotonic()
            args = (_text(lock.name), ticket, int(lock.ttl * 1000), owner, int(time.time() * 1000), *dead)
            reply = self._ensemble.run(_TAKE, [leases, fences], args)
            if reply[0] == OK:
                self._seen.pop(lock.name, None)
                on_lost = None if lock.on_lost is None else functools.partial(lock.on_lost, lock)
                lease = Lease(lock.name, leases, ticket, reply[1], lock.ttl, asked, lock.lost, on_lost)
                self._renewal.add(lease)
                return lease
            dead = self._dead(lock.name, reply[1])
            left = None if limit is None else start + limit - time.monotonic()
            if left is not None and left <= 0:
                raise not_acquired(lock, limit, self._holder(lock.name, reply[1]))
            if not dead[0]:
                pause = min(2 * pause, _LONGEST_PAUSE)
                wanted = random.uniform(pause / 2, pause)
                time.sleep(wanted if left is None else min(wanted, left))

    def release(self, lock: DistributedLock, lease: Lease) -> bool:
        """Give the lock back; whether it was still held."""
        if not self._renewal.remove(lease.ticket):
            return False
        leases, _, released = self._keys(lock.name)
        args = (_text(lock.name), lease.ticket, "", self._client)
        return bool(self._ensemble.run(_DROP, [leases, released], args)[0] == OK)

    def renew(self, leases: Sequence[Lease]) -> list[bool]:
        """Tell that we live; which of these leases are still held."""
        return [
            self._ensemble.run(_RENEW, [lease.key], [_text(lease.name), lease.ticket])[0] == OK
            for lease in leases
        ]

    def close(self) -> None:
        """Close the connections and stop renewing: what is still held ends with its lease."""
        self._renewal.stop()
        self._ensemble.close()


def _text(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
