"""Several masters of our own: independent, tied together by our replicator, or real KeyDB multi-master."""

from __future__ import annotations

import contextlib
import itertools
import re
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import cast

import optuna
import pytest
import redis

from optuna_dlock import RedisLockedStorage
from optuna_dlock.ensemble import Ensemble
from tests.proxy import CuttingProxy, _Link
from tests.replicator import Replicator
from tests.servers import Server, find_binary

ALL_KINDS = ("valkey", "replicated", "keydb")
_FLAVOURS = {"valkey": "valkey", "replicated": "valkey", "keydb": "keydb"}
_LINK_TIMEOUT = 20.0
_POLL = 0.005
_UPSTREAM = re.compile(rb"master(?:_\d+)?_port:(\d+)\r\nmaster(?:_\d+)?_link_status:up")
_DOWNSTREAM = re.compile(rb"port=(\d+),state=online")

# For `@pytest.mark.parametrize("kind", KINDS)`: what is missing here is skipped, and says so.
KINDS = [
    pytest.param(
        kind,
        marks=pytest.mark.skipif(
            not find_binary(_FLAVOURS[kind]), reason=f"no {_FLAVOURS[kind]} server here"
        ),
    )
    for kind in ALL_KINDS
]


class Masters:
    """A group of servers that all accept writes.

    Kinds: "valkey" are plain and independent; "replicated" are plain Valkey servers, each fed with the
    writes of the others by a `tests.replicator.Replicator`; "keydb" are real KeyDB servers with
    `--active-replica yes --multi-master yes`, each a replica of all others.

    Used as a context manager it starts all and waits until they are linked; in the end every server is
    ended by its pid and its folder removed.

    Attributes:
        servers: The servers, by number.
        replicator: What ties "replicated" ones together; None for the other kinds.

    Args:
        kind: One of `ALL_KINDS`.
        n: How many.
        appendonly: Keep the data across `kill` and `start`; else only a `dump.rdb` is loaded. KeyDB's
            append-only file lacks what came from a peer.
        delay: Seconds by which every write reaches another master late; see `set_delay`.
        echo: "replicated" only: a restarted server gets its own last commands once more, as KeyDB does.
        extra: Further arguments of every server.
    """

    def __init__(
        self,
        kind: str,
        n: int = 2,
        *,
        appendonly: bool = False,
        delay: float = 0.0,
        echo: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self.replicator: Replicator | None = None
        self._delay = delay
        self._echo = echo
        self._links: dict[tuple[int, int], _StreamProxy] = {}
        self._cut: set[tuple[int, int]] = set()
        self._servers = [_Master(_FLAVOURS[kind], appendonly=appendonly, extra=extra) for _ in range(n)]
        self.servers: Sequence[Server] = self._servers

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """All (source, target) of two different masters, by number."""
        return list(itertools.permutations(range(len(self.servers)), 2))

    @property
    def urls(self) -> list[str]:
        """URL of database 0 of each master."""
        return [server.url for server in self.servers]

    @property
    def url(self) -> str:
        """One URL that names all masters: redis://127.0.0.1:p1,127.0.0.1:p2/0."""
        return f"redis://{','.join(f'127.0.0.1:{server.port}' for server in self.servers)}/0"

    # -- links -----------------------------------------------------------------------------------

    def wait_until_linked(self) -> None:
        """Return when each link that is not cut is up, as far as its two ends run; an error after 20 s.

        None of them may be paused.
        """
        if self.replicator is not None:
            self.replicator.wait_until_attached(self._expected_links())
        elif self.kind == "keydb":
            _wait_for(
                lambda: all(self._is_linked(*pair) for pair in self._expected_links()), "links are down"
            )

    def cut(self, i: int, j: int, *, both: bool = True, backlog: bool = False, silent: bool = False) -> None:
        """Cut the replication from i to j, and from j to i if `both`; nothing for "valkey".

        In a mesh of three KeyDB masters the third forwards what a cut link does not carry.

        Args:
            i: Number of a master.
            j: Number of another one.
            both: Cut the other direction too.
            backlog: "replicated": deliver after `mend` what was written meanwhile; else it is lost. KeyDB
                always delivers late: its backlog (1 MB), or past that a full resync.
            silent: KeyDB: the link swallows all and stays open; else it is dropped, and both see that.
        """
        for pair in self._directions(i, j, both):
            self._cut.add(pair)
            if self.replicator is not None:
                self.replicator.cut(*pair, backlog=backlog)
            elif pair in self._links and silent:
                self._links[pair].black_hole()
            elif pair in self._links:
                self._links[pair].refuse()
                self._links[pair].cut_all()

    def mend(self, i: int, j: int, *, both: bool = True) -> None:
        """End `cut`; returns at once (KeyDB tries again each second: see `wait_until_linked`)."""
        for pair in self._directions(i, j, both):
            self._cut.discard(pair)
            if self.replicator is not None:
                self.replicator.mend(*pair)
            elif pair in self._links:
                self._links[pair].restore()

    def resync(self, i: int, j: int) -> None:
        """Copy every key of i over those of j, as a full resync does when i's are newer.

        KeyDB does this by itself, newest key wins: here this only waits for the links. Nothing for "valkey".
        """
        if self.replicator is not None:
            self.replicator.resync(i, j)
        else:
            self.wait_until_linked()

    def set_delay(self, seconds: float) -> None:
        """Let every write reach another master this late; nothing for "valkey".

        In KeyDB acknowledgements are as late, in the other direction.
        """
        self._delay = seconds
        if self.replicator is not None:
            self.replicator.delay = seconds
        for proxy in self._links.values():
            proxy.delay = seconds

    # -- servers ---------------------------------------------------------------------------------

    def kill(self, i: int) -> None:
        """End master i at once (SIGKILL)."""
        self.servers[i].kill()

    def start(self, i: int) -> None:
        """Start master i again; returns when it answers, which for KeyDB is before it has synced."""
        self.servers[i].start()

    def restart_empty(self, i: int) -> None:
        """Kill master i, remove its data files, and start it.

        A KeyDB master gets its data back from the others by itself within about 3 s; until then it is
        empty, and yet answers.
        """
        self.kill(i)
        self._servers[i].remove_data()
        self.start(i)

    def restart_with_rdb(self, i: int) -> None:
        """Let master i SAVE, kill it, and start it with that; `appendonly` ones load their other file."""
        _wait_for(lambda: self._servers[i].save(), "another save goes on")
        self.kill(i)
        self.start(i)

    def pause(self, i: int) -> None:
        """Stop the clock of master i (SIGSTOP)."""
        self.servers[i].pause()

    def resume(self, i: int) -> None:
        """Let master i go on after `pause`."""
        self.servers[i].resume()

    def __enter__(self) -> Masters:
        with contextlib.ExitStack() as stack:
            stack.callback(self._close)
            if self.kind == "keydb":
                self._make_links()
            for server in self.servers:
                server.start()
            if self.kind == "replicated":
                ports = [server.port for server in self.servers]
                self.replicator = Replicator(ports, echo=self._echo)
            self.wait_until_linked()
            self.set_delay(self._delay)  # only now: KeyDB's handshake has many round trips
            stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self.replicator is not None:
            self.replicator.close()
        for server in self.servers:
            server.remove()
        for proxy in self._links.values():
            proxy.close()

    def _make_links(self) -> None:
        for server in self._servers:
            server.add_arguments("--active-replica", "yes", "--multi-master", "yes", "--protected-mode", "no")
        for i, j in self.pairs:
            proxy = self._links[i, j] = _StreamProxy(self.servers[i].port)
            self._servers[j].add_arguments("--replicaof", "127.0.0.1", str(proxy.port))

    def _directions(self, i: int, j: int, both: bool) -> list[tuple[int, int]]:
        return [(i, j), (j, i)] if both else [(i, j)]

    def _expected_links(self) -> list[tuple[int, int]]:
        running = [server.running for server in self._servers]
        return [(i, j) for i, j in self.pairs if (i, j) not in self._cut and running[i] and running[j]]

    def _is_linked(self, i: int, j: int) -> bool:
        """Both ends say so: a target may not yet have noticed that its source was restarted."""
        sources = _UPSTREAM.findall(self.servers[j].command(b"INFO", "replication"))
        targets = _DOWNSTREAM.findall(self.servers[i].command(b"INFO", "replication"))
        return b"%d" % self._links[i, j].port in sources and b"%d" % self.servers[j].port in targets


class _Master(Server):
    """A server that learns its peers after its port, and can lose its data."""

    @property
    def running(self) -> bool:
        return self._process is not None

    def add_arguments(self, *arguments: str) -> None:
        self._extra += arguments

    def save(self) -> bool:
        """Write a dump.rdb; False if that has to wait for a snapshot that a replica gets."""
        try:
            self.command("SAVE")
        except redis.ResponseError as error:
            if "in progress" not in str(error):
                raise
            return False
        return True

    def remove_data(self) -> None:
        assert not self.running, "the server is running"
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "server.log":
                path.unlink()


class _StreamProxy(CuttingProxy):
    """A proxy of a replication link: an RDB file on the wire is no reply that could be parsed."""

    def _welcome(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), timeout=5.0)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.settimeout(None)
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self._lock:
            self.connections += 1
            link = _RawLink(self, client, server)
            self._links.add(link)
        link.start()


class _RawLink(_Link):
    def _on_request(self, chunk: bytes) -> bool:
        return True

    def _on_reply(self, chunk: bytes) -> bool:
        return True


def ensemble_of(storage: RedisLockedStorage) -> Ensemble:
    """What a storage over several masters asks."""
    return cast("Ensemble", storage._node)


def create(storage: RedisLockedStorage) -> int:
    """A new study."""
    return optuna.create_study(storage=storage)._study_id


def level(storage: RedisLockedStorage, study_id: int) -> bool:
    """Whether three masters are where a new trial leaves them, all of them."""
    storage.create_new_trial(study_id)
    ensemble = ensemble_of(storage)
    with ensemble.lock:
        key = storage._registry.study_keys(study_id).ballots
        request = ensemble._send_read("read_key", [key], ["HLEN"])
        ensemble.wait_for_all(request, 1.0)
        states = [reply[2] for reply in request.replies.values() if isinstance(reply, list) and reply[0] == 0]
    return len(states) == 3 and len(set(states)) == 1


def _wait_for(condition: Callable[[], bool], failure: str) -> None:
    deadline = time.monotonic() + _LINK_TIMEOUT
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{failure} after {_LINK_TIMEOUT} s")
        time.sleep(_POLL)
