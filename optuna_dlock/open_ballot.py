"""Open ballots: clients that want the same object share one, and one master says which section follows which.

The client that has a ballot opens it on a master that it has brought to the latest state. From then on that
master, the sequencer, is the only one that proposes under it (a distinguished proposer: Lamport, "Paxos Made
Simple", 2001). It runs sections as they come, and each client passes on to the other masters what was run.
Nobody waits for a turn, and nobody who dies holds others up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from optuna_dlock.fanout import Fanout
from optuna_dlock.master import Request
from optuna_dlock.node import Argument
from optuna_dlock.scripts import GAP, NO_DATA, OK, STALE_BALLOT, masters_script, wrapped

_PATIENCE = 0.25  # seconds after which a sequencer is too slow to go by
_SPARE = 4  # sections of others that are passed on besides one's own, before it is known how many are lacking
_MOST = 256  # sections that are passed on at once; a master that lacks more is looked after


class OpenBallot:
    """A ballot that is open, as one client sees it.

    Args:
        fanout: The masters.
        keys: Of the object: ballots and list of sections.
        ballot: Which one it is.
        sequencer: Index of the master on which it is open.
        reached: By index, how many sections the other masters have run at least.

    Attributes:
        is_closed: Whether the sequencer said so: there may be another open one. Else it does not get through.
        others_ran_at: When somebody else was last seen to run a section, by the monotonic clock.
    """

    def __init__(
        self,
        fanout: Fanout,
        keys: tuple[str, str],
        ballot: str,
        sequencer: int,
        reached: Mapping[int, int] | None = None,
    ) -> None:
        self.ballot = ballot
        self.is_closed = False
        self.others_ran_at = time.monotonic()
        self._fanout = fanout
        self._keys = keys
        self._sequencer = fanout.masters[sequencer]
        self._reached = dict(reached or {})
        self._sent: Request | None = None
        self._passed: Request | None = None
        self._first = 0  # sequence number of the first section that was passed on last
        self._behind: set[int] = set()
        self._seq = -1
        self._own = 0  # sections sent since then
        self._spare = _SPARE  # sections of others that the rest may lack when we pass on ours

    @property
    def is_lost(self) -> bool:
        """Whether what was sent last did not arrive, so that nothing may be sent after it."""
        return self._sent is not None and self._sequencer.index in self._sent.lost

    def send(
        self, name: str, keys: Sequence[str], args: Sequence[Argument], this: str, is_last: bool = False
    ) -> Request:
        """Have the sequencer run a section; the reply to the last one brings what is to be passed on."""
        request = self._sent = Request()
        self._own += 1
        wanted = (self._start(), self._own + self._spare) if is_last else (0, 0)
        words = (*args, self.ballot, this, len(self._sequencer.key_prefix), name, *wanted)
        self._sequencer.send_script(wrapped("sequenced", name), (*keys, *self._keys), words, request)
        return request

    def replies(self, requests: Sequence[Request]) -> list[list[Any]] | None:
        """What the sequencer replied to all of these; None if it did not run them all."""
        replies = []
        for request in requests:
            reply = self._fanout.wait_for(self._sequencer, request, _PATIENCE)
            if not isinstance(reply, list) or reply[0] != OK:
                self.is_closed = isinstance(reply, list) and reply[0] == STALE_BALLOT
                return None
            replies.append(reply)
        return replies

    def _start(self) -> int:
        """The sequence number from which on the other masters may lack sections."""
        self._note_reached()
        connected = [
            reached for index, reached in self._reached.items() if self._fanout.masters[index].connected
        ]
        return min((r for r in connected if r >= max(connected) - _MOST), default=0)

    def pass_on(self, reply: Sequence[Any] | None = None) -> bool:
        """Have a majority run what the sequencer has run; whether it has.

        Args:
            reply: The sequencer's to the last section; None to ask what it has run.
        """
        for _ in range(2):
            if reply is None:
                request, script = Request(), masters_script("get_sections")
                self._sequencer.send_script(script, self._keys, [self.ballot, self._start(), _MOST], request)
                replies = self.replies([request])
                if replies is None:
                    return False
                (reply,) = replies
            *_, seq, entries = reply
            request, script = Request(), masters_script("run_sections")
            request.replies[self._sequencer.index] = [OK]
            for master in self._fanout.masters:
                if master is not self._sequencer:
                    words = (self.ballot, master.key_prefix, *entries)
                    master.send_script(script, self._keys, words, request)
            self._note_reached()
            self._passed, self._first = request, seq - len(entries)
            if self._fanout.wait_for_majority(request):
                if self._seq != seq - self._own:
                    self.others_ran_at = time.monotonic()
                missing = max(r[2] for r in request.replies.values() if isinstance(r, list) and len(r) == 3)
                self._spare = max(2 * (missing - self._own) + _SPARE, self._spare - 1)
                self._seq, self._own = seq, 0
                return True
            if not self._fanout.count(request, GAP):
                return False
            reply = None  # they lack more than we thought
            self._spare = min(2 * self._spare, _MOST)
        return False

    def seen(self, requests: Sequence[Request]) -> list[Any] | None:
        """What the sequencer replied to reads, if a majority has now run all that it had run by then.

        Such a majority has promised no higher ballot, so nothing newer was decided before the reads began.
        """
        found = []
        for request in requests:
            reply = request.replies.get(self._sequencer.index)
            if not isinstance(reply, list) or reply[0] != OK or reply[1].decode() != self.ballot:
                return None
            found.append(reply[4])
        return found if self.pass_on() else None

    def behind(self) -> list[int]:
        """Masters that cannot catch up with what is passed on; each is told once."""
        self._note_reached()
        behind, self._behind = sorted(self._behind), set()
        return behind

    def _note_reached(self) -> None:
        """Look at the replies to what was passed on last, those that came late as well."""
        passed, self._passed = self._passed, None
        for index, reply in passed.replies.items() if passed is not None else ():
            if index == self._sequencer.index or not isinstance(reply, list):
                continue
            if reply[0] == OK:
                self._reached[index] = max(self._reached.get(index, 0), reply[1])
            elif reply[0] == GAP:
                self._reached[index] = int(reply[2])
                if not self._seq - _MOST < self._reached[index] < self._first:
                    self._behind.add(index)  # it has run something else, or lacks more than is passed on
            elif reply[0] == NO_DATA or reply[1].decode() < self.ballot:
                self._behind.add(index)
