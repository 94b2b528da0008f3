"""Who runs a trial: host, process and name of a worker, and whether that process still lives."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from optuna_dlock.errors import CorruptRecordError

HOST_VARIABLE = "OPTUNA_DLOCK_HOST"
WORKER_VARIABLE = "OPTUNA_DLOCK_WORKER"


@dataclass(frozen=True)
class Worker:
    """Who runs or ran a trial.

    Attributes:
        host: `$OPTUNA_DLOCK_HOST` of that process, else the name of its machine (in a container, its own).
        pid: Process id, as that process sees it.
        name: `worker_name` of its storage, `$OPTUNA_DLOCK_WORKER`, or `host:pid` with something random.
    """

    host: str
    pid: int
    name: str


@dataclass(frozen=True)
class WorkerProcess:
    """One storage object in one process, as it makes itself known to a study.

    Attributes:
        worker: What users see of it.
        client: What the server tells it from all others by.
        place: The running system and the set of processes in which the pid means something.
        started: When the process started, by that system; tells it from a later one with its pid. May be "".
    """

    worker: Worker
    client: str
    place: str
    started: str

    def describe(self) -> bytes:
        """The text that the server keeps."""
        worker = self.worker
        fields = [worker.host, worker.pid, worker.name, self.client, self.place, self.started]
        return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")

    @classmethod
    def read(cls, description: bytes, key: str) -> WorkerProcess:
        """The worker that such a text is of.

        Raises:
            CorruptRecordError: If it is none.
        """
        try:
            host, pid, name, client, place, started = json.loads(description)
            return cls(Worker(str(host), int(pid), str(name)), str(client), str(place), str(started))
        except (ValueError, TypeError) as error:
            raise CorruptRecordError(f"key {key!r} holds an unreadable worker: {error}", key=key) from error

    def is_dead(self) -> bool:
        """Whether this process can see that that one is gone: never, if it is elsewhere."""
        if self.place != _place():
            return False
        try:
            os.kill(self.worker.pid, 0)
        except ProcessLookupError:
            return True
        except OSError:
            return False  # it lives, and is somebody else's
        state, started = _stat(str(self.worker.pid))
        return state in ("Z", "X") or bool(self.started and started and started != self.started)


def this_worker(name: str | None, client: str, forked: bool = False) -> WorkerProcess:
    """This process under a name.

    Args:
        name: As given to the storage; None: as the environment says, else a unique one.
        client: What the server tells this storage object from all others by.
        forked: Whether this is a child of the process that was given the name: then it gets its own.
    """
    host, pid = os.environ.get(HOST_VARIABLE) or socket.gethostname(), os.getpid()
    name = name or os.environ.get(WORKER_VARIABLE)
    if name is None or not name:
        name = f"{host}:{pid}:{secrets.token_hex(2)}"
    elif forked:
        name = f"{name}:{pid}"
    return WorkerProcess(Worker(host, pid, name), client, _place(), _stat("self")[1])


def _place() -> str:
    """This boot of this kernel, and our set of process ids: two containers may both have a pid 1."""
    try:
        return f"{_boot()}.{os.readlink('/proc/self/ns/pid')[5:-1]}"
    except OSError:
        return socket.gethostname()  # no Linux


@cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()[:13]


def _stat(pid: str) -> tuple[str, str]:
    """State and start time of a process; empty texts where there is no /proc."""
    try:
        # The second field, the name of the program, may hold spaces and brackets.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""
