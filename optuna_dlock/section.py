"""The critical sections of one study: scripts that step aside for a holder of the study's section lock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from optuna_dlock.distributed_lock import LockBackend
from optuna_dlock.ensemble import AnyNode
from optuna_dlock.errors import LockNotAcquiredError
from optuna_dlock.node import Argument
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import BUSY, Script

_STOOD_STILL = 2.0  # seconds between two looks at the lock, which are 0.1 s apart


class Section:
    """What excludes whom in one study.

    A script excludes all other scripts. The section lock, `storage.lock("study:<id>")`, excludes the
    scripts of other processes for as long as several steps take; its holder's own go on.
    """

    def __init__(self, node: AnyNode, locks: LockBackend, study_id: int) -> None:
        self.name = f"study:{study_id}"
        self._node = node
        self._locks = locks
        self._key = locks.holder_key(self.name)
        self._no_key = self._key + ":none"  # never exists

    def key(self) -> str:
        """The key that exists while somebody else holds the section lock."""
        return self._no_key if self._locks.holds(self.name) else self._key

    def hold(self) -> AbstractContextManager[Any]:
        """The section lock, for a section of several steps; nothing to do if this process holds it."""
        if self._locks.holds(self.name):
            return nullcontext()
        return self._locks.lock(self.name, timeout=self._node.timeout)

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run the script of a critical section, waiting while somebody else holds the section lock.

        Raises:
            LockNotAcquiredError: If it is held for longer than the node's timeout, not counting pauses of
                this process.
        """
        reply = self._node.run(script, keys, args)
        if reply[0] != BUSY:
            return reply
        last = float("-inf")
        while reply[0] == BUSY:
            now = time.monotonic()
            if now - last > _STOOD_STILL:
                # At first; and when this process was paused or the server away: it has not waited meanwhile.
                waiting = Backoff(self._node.timeout, first=0.005, longest=0.1)
            last = now
            self._locks.free_if_dead(self.name)
            if not waiting.wait():
                raise self._still_held(script)
            reply = self._node.run(script, keys, args)
        return reply

    def _still_held(self, script: Script) -> LockNotAcquiredError:
        holder = self._locks.holder(self.name)
        owner, held_for = (holder.owner, holder.held_for) if holder else (None, None)
        now = f", now by {owner} for {held_for:.1f} s" if holder else ""
        return LockNotAcquiredError(
            f"{script.name}: lock {self.name!r} was held by others for {self._node.timeout:g} s{now}",
            name=self.name,
            timeout=self._node.timeout,
            holder=owner,
            held_for=held_for,
        )
