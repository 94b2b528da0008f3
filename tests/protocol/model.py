"""An explicit-state model of the replicated section log, and a breadth-first checker of it.

Several masters keep one object as a log of sections; clients append to it by acquire (a ballot), synchronise
(replay or install) and commit, read it by a rule, and rebuild a master that restarted without its data.
Or who has acquired a ballot opens it at one master, the sequencer: from then on this one alone proposes under
it, what any client asks it to, and each client forwards what the sequencer has to the other masters.

What the adversary may do: deliver any message in flight at any time or never, in any order, after its sender
went on to other things; lose any answer; stop a client for ever anywhere; restart one master, which then
knows nothing.  Leases do not exist (each has always expired already).

Two rules are stricter than in the first draft of the protocol, which this model refuted:

* install, like every other write, never takes a master back: it needs P == b *and* (A, S) < (b, new S).
  Else one that is delivered late, or again, undoes commits of the same ballot ("install goes back").
* A grant of a run that died is void.  A rebuild tells N - q + 1 others of the target's new run with its
  acquire, and these refuse an acquire of a client that knows only the older one.  Else a promise that the
  restart forgot, of a ballot higher than the rebuild's, still counts in its holder's majority ("a dead run's
  grant counts").  Runs are counted here by an epoch, as there is one restart; with more, it is one counter
  per master.

What keeps the model small, without leaving out a behaviour:

* A master's step is atomic (it is one script) and its answer is seen at once or never.  A client that uses an
  answer later is one that acts later, and everything it sends may be late.
* Sending is eager, as an undelivered message is as good as one not sent yet.
* A message that can never have an effect again is dropped (`_prune`).
* What concerns one master (its record, messages to it, what clients know of it) is one slot, and the slots
  are sorted: masters are interchangeable.
* A message that was executed does nothing when it is delivered again, so it is delivered once; the mistakes
  for which that is not true keep theirs in flight.
* Requests to a sequencer are not kept as messages: one may arrive for any operation that was begun, the past
  ones too (late), as often as the setup says.
* What is forwarded is the sequencer's whole log.  Were it less, more masters would refuse it, as if it
  were lost.
* The opener opens as soon as the sequencer is synchronised, be a majority so or not: it may do more.
* A ballot that is open nowhere but where a higher one is promised is as good as closed, and is noted so.

A trial's number is its position in the object's list.  The log of a record holds `(identity, operation)`, and
the identity of a section is the ballot it was committed with, or that and the operation if it was sequenced:
with its position that is unique.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations
from typing import NamedTuple

Log = tuple[tuple[int, int], ...]
"""Executed sections, each (identity, operation id)."""

Fact = tuple[str, int, int]
"""What a client was told: ("trial", number, creating operation) or ("finished", 0, finishing operation)."""

Known = tuple[int, Log] | None
"""What a client knows of a master: its (accepted ballot, log), or (OK, ()) once it committed."""

ACQUIRE, REPLAY, INSTALL, COMMIT, REBUILD, REPLICATE, OPEN, FORWARD = range(8)
ACQUIRING, COMMITTING, READING, DONE, SEQUENCING, FORWARDING = range(6)
OK = 1000
SPENT = 1000
"""The ballot of a client that has none left, but may have its operations sequenced."""
EMPTY = 0

KINDS = ("acquire", "replay", "install", "commit", "rebuild", "replicate", "open", "forward")


class Record(NamedTuple):
    """The object on one master."""

    promised: int
    accepted: int
    log: Log
    epoch: int
    """How many restarts (of any master) a rebuild told this master of."""
    opened: int = 0
    """The ballot that is open here, under which this master alone proposes; 0 if none is."""


class Message(NamedTuple):
    """A script on its way to a master.

    `size` and `identity` are (S, I) of the base that a replay, a commit or an open must find there; for an
    acquire and a rebuild, `size` is the epoch.  `log` is the section to commit, or all of the state to reach.
    """

    kind: int
    ballot: int
    size: int
    identity: int
    log: Log
    record: Record | None = None


class Slot(NamedTuple):
    """One master and all that concerns it."""

    record: Record | None
    inbox: frozenset[Message]
    known: tuple[Known, ...]
    run: int
    twin: bool
    """It shares its key names with the other twin, of which it is an active replica (a mistake)."""


class Client(NamedTuple):
    """A client: which of its operations it is at, and how far it is with it."""

    operation: int
    phase: int
    ballot: int
    epoch: int
    log: Log
    """The log that it commits or forwards; the base of the ballot that it opens."""
    need: frozenset[Fact] | None
    """While it reads: what was known to anybody when the first master was asked."""


class State(NamedTuple):
    """A state of the whole system; `facts` are all that clients were told so far."""

    slots: tuple[Slot, ...]
    clients: tuple[Client, ...]
    facts: frozenset[Fact]
    restarts: int


class Setup(NamedTuple):
    """What is explored: `programs` and `ballots` per client, and the mistakes that are made.

    `opens` are the ballots that their owners open.  If there are any, every client may have each of its
    operations sequenced under each of them, `requests` times; a read too, which is then told what the section
    finds where it is.
    """

    programs: tuple[tuple[str, ...], ...]
    ballots: tuple[tuple[int, ...], ...]
    masters: int = 3
    restarts: int = 0
    mistakes: frozenset[str] = frozenset()
    opens: frozenset[int] = frozenset()
    requests: int = 1


class Violation(NamedTuple):
    """A broken invariant, why, and the shortest way to it."""

    invariant: str
    detail: str
    trace: tuple[str, ...]


class Result(NamedTuple):
    """What a check found: how many states, what clients were told in any of them, what is broken."""

    states: int
    told: frozenset[Fact]
    violation: Violation | None


class Broken(Exception):
    """A step told a client something that contradicts what was told before."""

    def __init__(self, invariant: str, detail: str) -> None:
        super().__init__(invariant, detail)
        self.invariant = invariant
        self.detail = detail


def _end(log: Log) -> tuple[int, int]:
    """(S, I) of a log."""
    return len(log), log[-1][0] if log else 0


def _rank(known: tuple[int, Log]) -> tuple[int, int]:
    """The order of states: (A, S)."""
    return known[0], len(known[1])


class Model:
    """The protocol, for one setup."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.mistakes = setup.mistakes
        self.majority = setup.masters // 2 + 1
        self.others = setup.masters - self.majority + 1
        self.owner = {ballot: c for c, ballots in enumerate(setup.ballots) for ballot in ballots}
        self.kind = {
            10 * (c + 1) + i: kind
            for c, program in enumerate(setup.programs)
            for i, kind in enumerate(program)
        }
        self.exact = not self.mistakes & {
            "commit ignores the promise",
            "shared key names",
            "forward ignores the promise",
            "sequenced under a ballot that is over",
        }
        self.facts_of = lru_cache(maxsize=None)(self._facts_of)
        self.pool: dict[Slot, Slot] = {}

    # ---- what a log means

    def _facts_of(self, log: Log) -> frozenset[Fact]:
        """Return all that is true after the sections of `log`, which do nothing when they are run again."""
        trials: list[int] = []
        finisher = None
        for _, operation in log:
            kind = self.kind.get(operation)
            if kind == "create" and operation not in trials:
                trials.append(operation)
            elif kind == "finish" and finisher is None:
                finisher = operation
        facts: list[Fact] = [("trial", number, operation) for number, operation in enumerate(trials)]
        if finisher is not None:
            facts.append(("finished", 0, finisher))
        return frozenset(facts)

    def _answer(self, log: Log, operation: int) -> frozenset[Fact]:
        """Return what the section of `operation`, the last one of `log`, tells its client."""
        kind = self.kind.get(operation)
        if kind == "finish":  # the winner, be it this client (done) or another (refused)
            return frozenset(f for f in self.facts_of(log) if f[0] == "finished")
        return frozenset(f for f in self.facts_of(log) if f[0] == "trial" and f[2] == operation)

    def _tell(self, facts: frozenset[Fact], told: frozenset[Fact]) -> frozenset[Fact]:
        """Return `facts` with what a client is `told` now; the two must not contradict each other."""
        for what, number, operation in told - facts:
            for fact in facts:
                if fact[:2] == (what, number):
                    invariant = "unique" if what == "trial" else "final"
                    raise Broken(invariant, f"{what} {number}: told {fact[2]} before, now {operation}")
        return facts | told

    # ---- states

    def first(self) -> State:
        """Return the state in which every client is about to begin."""
        known: tuple[Known, ...] = (None,) * len(self.setup.programs)
        shared = "shared key names" in self.mistakes
        slots = [
            Slot(Record(0, 0, (), 0), frozenset(), known, 0, shared and m < 2)
            for m in range(self.setup.masters)
        ]
        clients = [Client(0, DONE, 0, 0, (), None) for _ in self.setup.programs]
        for c in range(len(clients)):
            self._begin(slots, clients, c)
        return self._state(slots, clients, frozenset(), self.setup.restarts)

    def _state(
        self, slots: list[Slot], clients: list[Client], facts: frozenset[Fact], restarts: int
    ) -> State:
        slots = [self.pool.setdefault(s, s) for s in map(self._prune, slots)]
        slots.sort(key=hash)
        return State(tuple(slots), tuple(clients), facts, restarts)

    def _prune(self, slot: Slot) -> Slot:
        """Drop messages that can never have an effect again."""
        if not slot.inbox or not self.exact:
            return slot
        inbox = slot.inbox
        promises = {m.ballot for m in inbox if m.kind in (ACQUIRE, REBUILD)}
        kept = frozenset(m for m in inbox if self._alive(slot.record, m, promises))
        return slot if len(kept) == len(inbox) else slot._replace(inbox=kept)

    def _alive(self, record: Record | None, message: Message, promises: set[int]) -> bool:
        if message.kind == REBUILD:
            return record is None or "rebuild over data" in self.mistakes
        if record is None:
            return message.kind == ACQUIRE or message.ballot in promises
        if message.kind == ACQUIRE:
            return message.ballot > record.promised and self._epoch_fits(record, message)
        if message.ballot != record.promised:
            return message.ballot > record.promised and message.ballot in promises
        if message.kind == OPEN:
            return record.opened != message.ballot
        if self._regresses(message):
            return True
        size = message.size + 1 if message.kind == COMMIT else len(message.log)
        return (record.accepted, len(record.log)) < (message.ballot, size)

    def _epoch_fits(self, record: Record, message: Message) -> bool:
        return message.size >= record.epoch or "a dead run's grant counts" in self.mistakes

    def _regresses(self, message: Message) -> bool:
        return message.kind == INSTALL and "install goes back" in self.mistakes

    # ---- what clients do

    def _begin(self, slots: list[Slot], clients: list[Client], c: int) -> None:
        """Let client `c` begin its next operation (or the same one again), with a ballot of its own."""
        client = clients[c]
        program = self.setup.programs[c]
        if client.operation == len(program):
            self._enter(slots, clients, c, client._replace(phase=DONE, log=(), need=None))
        elif program[client.operation] == "read":
            self._enter(slots, clients, c, client._replace(phase=READING, log=(), need=None))
        else:
            self._acquire(slots, clients, c, client.epoch)

    def _enter(self, slots: list[Slot], clients: list[Client], c: int, client: Client) -> None:
        """Put client `c` into a new phase, in which it knows nothing of any master yet."""
        clients[c] = client
        for j, slot in enumerate(slots):
            if slot.known[c] is not None:
                slots[j] = slot._replace(known=_put(slot.known, c, None))

    def _acquire(self, slots: list[Slot], clients: list[Client], c: int, epoch: int) -> None:
        """Let client `c` ask all masters for its next ballot; without one only sequencers are left to it."""
        client = clients[c]
        ballot = min((b for b in self.setup.ballots[c] if b > client.ballot), default=None)
        if ballot is None:
            client = client._replace(phase=DONE, log=(), need=None)
            if self.setup.opens and self.setup.programs[c][client.operation] != "read":
                client = client._replace(phase=SEQUENCING, ballot=SPENT)
            self._enter(slots, clients, c, client)
            return
        self._enter(slots, clients, c, Client(client.operation, ACQUIRING, ballot, epoch, (), None))
        for j in range(len(slots)):
            self._send(slots, j, epoch, Message(ACQUIRE, ballot, epoch, 0, ()))

    def _send(self, slots: list[Slot], j: int, epoch: int, *messages: Message) -> None:
        """Send to the run of a master that the sender knows: what is for an older run is lost."""
        slot = slots[j]
        if slot.run <= epoch:
            slots[j] = slot._replace(inbox=slot.inbox.union(messages))

    def _operation(self, client: Client, c: int) -> int:
        """Return the id of the operation whose section the client runs: a reader's is the empty one."""
        operation = 10 * (c + 1) + client.operation
        return EMPTY if self.kind[operation] == "read" else operation

    def _granted(self, slots: list[Slot], clients: list[Client], c: int) -> list[int]:
        """Let client `c` begin its commit if enough masters granted its ballot, or open it.

        Returns:
            The masters at one of which it may open its ballot.
        """
        client = clients[c]
        grants = [slot.known[c] for slot in slots]
        states = [grant for grant in grants if grant is not None]
        rebuilds = client.epoch > 0 and any(slot.record is None for slot in slots)
        if len(states) < (self.others if rebuilds else self.majority):
            return []
        base = max(states, key=_rank)[1]
        opens = client.ballot in self.setup.opens
        commits = not opens or "the opener goes on" in self.mistakes
        if commits:
            clients[c] = client = self._committing(client, c, base)
        else:
            self._enter(slots, clients, c, client._replace(phase=SEQUENCING, log=base))
        for j, grant in enumerate(grants):
            if grant is not None:
                self._synchronise(slots, client, j, grant, base)
            elif rebuilds and slots[j].record is None:
                self._send(slots, j, client.epoch, Message(REBUILD, client.ballot, client.epoch, 0, base))
            else:
                continue
            if commits:
                self._send(slots, j, client.epoch, self._commit(client))
        return [j for j, grant in enumerate(grants) if opens and grant is not None]

    def _open(self, slots: list[Slot], client: Client, j: int, base: Log) -> None:
        """Open the ballot of `client` at a master, once that is at the base."""
        self._send(slots, j, client.epoch, Message(OPEN, client.ballot, *_end(base), ()))

    def _committing(self, client: Client, c: int, base: Log) -> Client:
        operation = self._operation(client, c)
        reused = "an identity per operation" in self.mistakes
        section = (operation if reused else client.ballot, operation)
        return client._replace(phase=COMMITTING, log=(*base, section))

    def _commit(self, client: Client) -> Message:
        size, identity = _end(client.log[:-1])
        return Message(COMMIT, client.ballot, size, identity, client.log[-1:])

    def _send_section(self, slots: list[Slot], client: Client, j: int, grant: tuple[int, Log]) -> None:
        """Send a commit to a master that granted, and before it what it misses of the base."""
        self._synchronise(slots, client, j, grant, client.log[:-1])
        self._send(slots, j, client.epoch, self._commit(client))

    def _synchronise(
        self, slots: list[Slot], client: Client, j: int, grant: tuple[int, Log], base: Log
    ) -> None:
        """Send to a master that granted what it misses of the base."""
        size, identity = _end(grant[1])
        if _end(base) != (size, identity):
            prefix = size < len(base) and _end(base[:size]) == (size, identity)
            message = (
                Message(REPLAY, client.ballot, size, identity, base)
                if prefix
                else Message(INSTALL, client.ballot, 0, 0, base)
            )
            self._send(slots, j, client.epoch, message)

    def _acknowledged(self, slots: list[Slot], clients: list[Client], c: int) -> None:
        """Let client `c` go on after a commit: with the ballot that it still holds if it can."""
        client = clients[c]
        program = self.setup.programs[c]
        if program[client.operation] == "read":  # confirmed: read again
            self._begin(slots, clients, c)
            return
        client = clients[c] = client._replace(operation=client.operation + 1)
        if client.operation == len(program) or program[client.operation] == "read":
            self._begin(slots, clients, c)
            return
        base = client.log
        clients[c] = client = self._committing(client, c, base)
        for j, slot in enumerate(slots):
            known = slot.known[c]
            if known is not None:
                grant = (client.ballot, base) if known[0] == OK else known
                slots[j] = slot._replace(known=_put(slot.known, c, grant))
                self._send_section(slots, client, j, grant)

    def _believed(self, replies: list[tuple[int, Log]]) -> Log | None:
        """Return the state that a reader may believe, if there is one: the read rule."""
        n, q, r = self.setup.masters, self.majority, len(replies)
        if r < q:
            return None
        replies = sorted(replies, key=_rank, reverse=True)
        if "reader takes the highest" in self.mistakes:
            return replies[0][1]
        t = replies[q - 1]
        chosen = sum(a == t[0] and len(log) >= len(t[1]) for a, log in replies) >= q
        newest = _rank(replies[r - n + q - 1]) == _rank(t)
        if "reader takes what is not chosen" in self.mistakes:
            chosen = True
        if "reader takes what may be old" in self.mistakes:
            newest = True
        return t[1] if chosen and newest else None

    # ---- steps

    def steps(self, state: State) -> Iterator[tuple[str, State | Broken]]:
        """Yield every step that is possible in `state`, and what it leads to."""
        for j, slot in enumerate(state.slots):
            for message in slot.inbox:
                yield from self._deliveries(state, j, message)
            yield from self._queries(state, j)
            yield from self._requests(state, j)
            if state.restarts and slot.record is not None:
                yield self._restart(state, j)
        for c, client in enumerate(state.clients):
            yield from self._own_steps(state, c, client)

    def _own_steps(self, state: State, c: int, client: Client) -> Iterator[tuple[str, State | Broken]]:
        """Yield what a client does of itself: acquire again, learn of a restart, return from a read."""
        restarted = any(slot.run for slot in state.slots)
        if client.phase != DONE and client.ballot < max(self.setup.ballots[c], default=0):
            for epoch in {client.epoch, int(restarted)}:
                slots, clients = list(state.slots), list(state.clients)
                self._acquire(slots, clients, c, epoch)
                label = f"client {c} goes on with ballot {clients[c].ballot}, epoch {epoch}"
                yield label, self._state(slots, clients, state.facts, state.restarts)
        if client.phase == ACQUIRING and restarted and not client.epoch and self._untouched(state, client):
            slots, clients = list(state.slots), list(state.clients)
            slots = [
                s._replace(inbox=frozenset(m for m in s.inbox if m.ballot != client.ballot)) for s in slots
            ]
            clients[c] = client._replace(ballot=client.ballot - 1)
            self._acquire(slots, clients, c, 1)
            yield (
                f"client {c} learns of the restart",
                self._state(slots, clients, state.facts, state.restarts),
            )
        if client.phase == READING:
            replies = [slot.known[c] for slot in state.slots]
            log = self._believed([reply for reply in replies if reply is not None])
            if log is not None:
                slots, clients = list(state.slots), list(state.clients)
                yield f"client {c} reads {log}", self._returned(state, slots, clients, c, log)
        if client.phase == FORWARDING:
            for j, slot in enumerate(state.slots):
                if slot.known[c] is None and slot.record is not None and self._has(slot.record, client.log):
                    slots, clients = list(state.slots), list(state.clients)
                    label = f"client {c} hears that master {_name(slot.record)} has its section"
                    yield self._counted(state, slots, clients, j, c, label)

    def _has(self, record: Record, log: Log) -> bool:
        """Tell whether a master says OK to what is forwarded, as it has it already."""
        ballot = _sequenced_under(log)
        if "further under another ballot" in self.mistakes:
            return record.promised == ballot and len(record.log) >= len(log)
        return record.promised == record.accepted == ballot and len(record.log) >= len(log)

    def _untouched(self, state: State, client: Client) -> bool:
        """Tell whether nobody has seen the client's ballot yet, so that it may as well begin only now."""
        return all(
            slot.run or any(m.kind == ACQUIRE and m.ballot == client.ballot for m in slot.inbox)
            for slot in state.slots
        ) and all(slot.known[self.owner[client.ballot]] is None for slot in state.slots)

    def _returned(
        self, state: State, slots: list[Slot], clients: list[Client], c: int, log: Log
    ) -> State | Broken:
        told = self.facts_of(log)
        missed = (clients[c].need or frozenset()) - told
        if missed:
            return Broken("fresh", f"the read misses {sorted(missed)}, known before it began")
        try:
            facts = self._tell(state.facts, told)
        except Broken as error:
            return error
        clients[c] = clients[c]._replace(operation=clients[c].operation + 1)
        self._begin(slots, clients, c)
        return self._state(slots, clients, facts, state.restarts)

    def _queries(self, state: State, j: int) -> Iterator[tuple[str, State | Broken]]:
        """Yield the answers of a master to the readers that have none of it yet."""
        slot = state.slots[j]
        if slot.record is None:
            return
        for c, client in enumerate(state.clients):
            if client.phase == READING and slot.known[c] is None:
                slots, clients = list(state.slots), list(state.clients)
                reply = (slot.record.accepted, slot.record.log)
                slots[j] = slot._replace(known=_put(slot.known, c, reply))
                if client.need is None:
                    clients[c] = client._replace(need=state.facts)
                label = f"client {c} asks master {_name(slot.record)}"
                yield label, self._state(slots, clients, state.facts, state.restarts)

    def _restart(self, state: State, j: int) -> tuple[str, State | Broken]:
        slots = list(state.slots)
        slot = slots[j]
        if "a restarted master votes" in self.mistakes:
            slots[j] = slot._replace(record=Record(0, 0, (), 0), inbox=frozenset())
        else:
            slots[j] = slot._replace(record=None, inbox=frozenset(), run=slot.run + 1)
        label = f"master {_name(slot.record)} restarts"
        return label, self._state(slots, list(state.clients), state.facts, state.restarts - 1)

    def _execute(self, record: Record | None, message: Message) -> Record | None:
        """Return what a master's script makes of its record; None if it refuses."""
        kind, ballot = message.kind, message.ballot
        if kind == REPLICATE:
            return message.record
        if kind == REBUILD:
            if record is not None and "rebuild over data" not in self.mistakes:
                return None
            return Record(ballot, ballot, message.log, message.size)
        if record is None:
            return None
        if kind == ACQUIRE:
            if ballot <= record.promised or not self._epoch_fits(record, message):
                return None
            opened = record.opened if "sequenced under a ballot that is over" in self.mistakes else 0
            return record._replace(promised=ballot, epoch=max(record.epoch, message.size), opened=opened)
        if record.promised != ballot and not self._ignores_promise(record, message):
            return None
        if kind == OPEN:
            if (
                _end(record.log) != (message.size, message.identity)
                and "opened too early" not in self.mistakes
            ):
                return None
            return record._replace(opened=ballot)
        if kind == FORWARD:
            return self._run(record, message)
        if kind == INSTALL:
            forward = (record.accepted, len(record.log)) < (ballot, len(message.log))
            if not forward and not self._regresses(message):
                return None
            return record._replace(accepted=self._stamp(message), log=message.log)
        if _end(record.log) != (message.size, message.identity):
            return None
        if kind == REPLAY:
            log = record.log + message.log[message.size :]
            return record._replace(accepted=self._stamp(message), log=log)
        return record._replace(accepted=ballot, log=record.log + message.log)

    def _ignores_promise(self, record: Record, message: Message) -> bool:
        if message.kind == FORWARD:
            return record.promised > message.ballot and "forward ignores the promise" in self.mistakes
        return "commit ignores the promise" in self.mistakes

    def _run(self, record: Record, message: Message) -> Record | None:
        """Return what a master makes of what is forwarded: it runs all that follows on where it is."""
        size, entries = len(record.log), message.log
        follows = size < len(entries) and (
            _end(entries[:size]) == _end(record.log) or "what is forwarded need not follow" in self.mistakes
        )
        if not follows:
            return None
        accepted = record.accepted if "forwarded under the old ballot" in self.mistakes else message.ballot
        return record._replace(accepted=accepted, log=record.log + entries[size:])

    def _stamp(self, message: Message) -> int:
        """Return the ballot that a synchronised master is stamped with: the holder's."""
        if "synchronised with the old ballot" in self.mistakes:
            return message.log[-1][0] if message.log else 0
        return message.ballot

    def _deliveries(self, state: State, j: int, message: Message) -> Iterator[tuple[str, State | Broken]]:
        """Yield what a message leads to, with its answer seen and with its answer lost."""
        slot = state.slots[j]
        record = self._execute(slot.record, message)
        if record is None or record == slot.record:
            return
        slots, clients = list(state.slots), list(state.clients)
        inbox = slot.inbox if message.kind == INSTALL and self._regresses(message) else slot.inbox - {message}
        if message.kind == REBUILD and "rebuild over data" in self.mistakes:
            inbox = slot.inbox
        slots[j] = slot._replace(record=record, inbox=inbox)
        if slot.twin and message.kind != REPLICATE:
            twin = next(i for i, other in enumerate(slots) if other.twin and i != j)
            copy = Message(REPLICATE, 0, 0, 0, (), record)
            slots[twin] = slots[twin]._replace(inbox=slots[twin].inbox | {copy})
        change = f"master {_name(slot.record)} -> {_name(record)}"
        label = f"{KINDS[message.kind]} of ballot {message.ballot}: {change}"
        if message.kind == FORWARD:
            yield f"{label}, unheard", self._state(slots, clients, state.facts, state.restarts)
            c = _client_of(message.log[-1][1])
            if clients[c].phase == FORWARDING and clients[c].log == message.log:
                yield self._counted(state, slots, clients, j, c, label)
            return
        c = self.owner.get(message.ballot, -1)
        client = clients[c]
        if message.ballot != client.ballot or message.kind not in (ACQUIRE, COMMIT):
            yield label, self._state(slots, clients, state.facts, state.restarts)
        elif message.kind == ACQUIRE:
            if client.phase == ACQUIRING:
                yield f"{label}, unheard", self._state(slots, clients, state.facts, state.restarts)
            if client.phase in (ACQUIRING, COMMITTING):
                grant = (record.accepted, record.log)
                slots[j] = slots[j]._replace(known=_put(slot.known, c, grant))
                if client.phase == COMMITTING:
                    self._send_section(slots, client, j, grant)
                else:
                    sequencers = self._granted(slots, clients, c)
                    if sequencers:
                        yield from self._opened(state, slots, clients, c, label, sequencers)
                        return
            elif client.phase == SEQUENCING:
                self._synchronise(slots, client, j, (record.accepted, record.log), client.log)
            yield label, self._state(slots, clients, state.facts, state.restarts)
        else:
            yield from self._committed(state, slots, clients, j, message, label)

    def _opened(
        self,
        state: State,
        slots: list[Slot],
        clients: list[Client],
        c: int,
        label: str,
        sequencers: list[int],
    ) -> Iterator[tuple[str, State | Broken]]:
        """Yield what comes of each choice of the sequencer by client `c`, which has a majority."""
        client = clients[c]
        base = client.log[:-1] if client.phase == COMMITTING else client.log
        twice = "opened at two masters" in self.mistakes
        for group in [sequencers] if twice else [[j] for j in sequencers]:
            after = list(slots)
            for j in group:
                self._open(after, client, j, base)
            names = ", ".join(_name(slots[j].record) for j in group)
            yield (
                f"{label}; to be opened at {names}",
                self._state(after, clients, state.facts, state.restarts),
            )

    def _requests(self, state: State, j: int) -> Iterator[tuple[str, State | Broken]]:
        """Yield what a sequencer makes of requests, with its answer seen and with its answer lost."""
        record = state.slots[j].record
        if record is None or not record.opened:
            return
        ballot = record.opened
        for c, client in enumerate(state.clients):
            for i, kind in enumerate(self.setup.programs[c][: client.operation + 1]):
                operation = 10 * (c + 1) + i
                section = (1000 * ballot + operation, operation)
                if record.log.count(section) == self.setup.requests:
                    continue
                accepted = record.accepted if "sequenced under the old ballot" in self.mistakes else ballot
                after = record._replace(accepted=accepted, log=(*record.log, section))
                slots, clients = list(state.slots), list(state.clients)
                slots[j] = slots[j]._replace(record=after)
                label = f"operation {operation} is sequenced: master {_name(record)} -> {_name(after)}"
                yield f"{label}, unheard", self._state(slots, clients, state.facts, state.restarts)
                if i == client.operation:
                    need = client.need
                    if kind == "read" and need is None:
                        need = state.facts
                    forwarding = client._replace(phase=FORWARDING, log=after.log, need=need)
                    self._enter(slots, clients, c, forwarding)
                    forward = Message(FORWARD, ballot, 0, 0, after.log)
                    for other, slot in enumerate(slots):
                        if other != j:
                            slots[other] = slot._replace(inbox=slot.inbox | {forward})
                    yield self._counted(state, slots, clients, j, c, label)

    def _counted(
        self, state: State, slots: list[Slot], clients: list[Client], j: int, c: int, label: str
    ) -> tuple[str, State | Broken]:
        """Return what client `c` makes of a master that has what it forwards, or has sequenced it."""
        client = clients[c]
        slots[j] = slots[j]._replace(known=_put(slots[j].known, c, (OK, ())))
        oks = sum(slot.known[c] == (OK, ()) for slot in slots)
        if oks < (1 if "the sequencer is enough" in self.mistakes else self.majority):
            return label, self._state(slots, clients, state.facts, state.restarts)
        if self.setup.programs[c][client.operation] == "read":
            return f"{label}; it reads {client.log}", self._returned(state, slots, clients, c, client.log)
        told = self._answer(client.log, client.log[-1][1])
        try:
            facts = self._tell(state.facts, told)
        except Broken as error:
            return label, error
        clients[c] = client._replace(operation=client.operation + 1)
        self._begin(slots, clients, c)
        label = f"{label}; acknowledged {sorted(told)}"
        return label, self._state(slots, clients, facts, state.restarts)

    def _committed(
        self, state: State, slots: list[Slot], clients: list[Client], j: int, message: Message, label: str
    ) -> Iterator[tuple[str, State | Broken]]:
        """Yield what a client makes of a master's OK: with a majority of them it has its answer."""
        c = self.owner[message.ballot]
        client = clients[c]
        slot = slots[j]
        if client.phase != COMMITTING or len(client.log) != message.size + 1:
            yield label, self._state(slots, clients, state.facts, state.restarts)
            return
        slots[j] = slot._replace(known=_put(slot.known, c, (OK, ())))
        oks = sum(s.known[c] == (OK, ()) for s in slots)
        if oks < self.majority:
            yield label, self._state(slots, clients, state.facts, state.restarts)
            return
        unheard, same = list(slots), list(clients)
        self._acquire(unheard, same, c, client.epoch)
        yield f"{label}, unheard", self._state(unheard, same, state.facts, state.restarts)
        assert slot.record is not None
        told = self._answer(slot.record.log, self._operation(client, c))
        try:
            facts = self._tell(state.facts, told)
        except Broken as error:
            yield label, error
            return
        self._acknowledged(slots, clients, c)
        yield f"{label}; acknowledged {sorted(told)}", self._state(slots, clients, facts, state.restarts)

    # ---- invariants

    def broken(self, state: State) -> Broken | None:
        """Return how a state breaks "kept": all that was told is in what any later majority yields.

        The next holder takes the highest state of a majority of masters that have data, or, if it rebuilds
        a master without data, of N - q + 1 others.  A number's gap would show here too: a trial's number is
        its position, so a state that holds it holds all the numbers below.
        """
        if not state.facts:
            return None
        records = [slot.record for slot in state.slots if slot.record is not None]
        sizes = {self.majority, self.others} if len(records) < self.setup.masters else {self.majority}
        for size in sizes:
            for group in combinations(records, size):
                highest = max((r.accepted, len(r.log)) for r in group)
                for r in group:
                    if (r.accepted, len(r.log)) == highest and not state.facts <= self.facts_of(r.log):
                        missed = sorted(state.facts - self.facts_of(r.log))
                        return Broken("kept", f"a majority yields {r.log}, without {missed}")
        return None


