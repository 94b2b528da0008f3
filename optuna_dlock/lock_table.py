"""All locks that are held, as an operator sees them: by whom, since when, who waits; and breaking one.

This looks through all keys of the server (SCAN): for people, not for workers.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass

from optuna_dlock.ensemble import AnyNode, Ensemble
from optuna_dlock.errors import LockError
from optuna_dlock.keys import RegistryKeys, StudyKeys, lock_keys, lock_name, lock_pattern
from optuna_dlock.node import Node
from optuna_dlock.scripts import OK, masters_script, script

_POTTERY = "redlock:"
_REMEMBER_MS = 60_000


@dataclass(frozen=True)
class LockState:
    """A lock that is held.

    Attributes:
        name: As given to `storage.lock`; `study:<id>` is that of a study.
        owner: host:pid:thread.
        token: Its fencing token.
        held_for: Seconds since it got the lock: by the server's clock, or on several masters by the holder's.
        ttl: Seconds until its lease ends unless renewed; on several masters the length of the lease.
        waiters: host:pid:thread of those in the queue, in order; None where waiters do not queue (several
            masters, pottery).
        ticket: What tells this hold from all others.
    """

    name: str
    owner: str
    token: int
    held_for: float
    ttl: float
    waiters: tuple[str, ...] | None
    ticket: str


def list_locks(node: AnyNode, prefix: str) -> list[LockState]:
    """All locks that are held now, by name."""
    found = _on_masters(node, prefix) if isinstance(node, Ensemble) else _on_server(node, prefix)
    return sorted(found, key=lambda lock: lock.name)


def break_lock(node: AnyNode, prefix: str, lock: LockState) -> bool:
    """Take a lock from its holder, and give it to the next one in the queue.

    The holder learns of it when it renews its lease, or releases the lock; until then it goes on as if it had
    it. Only its fencing token tells.

    Returns:
        Whether it was still the same hold.

    Raises:
        LockError: If it is a pottery.Redlock.
    """
    if isinstance(node, Ensemble):
        holder, released = _masters_keys(prefix, lock.name)
        args = (_encoded(lock.name), lock.ticket, "", "break")
        return bool(node.run(masters_script("drop_lease"), [holder, released], args)[0] == OK)
    if lock.ticket.startswith(_POTTERY):
        raise LockError(
            f"lock {lock.name!r} is a pottery.Redlock, which is not broken: end {lock.owner}, and it is free "
            f"{lock.ttl:.0f} s later",
            name=lock.name,
        )
    keys = lock_keys(prefix, lock.name)
    all_keys = (keys.holder, keys.fence, keys.queue, keys.wake(f"break:{secrets.token_hex(6)}"))
    reply = node.run(script("release_lock"), all_keys, (lock.ticket, keys.wake(""), _REMEMBER_MS))
    return bool(reply[0] == OK)


# -- one master ------------------------------------------------------------------------------------------


def _on_server(node: Node, prefix: str) -> Iterator[LockState]:
    seconds, microseconds = node.command("TIME")
    now = int(seconds) * 1000 + int(microseconds) // 1000
    for pottery in ("", _POTTERY):
        for key in _scan(node, pottery + lock_pattern(prefix)):
            name = lock_name(prefix, key.removeprefix(pottery))
            if name is None:
                continue
            keys = lock_keys(prefix, name)
            # pottery's key holds a random value; who it is stands in a note, after the same value.
            held, left = node.commands((("GET", keys.wake("pottery") if pottery else key), ("PTTL", key)))
            if held is None:
                continue  # released since
            ticket, token, since, owner = held.decode("utf-8", "replace").split(" ", 3)
            yield LockState(
                name,
                owner,
                int(token),
                max(0.0, (now - int(since)) / 1000),
                max(0.0, left / 1000),
                None if pottery else tuple(_waiters(node, prefix, name)),
                pottery + ticket,
            )


def _scan(node: Node, pattern: str) -> set[str]:
    found: set[str] = set()
    cursor = b"0"
    while True:
        cursor, keys = node.command("SCAN", cursor, "MATCH", pattern, "COUNT", 1000)
        found.update(key.decode("utf-8", "surrogatepass") for key in keys)
        if cursor == b"0":
            return found


def _waiters(node: Node, prefix: str, name: str) -> Iterator[str]:
    keys = lock_keys(prefix, name)
    tickets = dict.fromkeys(node.command("LRANGE", keys.queue, 0, -1))
    marks = [("GET", keys.wake(ticket.decode()) + ":waits") for ticket in tickets]
    for wish in node.commands(marks) if marks else ():
        if wish is not None:  # else it waits no more
            yield wish.decode("utf-8", "replace").partition(" ")[2]


# -- several masters -------------------------------------------------------------------------------------


def _masters_keys(prefix: str, name: str) -> tuple[str, str]:
    """Keys of the holder and of what was released."""
    kind, _, study_id = name.partition(":")
    if kind == "study" and study_id.isdecimal():
        study = StudyKeys(prefix, int(study_id))
        return study.lock, study.released
    registry = RegistryKeys(prefix)
    return registry.leases, registry.released


def _on_masters(node: AnyNode, prefix: str) -> Iterator[LockState]:
    registry = RegistryKeys(prefix)
    study_ids = sorted(int(study_id) for study_id in node.command("HKEYS", registry.studies))
    for holder in (registry.leases, *(StudyKeys(prefix, study_id).lock for study_id in study_ids)):
        flat = node.command("HGETALL", holder)
        for name, held in zip(flat[::2], flat[1::2], strict=True):
            ticket, token, _, ttl, since, owner = held.decode("utf-8", "replace").split(" ", 5)
            held_for = max(0.0, time.time() - int(since) / 1000)
            yield LockState(
                name.decode("utf-8", "surrogatepass"),
                owner,
                int(token),
                held_for,
                int(ttl) / 1000,
                None,
                ticket,
            )


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
