"""Several masters behind the face of one node: fenced critical sections, majority reads, deferred writes.

Every master runs the same sections of an object (a study, or the registry) in the same order. Ballots decide
who may run the next one, after which (CASPaxos: Rystsov, "CASPaxos: Replicated State Machines without logs",
2018); leases only keep contenders apart, until they share a ballot (`open_ballot.py`). The protocol is in
`optuna_dlock/README.md`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import secrets
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from optuna_dlock.channel import Connection, RefusalError
from optuna_dlock.errors import (
    DLockError,
)
from optuna_dlock.fanout import Fanout
from optuna_dlock.keys import RegistryKeys, StudyKeys, object_of, pack_members
from optuna_dlock.master import Master, Request
from optuna_dlock.node import Argument, Node, Post, forget_in_children
from optuna_dlock.open_ballot import OpenBallot
from optuna_dlock.quorum import FIRST_BALLOT, Ballots, Runs, State, decided, needed_for_rebuild
from optuna_dlock.repair import Copy, Repairs, revive, sweep_earlier_runs, throw_away
from optuna_dlock.scripts import (
    GAP,
    HINTS,
    LEASED,
    NO_DATA,
    NO_STUDY,
    OK,
    OPEN,
    READS,
    SECTIONS,
    STALE_BALLOT,
    Script,
    masters_script,
    wrapped,
)
from optuna_dlock.spacing import Spacing

_logger = logging.getLogger(__name__)

_TTL_MS = 2000  # of a section's lease: how long a holder that died keeps others waiting
_GRACE = 0.02  # seconds that a read waits for the last masters before it asks again
_SLOWEST = 0.05  # seconds that one that has its majority waits for the votes of the rest
_ASKED_AGAIN = 5  # times
_GATE = 0.05  # seconds that the master that is asked first may take before the others are asked too
_REPLAYED = 256  # sections that are replayed on a master that missed them; beyond, it gets a copy
_WAITED_FOR_ALL = 5.0  # seconds, after all went down, before a majority goes on without the rest
# Seconds between two attempts to get a turn. Long ones let the holder run several sections at one round trip
# each, where a new holder needs three: with 8 contenders twice as many per second, and shorter waits in all.
_FIRST_WAIT, _LONGEST_WAIT = 0.02, 0.05
_ALTERNATE = 10.0  # seconds; who finds others' sections within them after its own opens its ballot
_ALONE = 1.0  # seconds without others after which an open ballot is given up for one of one's own
_FLUSHED_AFTER = 0.002  # seconds for which a write waits for others, to take a turn or be passed on together
_READ_TRIES = 3  # undecided reads before one is made a section
_READ_COMMANDS = frozenset(
    ("EXISTS", "GET", "HGET", "HGETALL", "HKEYS", "HMGET", "KEYS", "LRANGE", "SMEMBERS", "ZRANGE")
)


class _Object:
    """What this process knows of one replicated object.

    Attributes:
        ballot: Ours, as long as nobody was seen to have a higher one: then no acquire is needed.
        base: Sequence number and identity of the last section.
        highest: The highest ballot that a master has told.
        opened: A ballot that all share; None if we know of none, or have one of our own.
        must_own: Whether an open one did not get through, so that we have to acquire one of our own.
        ran_at: When we ran a section last, by the monotonic clock.
        is_lacking: Whether, at the last attempt, so many masters had no data of it that no majority was left.
    """

    __slots__ = (
        *("ballot", "ballots_key", "base", "highest", "is_lacking", "must_own", "name", "opened", "ran_at"),
        "sections_key",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.ballots_key = name + "ballots"
        self.sections_key = name + "sections"
        self.ballot: str | None = None
        self.base = (0, "")
        self.highest = FIRST_BALLOT
        self.is_lacking = False
        self.opened: OpenBallot | None = None
        self.must_own = False
        self.ran_at = -_ALTERNATE


class _Posted:
    """A write that returned to its caller before a majority had it.

    Attributes:
        request: None while it is not sent, as somebody else may have the turn.
        opened: The open ballot under which it was sent, if it was.
    """

    __slots__ = ("obj", "opened", "post", "request")

    def __init__(self, post: Post, obj: _Object) -> None:
        self.post, self.obj = post, obj
        self.request: Request | None = None
        self.opened: OpenBallot | None = None


class Head:
    """The unchanging first part of a Post: three more arguments follow."""

    __slots__ = ("args", "keys", "script")

    def __init__(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> None:
        self.script, self.keys, self.args = script, tuple(keys), tuple(args)


class Ensemble(Fanout):
    """N masters, as one process sees them; the methods that it shares with `Node` mean the same.

    Args:
        servers: Address and connection factory of each master.
        prefix: Key space.
        timeout: Seconds for which a call goes on trying while no majority answers.
        on_fork: Called in a forked child, so that the owner forgets what belongs to the parent.
        clock: Of the ballots, in seconds since the epoch; nothing depends on its being right.
        repair: Whether masters that are behind are brought up to date in the background.
        spacing: What keeps contenders apart besides leases.
    """

    def __init__(
        self,
        servers: Sequence[tuple[str, Callable[[], Connection]]],
        prefix: str,
        timeout: float,
        on_fork: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.time,
        repair: bool = True,
        spacing: Spacing | None = None,
    ) -> None:
        super().__init__(servers, prefix, timeout)
        self.waits = 0
        self.keys = RegistryKeys(prefix)
        self._on_fork = on_fork
        self._clock = clock
        self._spacing = spacing or Spacing()
        self._servers = list(servers)
        self._repairing = repair
        self._start_anew()
        forget_in_children(self)

    def _start_anew(self) -> None:
        self.ballots = Ballots(self._clock)
        self._client = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._sequence = 0
        self._objects: dict[str, _Object] = {}
        self._outstanding: deque[_Posted] = deque()
        self._unsent = 0  # of these
        self._flusher: threading.Thread | None = None
        self._greeted = False
        self._lacking_since = 0.0
        self._repairs: Repairs | None = None
        if self._repairing:
            # No bound method: in a cycle, sockets would be collected before the connections that close them.
            args = (self._servers, self.prefix, self.timeout)
            self._repairs = Repairs(functools.partial(Ensemble, *args, clock=self._clock, repair=False))
            weakref.finalize(self, self._repairs.stop)

    def forget(self) -> None:
        """In a forked child: leave the parent's connections and writes to the parent."""
        self.lock = threading.RLock()
        for master in self.masters:
            master.forget()
        self._spacing.forget()
        self._start_anew()
        if self._on_fork is not None:
            self._on_fork()

    def close(self) -> None:
        """Close the connections; the next call opens others."""
        with self.lock:
            for master in self.masters:
                master.close()
        self._spacing.close()
        if self._repairs is not None:
            self._repairs.stop()

    # -- the face of a node ----------------------------------------------------------------------

    def next_sequence(self) -> int:
        """A number that rises with every operation of this client; the masters refuse repeats by it."""
        self._sequence += 1
        return self._sequence

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """Run a script: as a section, as a majority read or as a hint, as its name says.

        Raises:
            QuorumError: If no majority of the masters answers within `timeout`.
            AccessDeniedError, ServerConfigurationError, CorruptRecordError: What retrying cannot mend.
        """
        with self.lock:
            self.waits += 1
            self._greet()
            if script.name in READS:
                return self._read(script.name, keys, args)
            if script.name in HINTS:
                return self._hint(script.name, keys, args)
            if script.name not in SECTIONS:
                raise ValueError(f"{script.name} is not listed in scripts.py, so no master knows it")
            return self._section(script.name, keys, args)

    def run_many(
        self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]
    ) -> list[Any]:
        """Run one reading script several times; the replies in order."""
        with self.lock:
            self.waits += 1
            self._greet()
            return self._read_many(script.name, calls)

    def command(self, *args: Argument) -> Any:
        """A plain command that reads one key; PING makes sure that a majority is there."""
        name = str(args[0])
        with self.lock:
            self.waits += 1
            self._greet()
            if name == "PING":
                return b"PONG"
            if name not in _READ_COMMANDS:
                raise ValueError(f"{name} is no command for several masters")
            reply = self._read("read_key", [str(args[1])], [name, *args[2:]])
            if reply == [NO_STUDY]:  # what does not exist is empty, as on one server
                return None if name in ("GET", "HGET") else []
            return reply

    def make_head(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Head:
        """The unchanging first part of a Post."""
        return Head(script, keys, args)

    def post(self, post: Post) -> None:
        """Send a write to all masters at once, and read the replies with the next call that waits.

        Under an open ballot it is sent to the sequencer; where somebody else may have run the object's last
        section, it needs a turn first. The rest happens with the next call that waits, or soon, in a thread.
        """
        with self.lock:
            obj = self._object(post.head.keys[0])
            self._outstanding.append(_Posted(post, obj))
            self._unsent += 1
            self._send_unsent(obj)
            if obj.ballot is None and self._flusher is None:
                self._flusher = threading.Thread(target=_flush, args=(self,), name="flush", daemon=True)
                self._flusher.start()
            if len(self._outstanding) > 500:
                self.collect()

    def collect(self) -> None:
        """Wait until all posts are with a majority; those that were refused are run again, in order."""
        with self.lock:
            if not self._outstanding:
                return
            self.waits += 1
            self._greet()
            self._collect()

    @property
    def outstanding(self) -> int:
        """Number of posts of which nobody has looked yet whether a majority has them."""
        return len(self._outstanding)

    def _collect(self) -> bool:
        """Take the replies of all posts; whether some had to be sent yet, or once more."""
        again, trying = False, self.trying(_LONGEST_WAIT, _FIRST_WAIT)
        while self._outstanding:
            posted = self._outstanding[0]
            obj, request = posted.obj, posted.request
            if request is None:
                again = True
                if obj.ballot is None and not self._opened(obj) and not self._acquire(obj):
                    if obj.is_lacking and self._is_unknown(obj):
                        self._done(posted, [NO_STUDY])
                    elif obj.opened is None:
                        next(trying)
                    continue
                self._send_unsent(obj)
            elif posted.opened is not None:
                self._share(obj, posted.opened)
            elif self.wait_for_majority(request):
                self._done(posted, self._section_reply(request))
            else:
                # Refused, or lost: this one and all that were sent after it, as they build on it.
                self._learn(obj, request)
                self.raise_refusals(request, posted.post.head.keys)
                obj.ballot = None
                self._take_back(obj)
        return again

    def _send_unsent(self, obj: _Object) -> None:
        """Send all posts of an object that were not sent, if we have its ballot or know of an open one."""
        opened = self._opened(obj)
        if not self._unsent or (obj.ballot is None and opened is None):
            return
        for posted in self._outstanding:
            if posted.obj is obj and posted.request is None:
                post, head = posted.post, posted.post.head
                name, args = head.script.name, (*head.args, post.field, post.value, post.sequence)
                if obj.ballot is not None:
                    posted.request = self._send_section(obj, obj.ballot, name, head.keys, args)
                elif opened is not None:
                    posted.opened = opened
                    posted.request = opened.send(name, head.keys, args, self._new_id())
                self._unsent -= 1

    def _take_back(self, obj: _Object) -> None:
        """All posts of an object that were sent have to be sent once more, in order."""
        sent = [posted for posted in self._outstanding if posted.obj is obj and posted.request is not None]
        # One that failed, while a later one did not, must not look as if it had been run before that.
        failed = any(
            isinstance(reply, RefusalError)
            for posted in sent
            if posted.opened is not None and posted.request is not None
            for reply in posted.request.replies.values()
        )
        for posted in sent:
            posted.request = posted.opened = None
            if failed:
                posted.post.sequence = self.next_sequence()
        self._unsent += len(sent)

    def _done(self, posted: _Posted, reply: Any) -> None:
        self._outstanding.popleft()
        self._unsent -= posted.request is None
        self._settle(posted.post, reply)

    @staticmethod
    def _settle(post: Post, reply: Any) -> None:
        if reply != post.expected:
            post.settle(post.subject, reply)

    # -- sections --------------------------------------------------------------------------------

    def _object(self, key: str) -> _Object:
        name = object_of(key)
        found = self._objects.get(name)
        if found is None:
            found = self._objects[name] = _Object(name)
        return found

    def _section(self, name: str, keys: Sequence[str], args: Sequence[Argument], collect: bool = True) -> Any:
        """Run a critical section, on a majority at least; its reply."""
        obj = self._object(keys[0])
        try:
            return self._section_of(obj, name, keys, args, collect)
        finally:
            self._spacing.give_back(obj.name)

    def _section_of(
        self, obj: _Object, name: str, keys: Sequence[str], args: Sequence[Argument], collect: bool
    ) -> Any:
        trying = self.trying(_LONGEST_WAIT, _FIRST_WAIT)
        while True:
            if obj.ballot is not None:
                self._send_unsent(obj)
                request = self._send_section(obj, obj.ballot, name, keys, args)
                if collect and self._outstanding:
                    self._collect()  # what was sent before is on the wires before
                if self.wait_for_majority(request):
                    obj.ran_at = time.monotonic()
                    self._note_behind(obj, request)
                    return self._section_reply(request)
                obj.ballot = None
                self._learn(obj, request)
                self.raise_refusals(request, keys)
            elif collect and any(p.obj is not obj or p.opened is None for p in self._sent()):
                self._collect()
                continue
            elif opened := self._opened(obj):
                reply = self._share(obj, opened, (name, keys, args))
                if reply is not None:
                    return reply[0]
            self._spacing.take(obj.name)
            if not self._acquire(obj) and not self._opened(obj):
                if obj.is_lacking and self._is_unknown(obj):
                    return [NO_STUDY]
                next(trying)

    def _sent(self) -> list[_Posted]:
        return [posted for posted in self._outstanding if posted.request is not None]

    def _new_id(self) -> str:
        return f"{self._client}.{next(self._numbers)}"

    def _opened(self, obj: _Object) -> OpenBallot | None:
        """The open ballot that we know of, if nothing that we sent under it was lost."""
        if obj.opened is not None and obj.opened.is_lost:
            self._stop_sharing(obj, obj.opened)
        return obj.opened

    def _stop_sharing(self, obj: _Object, opened: OpenBallot) -> None:
        obj.opened, obj.must_own = None, not opened.is_closed
        self._take_back(obj)

    def _share(
        self,
        obj: _Object,
        opened: OpenBallot,
        call: tuple[str, Sequence[str], Sequence[Argument]] | None = None,
    ) -> list[Any] | None:
        """Run a section under an open ballot, after all that was posted to the object.

        Returns:
            The section's reply, in a list; None if it may not have been run.
        """
        self._send_unsent(obj)
        posts = list(itertools.takewhile(lambda p: p.opened is opened, self._outstanding))
        request = None if call is None else opened.send(*call, self._new_id(), is_last=True)
        replies = opened.replies(
            [*(p.request for p in posts if p.request is not None), *([request] if request else ())]
        )
        if replies is None or not opened.pass_on(None if request is None else replies[-1]):
            self._stop_sharing(obj, opened)
            return None
        obj.ran_at = time.monotonic()
        if self._repairs is not None:
            self._repairs.ask_for(*opened.behind())
        for posted, reply in zip(posts, replies, strict=False):
            self._done(posted, reply[1])
        if obj.ran_at - opened.others_ran_at > _ALONE:
            self._acquire(obj)
        return None if request is None else [replies[-1][1]]

    def _open(self, obj: _Object, ballot: str, at_best: Collection[int]) -> None:
        """Let others share our ballot, on the master that everybody asks first."""
        sequencer = next((m for m in self.masters if m.connected), None)
        if sequencer is None or sequencer.index not in at_best:
            return
        sequencer.send_script(masters_script("open_ballot"), [obj.ballots_key], [ballot], Request())
        self._release(obj, ballot)
        reached = {index: obj.base[0] for index in at_best if index != sequencer.index}
        keys = obj.ballots_key, obj.sections_key
        obj.ballot, obj.opened = None, OpenBallot(self, keys, ballot, sequencer.index, reached)

    def _send_section(
        self, obj: _Object, ballot: str, name: str, keys: Sequence[str], args: Sequence[Argument]
    ) -> Request:
        """Send a section to all masters; from here on the next one builds on it."""
        seq, last = obj.base
        new = self._new_id()
        request, script = Request(), wrapped("fenced", name)
        for master in self.masters:
            master.send_script(
                script,
                (*keys, obj.ballots_key, obj.sections_key),
                (*args, ballot, seq, last, new, len(master.key_prefix), name),
                request,
            )
        obj.base = seq + 1, new
        return request

    @staticmethod
    def _section_reply(request: Request) -> Any:
        return next(r[1] for r in request.replies.values() if isinstance(r, list) and r[0] == OK)

    def _learn(self, obj: _Object, request: Request) -> None:
        """Note the ballots that masters have told."""
        for reply in request.replies.values():
            if isinstance(reply, list) and reply[0] in (STALE_BALLOT, LEASED, OPEN):
                self.ballots.see(reply[1].decode())
                obj.highest = max(obj.highest, reply[1].decode())

    def _acquire(self, obj: _Object, thoroughly: bool = False) -> bool:
        """Get the promises of a majority, and bring enough of it to the latest state any of it has.

        Args:
            thoroughly: Whether masters that are not needed get a copy too, if a replay is not enough.
        """
        ballot = self.ballots.next(obj.highest)
        obj.is_lacking = False
        if sum(master.connected for master in self.masters) < self.q:
            return False  # who cannot win must not take the turn from those who can
        may_share = self._spacing.opens and not thoroughly and not obj.must_own and not obj.opened
        request, runs = self._ask_for_votes(obj, ballot, self.masters, True, may_share)
        obj.opened, obj.must_own = None, False
        if len(runs) == 1:  # the one that is asked first says no: there is nothing to give back
            self._learn(obj, request)
            (index,) = runs
            code, promised = request.replies[index]
            if code == OPEN:
                keys = obj.ballots_key, obj.sections_key
                obj.opened = OpenBallot(self, keys, promised.decode(), index)
            return False
        if self.accepted(request):
            # Who has not answered yet may refuse the section, and then has to catch up with it later.
            self.wait_for_all(request, _SLOWEST, or_slow=True)
            self._ask_again(obj, ballot, request)
        self._learn(obj, request)
        self.raise_refusals(request, [obj.ballots_key])
        self._note_behind(obj, request)
        obj.is_lacking = self._is_lacking(request)
        states, known = self._votes(request, runs)
        if len(states) < self.q:
            self._release(obj, ballot)
            return False
        best_index, best = max(states.items(), key=lambda item: item[1].order)
        at_best = {index for index, state in states.items() if state.base == best.base}
        behind = {index: state for index, state in states.items() if index not in at_best}
        if behind:
            at_best |= self._replay(obj, ballot, best_index, best, behind)
        left = behind.keys() - at_best
        if left and self._repairs is not None:
            self._repairs.ask_for(*left)
        if thoroughly or len(at_best) < self.q:
            for index in left:
                if self._install(obj, ballot, best_index, best, index, behind[index], known):
                    at_best.add(index)
        if len(at_best) < self.q:
            self._release(obj, ballot)
            return False
        obj.ballot, obj.base = ballot, best.base
        self._lacking_since = 0.0
        alternates = not best.last.startswith(self._client) and time.monotonic() - obj.ran_at < _ALTERNATE
        if may_share and alternates:
            self._open(obj, ballot, at_best)
            return False
        return True

    def _ask_for_votes(
        self,
        obj: _Object,
        ballot: str,
        masters: Sequence[Master],
        gate: bool = False,
        may_share: bool = False,
    ) -> tuple[Request, dict[int, str]]:
        """Send a ballot to these masters, and wait until a majority has granted it, or none can.

        Returns:
            The request, and the run of each master that it was sent to: of one, if `gate` ended it.
        """
        request, script = Request(), masters_script("acquire_ballot")
        request.lost.update(m.index for m in self.masters if m not in masters or not m.connected)
        asked = [master for master in masters if master.connected]
        runs = {master.index: master.run for master in asked}
        for at, master in enumerate(asked):
            if master.run != runs[master.index]:
                request.lost.add(master.index)  # it restarted just now
                continue
            master.send_script(
                script, [obj.ballots_key], [ballot, _TTL_MS, int(may_share and at == 0)], request
            )
            if at == 0 and gate:
                # All contenders ask the same master first: who loses there keeps nobody from a majority.
                self.wait_for(master, request, _GATE)
                if self._is_taken(request):
                    return request, {master.index: master.run}
        self.wait(request, lambda: self.accepted(request) or self.is_refused(request))
        return request, runs

    def _ask_again(self, obj: _Object, ballot: str, request: Request) -> None:
        """Get the votes of masters where the last holder's lease is about to end.

        It has its majority and has sent its section to them too. It may go on, as it knows of nobody else
        yet, and what it would run there alone could only be undone by a copy.
        """
        script = masters_script("acquire_ballot")
        for _ in range(_ASKED_AGAIN):
            leased = [i for i, r in request.replies.items() if isinstance(r, list) and r[0] == LEASED]
            if not leased:
                return
            for index in leased:
                del request.replies[index]
                self.masters[index].send_script(script, [obj.ballots_key], [ballot, _TTL_MS, 0], request)
            self.wait_for_all(request, _SLOWEST, or_slow=True)

    def _is_taken(self, request: Request) -> bool:
        """Whether somebody else has the turn, as the only master says that was asked so far."""
        return len(request.replies) == 1 and bool(
            self.count(request, LEASED) or self.count(request, OPEN) or self.count(request, STALE_BALLOT)
        )

    def _votes(self, request: Request, runs: dict[int, str]) -> tuple[dict[int, State], Runs]:
        """The states of the masters whose grants count: those of runs that are still the current ones."""
        granted = {i: r for i, r in request.replies.items() if isinstance(r, list) and r[0] == OK}
        known = Runs(reply[4] for reply in granted.values())
        states = {
            index: State.of(*reply[1:4])
            for index, reply in granted.items()
            if known.is_current(index, runs[index])
        }
        return states, known

    def _release(self, obj: _Object, ballot: str) -> None:
        """Give back what was granted, or is about to be: nobody waits for the reply."""
        script, request = masters_script("release_ballot"), Request()
        for master in self.masters:
            master.send_script(script, [obj.ballots_key], [ballot], request)

    def _replay(
        self, obj: _Object, ballot: str, source: int, best: State, behind: dict[int, State]
    ) -> set[int]:
        """Run the sections that masters missed on them, under our ballot; the masters that have caught up."""
        first = min(state.seq for state in behind.values())
        if best.seq - first > _REPLAYED:
            return set()
        found = self._ask(source, "read_key", [obj.sections_key], ["LRANGE", first - best.seq, -1], obj)
        if found is None or State.of(*found[1:4]).base != best.base:
            return set()
        requests: dict[int, Request] = {}
        for index in behind:
            request = requests[index] = Request()
            master, keys = self.masters[index], (obj.ballots_key, obj.sections_key)
            words = (ballot, master.key_prefix, *found[4])
            master.send_script(masters_script("run_sections"), keys, words, request)
        caught_up = set()
        for index, request in requests.items():
            reply = self.wait_for(self.masters[index], request, 1.0)
            if isinstance(reply, list) and reply[0] == OK:
                caught_up.add(index)
        return caught_up

    def _note_behind(self, obj: _Object, request: Request) -> None:
        """Have masters that were seen without data, or elsewhere than the majority, looked after."""
        if self._repairs is None:
            return
        for index, reply in request.replies.items():
            if isinstance(reply, list) and reply[0] == NO_DATA:
                self._repairs.ask_for(index)
            elif isinstance(reply, list) and reply[0] == GAP:
                obj.ballot = None  # the next acquire replays what it missed

    # -- reads -----------------------------------------------------------------------------------

    def _read(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        return self._read_many(name, [(keys, args)])[0]

    def _read_many(
        self,
        name: str,
        calls: Sequence[tuple[Sequence[str], Sequence[Argument]]],
        collect: bool = True,
    ) -> list[Any]:
        if not calls:
            return []
        obj = self._object(calls[0][0][0])
        trying: Iterator[int] | None = None
        tries = 0
        while True:
            if collect and not all(p.request is not None and p.opened is None for p in self._outstanding):
                self._collect()
            requests = [self._send_read(name, keys, args) for keys, args in calls]
            if collect and self._outstanding and self._collect():
                continue  # some write was run again after we asked
            last = requests[-1]
            self._wait_for_decision(last)
            for request in requests:
                self.raise_refusals(request, calls[0][0])
                self._note_behind(obj, request)
            if name == "get_stale_trials" and self.count(last, OK) >= self.q:
                return [_stale_on_all(request) for request in requests]
            indexes = [self._decided(request) for request in requests]
            if None not in indexes:
                return [r.replies[i][4] for r, i in zip(requests, indexes, strict=True) if i is not None]
            opened = self._opened(obj)
            if opened is not None and (seen := opened.seen(requests)) is not None:
                return seen
            lacking = any(self._is_lacking(request) for request in requests)
            if lacking and self._is_unknown(obj):
                return [[NO_STUDY] for _ in calls]
            tries += 1
            self.waits += 1
            if tries >= _READ_TRIES and not lacking:
                # Others write all the time, or one left something on a minority: take a turn as writers do.
                return [self._section(name, keys, args, collect=False) for keys, args in calls]
            trying = trying or self.trying(longest=0.05, first=0.0005)
            next(trying)

    def _wait_for_decision(self, request: Request) -> None:
        self.wait(request, lambda: self._decided(request) is not None or self._is_over(request))
        if self._decided(request) is None:
            self.wait_for_all(request, _GRACE, or_slow=True)

    def _is_over(self, request: Request) -> bool:
        """Whether all that answer at all have answered, or a majority has and the rest may be slow."""
        return self.all_answered(request) or len(request.replies) >= self.q

    def _send_read(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Request:
        request, script = Request(), wrapped("versioned", name)
        all_keys = (*keys, object_of(keys[0]) + "ballots")
        for master in self.masters:
            master.send_script(script, all_keys, args, request)
        return request

    def _decided(self, request: Request) -> int | None:
        states = {
            index: State.of(*reply[1:4])
            for index, reply in request.replies.items()
            if isinstance(reply, list) and reply[0] == OK
        }
        return decided(states, len(self.masters))

    def _hint(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Tell all masters something that no decision depends on."""
        trying = self.trying()
        while True:
            request, script = Request(), wrapped("present", name)
            all_keys = (*keys, object_of(keys[0]) + "ballots")
            for master in self.masters:
                master.send_script(script, all_keys, args, request)
            if self.wait_for_majority(request):
                return self._section_reply(request)
            next(trying)

    def _ask(self, index: int, name: str, keys: Sequence[str], args: Sequence[Argument], obj: _Object) -> Any:
        """A read of one master's own state; None if it does not answer."""
        request = Request()
        self.masters[index].send_script(wrapped("versioned", name), (*keys, obj.ballots_key), args, request)
        reply = self.wait_for(self.masters[index], request, 2.0)
        return reply if isinstance(reply, list) and reply[0] == OK else None

    # -- the ensemble itself -----------------------------------------------------------------------

    def _greet(self) -> None:
        """The first time: see that a majority is there and has data, or let a new ensemble begin."""
        if self._greeted:
            return
        registry = self._object(self.keys.ballots)
        trying = self.trying()
        while True:
            if sum(m.connected for m in self.masters) >= self.q:
                request = self._send_read("read_key", [self.keys.info], ["HLEN"])
                self.wait_for_all(request, 1.0)
                if self.count(request, OK) >= self.q:
                    break
                tried = all(m.connected or m.problem is not None for m in self.masters)
                if tried and self._is_lacking(request):
                    self._recover(registry, request)
            self.receive(0.002)
            next(trying)
        self._greeted = True
        if len(self.masters) % 2 == 0:
            _warn_once(self.members)

    def _is_unknown(self, obj: _Object) -> bool:
        """Whether a majority lacks the object as there is no such study; if it is lost, it is recovered."""
        request = self._send_read("read_key", [obj.ballots_key], ["HLEN"])
        self.wait_for_all(request, 1.0)
        if not self._is_lacking(request):
            return False
        if self._is_deleted(obj.name):
            return True
        self._recover(obj, request)
        return False

    def _is_deleted(self, name: str) -> bool:
        """Whether this is a study that a majority knows to be none."""
        if name == object_of(self.keys.ballots):
            return False
        study_id = name[name.rindex("{") + 1 : -2]
        call = [self.keys.studies], ["HGET", study_id]
        return self._read_many("read_key", [call], collect=False)[0] is None

    def _is_lacking(self, request: Request) -> bool:
        """Whether masters without data leave no majority, as things stand."""
        without = self.count(request, NO_DATA)
        away = sum(not master.connected for master in self.masters)
        return without > 0 and len(self.masters) - without - away < self.q

    def _recover(self, obj: _Object, request: Request) -> None:
        """No majority has data of an object: let the registry begin, or take what an earlier run has left."""
        without = [i for i, r in request.replies.items() if isinstance(r, list) and r[0] == NO_DATA]
        with_data = {i: r for i, r in request.replies.items() if isinstance(r, list) and r[0] == OK}
        if obj.name == object_of(self.keys.ballots) and not any(m.earlier_runs for m in self.masters):
            # Whoever began it before may have died on the way.
            begun = [r for r in with_data.values() if int(r[2]) == 0]
            if len(begun) + len(without) == len(self.masters):
                self._found()
                return
        if len(with_data) >= needed_for_rebuild(len(self.masters)):
            for index in without:
                self.rebuild(obj.name, index)
            return
        # What is missing might have lost nothing, while these have lost the last second before a crash.
        self._lacking_since = self._lacking_since or time.monotonic()
        all_here = len(with_data) + len(without) == len(self.masters)
        if all_here or time.monotonic() - self._lacking_since > _WAITED_FOR_ALL:
            try:
                revive(self, obj.name, with_data.keys())
            except ConnectionError as error:
                _logger.debug("a master went away again: %s", error)

    def _found(self) -> None:
        """Begin a new ensemble, with all masters; nothing was there before."""
        for master in self.masters:
            request = Request()
            master.send_plain(("SET", self.keys.members, pack_members(self.members), "NX"), Request())
            master.send_plain(("GET", self.keys.members), request)
            reply = self.wait_for(master, request, 2.0)
            if not isinstance(reply, bytes):
                return
            master.check_members(reply)
        request, script = Request(), masters_script("found_object")
        for master in self.masters:
            master.send_script(script, [self.keys.ballots], [FIRST_BALLOT, ""], request)
            self._note_run(master)
        self.wait_for_all(request, 2.0)

    def _note_run(self, master: Master) -> None:
        """Remember, on the master, in which run it has data."""
        master.send_plain(("HSET", master.run_key, master.run, int(time.time() * 1e6)), Request())

    # -- copies ----------------------------------------------------------------------------------

    def rebuild(self, name: str, target: int) -> bool:
        """Give a master that has forgotten an object a copy, after which it votes again."""
        with self.lock:
            obj = self._object(name + "ballots")
            obj.ballot = obj.opened = None
            ballot = self.ballots.next(obj.highest)
            others = [master for master in self.masters if master.index != target]
            needed = needed_for_rebuild(len(self.masters))
            request, runs = self._ask_for_votes(obj, ballot, others)
            self.wait_for_all(request, 1.0, or_slow=True)
            self._learn(obj, request)
            states, known = self._votes(request, runs)
            if len(states) < needed:
                self._release(obj, ballot)
                return False
            known.begin(target, self.masters[target].run)
            told = Request()
            for index in states:
                script = masters_script("note_runs")
                self.masters[index].send_script(script, [obj.ballots_key], [ballot, str(known)], told)
            self.wait(told, lambda: self.count(told, OK) >= needed, 2.0)
            source, best = max(states.items(), key=lambda item: item[1].order)
            if self.count(told, OK) < needed or not self._install(
                obj, ballot, source, best, target, None, known
            ):
                self._release(obj, ballot)
                return False
            obj.ballot, obj.base = ballot, best.base
            confirmed = self._send_section(obj, ballot, "confirm_state", [obj.ballots_key], [])
            if not self.wait_for_majority(confirmed):
                obj.ballot = None
            return obj.ballot is not None

    def _install(
        self,
        obj: _Object,
        ballot: str,
        source: int,
        best: State,
        target: int,
        replaced: State | None,
        known: Runs,
    ) -> bool:
        """Copy an object from one master to another, under a ballot that the source has promised."""
        copy = f"{ballot}.{next(self._numbers)}"
        is_whole = Copy(self, obj.name, ballot, copy, source, best, target, replaced, known).run()
        if self._is_deleted(obj.name):
            with contextlib.suppress(ConnectionError):  # that master may have swept before the copy came
                throw_away(self, obj.name, self.masters[target])
            return False
        return is_whole

    def repair(self, index: int) -> bool:
        """Give a master that restarted everything that the others have; whether it has it all."""
        with self.lock:
            self._greet()
            registry = object_of(self.keys.ballots)
            names = [registry]
            names += [
                object_of(StudyKeys(self.prefix, int(study_id)).ballots)
                for study_id in self._read("read_key", [self.keys.studies], ["HKEYS"])
            ]
            master = self.masters[index]
            if not master.connected:
                return False
            whole = True
            for name in names:
                if self._lacks(index, name):
                    whole = self.rebuild(name, index) and whole
                else:
                    obj = self._object(name + "ballots")
                    whole = self._acquire(obj, thoroughly=True) and whole
                    if obj.ballot is not None:
                        self._release(obj, obj.ballot)
            if whole:
                master.send_plain(("SET", self.keys.members, pack_members(self.members), "NX"), Request())
                self._note_run(master)
                sweep_earlier_runs(self, master)
            return whole

    def _lacks(self, index: int, name: str) -> bool:
        """Whether a master has no data of an object."""
        request = Request()
        key = name + "ballots"
        self.masters[index].send_script(wrapped("versioned", "read_key"), [key, key], ["HLEN"], request)
        return bool(self.reply_of(self.masters[index], request, 2.0)[0] == NO_DATA)

    def keys_of(self, name: str) -> RegistryKeys | StudyKeys:
        """The key names of an object."""
        text = name[name.rindex("{") + 1 : -2]
        return StudyKeys(self.prefix, int(text)) if text.isdecimal() else self.keys


def _flush(ensemble: Ensemble) -> None:
    """Send, or pass on, what was not when it was posted; a burst of writes takes one turn."""
    time.sleep(_FLUSHED_AFTER)
    with ensemble.lock:
        ensemble._flusher = None
        try:
            if ensemble._outstanding:
                ensemble._greet()
                ensemble._collect()
        except DLockError as error:  # the next call that waits raises it
            _logger.debug("writes wait for their turn: %s", error)


def _stale_on_all(request: Request) -> Any:
    """A trial is stale only if every master that answered says so: one that was away missed heartbeats."""
    replies = [r[4] for r in request.replies.values() if isinstance(r, list) and r[0] == OK]
    codes = [reply for reply in replies if reply[0] != OK]
    if codes:
        return codes[0]
    stale = set(replies[0][1]).intersection(*(reply[1] for reply in replies[1:]))
    return [OK, [number for number in replies[0][1] if number in stale]]


AnyNode = Node | Ensemble  # one master or several, behind the same face


_warned: set[tuple[str, ...]] = set()


def _warn_once(members: Sequence[str]) -> None:
    if tuple(members) not in _warned:
        _warned.add(tuple(members))
        _logger.warning(
            "%d masters work, but stop when half of them are down: an odd number survives more (%s)",
            len(members),
            ", ".join(members),
        )
