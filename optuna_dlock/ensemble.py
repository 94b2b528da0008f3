"""Several masters behind the face of one node: fenced critical sections, majority reads, deferred writes.

Every master runs the same sections of an object (a study, or the registry) in the same order. Ballots decide
who may run the next one, after which (CASPaxos: Rystsov, "CASPaxos: Replicated State Machines without logs",
2018); leases only keep contenders apart. `optuna_dlock/README.md` tells the protocol.
"""

from __future__ import annotations

import functools
import itertools
import logging
import secrets
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from optuna_dlock.channel import Connection, RefusalError
from optuna_dlock.errors import (
    AccessDeniedError,
    CorruptRecordError,
    DLockError,
    QuorumError,
    ServerConfigurationError,
)
from optuna_dlock.keys import RegistryKeys, StudyKeys, object_of, pack_members
from optuna_dlock.master import Master, Request
from optuna_dlock.node import Argument, Node, Post, forget_in_children
from optuna_dlock.quorum import FIRST_BALLOT, Ballots, Runs, State, decided, majority, needed_for_rebuild
from optuna_dlock.repair import Copy, Repairs, revive, sweep_earlier_runs
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import (
    GAP,
    HINTS,
    LEASED,
    NO_DATA,
    NO_STUDY,
    OK,
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
_FLUSHED_AFTER = 0.002  # seconds for which a write waits for others to take a turn together
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
        is_lacking: Whether, at the last attempt, so many masters had no data of it that no majority was left.
    """

    __slots__ = ("ballot", "ballots_key", "base", "highest", "is_lacking", "name", "sections_key")

    def __init__(self, name: str) -> None:
        self.name = name
        self.ballots_key = name + "ballots"
        self.sections_key = name + "sections"
        self.ballot: str | None = None
        self.base = (0, "")
        self.highest = FIRST_BALLOT
        self.is_lacking = False


class _Posted:
    """A write that returned to its caller before a majority had it.

    Attributes:
        request: None while it is not sent, as somebody else may have the turn.
    """

    __slots__ = ("obj", "post", "request")

    def __init__(self, post: Post, obj: _Object) -> None:
        self.post, self.obj = post, obj
        self.request: Request | None = None


class Head:
    """The unchanging first part of a Post: three more arguments follow."""

    __slots__ = ("args", "keys", "script")

    def __init__(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> None:
        self.script, self.keys, self.args = script, tuple(keys), tuple(args)


class Ensemble:
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
        members = [address for address, _ in servers]
        self.prefix = prefix
        self.address = ",".join(members)
        self.timeout = timeout
        self.lock = threading.RLock()
        self.waits = 0
        self.members = members
        self.masters = [
            Master(index, address, factory, prefix, members)
            for index, (address, factory) in enumerate(servers)
        ]
        self.q = majority(len(self.masters))
        self.keys = RegistryKeys(prefix)
        self._on_fork = on_fork
        self._clock = clock
        self._spacing = spacing or Spacing()
        self._servers = list(servers)
        self._poll, self._polled = select.poll(), set[int]()
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

        Where somebody else may have run the last section of the object, it needs a turn first: with the next
        call that waits, or soon, in a thread of its own.
        """
        with self.lock:
            obj = self._object(post.head.keys[0])
            self._outstanding.append(_Posted(post, obj))
            self._unsent += 1
            if obj.ballot is not None:
                self._send_unsent(obj)
            elif self._flusher is None:
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
        again, trying = False, self._trying(_LONGEST_WAIT, _FIRST_WAIT)
        while self._outstanding:
            posted = self._outstanding[0]
            obj, request = posted.obj, posted.request
            if request is None:
                again = True
                if obj.ballot is None and not self._acquire(obj):
                    if obj.is_lacking and self._is_unknown(obj):
                        self._done(posted, [NO_STUDY])
                    else:
                        next(trying)
                    continue
                self._send_unsent(obj)
            elif self._wait_for_section(request):
                self._done(posted, self._section_reply(request))
            else:
                # Refused, or lost: this one and all that were sent after it, as they build on it.
                self._learn(obj, request)
                self._raise_refusals(request, posted.post.head.keys)
                obj.ballot = None
                for later in self._outstanding:
                    if later.obj is obj and later.request is not None:
                        later.request = None
                        self._unsent += 1
        return again

    def _send_unsent(self, obj: _Object) -> None:
        """Send all posts of an object that were not sent; we have its ballot."""
        if not self._unsent or obj.ballot is None:
            return
        for posted in self._outstanding:
            if posted.obj is obj and posted.request is None:
                post, head = posted.post, posted.post.head
                args = (*head.args, post.field, post.value, post.sequence)
                posted.request = self._send_section(obj, obj.ballot, head.script.name, head.keys, args)
                self._unsent -= 1

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
        trying = self._trying(_LONGEST_WAIT, _FIRST_WAIT)
        while True:
            if obj.ballot is not None:
                self._send_unsent(obj)
                request = self._send_section(obj, obj.ballot, name, keys, args)
                if collect and self._outstanding:
                    self._collect()  # what was sent before is on the wires before
                if self._wait_for_section(request):
                    self._note_behind(obj, request)
                    return self._section_reply(request)
                obj.ballot = None
                self._learn(obj, request)
                self._raise_refusals(request, keys)
            elif collect and len(self._outstanding) > self._unsent:
                self._collect()
                continue
            self._spacing.take(obj.name)
            if not self._acquire(obj):
                if obj.is_lacking and self._is_unknown(obj):
                    return [NO_STUDY]
                next(trying)

    def _send_section(
        self, obj: _Object, ballot: str, name: str, keys: Sequence[str], args: Sequence[Argument]
    ) -> Request:
        """Send a section to all masters; from here on the next one builds on it."""
        seq, last = obj.base
        new = f"{self._client}.{next(self._numbers)}"
        request, script = Request(), wrapped("fenced", name)
        for master in self.masters:
            master.send_script(
                script,
                (*keys, obj.ballots_key, obj.sections_key),
                (*args, ballot, seq, last, new, len(master.key_prefix), name, "commit"),
                request,
            )
        obj.base = seq + 1, new
        return request

    def _accepted(self, request: Request) -> bool:
        return self._count(request, OK) >= self.q

    @staticmethod
    def _count(request: Request, code: int) -> int:
        return sum(isinstance(r, list) and r[0] == code for r in request.replies.values())

    def _is_refused(self, request: Request) -> bool:
        """Whether no majority can accept it any more."""
        refused = len(request.replies) - self._count(request, OK)
        return len(self.masters) - refused - len(request.lost) < self.q

    @staticmethod
    def _section_reply(request: Request) -> Any:
        return next(r[1] for r in request.replies.values() if isinstance(r, list) and r[0] == OK)

    def _learn(self, obj: _Object, request: Request) -> None:
        """Note the ballots that masters have told."""
        for reply in request.replies.values():
            if isinstance(reply, list) and reply[0] in (STALE_BALLOT, LEASED):
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
        request, runs = self._ask_for_votes(obj, ballot, self.masters, gate=True)
        if len(runs) == 1:  # the one that is asked first says no: there is nothing to give back
            self._learn(obj, request)
            return False
        if self._accepted(request):
            # Who has not answered yet may refuse the section, and then has to catch up with it later.
            self._wait_for_all(request, _SLOWEST, or_slow=True)
            self._ask_again(obj, ballot, request)
        self._learn(obj, request)
        self._raise_refusals(request, [obj.ballots_key])
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
        return True

    def _ask_for_votes(
        self, obj: _Object, ballot: str, masters: Sequence[Master], gate: bool = False
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
            master.send_script(script, [obj.ballots_key], [ballot, _TTL_MS], request)
            if at == 0 and gate:
                # All contenders ask the same master first: who loses there keeps nobody from a majority.
                self._wait_for(master, request, _GATE)
                if self._is_taken(request):
                    return request, {master.index: master.run}
        self._wait(request, lambda: self._accepted(request) or self._is_refused(request))
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
                self.masters[index].send_script(script, [obj.ballots_key], [ballot, _TTL_MS], request)
            self._wait_for_all(request, _SLOWEST, or_slow=True)

    def _is_taken(self, request: Request) -> bool:
        """Whether somebody else has the turn, as the only master says that was asked so far."""
        return len(request.replies) == 1 and bool(
            self._count(request, LEASED) or self._count(request, STALE_BALLOT)
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
        entries = [_entry(raw) for raw in found[4]]
        requests: dict[int, Request] = {}
        for index, state in behind.items():
            missed = [entry for entry in entries if int(entry[0]) >= state.seq]
            if not missed or (int(missed[0][0]), missed[0][1].decode()) != state.base:
                continue  # it has run something that lost: it needs a copy
            requests[index] = self._replay_on(self.masters[index], obj, ballot, missed)
        caught_up = set()
        for index, request in requests.items():
            replies = self._wait_for(self.masters[index], request, 1.0)
            if isinstance(replies, list) and all(isinstance(r, list) and r[0] == OK for r in replies):
                caught_up.add(index)
        return caught_up

    def _replay_on(
        self, master: Master, obj: _Object, ballot: str, missed: Sequence[Sequence[bytes]]
    ) -> Request:
        """Run all these sections on a master, in one transaction: it has caught up, or is where it was."""
        master.send_plain(("MULTI",), Request())
        for at, (seq, last, new, name, n_keys, *words) in enumerate(missed):
            n = int(n_keys)
            keys = [self.prefix + word.decode("utf-8", "surrogatepass") for word in words[:n]]
            mode = "caught up" if at == len(missed) - 1 else "missed"
            master.send_script(
                wrapped("fenced", name.decode()),
                (*keys, obj.ballots_key, obj.sections_key),
                (*words[n:], ballot, seq, last, new, len(master.key_prefix), name, mode),
                Request(),
            )
        request = Request()
        master.send_plain(("EXEC",), request)
        return request

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
            if collect and self._unsent:
                self._collect()
            requests = [self._send_read(name, keys, args) for keys, args in calls]
            if collect and self._outstanding and self._collect():
                continue  # some write was run again after we asked
            last = requests[-1]
            self._wait_for_decision(last)
            for request in requests:
                self._raise_refusals(request, calls[0][0])
                self._note_behind(obj, request)
            if name == "get_stale_trials" and self._count(last, OK) >= self.q:
                return [_stale_on_all(request) for request in requests]
            indexes = [self._decided(request) for request in requests]
            if None not in indexes:
                return [r.replies[i][4] for r, i in zip(requests, indexes, strict=True) if i is not None]
            lacking = any(self._is_lacking(request) for request in requests)
            if lacking and self._is_unknown(obj):
                return [[NO_STUDY] for _ in calls]
            tries += 1
            self.waits += 1
            if tries >= _READ_TRIES and not lacking:
                # Others write all the time, or one left something on a minority: take a turn as writers do.
                return [self._section(name, keys, args, collect=False) for keys, args in calls]
            trying = trying or self._trying(longest=0.05, first=0.0005)
            next(trying)

    def _all_answered(self, request: Request, or_slow: bool = False) -> bool:
        slow = {m.index for m in self.masters if m.slow} if or_slow else set()
        return len(request.replies.keys() | request.lost | slow) == len(self.masters)

    def _wait_for_decision(self, request: Request) -> None:
        self._wait(request, lambda: self._decided(request) is not None or self._is_over(request))
        if self._decided(request) is None:
            self._wait_for_all(request, _GRACE, or_slow=True)

    def _is_over(self, request: Request) -> bool:
        """Whether all that answer at all have answered, or a majority has and the rest may be slow."""
        return self._all_answered(request) or len(request.replies) >= self.q

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
        trying = self._trying()
        while True:
            request, script = Request(), wrapped("present", name)
            all_keys = (*keys, object_of(keys[0]) + "ballots")
            for master in self.masters:
                master.send_script(script, all_keys, args, request)
            if self._wait_for_section(request):
                return self._section_reply(request)
            next(trying)

    def _ask(self, index: int, name: str, keys: Sequence[str], args: Sequence[Argument], obj: _Object) -> Any:
        """A read of one master's own state; None if it does not answer."""
        request = Request()
        self.masters[index].send_script(wrapped("versioned", name), (*keys, obj.ballots_key), args, request)
        reply = self._wait_for(self.masters[index], request, 2.0)
        return reply if isinstance(reply, list) and reply[0] == OK else None

    # -- waiting ---------------------------------------------------------------------------------

    def _wait(self, request: Request, done: Callable[[], bool], limit: float = 10.0) -> bool:
        """Take replies as they come, until it is done or for so many seconds."""
        deadline = 0.0
        while not done():
            now = time.monotonic()
            if not deadline:
                deadline = now + limit
            elif now >= deadline:
                return False
            self._receive(min(deadline - now, 0.25))
        return True

    def _wait_for(self, master: Master, request: Request, limit: float) -> Any:
        """The reply of one master; None if it does not come."""
        index = master.index
        self._wait(request, lambda: index in request.replies or index in request.lost, limit)
        return request.replies.get(index)

    def _wait_for_section(self, request: Request) -> bool:
        """Wait until a majority has run a section, or none will; whether it has."""
        self._wait(request, lambda: self._accepted(request) or self._is_refused(request))
        return self._accepted(request)

    def _wait_for_all(self, request: Request, limit: float, or_slow: bool = False) -> None:
        self._wait(request, lambda: self._all_answered(request, or_slow), limit)

    def _receive(self, seconds: float) -> None:
        """Wait for replies, and take them; connections that were lost are made again meanwhile."""
        for master in self.masters:
            if master.tend():
                self._check_names()
        by_file = {master.fileno(): master for master in self.masters if master.connected}
        if len(by_file) < len(self.masters):
            seconds = min(seconds, 0.005)
        if not by_file:
            time.sleep(seconds)
            return
        if by_file.keys() != self._polled:
            self._poll, self._polled = select.poll(), set(by_file)
            for file in by_file:
                self._poll.register(file, select.POLLIN)
        for file, _ in self._poll.poll(max(seconds * 1000, 0.1)):
            by_file[file].receive()

    def _trying(self, longest: float = 0.1, first: float = 0.002) -> Iterator[int]:
        """Pauses between tries; raises when the time is over."""
        waiting = Backoff(self.timeout, first=first, longest=longest)
        for number in itertools.count():
            if sum(master.tend() for master in self.masters):
                self._check_names()
            self._raise_fatal()
            if not waiting.wait():
                raise self._quorum_error()
            yield number

    def _quorum_error(self) -> QuorumError:
        nodes = {
            m.address: "connected"
            if m.connected
            else f"{type(m.problem).__name__}: {m.problem}"
            if m.problem
            else "not reached yet"
            for m in self.masters
        }
        answered = sum(m.connected for m in self.masters)
        what = "; ".join(f"{address}: {text}" for address, text in nodes.items())
        return QuorumError(
            f"{answered} of {len(nodes)} masters can be used and {self.q} are needed; none were for "
            f"{self.timeout:g} s ({what})",
            address=self.address,
            timeout=self.timeout,
            needed=self.q,
            answered=answered,
            nodes=nodes,
        )

    def _raise_fatal(self) -> None:
        fatal = [m.fatal for m in self.masters if m.fatal is not None]
        for error in fatal:
            if isinstance(error, ServerConfigurationError):
                raise error
        if len(fatal) > len(self.masters) - self.q:
            raise fatal[0]

    def _raise_refusals(self, request: Request, keys: Sequence[str]) -> None:
        """Raise what so many masters say that no majority is left to say otherwise."""
        errors = {i: r for i, r in request.replies.items() if isinstance(r, RefusalError)}
        if len(errors) <= len(self.masters) - self.q:
            return
        index, error = next(iter(errors.items()))
        address, code = self.masters[index].address, error.code
        if code in ("WRONGPASS", "NOAUTH", "NOPERM"):
            raise AccessDeniedError(f"{address} refused access: {error}", address=address)
        if code in ("OOM", "MISCONF"):
            raise ServerConfigurationError(
                f"{address} takes no writes: {error}; raise its maxmemory, or see that it can save its data",
                address=address,
            )
        if "WRONGTYPE" in str(error):
            raise CorruptRecordError(
                f"one of the keys {', '.join(keys)} on {address} is of another type: somebody else's data "
                "stands under our prefix; choose another one with ?prefix=NAME",
                key=keys[0],
            )
        if code == "ERR":
            raise DLockError(f"{address}: {error}")

    # -- the ensemble itself -----------------------------------------------------------------------

    def _greet(self) -> None:
        """The first time: see that a majority is there and has data, or let a new ensemble begin."""
        if self._greeted:
            return
        registry = self._object(self.keys.ballots)
        trying = self._trying()
        while True:
            if sum(m.connected for m in self.masters) >= self.q:
                request = self._send_read("read_key", [self.keys.info], ["HLEN"])
                self._wait_for_all(request, 1.0)
                if self._count(request, OK) >= self.q:
                    break
                tried = all(m.connected or m.problem is not None for m in self.masters)
                if tried and self._is_lacking(request):
                    self._recover(registry, request)
            self._receive(0.002)
            next(trying)
        self._greeted = True
        if len(self.masters) % 2 == 0:
            _warn_once(self.members)

    def _check_names(self) -> None:
        runs: dict[str, str] = {}
        for master in self.masters:
            if master.connected and master.run in runs:
                error = master.fatal = ServerConfigurationError(
                    f"{runs[master.run]} and {master.address} are the same server: list every master once",
                    address=master.address,
                )
                master.close()  # it must not be counted twice
                raise error
            runs[master.run] = master.address

    def _is_unknown(self, obj: _Object) -> bool:
        """Whether a majority lacks the object as there is no such study; if it is lost, it is recovered."""
        request = self._send_read("read_key", [obj.ballots_key], ["HLEN"])
        self._wait_for_all(request, 1.0)
        if not self._is_lacking(request):
            return False
        if obj.name != object_of(self.keys.ballots):
            study_id = obj.name[obj.name.rindex("{") + 1 : -2]
            call = [self.keys.studies], ["HGET", study_id]
            if self._read_many("read_key", [call], collect=False)[0] is None:
                return True
        self._recover(obj, request)
        return False

    def _is_lacking(self, request: Request) -> bool:
        """Whether masters without data leave no majority, as things stand."""
        without = self._count(request, NO_DATA)
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
            reply = self._wait_for(master, request, 2.0)
            if not isinstance(reply, bytes):
                return
            master.check_members(reply)
        request, script = Request(), masters_script("found_object")
        for master in self.masters:
            master.send_script(script, [self.keys.ballots], [FIRST_BALLOT, ""], request)
            self._note_run(master)
        self._wait_for_all(request, 2.0)

    def _note_run(self, master: Master) -> None:
        """Remember, on the master, in which run it has data."""
        master.send_plain(("HSET", master.run_key, master.run, int(time.time() * 1e6)), Request())

    # -- copies ----------------------------------------------------------------------------------

    def rebuild(self, name: str, target: int) -> bool:
        """Give a master that has forgotten an object a copy, after which it votes again."""
        with self.lock:
            obj = self._object(name + "ballots")
            obj.ballot = None
            ballot = self.ballots.next(obj.highest)
            others = [master for master in self.masters if master.index != target]
            needed = needed_for_rebuild(len(self.masters))
            request, runs = self._ask_for_votes(obj, ballot, others)
            self._wait_for_all(request, 1.0, or_slow=True)
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
            self._wait(told, lambda: self._count(told, OK) >= needed, 2.0)
            source, best = max(states.items(), key=lambda item: item[1].order)
            if self._count(told, OK) < needed or not self._install(
                obj, ballot, source, best, target, None, known
            ):
                self._release(obj, ballot)
                return False
            obj.ballot, obj.base = ballot, best.base
            confirmed = self._send_section(obj, ballot, "confirm_state", [obj.ballots_key], [])
            if not self._wait_for_section(confirmed):
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
        return Copy(self, obj.name, ballot, copy, source, best, target, replaced, known).run()

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

    def reply_of(self, master: Master, request: Request, limit: float) -> Any:
        """The reply of one master.

        Raises:
            ConnectionError: If it does not come, or is a refusal.
        """
        reply = self._wait_for(master, request, limit)
        if master.index not in request.replies or isinstance(reply, RefusalError):
            raise ConnectionError(f"{master.address} does not answer: {reply}")
        return reply

    def keys_of(self, name: str) -> RegistryKeys | StudyKeys:
        """The key names of an object."""
        text = name[name.rindex("{") + 1 : -2]
        return StudyKeys(self.prefix, int(text)) if text.isdecimal() else self.keys


def _flush(ensemble: Ensemble) -> None:
    """Send what was not sent when it was posted; a burst of writes takes one turn."""
    time.sleep(_FLUSHED_AFTER)
    with ensemble.lock:
        ensemble._flusher = None
        try:
            if ensemble._unsent:
                ensemble._greet()
                ensemble._collect()
        except DLockError as error:  # the next call that waits raises it
            _logger.debug("writes wait for their turn: %s", error)


def _entry(raw: bytes) -> list[bytes]:
    """The words of an entry of the list of sections: length:word, one after the other (see _fenced.lua)."""
    words, at = [], 0
    while at < len(raw):
        colon = raw.index(b":", at)
        end = colon + 1 + int(raw[at:colon])
        words.append(raw[colon + 1 : end])
        at = end
    return words


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
