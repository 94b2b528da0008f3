"""A TCP proxy on loopback that breaks connections where it hurts: between a request and its reply."""

from __future__ import annotations

import contextlib
import random
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

import hiredis

_CHUNK = 1 << 16
_IDLE = 0.2  # seconds between looks at the flags while nothing arrives


class CuttingProxy:
    """Forwards connections to a server on loopback, and fails on demand.

    Attributes:
        port: Where to connect to.
        delay: Seconds added to each direction: a round trip takes twice as much longer. Chunks that
            follow each other are late together, as on a long wire, not one after the other.
        connections, requests, replies, cuts: What happened so far, counted.

    Args:
        server_port: Port of the server on 127.0.0.1.
        password: Put into `url`.
    """

    def __init__(self, server_port: int, *, password: str | None = None) -> None:
        self.delay = 0.0
        self.connections = self.requests = self.replies = self.cuts = 0
        self._password = password
        self._server_port = server_port
        self._lock = threading.RLock()
        self._links: set[_Link] = set()
        self._armed: bytes | None = None
        self._probability = 0.0
        self._random = random.Random()
        self._swallowing = False
        self._refusing = False
        self._closed = False
        self._listener: socket.socket | None = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self._waker, self._woken = socket.socketpair()
        self._settled = threading.Event()  # set when the accepting thread has seen `_refusing`
        self._thread = threading.Thread(target=self._accept, name="proxy", daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        """URL of database 0 through the proxy."""
        user = f":{self._password}@" if self._password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    # -- faults ----------------------------------------------------------------------------------

    def cut_next_reply(self, containing: bytes = b"") -> None:
        """Let the next request through to the server and drop its connection instead of the reply.

        Args:
            containing: Only a command with these bytes in one of its words, such as a key's name.
        """
        with self._lock:
            self._armed = containing

    def cut_randomly(self, probability: float, seed: int | None = None) -> None:
        """Drop the connection instead of a reply, each time with this probability; 0 ends it."""
        with self._lock:
            self._random = random.Random(seed)
            self._probability = probability

    def cut_all(self) -> None:
        """Drop all connections now; new ones are welcome."""
        with self._lock:
            for link in list(self._links):
                self.cuts += 1
                link.close()

    def black_hole(self) -> None:
        """From now on swallow every byte of both directions; connections stay open."""
        self._swallowing = True

    def refuse(self) -> None:
        """From now on refuse new connections, as a server does that is down; old ones go on."""
        self._set_refusing(True)

    def restore(self) -> None:
        """End `black_hole` and `refuse`.

        Connections that lost bytes are dropped: no network gives streams with a hole.
        """
        with self._lock:
            self._swallowing = False
            for link in list(self._links):
                if link.has_hole:
                    link.close()
        self._set_refusing(False)

    def close(self) -> None:
        """Drop everything and end the threads."""
        self._closed = True
        self._waker.send(b"x")
        self._thread.join()
        self.cut_all()
        with self._lock:
            links = list(self._links)
        for link in links:
            link.join()
        self._waker.close()
        self._woken.close()

    def __enter__(self) -> CuttingProxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the accepting thread, sole owner of the listening socket ----------------------------------

    def _listen(self, port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(512)
        return listener

    def _set_refusing(self, refusing: bool) -> None:
        self._settled.clear()
        self._refusing = refusing
        self._waker.send(b"x")
        assert self._settled.wait(10), "the proxy's accepting thread is gone"

    def _accept(self) -> None:
        while not self._closed:
            sources = [self._woken, *([self._listener] if self._listener else [])]
            ready = select.select(sources, [], [])[0]
            if self._listener in ready and self._listener is not None and not self._refusing:
                self._welcome(self._listener.accept()[0])
            if self._woken in ready:
                self._woken.recv(100)
                if self._refusing and self._listener is not None:
                    self._end_listening(self._listener)
                    self._listener = None
                elif not self._refusing and self._listener is None:
                    self._listener = self._listen(self.port)
                self._settled.set()
        if self._listener is not None:
            self._end_listening(self._listener)

    @staticmethod
    def _end_listening(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # a forked child may hold a copy: closing ours is not enough
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()

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
            link = _Link(self, client, server)
            self._links.add(link)
        link.start()

    # -- what links ask ----------------------------------------------------------------------------

    def _count_request(self, words: object) -> bool:
        """Note one request; True if the connection is to be dropped instead of its reply."""
        with self._lock:
            self.requests += 1
            if self._armed is not None and _mentions(words, self._armed):
                self._armed = None
                return True
            return bool(self._probability) and self._random.random() < self._probability

    def _gone(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)


class _Link:
    """One client's connection and ours to the server, with a thread for each direction."""

    def __init__(self, proxy: CuttingProxy, client: socket.socket, server: socket.socket) -> None:
        self.has_hole = False
        self._proxy = proxy
        self._client = client
        self._server = server
        self._requests = 0
        self._replies = 0
        self._cut_at: int | None = None  # the reply of this number is not delivered
        self._running = 2
        self._request_reader = hiredis.Reader()
        self._reply_reader = hiredis.Reader()
        self._threads = [
            threading.Thread(target=self._pump, args=(client, server, self._on_request), daemon=True),
            threading.Thread(target=self._pump, args=(server, client, self._on_reply), daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def close(self) -> None:
        """Drop both connections; the threads see it and close the sockets."""
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _on_request(self, chunk: bytes) -> bool:
        self._request_reader.feed(chunk)
        while (words := self._request_reader.gets()) is not False:
            self._requests += 1
            if self._proxy._count_request(words) and self._cut_at is None:
                self._cut_at = self._requests
        return True

    def _on_reply(self, chunk: bytes) -> bool:
        self._reply_reader.feed(chunk)
        while self._reply_reader.gets() is not False:
            self._replies += 1
            self._proxy.replies += 1
        if self._cut_at is None or self._replies < self._cut_at:
            return True
        self._proxy.cuts += 1
        return False

    def _pump(self, source: socket.socket, target: socket.socket, inspect: Callable[[bytes], bool]) -> None:
        pending: deque[tuple[float, bytes]] = deque()
        try:
            while True:
                wait = pending[0][0] - time.monotonic() if pending else _IDLE
                if wait <= 0:
                    target.sendall(pending.popleft()[1])
                elif select.select([source], [], [], wait)[0]:
                    chunk = source.recv(_CHUNK)
                    if not chunk:
                        break
                    if self._proxy._swallowing:
                        self.has_hole = True
                    elif not inspect(chunk):
                        break
                    elif self._proxy.delay or pending:
                        pending.append((time.monotonic() + self._proxy.delay, chunk))
                    else:
                        target.sendall(chunk)
        except OSError:
            pass  # one end is gone: so is the other
        finally:
            self.close()
            self._end()

    def _end(self) -> None:
        with self._proxy._lock:
            self._running -= 1
            if self._running:
                return  # the other thread still selects on these sockets
            self._client.close()
            self._server.close()
            self._proxy._gone(self)


def _mentions(words: object, wanted: bytes) -> bool:
    if not wanted:
        return True
    return isinstance(words, list) and any(isinstance(word, bytes) and wanted in word for word in words)
