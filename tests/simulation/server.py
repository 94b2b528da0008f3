"""The masters of a schedule: databases of one real Valkey server, which is told what time it is.

The server executes; everything around it is simulated: which run of a master this is, what it knows after a
restart, its clock (scripts get the virtual time), what it replicates to its peers (KeyDB).
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import hiredis

from optuna_dlock.node import pack_command
from optuna_dlock.scripts import Script, all_masters_scripts, on_keydb
from tests.servers import Server

Words = list[bytes]
_SPARE = 8  # databases per master: its present data, its data at the start, a snapshot

# Everything of one database over the whole of another one.
_COPY = b"""
redis.call('SELECT', ARGV[2]) redis.call('FLUSHDB')
redis.call('SELECT', ARGV[1])
for _, key in ipairs(redis.call('KEYS', '*')) do
  redis.call('COPY', key, key, 'DB', ARGV[2])
end
"""
# Everything of one database that another one lacks, as a full resync of KeyDB does (what is there is newer).
_MERGE = _COPY.replace(b"redis.call('SELECT', ARGV[2]) redis.call('FLUSHDB')\n", b"")

# Around each script: the last argument is the time; what it wrote is listed if the one before says so.
_AROUND = b"""
local sim_time, sim_listed = table.remove(ARGV), table.remove(ARGV)
local sim_call = redis.call
local redis = setmetatable({call = function(command, ...)
  if command == 'TIME' then
    return {math.floor(sim_time / 1000000), sim_time %% 1000000}
  end
  if sim_listed == '1' and not string.find('%s', ' ' .. command .. ' ', 1, true) then
    sim_call('RPUSH', '~effects', 1 + select('#', ...), command, ...)
  end
  return sim_call(command, ...)
end, set_repl = function() sim_listed = '0' end}, {__index = redis})
""" % (
    b" GET HGET HMGET HGETALL HKEYS HVALS HLEN HEXISTS EXISTS LLEN LRANGE SMEMBERS ZCARD ZRANGE ZRANGEBYSCORE"
    b" ZSCORE HSCAN SCAN TYPE "
)
_PLAIN_WRITES = frozenset((b"SET", b"HSET", b"HDEL", b"UNLINK", b"DEL"))


_HEADER = re.compile(r"^-- (\w+): ", re.MULTILINE)


@cache
def _scripts() -> list[Script]:
    """All that a master may be asked to run."""
    plain = all_masters_scripts()
    return [*plain, *map(on_keydb, plain)]


@cache
def _names() -> dict[bytes, str]:
    """How people know a script."""
    headers = {script: _HEADER.findall(script.source) for script in _scripts()}
    return {
        script.sha.encode(): "/".join([name for name in names if name != "keydb"][:2])
        for script, names in headers.items()
    }


class Backend:
    """One real server for all schedules of this process.

    Args:
        masters: How many masters there may be.
    """

    def __init__(self, masters: int) -> None:
        limits = [f"{kind}-max-listpack-{what}" for kind in ("hash", "zset") for what in ("entries", "value")]
        # In packed form, hashes list their fields in the order in which they were set.
        packed = [word for name in limits for word in (f"--{name}", "100000")]
        self._server = Server(
            "valkey", unix_socket=True, extra=[*packed, "--databases", str(masters * _SPARE)]
        )
        self._server.start()
        self._sockets = [self._connect(master * _SPARE) for master in range(masters)]
        self._loaded: dict[str, bytes] = {}  # script as it is on the server, by its source
        self._copy = self._load(_COPY)
        self._merge = self._load(_MERGE)

    def close(self) -> None:
        """End the server."""
        for sock in self._sockets:
            sock.close()
        self._server.remove()

    def _connect(self, database: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(20.0)
        assert self._server.socket_path is not None
        sock.connect(self._server.socket_path)
        sock.sendall(pack_command(("SELECT", database)))
        assert sock.recv(100) == b"+OK\r\n"
        return sock

    def _load(self, source: bytes) -> bytes:
        sha = self.ask(0, b"SCRIPT", b"LOAD", source)
        assert isinstance(sha, bytes), sha
        return sha

    def load(self, source: str) -> bytes:
        """Name on the server of a script, once it was made to take its time from its arguments."""
        sha = self._loaded.get(source)
        if sha is None:
            sha = self._loaded[source] = self._load(_AROUND + source.encode())
        return sha

    def execute(self, master: int, packed: bytes, replies: int = 1) -> tuple[bytes, list[Any]]:
        """Run commands on a master; the bytes of the replies, and the replies."""
        found: list[Any]
        sock, reader, raw, found = self._sockets[master], hiredis.Reader(), b"", []
        sock.sendall(packed)
        while len(found) < replies:
            data = sock.recv(1 << 20)
            assert data, "the server is gone"
            raw += data
            reader.feed(data)
            while (reply := reader.gets()) is not False:
                found.append(reply)
        return raw, found

    def ask(self, master: int, *words: bytes | str | int) -> Any:
        """Run one command on a master; the reply."""
        return self.execute(master, pack_command(words))[1][0]

    def copy(self, source: int, target: int, merge: bool = False) -> None:
        """Put the data of one database in the place of another's; or add what is not there."""
        reply = self.ask(0, b"EVALSHA", self._merge if merge else self._copy, 0, source, target)
        assert reply is None, reply

    def flush(self, master: int) -> None:
        """Take all data from a master."""
        assert self.ask(master, b"FLUSHDB") == b"OK"

    @staticmethod
    def database(master: int, which: int = 0) -> int:
        """Number of a database: 0 the present data of a master, above: copies."""
        return master * _SPARE + which


