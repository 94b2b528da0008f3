"""`optuna-dlock locks`: who holds which lock, since when, who waits; and breaking one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from optuna_dlock.cli_output import (
    FAILED,
    OK,
    URL_HELP,
    USAGE,
    AddCommand,
    duration,
    open_to_look,
    table,
    to_json,
)
from optuna_dlock.lock_table import LockState, break_lock, list_locks

_EXAMPLES = """\
examples:
  optuna-dlock locks redis://localhost:6379/0
  optuna-dlock locks redis://localhost:6379/0 --json
  optuna-dlock locks redis://localhost:6379/0 --break dataset
  optuna-dlock locks redis://localhost:6379/0 --break study:3 --yes

A lock is free by itself when its holder has been dead for its ttl. Break one only if its holder hangs:
it goes on as if it had the lock until it next renews or releases it, and then gets a LockLostError.
On several masters nobody queues: who waits is not known there.
Exit codes: 0 listed (there may be none) or broken, 1 nobody holds that lock, or the answer was no,
2 it could not look or ask."""


def add_to(add_command: AddCommand) -> None:
    """Make the command known."""
    parser = add_command("locks", "show who holds which lock, since when, and who waits", _EXAMPLES, _run)
    parser.add_argument("url", metavar="URL", help=URL_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON, one list with an object per lock")
    parser.add_argument("--break", dest="broken", metavar="NAME", help="take this lock from its holder")
    parser.add_argument("--yes", action="store_true", help="with --break: do not ask")


def _run(args: argparse.Namespace) -> int:
    with open_to_look(args.url) as storage:
        node, prefix = storage._node, storage._server.prefix
        locks = list_locks(node, prefix)
        if args.broken is None:
            print(to_json([_described(lock) for lock in locks]) if args.json else _text(locks))
            return OK
        lock = next((lock for lock in locks if lock.name == args.broken), None)
        if lock is None:
            return _failed(f"nobody holds lock {args.broken!r}")
        if not args.yes and not _is_confirmed(lock):
            return FAILED if sys.stdin.isatty() else USAGE
        if not break_lock(node, prefix, lock):
            return _failed(f"lock {lock.name!r} was released meanwhile; nothing was broken")
    print(to_json([_described(lock)]) if args.json else f"broken: lock {lock.name!r} of {lock.owner}")
    return OK


def _failed(message: str) -> int:
    print("optuna-dlock:", message, file=sys.stderr)
    return FAILED


def _is_confirmed(lock: LockState) -> bool:
    if not sys.stdin.isatty():
        print("optuna-dlock: there is nobody to ask: give --yes to break a lock", file=sys.stderr)
        return False
    print(_text([lock]), file=sys.stderr)
    print(f"Take lock {lock.name!r} from {lock.owner}? [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _described(lock: LockState) -> dict[str, object]:
    return {
        "lock": lock.name,
        "owner": lock.owner,
        "token": lock.token,
        "held_for": round(lock.held_for, 3),
        "ttl": round(lock.ttl, 3),
        "waiters": lock.waiters,
    }


def _text(locks: Sequence[LockState]) -> str:
    if not locks:
        return "no locks are held"
    rows: list[tuple[object, ...]] = [("lock", "owner", "held for", "ttl", "token", "waiters")]
    for lock in locks:
        waiters = "not known" if lock.waiters is None else ", ".join(lock.waiters) or "none"
        row = (lock.name, lock.owner, duration(lock.held_for), duration(lock.ttl), lock.token, waiters)
        rows.append(row)
    return table(rows, left=(0, 1, 5))
