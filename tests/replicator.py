"""Imitates KeyDB's active-replica stream between plain Valkey servers."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, NamedTuple

import hiredis

_MARKER = b"__replicator__"  # a channel: what follows a PUBLISH to it in a transaction is ours
_CHUNK = 1 << 16
_TIMEOUT = 10.0
_RETRY = 0.02  # seconds between attempts to reach a server that is down
_ACK_EVERY = 1.0
_NOT_WRITES = frozenset({b"PING", b"REPLCONF"})

# All keys of one database, with their deadlines (0: none), at one place of the stream.
_COPY = b"""
redis.call('PUBLISH', ARGV[1], ARGV[2])
local found = {}
for db in string.gmatch(redis.call('INFO', 'keyspace'), 'db(%d+):') do
  redis.call('SELECT', db)
  for _, key in ipairs(redis.call('KEYS', '*')) do
    local record = redis.call('DUMP', key)
    if record then
      table.insert(found, {db, key, math.max(redis.call('PEXPIRETIME', key), 0), record})
    end
  end
end
return found
"""

Words = list[bytes]


class Batch(NamedTuple):
    """What one transaction, or one command by itself, wrote."""

    commands: list[tuple[int, Words]]  # each with its database
    arrived: float  # time.monotonic()
    is_echo: bool = False


class Replicator:
    """Executes the writes of each server blindly on all others, as KeyDB masters do among each other.

    Imitated (numbers of keydb-facts.md): the stream is real (NX is gone, scripts and MULTI arrive as
    transactions), nothing resolves conflicts (1-3); a resync copies whole keys (4); a restarted server is
    empty and answers (6), and may get its own last commands once more (7); each server expires keys by
    itself (9). What one server received is not forwarded to a third.

    Not imitated: timestamps (in `resync` the source wins), a resync by itself after a restart, AOF without
    what came from a peer (8), SCRIPT LOAD (Valkey has it not in the stream). Where a user's UNLINK of one
    key and the expiry of that very key come within a millisecond, one may be taken for the other. What a
    target could not take (it is down, or loads) is lost, and counted; what was written while a stream was
    broken otherwise than by `cut` (a source drops replicas after a pause of 60 s) is lost, and not counted.

    The servers' `notify-keyspace-events` is set to "Ex", whence expiry is told from UNLINK.

    Attributes:
        delay: Seconds from the arrival of a write in the stream to its execution elsewhere.

    Args:
        ports: Of the servers, on 127.0.0.1.
        delay: See the attribute.
        echo: Let each peer of a restarted server execute on it the last commands that it got from it.
        echo_count: How many commands (or transactions) each peer remembers for that.
    """

    def __init__(
        self, ports: Sequence[int], *, delay: float = 0.0, echo: bool = False, echo_count: int = 16
    ) -> None:
        self.delay = delay
        self.ports = list(ports)
        self.echo_count = echo_count if echo else 0
        self._numbers = itertools.count()
        self._links = {pair: _Link(self, *pair) for pair in itertools.permutations(range(len(ports)), 2)}
        for link in self._links.values():
            link.start()

    def wait_until_attached(self, pairs: Sequence[tuple[int, int]] | None = None) -> None:
        """Return when the streams of these pairs (source, target), or all, are read from now on."""
        for pair in self._links if pairs is None else pairs:
            self._links[pair].catch_up(self._message())

    def wait_until_idle(self) -> None:
        """Return when all that the sources wrote before this call was executed, dropped by a cut, or lost.

        All servers must run. What a cut with backlog holds back is not waited for.
        """
        for link in self._links.values():
            link.catch_up(self._message())
        for link in self._links.values():
            link.wait_until_delivered()

    def cut(self, i: int, j: int, *, backlog: bool = False) -> None:
        """From now on execute nothing of i on j: neither new writes nor those that are under way.

        Args:
            i: Number of the source.
            j: Number of the target.
            backlog: Deliver all that after `mend`; else it is lost.
        """
        self._links[i, j].cut(backlog)

    def mend(self, i: int, j: int) -> None:
        """End `cut`."""
        self._links[i, j].mend()

    def resync(self, i: int, j: int) -> None:
        """Copy every key of i over j's, cut or not, at once; keys that only j has stay. Both must run.

        The copy takes its place in the stream: earlier writes that are still under way are in it and are
        not executed again, later ones are executed after it.
        """
        self._links[i, j].catch_up(self._message())
        self._links[i, j].resync(self._message())

    def lost(self, i: int, j: int) -> int:
        """How many transactions and commands of i did not reach j, or were refused there as a whole."""
        return self._links[i, j].lost

    def close(self) -> None:
        """End all threads and connections."""
        for link in self._links.values():
            link.close()
        for link in self._links.values():
            link.join()

    def _message(self) -> bytes:
        return b"place %d" % next(self._numbers)

    def __enter__(self) -> Replicator:
        self.wait_until_attached()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Link:
    """The writes of one server on their way to another: one thread reads, another executes."""

    def __init__(self, replicator: Replicator, source: int, target: int) -> None:
        self.lost = 0
        self._replicator = replicator
        self._source, self._target = source, target
        self._run: bytes | None = None  # run_id of the source when it was attached last
        self._queue: deque[Batch] = deque()
        self._executing = threading.RLock()  # held while something is executed on the target
        self._changed = threading.Condition()  # guards what follows
        self._seen: set[bytes] = set()  # messages on the marker's channel
        self._copying: bytes | None = None  # the one that `resync` waits for
        self._is_cut = self._keeps = self._closed = False
        self._client: _Wire | None = None  # the executing thread's, or that of `resync`
        self._history: deque[Batch] = deque(maxlen=replicator.echo_count)
        name = f"{source}->{target}"
        self._threads = [
            threading.Thread(target=self._read, name=f"read {name}", daemon=True),
            threading.Thread(target=self._execute, name=f"execute {name}", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()
        if self._client is not None:
            self._client.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            client = self._client
        if client is not None:
            client.shut()  # the target may be paused

    # -- what tests ask ----------------------------------------------------------------------------

    def cut(self, backlog: bool) -> None:
        with self._changed:
            self._is_cut, self._keeps = True, backlog
            if not backlog:
                self._drop()
        if self._executing.acquire(timeout=0.5):  # nothing more arrives once this returns
            self._executing.release()
        elif (client := self._client) is not None:
            client.shut()  # the target is paused: what its kernel holds still arrives

    def mend(self) -> None:
        with self._changed:
            self._is_cut = False
            self._changed.notify_all()

    def catch_up(self, message: bytes) -> None:
        """Return when this message was seen in the stream: all that was written so far is in the queue."""
        deadline = time.monotonic() + _TIMEOUT
        while message not in self._seen:
            if time.monotonic() > deadline:
                raise TimeoutError(f"no stream from {self._source} to {self._target} in {_TIMEOUT} s")
            with contextlib.suppress(OSError, hiredis.HiredisError):  # it may start just now
                self._ask_source([b"PUBLISH", _MARKER, message])
            with self._changed:  # again if not seen: a stream may have broken unnoticed
                self._changed.wait_for(lambda: message in self._seen, 0.05)

    def wait_until_delivered(self) -> None:
        self._wait(lambda: not self._queue or self._is_cut)
        with self._executing:
            pass

    def resync(self, message: bytes) -> None:
        with self._executing:
            self._copying = message
            found = self._ask_source([b"EVAL", _COPY, b"0", _MARKER, message])
            self._wait(lambda: message in self._seen)  # the queue is then empty but for later writes
            copies = [
                (int(db), [b"RESTORE", key, b"%d" % deadline, record, b"REPLACE", b"ABSTTL"])
                for db, key, deadline, record in found
            ]
            if copies and not self._deliver(Batch(copies, time.monotonic())):
                raise ConnectionError(f"server {self._target} took no copy")

    def put(self, batch: Batch) -> None:
        with self._changed:
            if self._is_cut and not self._keeps:
                self.lost += 1
                return
            self._queue.append(batch)
            self._changed.notify_all()

    def _ask_source(self, words: Words) -> Any:
        with contextlib.closing(_Wire(self._replicator.ports[self._source])) as wire:
            return wire.call(words)

    def _drop(self) -> None:
        self.lost += len(self._queue)
        self._queue.clear()

    def _wait(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            if not self._changed.wait_for(condition, _TIMEOUT + self._replicator.delay):
                raise TimeoutError(f"stream from {self._source} to {self._target} stands still")

    # -- the reading thread ------------------------------------------------------------------------

    def _read(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError, hiredis.HiredisError):  # it is down, or was: try again
                stream = _Stream(self._replicator.ports[self._source])
                try:
                    self._attach(stream)
                    for batch in stream.batches(lambda: self._closed):
                        self._take(stream, batch)
                finally:
                    stream.close()
            with self._changed:
                self._changed.wait_for(lambda: self._closed, _RETRY)

    def _attach(self, stream: _Stream) -> None:
        stream.attach()
        if self._run not in (None, stream.run):
            with self._changed:
                echoed = [batch._replace(arrived=time.monotonic(), is_echo=True) for batch in self._history]
                self._history.clear()
            for batch in echoed:
                self._replicator._links[self._target, self._source].put(batch)
        self._run = stream.run

    def _take(self, stream: _Stream, batch: Batch) -> None:
        first = batch.commands[0][1]
        if first[0].upper() == b"PUBLISH" and first[1] == _MARKER:
            with self._changed:
                self._seen.add(first[2])
                if first[2] == self._copying:
                    self._queue.clear()  # the copy has it all
                self._changed.notify_all()
            return
        commands = [command for command in batch.commands if not stream.is_expiry(*command)]
        if commands:
            self.put(batch._replace(commands=commands))

    # -- the executing thread ----------------------------------------------------------------------

    def _execute(self) -> None:
        while not self._closed:
            with self._changed:
                if not self._queue or self._is_cut:
                    self._changed.wait()
                    continue
                wait = self._queue[0].arrived + self._replicator.delay - time.monotonic()
                if wait > 0:
                    self._changed.wait(min(wait, 0.01))  # `delay` may be changed meanwhile
                    continue
            with self._executing:
                with self._changed:
                    if not self._queue or self._is_cut or self._closed:
                        continue
                    batch = self._queue.popleft()
                delivered = self._deliver(batch)
                with self._changed:
                    if not delivered:
                        self.lost += 1
                    elif not batch.is_echo:
                        self._history.append(batch)
                    self._changed.notify_all()

    def _deliver(self, batch: Batch) -> bool:
        """Execute it on the target, marked; whether that was answered, even if some commands failed."""
        commands: list[Words] = [[b"MULTI"], [b"PUBLISH", _MARKER, b"%d" % self._source]]
        selected = None
        for db, words in batch.commands:
            if db != selected:
                commands.append([b"SELECT", b"%d" % db])
                selected = db
            commands.append(words)
        commands.append([b"EXEC"])
        try:
            if self._client is None or self._client.is_gone():
                self._connect()
            assert self._client is not None
            replies = self._client.call_all(commands)
        except (OSError, hiredis.HiredisError):
            self._disconnect()
            return False
        if isinstance(replies[-1], list):
            return True
        self._disconnect()  # it loads, or is busy, or refused to queue something
        return False

    def _connect(self) -> None:
        self._disconnect()
        client = _Wire(self._replicator.ports[self._target], timeout=None)
        with self._changed:
            self._client = client
            if self._closed:
                client.shut()

    def _disconnect(self) -> None:
        with self._changed:
            client, self._client = self._client, None
        if client is not None:
            client.close()


class _Wire:
    """A connection to a server that sends commands and gives replies, nothing more."""

    def __init__(self, port: int, timeout: float | None = _TIMEOUT) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=1.0)
        self.socket.settimeout(timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.reader = hiredis.Reader()

    def send(self, commands: Sequence[Words]) -> None:
        pack: Callable[[tuple[bytes, ...]], bytes] = hiredis.pack_command  # type: ignore[assignment]
        self.socket.sendall(b"".join(pack(tuple(words)) for words in commands))  # (its stub: of one word)

    def reply(self) -> Any:
        while (reply := self.reader.gets()) is False:
            self.reader.feed(self.receive())
        return reply

    def call_all(self, commands: Sequence[Words]) -> list[Any]:
        self.send(commands)
        return [self.reply() for _ in commands]

    def call(self, words: Words) -> Any:
        reply = self.call_all([words])[0]
        if isinstance(reply, hiredis.ReplyError):
            raise reply
        return reply

    def receive(self) -> bytes:
        chunk = self.socket.recv(_CHUNK)
        if not chunk:
            raise ConnectionError("the server is gone")
        return chunk

    def is_gone(self) -> bool:
        """Whether the server closed the connection, between two calls."""
        return bool(select.select([self.socket], [], [], 0)[0])  # an answer is not due: it is the end

    def shut(self) -> None:
        """Let another thread's call fail."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.socket.close()


