"""The process that keeps the server of one `embedded:` folder while somebody uses it.

Started by `embedded.acquire`, by path and with the standard library only, so that it costs 20 ms and not an
import of Optuna. All agreement is by `flock` on files of the folder, which the kernel releases however
a process ends:

    start.lock       exclusive: a participant that looks whether a supervisor must be started
    users.lock       shared: one per participant; exclusive: the supervisor, from its decision to stop the
                     server until the server is gone, so that nobody arrives in between
    supervisor.lock  exclusive: the supervisor
    server.lock      exclusive: the server itself, which inherits it: never two servers on one folder
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import time

USERS = "users.lock"
START = "start.lock"
SUPERVISOR = "supervisor.lock"
SERVER = "server.lock"
LOG = "server.log"

READY = "ready"
BUSY = "busy"

_POLL = 0.1
_START_TIMEOUT = 30.0
_STOP_TIMEOUT = 30.0
_LONGEST_RESTART_WAIT = 5.0
_LOG_LIMIT = 1_000_000
_PR_SET_PDEATHSIG = 1


def open_file(folder: str, name: str) -> int:
    """Descriptor of a lock file, created if need be; not inherited by programs that are started."""
    return os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT, 0o600)


def try_lock(descriptor: int, kind: int) -> bool:
    """Take a lock (`fcntl.LOCK_SH` or `LOCK_EX`) if that is possible at once."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def make_private(folder: str) -> None:
    """Make a folder only its owner can enter; refuse one that somebody else prepared."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    status = os.lstat(folder)
    if not (status.st_uid == os.geteuid() and status.st_mode & 0o170777 == 0o040700):
        raise PermissionError(f"{folder} is not a folder of ours that only we can enter")


def answers(socket_path: str, timeout: float = 1.0) -> bool:
    """Whether a server answers on this socket, be it to say that it still loads its data."""
    reply = _ask(socket_path, b"PING\r\n", timeout)
    return reply.startswith((b"+PONG", b"-LOADING"))


def _ask(socket_path: str, command: bytes, timeout: float) -> bytes:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout)
        try:
            connection.connect(socket_path)
            connection.sendall(command)
            return connection.recv(100)
        except OSError:
            return b""


class Supervisor:
    """Keeps the server of one folder running until the last participant is gone.

    Args:
        folder: Where data, log and lock files are.
        socket_path: Where the server listens.
        binary: The server program.
        linger: Seconds to go on after the last participant left, as the next one may be about to come.
    """

    def __init__(self, folder: str, socket_path: str, binary: str, linger: float) -> None:
        self._folder = folder
        self._socket_path = socket_path
        self._binary = binary
        self._linger = linger
        self._server: subprocess.Popen[bytes] | None = None
        self._terminated = False
        self._wakeup, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # wakes the loop: the server died
        signal.signal(signal.SIGTERM, self._on_sigterm)
        for ignored in (signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)

    def run(self) -> None:
        """Start the server, report on standard output, and keep it."""
        own = open_file(self._folder, SUPERVISOR)
        if not try_lock(own, fcntl.LOCK_EX):
            _report(BUSY)
            return
        os.ftruncate(own, 0)
        os.write(own, f"{socket.gethostname()} {os.getpid()}\n".encode())
        self._users = open_file(self._folder, USERS)
        self._server_lock = open_file(self._folder, SERVER)
        try:
            self._end_orphan()
            self._start_first()
        except Exception as error:
            self._stop()
            _report(f"{type(error).__name__}: {error}")
            return
        _report(READY)
        self._keep()
        self._stop()

    def _end_orphan(self) -> None:
        """End a server whose supervisor was killed, where the system did not do that (see `_spawn`)."""
        deadline = time.monotonic() + _STOP_TIMEOUT
        asked = False
        while not try_lock(self._server_lock, fcntl.LOCK_EX):
            if not asked:
                asked = True
                _ask(self._socket_path, b"SHUTDOWN\r\n", 1.0)
            if time.monotonic() > deadline:
                raise TimeoutError("an earlier server of this folder does not end")
            time.sleep(0.01)

    def _start_first(self) -> None:
        server = self._spawn()
        deadline = time.monotonic() + _START_TIMEOUT
        while not answers(self._socket_path):
            if server.poll() is not None:
                raise RuntimeError(f"the server ended with status {server.returncode}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"the server did not answer for {_START_TIMEOUT:g} s")
            time.sleep(0.002)

    def _keep(self) -> None:
        alone_since: float | None = None
        restart_wait = 0.0
        next_restart = 0.0
        while not self._terminated:
            if select.select([self._wakeup], [], [], _POLL)[0]:
                os.read(self._wakeup, 1000)
            if not self._is_our_folder():
                return
            now = time.monotonic()
            if not self._is_running() and now >= next_restart:
                # The first restart is immediate, as workers wait; a server that dies again and again is not.
                restart_wait = min(2 * restart_wait + 0.1, _LONGEST_RESTART_WAIT)
                next_restart = now + restart_wait
                self._spawn()
            elif now > next_restart + 10 * _LONGEST_RESTART_WAIT:
                restart_wait = 0.0
            if not try_lock(self._users, fcntl.LOCK_EX):
                alone_since = None
                continue
            alone_since = now if alone_since is None else alone_since
            if now - alone_since >= self._linger:
                return  # with users.lock held: who comes now waits until this process has ended
            fcntl.flock(self._users, fcntl.LOCK_UN)

    def _is_running(self) -> bool:
        return self._server is not None and self._server.poll() is None

    def _is_our_folder(self) -> bool:
        """Whether the folder still is the one we lock; somebody may have removed and made it anew."""
        try:
            found = os.stat(os.path.join(self._folder, USERS))
        except OSError:
            return False
        return os.path.samestat(found, os.fstat(self._users))

    def _spawn(self) -> subprocess.Popen[bytes]:
        if os.path.dirname(self._socket_path) != self._folder:
            make_private(os.path.dirname(self._socket_path))
        log = os.path.join(self._folder, LOG)
        with contextlib.suppress(OSError):
            if os.path.getsize(log) > _LOG_LIMIT:
                os.replace(log, log + ".1")
        supervisor = os.getpid()

        def die_with_supervisor() -> None:
            # Linux ends the server even when this process is killed; elsewhere the next one does.
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != supervisor:
                    os._exit(1)

        options = {
            "--port": "0",
            "--unixsocket": self._socket_path,
            "--unixsocketperm": "700",
            "--dir": self._folder,
            "--logfile": log,
            "--daemonize": "no",
            "--save": "",
            "--appendonly": "yes",
            "--appendfsync": "everysec",
            "--maxmemory-policy": "noeviction",
        }
        with open(log, "ab") as output:  # what goes wrong before the server opens its log
            self._server = subprocess.Popen(  # noqa: S603 -- the binary of a package we depend on
                [self._binary, *(part for option in options.items() for part in option)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(self._server_lock,),
                preexec_fn=die_with_supervisor,  # this process has one thread
            )
        return self._server

    def _stop(self) -> None:
        server = self._server
        if server is not None and server.poll() is None:
            ours = self._is_our_folder()
            # A server whose folder was removed has nothing to save, and must not remove the socket of
            # the next server on its way out.
            server.send_signal(signal.SIGTERM if ours else signal.SIGKILL)
            server.send_signal(signal.SIGCONT)
            try:
                server.wait(_STOP_TIMEOUT)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        if self._is_our_folder():
            with contextlib.suppress(OSError):
                os.unlink(self._socket_path)
        if os.path.dirname(self._socket_path) != self._folder:
            with contextlib.suppress(OSError):
                os.rmdir(os.path.dirname(self._socket_path))

    def _on_sigterm(self, *_: object) -> None:
        self._terminated = True


def _report(text: str) -> None:
    """Tell the participant that waits on our standard output, and let go of it."""
    with contextlib.suppress(OSError):  # it may be gone
        os.write(1, text.encode())
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    os.close(null)


def main(arguments: list[str]) -> None:
    """Become a daemon: no parent that must wait for it, no terminal (the caller started a session)."""
    folder, socket_path, binary, linger = arguments
    if os.fork():
        os._exit(0)
    os.umask(0o077)
    os.chdir("/")
    Supervisor(folder, socket_path, binary, float(linger)).run()


if __name__ == "__main__":
    main(sys.argv[1:])
