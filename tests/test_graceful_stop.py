"""graceful_stop in real programs that get real signals: what is stored afterwards, and how they ended."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from optuna_dlock.signal_watch import LAST_WORDS, SAME
from tests.masters import Masters
from tests.servers import Server
from tests.stop_worker import open_storage

_PATIENCE = 60.0  # seconds
_KINDS = ("memory", "sqlite", "journal", "valkey", "masters")
_PATIENT: dict[str, Any] = {"abort_after": 30.0}
_numbers = itertools.count()
_COMMAND = [sys.executable, "-W", "error", "-m", "tests.stop_worker"]


class Program:
    """A `tests.stop_worker` in a process group of its own, as a shell starts it."""

    def __init__(
        self,
        storage: tuple[str, Any],
        *,
        before: tuple[str, ...] = (),
        in_shell: bool = False,
        options: dict[str, Any] | None = _PATIENT,
        **config: Any,
    ) -> None:
        self.storage = storage
        options = {} if options is None else {**_PATIENT, **options}
        config = {
            "loop": "optimize",
            "n_jobs": 1,
            "work": "gate",
            "reraise": False,
            "last_words": LAST_WORDS,
            **config,
            "options": options,
        }
        command = [*before, *_COMMAND, json.dumps({**config, "storage": storage})]
        if in_shell:
            command = ["/bin/bash", "-c", f"{shlex.join(command)}; echo shell sees $?"]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).parent.parent,
        )
        self.output = ""
        self.pid = int(self.wait_for(r"^pid (\d+)")[0])  # as the program sees it
        self.outer_pid = self.pid if in_shell else self._process.pid

    def wait_for(self, pattern: str, times: int = 1) -> list[str]:
        """Read its output up to the line with the pattern, or as many lines with it; their first groups."""
        assert self._process.stdout is not None
        found: list[str] = []
        for line in self._process.stdout:
            self.output += line.decode()
            if match := re.search(pattern, line.decode()):
                found.append(match[match.lastindex or 0])
                if len(found) == times:
                    return found
        raise AssertionError(f"no {pattern!r} in\n{self.output}")

    def send(self, signum: int) -> None:
        os.kill(self.outer_pid, signum)

    def send_to_group(self, signum: int) -> None:
        """What a terminal does."""
        os.killpg(self._process.pid, signum)

    def interrupt(self) -> None:
        """The first SIGINT; returns when it was seen, and so long after that a second one counts."""
        self.send(signal.SIGINT)
        self.wait_for("SIGINT: finishing")
        time.sleep(SAME * 1.2)

    def open_gate(self, trials: int = 1) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"." * trials)
        self._process.stdin.flush()

    def finish(self) -> int:
        """Read the rest and return what `subprocess.returncode` says."""
        assert self._process.stdout is not None
        self.output += self._process.stdout.read().decode()
        return self._process.wait(_PATIENCE)

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def trials(self) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
        """State, parameters and user attributes of all trials, in order."""
        if self.storage[0] == "memory":
            trials = json.loads(self.output.partition("\ntrials ")[2].splitlines()[0])
            return [tuple(trial) for trial in trials]
        return [(t.state.name, t.params, t.user_attrs) for t in self.study().trials]

    def states(self) -> Counter[str]:
        return Counter(state for state, _, _ in self.trials())

    def study(self) -> optuna.Study:
        return optuna.load_study(study_name="s", storage=open_storage(*self.storage))


Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts programs, and ends them."""
    with contextlib.ExitStack() as stack:

        def start_program(*args: Any, **kwargs: Any) -> Program:
            program = Program(*args, **kwargs)
            stack.callback(program.end)
            return program

        yield start_program


@pytest.fixture(scope="module")
def masters() -> Iterator[Masters]:
    """Three plain Valkey servers."""
    with Masters("valkey", 3) as group:
        yield group