class _Stream:
    """The replication stream of one server, which takes us for a replica."""

    def __init__(self, port: int) -> None:
        self.run = b""
        self._port = port
        self._offset = 0
        self._acknowledged = 0.0
        self._wire = _Wire(port)
        try:
            self._expiries = _Expiries(port)
        except BaseException:
            self._wire.close()
            raise

    def attach(self) -> None:
        """Become a replica; what was written before is dropped with the snapshot that it sends first."""
        wire = self._wire
        own_port = b"%d" % wire.socket.getsockname()[1]
        info = wire.call([b"INFO", b"server"])
        self.run = next(line for line in info.split(b"\r\n") if line.startswith(b"run_id:"))
        wire.call([b"REPLCONF", b"listening-port", own_port])
        wire.call([b"REPLCONF", b"capa", b"eof", b"capa", b"psync2"])
        wire.send([[b"PSYNC", b"?", b"-1"]])
        answer = self._line().split()
        if answer[0] != b"+FULLRESYNC":
            raise ConnectionError(f"no stream: {answer!r}")
        self._offset = int(answer[2])
        self._skip_snapshot()
        with contextlib.closing(_Wire(self._port)) as other:
            deadline = time.monotonic() + _TIMEOUT
            while b"port=%s,state=online" % own_port not in other.call([b"INFO", b"replication"]):
                if time.monotonic() > deadline:
                    raise ConnectionError("the server does not go on after its snapshot")
                self._acknowledge()  # else it sends nothing; one that comes too soon is ignored
                time.sleep(_RETRY / 4)

    def batches(self, is_over: Callable[[], bool]) -> Iterator[Batch]:
        """What is written from now on, as it comes."""
        db, transaction = 0, None
        wire = self._wire
        while not is_over():
            if time.monotonic() - self._acknowledged > _ACK_EVERY:
                self._acknowledge()
            if (words := wire.reader.gets()) is False:
                if select.select([wire.socket], [], [], 0.1)[0]:
                    wire.reader.feed(self._count(wire.receive()))
                continue
            assert isinstance(words, list)
            name = words[0].upper()
            if name == b"SELECT":
                db = int(words[1])
            elif name == b"MULTI":
                transaction = Batch([], time.monotonic())
            elif name == b"EXEC":
                if transaction is not None and transaction.commands:
                    yield transaction
                transaction = None
            elif name == b"REPLCONF" and words[1].upper() == b"GETACK":
                self._acknowledge()
            elif name in _NOT_WRITES:
                pass
            elif transaction is not None:
                transaction.commands.append((db, words))
            else:
                yield Batch([(db, words)], time.monotonic())

    def is_expiry(self, db: int, words: Words) -> bool:
        """Whether that is the server's own word for a key that expired, and no client's."""
        return words[0] == b"UNLINK" and len(words) == 2 and self._expiries.take(db, words[1])

    def close(self) -> None:
        self._wire.close()
        self._expiries.close()

    def _line(self) -> bytes:
        """One line, without a byte more; empty lines say that the server still prepares its snapshot."""
        line = b""
        while not line.endswith(b"\n") or not line.strip():
            byte = self._wire.socket.recv(1)
            if not byte:
                raise ConnectionError("the server is gone")
            line += byte
        return line.strip()

    def _skip_snapshot(self) -> None:
        header = self._line()
        if header.startswith(b"$EOF:"):  # of unknown length: until these 40 bytes come again
            mark, tail = header[5:], b""
            while mark not in tail:
                tail = tail[-len(mark) :] + self._wire.receive()
            rest = tail.partition(mark)[2]
            self._wire.reader.feed(self._count(rest))
            return
        left = int(header[1:])
        while left:
            left -= len(self._wire.socket.recv(min(left, _CHUNK)) or self._wire.receive())

    def _count(self, chunk: bytes) -> bytes:
        self._offset += len(chunk)
        return chunk

    def _acknowledge(self) -> None:
        self._acknowledged = time.monotonic()
        self._wire.send([[b"REPLCONF", b"ACK", b"%d" % self._offset]])


class _Expiries:
    """Tells which keys of a server expired, since in the stream this looks like a client's UNLINK."""

    def __init__(self, port: int) -> None:
        self._found: list[tuple[bytes, bytes]] = []
        self._wire = _Wire(port)
        try:
            self._wire.call([b"CONFIG", b"SET", b"lazyfree-lazy-expire", b"yes"])  # UNLINK, not DEL
            self._wire.call([b"CONFIG", b"SET", b"notify-keyspace-events", b"Ex"])
            self._wire.call([b"PSUBSCRIBE", b"__keyevent@*__:expired"])
        except BaseException:
            self._wire.close()
            raise

    def take(self, db: int, key: bytes) -> bool:
        """Whether this key expired and that was not asked before."""
        self._wire.send([[b"PING"]])  # its answer comes after all that expired before
        while (message := self._wire.reply())[0] == b"pmessage":
            self._found.append((message[2], message[3]))
        event = (b"__keyevent@%d__:expired" % db, key)
        if event not in self._found:
            return False
        self._found.remove(event)
        return True

    def close(self) -> None:
        self._wire.close()
