"""What workers were told, safe from SIGKILL: one file per worker, one JSON line per fact.

A `try` line goes before each call that decides something, a line of its outcome after it returned. A `try`
without an outcome is open: it may have happened or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Fact = dict[str, Any]


class Ledger:
    """The facts of one worker, written by it alone."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._sent: list[Fact] = []
        self.acknowledged = 0

    def trying(self, what: str, **details: Any) -> None:
        """Say what will be asked of the storage next."""
        self._write({"fact": "try", "what": what, **details})

    def sent(self, number: int, kind: str, name: str, value: Any) -> None:
        """Note a write that returned without waiting: acknowledged by the next call that waits."""
        fact = {"fact": "wrote", "number": number, "kind": kind, "name": name, "value": value}
        self._sent.append(fact)

    def waited(self) -> None:
        """A call that waits has returned: what was sent before is acknowledged."""
        if self._sent:
            self._write(*self._sent)
            self._sent.clear()

    def note(self, fact: str, **details: Any) -> None:
        """A call that waits has returned, with this outcome."""
        self._write(*self._sent, {"fact": fact, **details})
        self._sent.clear()

    def refused(self, number: int) -> None:
        """The trial was finished by somebody else: what was sent to it since the last wait may be lost."""
        self._sent = [fact for fact in self._sent if fact["number"] != number]
        self.note("refused", number=number)

    def remark(self, fact: str, **details: Any) -> None:
        """Something worth knowing that acknowledges nothing."""
        self._write({"fact": fact, **details})

    def _write(self, *facts: Fact) -> None:
        self.acknowledged += len(facts)
        os.write(self._file, "".join(json.dumps(fact) + "\n" for fact in facts).encode())


@dataclass
class Record:
    """All that one worker has noted.

    Attributes:
        facts: Outcomes, in order.
        open: Tries whose outcome nobody knows: the worker was killed, or the server was away for too long.
    """

    facts: list[Fact] = field(default_factory=list)
    open: list[Fact] = field(default_factory=list)

    def of(self, kind: str) -> list[Fact]:
        """The facts of one kind."""
        return [fact for fact in self.facts if fact["fact"] == kind]


def read_records(folder: Path) -> dict[str, Record]:
    """The records of all workers whose ledgers lie in a folder, by name."""
    return {path.stem: _record(_lines(path)) for path in sorted(folder.glob("*.jsonl"))}


def _lines(path: Path) -> Iterator[Fact]:
    for line in path.read_bytes().splitlines(keepends=True):
        if line.endswith(b"\n"):  # SIGKILL may come in the middle of the last one
            yield json.loads(line)


def _record(facts: Iterator[Fact]) -> Record:
    record = Record()
    trying: Fact | None = None
    for fact in facts:
        if fact["fact"] == "try":
            trying = fact
        elif fact["fact"] in ("wrote", "stale"):
            record.facts.append(fact)
        else:
            if fact["fact"] == "unavailable" and trying is not None:
                record.open.append(trying)
            record.facts.append(fact)
            trying = None
    if trying is not None:
        record.open.append(trying)
    return record