@pytest.fixture(scope="module")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with its tables: making them takes longer than most of the tests."""
    path = tmp_path_factory.mktemp("sqlite") / "empty"
    open_storage("sqlite", str(path))
    return path


@pytest.fixture
def storage_of(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], tuple[str, Any]]:
    """Where a storage of that kind is, with nothing in it."""

    def make(kind: str) -> tuple[str, Any]:
        if kind == "sqlite":
            shutil.copy(request.getfixturevalue("empty_sqlite"), tmp_path / kind)
        if kind in ("sqlite", "journal"):
            return kind, str(tmp_path / kind)
        if kind == "valkey":
            valkey: Server = request.getfixturevalue("valkey")
            return kind, f"{valkey.url}?prefix=stop{next(_numbers)}"
        if kind == "masters":
            masters: Masters = request.getfixturevalue("masters")
            return kind, f"{masters.url}?prefix=stop{next(_numbers)}"
        return kind, None

    return make


StorageOf = Callable[[str], tuple[str, Any]]
_kinds_and_n_jobs = pytest.mark.parametrize(
    ("kind", "n_jobs"), [*((kind, 4) for kind in _KINDS), ("memory", 1), ("sqlite", 1), ("masters", 1)]
)


# -- the first SIGINT --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "n_jobs"),
    [("memory", 1), ("sqlite", 4), ("journal", 1), ("valkey", 1), ("valkey", 4), ("masters", 1)],
)
def test_the_first_sigint_finishes_what_runs_and_begins_nothing(
    start: Start, storage_of: StorageOf, kind: str, n_jobs: int
) -> None:
    program = start(storage_of(kind), n_jobs=n_jobs)
    program.wait_for("running", n_jobs)
    program.open_gate()
    program.wait_for("running")
    program.interrupt()
    program.open_gate(n_jobs)
    assert program.finish() == 0, program.output
    assert program.states() == {"COMPLETE": n_jobs + 1}
    assert "end of block\nafter block True SIGINT\nhandlers restored\n" in program.output


def test_after_reraise_a_shell_sees_the_signal(start: Start, storage_of: StorageOf) -> None:
    program = start(storage_of("memory"), reraise=True)
    program.wait_for("running")
    program.interrupt()
    program.open_gate()
    assert program.finish() == -signal.SIGINT, program.output
    assert program.states() == {"COMPLETE": 1}


# -- a second SIGINT, SIGTERM, SIGHUP ----------------------------------------------------------------


@_kinds_and_n_jobs
def test_sigterm_puts_the_running_trials_back_into_the_queue(
    start: Start, storage_of: StorageOf, kind: str, n_jobs: int
) -> None:
    program = start(storage_of(kind), n_jobs=n_jobs, options={"on_abort": "requeue"})
    program.wait_for("running", n_jobs)
    program.open_gate()
    program.wait_for("running")
    program.send(signal.SIGTERM)
    if n_jobs > 1:  # the threads go on until their trials are recorded, and are refused then
        program.wait_for("was ended", n_jobs)
        program.open_gate(n_jobs)
    assert program.finish() == 128 + signal.SIGTERM, program.output
    assert "handlers restored" in program.output
    trials = program.trials()
    assert program.states() == {"COMPLETE": 1, "FAIL": n_jobs, "WAITING": n_jobs}, program.output
    ended, again = (
        sorted((params["x"], attrs["mark"]) for state, params, attrs in trials if state == wanted)
        for wanted in ("FAIL", "WAITING")
    )
    assert ended == again
    if kind != "memory":
        study = program.study()
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=n_jobs)
        assert sorted((t.params["x"], t.user_attrs["mark"]) for t in study.trials[-n_jobs:]) == ended
        assert {t.state for t in study.trials[-n_jobs:]} == {TrialState.COMPLETE}
        assert [t.system_attrs["failed_trial"] for t in study.trials[-n_jobs:]] == [
            t.system_attrs["retry_history"][0] for t in study.trials[-n_jobs:]
        ]


@pytest.mark.parametrize(("kind", "n_jobs"), [("sqlite", 1), ("valkey", 4)])
def test_a_second_sigint_ends_the_running_trials(
    start: Start, storage_of: StorageOf, kind: str, n_jobs: int
) -> None:
    program = start(storage_of(kind), n_jobs=n_jobs)
    program.wait_for("running", n_jobs)
    program.interrupt()
    program.send(signal.SIGINT)
    if n_jobs > 1:
        program.wait_for("was ended", n_jobs)
        program.open_gate(n_jobs)
    assert program.finish() == -signal.SIGINT, program.output
    assert program.states() == {"FAIL": n_jobs}
    assert "handlers restored" in program.output
    assert "end of block" not in program.output


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_shell_sees_the_exit_code_of_the_convention(
    start: Start, storage_of: StorageOf, signum: signal.Signals, code: int
) -> None:
    program = start(storage_of("memory"), in_shell=True)
    program.wait_for("running")
    if signum == signal.SIGINT:
        program.interrupt()
    program.send(signum)
    program.finish()
    assert f"shell sees {code}\n" in program.output
    assert program.states() == {"FAIL": 1}


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_it_works_as_process_1_of_a_container(
    start: Start, storage_of: StorageOf, signum: signal.Signals
) -> None:
    namespace = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this needs the right to make a PID namespace")
    program = start(storage_of("sqlite"), before=namespace)
    program.wait_for("running")
    assert program.pid == 1
    program.outer_pid = _child_of(program.outer_pid)
    if signum == signal.SIGINT:
        program.interrupt()
    program.send(signum)
    assert program.finish() == 128 + signum, program.output
    assert program.states() == {"FAIL": 1}


# -- what does not come to its end -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "n_jobs", "kind", "sign"),
    [
        ("c code", 1, "sqlite", "in C code"),
        ("sleep", 4, "valkey", "running"),
        ("sleep", 4, "masters", "running"),
        ("stubborn", 1, "journal", "goes on"),
        ("stubborn", 4, "sqlite", "goes on"),
    ],
)
def test_a_trial_that_does_not_end_is_recorded_and_the_process_exits(
    start: Start, storage_of: StorageOf, work: str, n_jobs: int, kind: str, sign: str
) -> None:
    program = start(
        storage_of(kind), n_jobs=n_jobs, work=work, options={"on_abort": "requeue", "abort_after": 0.1}
    )
    program.wait_for(sign, n_jobs)
    program.send(signal.SIGTERM)
    assert program.finish() == 128 + signal.SIGTERM, program.output
    assert "this process exits without them" in program.output
    assert program.states() == {"FAIL": n_jobs, "WAITING": n_jobs}, program.output


def test_a_sleep_in_the_main_thread_ends_at_once(start: Start, storage_of: StorageOf) -> None:
    program = start(storage_of("sqlite"), work="sleep")
    program.wait_for("running")
    program.send(signal.SIGTERM)
    assert program.finish() == 128 + signal.SIGTERM, program.output
    assert "left 0\n" in program.output  # its `finally` was run
    assert program.states() == {"FAIL": 1}


def test_by_default_it_is_over_before_docker_kills(start: Start, storage_of: StorageOf) -> None:
    """Docker's grace is a contract in seconds: SIGTERM, 10 s, SIGKILL."""
    program = start(storage_of("valkey"), work="c code", options=None)
    program.wait_for("in C code")
    program.send(signal.SIGTERM)
    began = time.monotonic()
    assert program.finish() == 128 + signal.SIGTERM, program.output
    assert time.monotonic() - began < 10
    assert program.states() == {"FAIL": 1}


