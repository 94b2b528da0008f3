"""What several masters have decided: majorities, ballots, and which of their states to believe. No I/O."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

FIRST_BALLOT = "0"
_EPOCH, _MICROSECONDS, _CLIENT = 4, 16, 12  # digits


def majority(n: int) -> int:
    """How many of n masters decide; any two such groups share a master."""
    return n // 2 + 1


def needed_for_rebuild(n: int) -> int:
    """How many others meet every majority that a master without memory was part of."""
    return n - majority(n) + 1


class Ballots:
    """Ballots of one client: unique, and higher than any this client has seen.

    After the epoch comes the time, which only saves a retry; their order is checked by the masters. An epoch
    ends when masters go on with what earlier runs of them have kept: no promise of before may outrank what
    comes then.

    Args:
        clock: Seconds since the epoch; may be wrong.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._client = random.SystemRandom().randrange(10**_CLIENT)
        self._epoch = 0
        self._last = 0

    def next(self, seen: str = FIRST_BALLOT) -> str:
        """A ballot above all before, and above one that a master has told."""
        epoch, microseconds = _parts(seen)
        now = int(self._clock() * 1e6)
        self._epoch = max(self._epoch, epoch)
        self._last = max(now, self._last + 1, microseconds + 1)
        return f"{self._epoch:0{_EPOCH}d}{self._last:0{_MICROSECONDS}d}{self._client:0{_CLIENT}d}"

    def next_epoch(self, seen: str) -> str:
        """A ballot of a new epoch, above all that can be made by whoever has not been told of it."""
        self._epoch = max(self._epoch, _parts(seen)[0]) + 1
        return self.next(seen)


def _parts(ballot: str) -> tuple[int, int]:
    """Epoch and time of a ballot."""
    return int(ballot[:_EPOCH]), int(ballot[_EPOCH : _EPOCH + _MICROSECONDS] or 0)


class State(NamedTuple):
    """Where a master is with an object; ordered by ballot, then by sequence number.

    Attributes:
        ballot: Under which its last section was accepted.
        seq: How many sections were run.
        last: Identity of the last one.
    """

    ballot: str
    seq: int
    last: str

    @classmethod
    def of(cls, ballot: bytes, seq: bytes, last: bytes) -> State:
        """The state in a reply."""
        return cls(ballot.decode(), int(seq), last.decode())

    @property
    def order(self) -> tuple[str, int]:
        """What decides which of two states is the later one."""
        return self.ballot, self.seq

    @property
    def base(self) -> tuple[int, str]:
        """What data it stands for."""
        return self.seq, self.last


def decided(states: Mapping[int, State], n: int) -> int | None:
    """The master whose reply may be believed, of those that answered; None if that cannot be told yet.

    Let t be the q-th latest state, q the majority. It was decided if q masters have its ballot and are at
    least as far; nothing later can have been acknowledged unless silent masters made it a majority.
    """
    q = majority(n)
    if len(states) < q:
        return None
    ranked = sorted(states.items(), key=lambda item: item[1].order, reverse=True)
    index, t = ranked[q - 1]
    if sum(s.ballot == t.ballot and s.seq >= t.seq for s in states.values()) < q:
        return None
    latest_possible = ranked[len(states) - (n - q) - 1][1]  # had the silent ones been at least as far
    return index if latest_possible.order == t.order else None


class Runs:
    """Which run of each master is the current one, as far as masters have been told.

    A master that restarts forgets its promises. Whoever rebuilds it tells N - q + 1 of the others its new run
    before it votes: these meet every majority in which a grant of the earlier run could be counted. Each
    telling has a higher generation than all before.
    """

    def __init__(self, known: Iterable[bytes] = ()) -> None:
        self._known: dict[int, tuple[int, str]] = {}
        for text in known:
            for entry in text.decode().split():
                index, _, rest = entry.partition("=")
                generation, _, run = rest.partition(":")
                self._merge(int(index), int(generation), run)

    def _merge(self, index: int, generation: int, run: str) -> None:
        if generation > self._known.get(index, (0, ""))[0]:
            self._known[index] = generation, run

    def is_current(self, index: int, run: str) -> bool:
        """Whether nobody was told of a later run."""
        known = self._known.get(index)
        return known is None or known[1] == run

    def begin(self, index: int, run: str) -> None:
        """A run that is about to vote."""
        if index not in self._known or self._known[index][1] != run:
            self._known[index] = self._known.get(index, (0, ""))[0] + 1, run

    def __str__(self) -> str:
        return " ".join(f"{index}={generation}:{run}" for index, (generation, run) in self._known.items())
