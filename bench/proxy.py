"""A TCP proxy that makes every round trip longer by a given time, in a process of its own."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

_Chunk = tuple[float, bytes]


@contextlib.contextmanager
def delaying_proxy(redis_url: str, delay_ms: float) -> Iterator[str]:
    """The URL of a proxy to `redis_url`; what the server says arrives `delay_ms` later.

    Chunks are delayed each from its own arrival, so pipelined replies do not add up.
    """
    parts = urlsplit(redis_url)
    if parts.scheme == "unix":
        raise ValueError("the delaying proxy speaks TCP only")
    target = [parts.hostname or "127.0.0.1", str(parts.port or 6379), str(delay_ms)]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.proxy", *target],
        cwd=Path(__file__).resolve().parent.parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        user = parts.netloc.rpartition("@")
        yield urlunsplit(parts._replace(netloc=f"{user[0]}{user[1]}127.0.0.1:{port}"))
    finally:
        process.kill()
        process.communicate()


def _serve(host: str, port: int, delay: float) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while True:
        client = listener.accept()[0]
        server = socket.create_connection((host, port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        chunks: queue.SimpleQueue[_Chunk] = queue.SimpleQueue()
        threading.Thread(target=_forward, args=(client, server), daemon=True).start()
        threading.Thread(target=_receive, args=(server, chunks, delay), daemon=True).start()
        threading.Thread(target=_release, args=(client, chunks), daemon=True).start()


def _forward(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _receive(source: socket.socket, chunks: queue.SimpleQueue[_Chunk], delay: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 18):
            chunks.put((time.monotonic() + delay, data))
    chunks.put((0.0, b""))


def _release(target: socket.socket, chunks: queue.SimpleQueue[_Chunk]) -> None:
    with contextlib.suppress(OSError):
        while True:
            due, data = chunks.get()
            if not data:
                break
            if (wait := due - time.monotonic()) > 0:
                time.sleep(wait)
            target.sendall(data)
    target.close()


def _exit_with_parent() -> None:
    sys.stdin.read()
    # A daemon thread cannot end the process by raising.
    import os

    os._exit(0)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]) / 1000)
