"""What keeps contenders for the sections of an object apart, on several masters; no safety depends on it."""

from __future__ import annotations


class Spacing:
    """`lock="redlock"`: the leases of ballots do it, and nothing is held besides.

    `PotterySpacing` is the other kind. An ensemble uses it under its lock, so one thread at a time.
    """

    opens = True  # whether contenders may share a ballot, after which nobody needs to be kept apart

    def take(self, name: str) -> None:
        """Wait for the turn to ask for a ballot of this object; it may return without having got it.

        Once taken it stays taken until `give_back`.
        """

    def give_back(self, name: str) -> None:
        """The section was run, or given up; nothing to do if the turn was not taken."""

    def forget(self) -> None:
        """In a forked child: leave what was taken to the parent."""

    def close(self) -> None:
        """Close connections; the next call opens others."""
