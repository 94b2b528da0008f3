"""The stacks of `deploy/` without Docker: their very command lines on this machine, on loopback.

What is translated, and nothing else: `/data` and `/run/secrets` to temporary folders, `0.0.0.0` to
127.0.0.1, port 6379 of a service to a free one, a service's name before a port to 127.0.0.1. Program names
are found in a folder of links that goes first on PATH: `valkey-cli` and `keydb-cli` are whichever client
there is.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import redis
import yaml
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.servers import find_binary, free_port

DEPLOY = Path(__file__).parent.parent / "deploy"
STACKS = ("valkey.yml", "keydb-pair.yml", "valkey-three.yml")
PASSWORD = 'a "pass\\word" & $HOME; #%/@:?+=\''  # noqa: S105  # of servers of our own; whatever may go wrong
_CLIENTS = ("redis-cli", "valkey-cli", "keydb-cli")
_TIMEOUT = 30.0
_VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::-([^}]*))?\})")


def read_stack(name: str, **variables: str) -> dict[str, Any]:
    """A stack as `docker stack deploy` reads it, with these variables in the environment."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[1] else variables.get(found[2]) or found[3]

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replaced(inner) for key, inner in node.items()}
        if isinstance(node, list):
            return [replaced(inner) for inner in node]
        return _VARIABLE.sub(value, node) if isinstance(node, str) else node

    stack: dict[str, Any] = replaced(yaml.safe_load((DEPLOY / name).read_text("utf-8")))
    return stack


def masters_of(stack: dict[str, Any]) -> list[str]:
    """The names of the services that are servers."""
    return [name for name in stack["services"] if name != "worker"]


def needs(name: str) -> None:
    """Skip the test if the programs of a stack are not installed here."""
    flavour = "keydb" if name.startswith("keydb") else "valkey"
    if find_binary(flavour) is None:
        pytest.skip(f"no {flavour} server here")


class Stack:
    """The servers of a stack; as a context manager it starts them, and in the end kills and removes them."""

    def __init__(self, name: str) -> None:
        self.definition = read_stack(name)
        self.names = masters_of(self.definition)
        self.folder = Path(tempfile.mkdtemp(prefix="dlock-"))
        self.ports = {name: free_port() for name in self.names}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for folder in ("bin", "secrets", *self.names):
            (self.folder / folder).mkdir()
        (self.folder / "secrets" / "optuna_password").write_text(PASSWORD + "\n", "utf-8")
        for flavour in ("valkey", "keydb"):
            if binary := find_binary(flavour):
                (self.folder / "bin" / f"{flavour}-server").symlink_to(binary)
        self.client = next(filter(None, map(shutil.which, _CLIENTS)), None)
        for client in _CLIENTS if self.client else ():
            (self.folder / "bin" / client).symlink_to(self.client or "")

    def translate(self, text: str, service: str | None = None) -> str:
        """A text of the file as it holds here; `service` is whose own port 6379 and /data it tells of."""
        for name, port in self.ports.items():
            text = re.sub(rf"\b{name}([ :])6379\b", rf"127.0.0.1\g<1>{port}", text)
        if service is not None:
            text = re.sub(r"\b6379\b", str(self.ports[service]), text)
            text = text.replace("/data", str(self.folder / service))
        text = text.replace("/run/secrets", str(self.folder / "secrets"))
        return text.replace("0.0.0.0", "127.0.0.1")  # noqa: S104

    @property
    def url(self) -> str:
        """What the worker service gets as OPTUNA_DLOCK_URL."""
        return self.translate(self.definition["services"]["worker"]["environment"]["OPTUNA_DLOCK_URL"])

    @property
    def environment(self) -> dict[str, str]:
        """Where programs are looked for; nothing else is handed down."""
        return {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}"}

    def start(self, service: str) -> None:
        """Start a server by its command line; returns when it answers to the password."""
        command = [self.translate(word, service) for word in self.definition["services"][service]["command"]]
        with open(self.folder / f"{service}.log", "ab") as log:
            self.processes[service] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment
            )
        deadline = time.monotonic() + _TIMEOUT
        while not self.answers(service):
            if self.processes[service].poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{service} did not start:\n{self.log(service)}")
            time.sleep(0.01)

    def answers(self, service: str, password: str | None = PASSWORD) -> bool:
        """Whether a PING with this password is answered."""
        try:
            return bool(self.command(service, "PING", password=password))
        except (redis.ConnectionError, redis.ResponseError):
            return False

    def command(self, service: str, *args: str, password: str | None = PASSWORD) -> Any:
        """Run one command on a server."""
        client = redis.Redis(
            "127.0.0.1",
            self.ports[service],
            password=password,
            socket_timeout=10.0,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
        )
        try:
            return client.execute_command(*args)  # type: ignore[no-untyped-call]
        finally:
            client.close()

    def check_health(self, service: str) -> subprocess.CompletedProcess[str]:
        """Run the health check of a service as Docker does: CMD-SHELL is what /bin/sh -c gets."""
        kind, test = self.definition["services"][service]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        return subprocess.run(
            ["/bin/sh", "-c", self.translate(test, service)],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )

    def kill(self, service: str, signal_number: signal.Signals = signal.SIGKILL) -> int:
        """End a server; its status."""
        process = self.processes.pop(service)
        process.send_signal(signal_number)
        return process.wait(_TIMEOUT)

    def log(self, service: str) -> str:
        """All that a server printed."""
        return (self.folder / f"{service}.log").read_text("utf-8", "replace")

    def __enter__(self) -> Stack:
        try:
            for name in self.names:
                self.start(name)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