class Mutations:
    """Mistakes built into the Lua scripts.

    Args:
        replaced: Pairs of a text and what stands in its place.
    """

    def __init__(self, *replaced: tuple[str, str]) -> None:
        self._replaced = replaced
        self.missing = [old for old, _ in replaced]  # what no script had so far

    def apply(self, source: str) -> str:
        """The script, with the mistakes."""
        self.missing = [old for old in self.missing if old not in source]
        for old, new in self._replaced:
            source = source.replace(old, new)
        return source


class SimulatedMaster:
    """One master: what it executes, and which run of it that is.

    Args:
        is_keydb: Whether it says that it is a KeyDB server.
        on_effects: Called with the number of the master and what it wrote, if its peers are to get it.
        clock: Gives the time in microseconds.
    """

    def __init__(
        self,
        backend: Backend,
        number: int,
        address: str,
        clock: Callable[[], int],
        mutations: Mutations,
        is_keydb: bool = False,
        on_effects: Callable[[int, list[Words]], None] | None = None,
    ) -> None:
        self.number = number
        self.address = address
        self.up = True
        self.paused_until = 0
        self.generation = 0
        self._backend = backend
        self._clock = clock
        self._on_effects = on_effects
        self._is_keydb = is_keydb
        self._scripts = {
            script.sha.encode(): backend.load(mutations.apply(script.source)) for script in _scripts()
        }

    @property
    def run_id(self) -> str:
        """As INFO tells it."""
        return f"{self.number}{self.generation:07d}" + "f" * 32

    def restart(self) -> None:
        """Begin another run."""
        self.generation += 1

    def execute(self, words: Words) -> bytes:
        """Run one command; the bytes of its reply."""
        name = words[0]
        if name == b"INFO":
            lines = [f"run_id:{self.run_id}", "maxmemory_policy:noeviction", "loading:0"]
            lines += ["mvcc_depth:0"] if self._is_keydb else []
            text = "".join(f"{line}\r\n" for line in lines).encode()
            return b"$%d\r\n%b\r\n" % (len(text), text)
        raw, replies = self._backend.execute(self.number, self._pack(words))
        if self._on_effects is not None:
            self._list_effects([words], replies)
        return raw

    def describe(self, words: Words) -> str:
        """A command, for people."""
        name = words[0].decode()
        if name == "EVALSHA":
            name, words = _names()[words[1]], words[2 + int(words[2]) :]
        if name == "UNLINK":
            return f"UNLINK {len(words) - 1} keys"  # in the order of SCAN, which differs
        return " ".join([name, *(word[:40].decode("utf-8", "backslashreplace") for word in words[1:])])

    def execute_transaction(self, commands: Sequence[Words]) -> bytes:
        """Run MULTI..EXEC; the bytes of the reply to EXEC."""
        packed = [pack_command(("MULTI",))]
        for words in commands:
            packed.append(self._pack(words))
        packed.append(pack_command(("EXEC",)))
        raw, replies = self._backend.execute(self.number, b"".join(packed), len(packed))
        if self._on_effects is not None:
            self._list_effects(commands, replies[-1])
        return raw[re.match(rb"\+OK\r\n(\+QUEUED\r\n)*", raw).end() :]  # type: ignore[union-attr]

    def apply(self, commands: Sequence[Words]) -> None:
        """Execute blindly what a peer wrote."""
        packed = [pack_command(tuple(words)) for words in commands]
        self._backend.execute(self.number, b"".join(packed), len(packed))

    def _pack(self, words: Words) -> bytes:
        """What the real server is told."""
        if words[0] == b"EVALSHA":
            listed = b"0" if self._on_effects is None else b"1"
            words = [words[0], self._scripts[words[1]], *words[2:], listed, b"%d" % self._clock()]
        return pack_command(tuple(words))

    def _list_effects(self, commands: Sequence[Words], replies: Sequence[Any]) -> None:
        effects: list[Words] = []
        if any(words[0] == b"EVALSHA" for words in commands):
            flat = self._backend.ask(self.number, b"LRANGE", b"~effects", 0, -1)
            self._backend.ask(self.number, b"DEL", b"~effects")
            at = 0
            while at < len(flat):
                length = int(flat[at])
                effects.append(flat[at + 1 : at + 1 + length])
                at += 1 + length
        for words, reply in zip(commands, replies, strict=True):
            if words[0] in _PLAIN_WRITES and reply is not None:
                effects.append([word for word in words if word != b"NX"])  # facts 2: NX is gone
        if effects and self._on_effects is not None:
            self._on_effects(self.number, effects)
