"""Leases of locks that are held, and the one thread per process and server that renews them in time."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

_logger = logging.getLogger(__name__)


class Lease:
    """One hold of one lock, for as long as it is renewed.

    Args:
        name: Name of the lock.
        key: Key of the lock on the server.
        ticket: What tells this hold from all others.
        token: Fencing token.
        ttl: Seconds for which the lease lasts, unless renewed.
        since: When it began or sooner, by our monotonic clock.
        lost: Set if it is lost.
        on_lost: Called by the renewal thread after that.
    """

    __slots__ = ("backing", "end", "key", "lost", "name", "on_lost", "renew_at", "ticket", "token", "ttl")

    def __init__(
        self,
        name: str,
        key: str,
        ticket: str,
        token: int,
        ttl: float,
        since: float,
        lost: threading.Event,
        on_lost: Callable[[], None] | None = None,
    ) -> None:
        self.name = name
        self.key = key
        self.ticket = ticket
        self.token = token
        self.ttl = ttl
        self.lost = lost
        self.on_lost = on_lost
        self.backing: Any = None  # what another kind of lock needs besides
        self.end = since + ttl
        self.renew_at = since + ttl / 3

    def renewed(self, since: float) -> None:
        """It began anew at `since` or later."""
        self.end = since + self.ttl
        self.renew_at = since + self.ttl / 3


class Renewal:
    """Renews leases when a third of their time is over. The thread starts with the first lease.

    `add` and `remove` cost a dictionary entry each: the thread need not be told of what comes and goes,
    as nothing new is due before it looks again.

    Args:
        renew: Renews the leases on the server and says which are still held; raises if it cannot know.
    """

    def __init__(self, renew: Callable[[Sequence[Lease]], Sequence[bool]]) -> None:
        self.shortest = float("inf")  # ttl of any lease so far
        self._renew = renew
        self._held: dict[str, Lease] = {}  # by ticket; single steps on it are atomic
        self._guard = threading.Lock()
        self._alarm: threading.Event | None = None  # of the thread, if there is one
        self._asleep = False

    def add(self, lease: Lease) -> None:
        """Renew this lease from now on."""
        self._held[lease.ticket] = lease
        if self._asleep or lease.ttl < self.shortest or self._alarm is None:
            self._rouse(lease.ttl)

    def remove(self, ticket: str) -> bool:
        """Renew it no more; whether it was still held, as far as is known here."""
        if self._held.pop(ticket, None) is not None:
            return True
        with self._guard:  # if it is being declared lost just now, let that come first
            return False

    def holds(self, name: str) -> bool:
        """Whether a lease of this lock is being renewed here."""
        return bool(self._held) and any(lease.name == name for lease in self._held.copy().values())

    def stop(self) -> None:
        """End the thread; the next lease starts another."""
        with self._guard:
            alarm, self._alarm = self._alarm, None
        if alarm is not None:
            alarm.set()

    def is_thread(self, alarm: threading.Event) -> bool:
        """Whether the thread with this alarm is the one to go on."""
        return self._alarm is alarm

    def _rouse(self, ttl: float) -> None:
        with self._guard:
            self.shortest = min(self.shortest, ttl)
            self._asleep = False
            if self._alarm is not None:
                self._alarm.set()
                return
            self._alarm = threading.Event()
            # The thread must not keep alive what everybody else forgot.
            weakref.finalize(self, self._alarm.set).atexit = False
            threading.Thread(
                target=_renew_for_ever,
                args=(weakref.ref(self), self._alarm),
                name="optuna-dlock-renewal",
                daemon=True,
            ).start()

    def renew_due(self) -> float | None:
        """Renew what is due; seconds until something may be due again. None: nothing is held."""
        now = time.monotonic()
        due = [lease for lease in self._held.copy().values() if lease.renew_at <= now]
        if due:
            self._renew_these(due)
        # In this order: a lease that is added between these two lines finds us asleep, and wakes us.
        self._asleep = True
        held = self._held.copy()
        if not held:
            return None
        self._asleep = False
        # What is added from now on is not due before the shortest third is over.
        first = min(lease.renew_at for lease in held.values()) - time.monotonic()
        return max(0.0, min(self.shortest / 3, first))

    def _renew_these(self, due: Sequence[Lease]) -> None:
        asked = time.monotonic()
        try:
            kept = self._renew(due)
        except Exception as error:  # whatever it is, the thread goes on: other locks live by it
            _logger.warning("%d leases could not be renewed for now: %s", len(due), error)
            now = time.monotonic()
            kept = [now < lease.end for lease in due]
            for lease in due:
                lease.renew_at = min(now + lease.ttl / 10, lease.end)
        else:
            for lease in due:
                lease.renewed(asked)
        for lease, is_kept in zip(due, kept, strict=True):
            if not is_kept:
                self._lose(lease)

    def _lose(self, lease: Lease) -> None:
        with self._guard:
            if self._held.pop(lease.ticket, None) is None:
                return  # released meanwhile
            lease.end = 0.0
            lease.lost.set()
        _logger.warning("lock %r was lost (fencing token %d)", lease.name, lease.token)
        if lease.on_lost is not None:
            try:
                lease.on_lost()
            except Exception:  # other locks live by this thread
                _logger.exception("on_lost of lock %r failed", lease.name)


def _renew_for_ever(renewal_ref: weakref.ref[Renewal], alarm: threading.Event) -> None:
    while True:
        renewal = renewal_ref()
        if renewal is None or not renewal.is_thread(alarm):
            return
        pause = renewal.renew_due()
        del renewal
        alarm.wait(pause)
        alarm.clear()