def test_a_server_that_is_away_holds_nothing_up(start: Start) -> None:
    with Server("valkey") as server:
        program = start(("valkey", server.url), work="sleep", options={"abort_after": 0.1}, last_words=0.5)
        program.wait_for("running")
        server.pause()
        program.send(signal.SIGTERM)
        assert program.finish() == 128 + signal.SIGTERM, program.output
        server.resume()
        assert program.states() == {"RUNNING": 1}  # nobody could know better


# -- processes and loops -----------------------------------------------------------------------------


def test_ctrl_c_of_the_whole_group_leaves_what_a_trial_forked_alone(
    start: Start, storage_of: StorageOf
) -> None:
    program = start(storage_of("sqlite"), work="forked")
    child = int(program.wait_for(r"^child (\d+)")[0])
    program.send_to_group(signal.SIGINT)
    program.wait_for("SIGINT: finishing")
    # A child that is not scheduled gets its SIGINT late: for its parent it must not be a second one.
    time.sleep(SAME * 1.2)
    os.kill(child, signal.SIGINT)
    program.open_gate(2)  # one byte for each of them
    assert program.finish() == 0, program.output
    assert f"child was alive, ended by {-signal.SIGTERM}\n" in program.output
    assert program.states() == {"COMPLETE": 1}


@pytest.mark.parametrize("kind", ["journal", "valkey"])
def test_a_loop_of_ask_and_tell_looks_and_ends(start: Start, storage_of: StorageOf, kind: str) -> None:
    program = start(storage_of(kind), loop="ask")
    program.wait_for("running")
    program.interrupt()
    program.open_gate()
    assert program.finish() == 0, program.output
    assert "end of block\nafter block True SIGINT\nhandlers restored\n" in program.output
    assert program.states() == {"COMPLETE": 1}


@pytest.mark.parametrize("kind", ["sqlite", "masters"])
def test_a_trial_of_ask_and_tell_is_ended_too(start: Start, storage_of: StorageOf, kind: str) -> None:
    program = start(storage_of(kind), loop="ask", options={"on_abort": "requeue"})
    program.wait_for("running")
    program.send(signal.SIGTERM)
    assert program.finish() == 128 + signal.SIGTERM, program.output
    assert program.states() == {"FAIL": 1, "WAITING": 1}


def _child_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()[0])
