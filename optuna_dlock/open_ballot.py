"""Open ballots: clients that want the same object share one, and one master says which section follows which.

The client that has a ballot opens it on a master that it has brought to the latest state. From then on that
master, the sequencer, is the only one that proposes under it: it runs sections as they come, and each client
passes on to the other masters what was run. Nobody waits for a turn, and nobody who dies holds others up.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from optuna_dlock.fanout import Fanout
from optuna_dlock.master import Request
from optuna_dlock.node import Argument
from optuna_dlock.scripts import GAP, OK, STALE_BALLOT, masters_script, wrapped

_PATIENCE = 0.1  # seconds after which a sequencer is too slow to go by
_FAR_BEHIND = (
    64  # sections; a master that lacks more is not waited for, and looked after (ENTRIES_CAP in Lua)
)


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
        self._seq = -1
        self._own = 0  # sections sent since then

    @property
    def is_lost(self) -> bool:
        """Whether what was sent last did not arrive, so that nothing may be sent after it."""
        return self._sent is not None and self._sequencer.index in self._sent.lost

    def send(
        self, name: str, keys: Sequence[str], args: Sequence[Argument], this: str, start: int | str = ""
    ) -> Request:
        """Have the sequencer run a section, and return what was run from a sequence number on."""
        request = self._sent = Request()
        self._own += 1
        words = (*args, self.ballot, this, len(self._sequencer.key_prefix), name, start)
        self._sequencer.send_script(wrapped("sequenced", name), (*keys, *self._keys), words, request)
        return request

    def reply(self, request: Request) -> list[Any] | None:
        """What the sequencer replied; None if it did not run it."""
        reply = self._fanout.wait_for(self._sequencer, request, _PATIENCE)
        if isinstance(reply, list) and reply[0] == OK:
            return reply
        self.is_closed = isinstance(reply, list) and reply[0] == STALE_BALLOT
        return None

    def start(self) -> int:
        """The sequence number from which on the other masters may lack sections."""
        self._note_reached()
        connected = [
            reached for index, reached in self._reached.items() if self._fanout.masters[index].connected
        ]
        return min((r for r in connected if r >= max(connected) - _FAR_BEHIND), default=0)

    def pass_on(self, reply: Sequence[Any] | None = None) -> bool:
        """Have a majority run what the sequencer has run; whether it has.

        Args:
            reply: The sequencer's to a section that was sent with `start`; None to ask what it has run.
        """
        for _ in range(2):
            if reply is None:
                request, script = Request(), masters_script("get_sections")
                self._sequencer.send_script(script, self._keys, [self.ballot, self.start()], request)
                reply = self.reply(request)
                if reply is None:
                    return False
            *_, seq, entries = reply
            request, script = Request(), masters_script("run_sections")
            request.replies[self._sequencer.index] = [OK]
            for master in self._fanout.masters:
                if master is not self._sequencer:
                    words = (self.ballot, master.key_prefix, *entries)
                    master.send_script(script, self._keys, words, request)
            self._note_reached()
            self._passed = request
            if self._fanout.wait_for_majority(request):
                if self._seq != seq - self._own:
                    self.others_ran_at = time.monotonic()
                self._seq, self._own = seq, 0
                return True
            if not self._fanout.count(request, GAP):
                return False
            reply = None  # they lack more than we knew
        return False

    def behind(self) -> list[int]:
        """Masters that were not reached with what was passed on: they need more than that."""
        self._note_reached()
        return []

    def _note_reached(self) -> None:
        if self._passed is None:
            return
        for index, reply in self._passed.replies.items():
            if index != self._sequencer.index and isinstance(reply, list):
                if reply[0] == OK:
                    self._reached[index] = max(self._reached.get(index, 0), reply[1])
                elif reply[0] == GAP:
                    self._reached[index] = int(reply[2])
