"""A board in shared memory: workers write what was acknowledged last, others hold their reads against it.

One slot per worker, one aligned 64-bit word per entry: a reader sees an entry of before or of after.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path

SLOTS = 128
_WORDS = 16
# Entries of a slot. Trial numbers are stored plus one: 0 is none yet.
(
    CREATED,  # number of the trial created last
    FINISHED,  # number of the trial finished last
    POPPED,  # number of the trial claimed last
    BEST,  # the lowest value told so far, plus one
    WROTE,  # number of the trial whose attribute "seen" was acknowledged last ...
    SEEN,  # ... and its value, which only grows; 0 while both are being changed
    STUDY,  # value of the study attribute named after the worker, which only grows
    DUEL,  # number of a trial that anybody is invited to finish
    DONE,  # how many facts were noted
    READY,  # whether the worker has begun
) = range(10)
_GO, _STOP = 0, 1  # words of the slot past the last one


class Board:
    """The board in a file; whoever maps the same file sees the same board."""

    def __init__(self, path: Path) -> None:
        size = (SLOTS + 1) * _WORDS * 8
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(descriptor, size)
        self._words = memoryview(mmap.mmap(descriptor, size)).cast("q")
        os.close(descriptor)

    def put(self, slot: int, entry: int, value: int) -> None:
        """Write one entry."""
        self._words[slot * _WORDS + entry] = value

    def get(self, slot: int, entry: int) -> int:
        """Read one entry."""
        return self._words[slot * _WORDS + entry]

    def column(self, entry: int) -> list[int]:
        """One entry of every slot."""
        return self._words[entry : SLOTS * _WORDS : _WORDS].tolist()

    def put_seen(self, slot: int, number: int, value: int) -> None:
        """An attribute "seen" of a trial was acknowledged."""
        self.put(slot, SEEN, 0)
        self.put(slot, WROTE, number + 1)
        self.put(slot, SEEN, value)

    def seen(self) -> list[tuple[int, int]]:
        """Number and acknowledged attribute "seen", of all slots that are not being changed."""
        before, numbers, after = self.column(SEEN), self.column(WROTE), self.column(SEEN)
        return [
            (number - 1, value)
            for value, number, again in zip(before, numbers, after, strict=True)
            if value and value == again
        ]

    @property
    def going(self) -> bool:
        """Whether workers may begin."""
        return bool(self.get(SLOTS, _GO))

    @property
    def stopped(self) -> bool:
        """Whether workers are to end."""
        return bool(self.get(SLOTS, _STOP))

    def go(self) -> None:
        """Let all workers begin at once."""
        self.put(SLOTS, _GO, 1)

    def stop(self) -> None:
        """Let all workers end what they are doing, and leave."""
        self.put(SLOTS, _STOP, 1)