def _put(known: tuple[Known, ...], c: int, value: Known) -> tuple[Known, ...]:
    return (*known[:c], value, *known[c + 1 :])


def _client_of(operation: int) -> int:
    return operation // 10 - 1


def _sequenced_under(log: Log) -> int:
    """Return the ballot of a log whose last section was sequenced."""
    return log[-1][0] // 1000


def _name(record: Record | None) -> str:
    if record is None:
        return "(no data)"
    opened = f" open={record.opened}" if record.opened else ""
    return f"(P={record.promised} A={record.accepted}{opened} log={[f'{op}@{b}' for b, op in record.log]})"


def check(setup: Setup, watched: frozenset[str] | None = None, limit: int = 10_000_000) -> Result:
    """Visit every state of `setup`, nearest first, until an invariant (one of `watched`) is broken."""
    model = Model(setup)
    first = model.first()
    parents: dict[State, State | None] = {first: None}
    queue = deque([first])
    told: set[Fact] = set()
    while queue:
        state = queue.popleft()
        for label, after in model.steps(state):
            if isinstance(after, Broken):
                error: Broken | None = after
            elif after in parents:
                continue
            else:
                parents[after] = state
                queue.append(after)
                told |= after.facts
                error = model.broken(after)
            if error is not None and (watched is None or error.invariant in watched):
                trace = (*_trace(model, parents, state), label)
                violation = Violation(error.invariant, error.detail, trace)
                return Result(len(parents), frozenset(told), violation)
        if len(parents) > limit:
            raise RuntimeError(f"more than {limit} states")
    return Result(len(parents), frozenset(told), None)


def _trace(model: Model, parents: dict[State, State | None], state: State) -> list[str]:
    """Return the labels of the steps that led to `state`."""
    labels = []
    before = parents[state]
    while before is not None:
        labels.append(next(label for label, after in model.steps(before) if after == state))
        state, before = before, parents[before]
    return labels[::-1]
