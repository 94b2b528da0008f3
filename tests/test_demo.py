"""The demo, run as people run it: to its end, ended early, and with workers killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock import RedisLockedStorage

_PATIENCE = 60.0  # seconds
_CHECKS = ("numbers", "acknowledged", "finished", "results")


class Demo:
    """A demo in a process group of its own, as a shell starts it, with `folder` for temporary files."""

    def __init__(self, folder: Path, *args: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "optuna_dlock.cli", "demo", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder), "PYTHONUNBUFFERED": "1"},
        )
        self.output = ""

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Read its output up to a line that has the pattern."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output += line
            if match := re.search(pattern, line):
                return match
        raise AssertionError(f"no {pattern!r} in\n{self.output}{self._process.communicate()[1]}")

    def finish(self) -> int:
        """Read the rest and return its exit code; nobody may have complained on stderr."""
        rest, errors = self._process.communicate(timeout=_PATIENCE)
        self.output += rest
        assert errors == "", self.output
        return self._process.returncode

    def send(self, signum: int) -> None:
        """Do what Ctrl-C does: the signal reaches the parent and all workers."""
        os.killpg(self._process.pid, signum)

    def end(self) -> None:
        """See that nothing of it goes on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def passed(self) -> list[str]:
        """Names of the checks that its audit found in order."""
        return re.findall(r"^  ok +(\w+) ", self.output, re.MULTILINE)


Start = Callable[..., Demo]


@pytest.fixture
def folder() -> Iterator[Path]:
    """Where demos put temporary files; `tmp_path` is too long for the name of a unix socket."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts demos, and ends them."""
    with contextlib.ExitStack() as stack:

        def start_demo(*args: str) -> Demo:
            demo = Demo(folder, *args)
            stack.callback(demo.end)
            return demo

        yield start_demo


def _trials(url: str) -> list[FrozenTrial]:
    with closing(RedisLockedStorage(url)) as storage:
        return optuna.load_study(study_name="digits", storage=storage).trials


def test_the_demo_runs_on_a_private_server_and_leaves_nothing_behind(start: Start, folder: Path) -> None:
    demo = start("--workers", "2", "--trials", "12")
    assert demo.finish() == 0, demo.output
    assert demo.passed() == list(_CHECKS)
    assert "exactly 0..11" in demo.output
    assert re.search(r"^best accuracy 0\.\d+, trial \d+ of w[12]: ", demo.output, re.MULTILINE)
    assert list(folder.iterdir()) == []


def test_the_demo_leaves_exactly_its_trials_on_a_given_server(start: Start, valkey_url: str) -> None:
    demo = start("--workers", "2", "--trials", "12", "--url", valkey_url, "--study", "digits")
    assert demo.finish() == 0, demo.output
    trials = _trials(valkey_url)
    assert [t.number for t in trials] == list(range(12))
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert {t.user_attrs["worker"] for t in trials} <= {"w1", "w2"}
    assert all(len(t.intermediate_values) == 3 and len(t.params) == 4 for t in trials)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_demo_without_leaving_a_trial_running(
    start: Start, valkey_url: str, signum: int, code: int
) -> None:
    demo = start("--workers", "2", "--trials", "10000", "--url", valkey_url, "--study", "digits")
    demo.wait_for(r"s  \d+/10000 trials")
    demo.send(signum)
    assert demo.finish() == code, demo.output
    assert demo.passed() == list(_CHECKS)
    trials = _trials(valkey_url)
    assert [t.number for t in trials] == list(range(len(trials)))
    assert 0 < len(trials) < 10000
    # Workers are not torn out of their trials, which ends them in good order.
    assert {t.state for t in trials} == {TrialState.COMPLETE}


def test_ctrl_c_does_not_end_the_private_server_before_the_audit(start: Start, folder: Path) -> None:
    demo = start("--workers", "1", "--trials", "10000")
    demo.wait_for(r"s  \d+/10000 trials")
    demo.send(signal.SIGINT)
    assert demo.finish() == 130, demo.output
    assert demo.passed() == list(_CHECKS)
    assert list(folder.iterdir()) == []


def test_ctrl_c_while_workers_come_up_does_not_wait_for_them(start: Start, valkey_url: str) -> None:
    demo = start("--workers", "2", "--trials", "12", "--url", valkey_url, "--study", "digits")
    demo.wait_for("started w1")
    demo.send(signal.SIGINT)
    assert demo.finish() == 130, demo.output
    assert len(re.findall(r"^w[12] .* stopped", demo.output, re.MULTILINE)) == 2, demo.output
    assert _trials(valkey_url) == []


def test_workers_do_not_react_to_ctrl_c_by_themselves_from_their_first_moment_on(
    start: Start, valkey_url: str
) -> None:
    demo = start("--workers", "1", "--trials", "4", "--url", valkey_url, "--study", "digits")
    worker = int(demo.wait_for(r"started w1 \(pid (\d+)\)")[1])
    with closing(RedisLockedStorage(valkey_url)) as storage:
        study = optuna.load_study(study_name="digits", storage=storage)
        while len(study.get_trials(deepcopy=False)) < 2:
            os.kill(worker, signal.SIGINT)
            time.sleep(0.01)
    assert demo.finish() == 0, demo.output
    assert "started w2" not in demo.output


def test_a_killed_worker_is_reported_its_trial_failed_and_all_others_are_run(
    start: Start, valkey_url: str
) -> None:
    demo = start("--workers", "2", "--trials", "16", "--url", valkey_url, "--study", "digits")
    victim = int(demo.wait_for(r"started w1 \(pid (\d+)\)")[1])
    _stop_within_a_trial("w1", victim, valkey_url)
    os.kill(victim, signal.SIGKILL)
    assert demo.finish() == 0, demo.output
    assert f"worker w1 (pid {victim}) is gone: killed by SIGKILL" in demo.output
    assert re.search(r"^trial \d+ was left RUNNING by a killed worker: now FAIL$", demo.output, re.MULTILINE)
    assert demo.passed() == list(_CHECKS)
    states = Counter(t.state for t in _trials(valkey_url))
    assert states == {TrialState.COMPLETE: 15, TrialState.FAIL: 1}


def test_killed_workers_are_replaced_when_none_is_left_to_do_the_rest(start: Start, valkey_url: str) -> None:
    demo = start("--workers", "1", "--trials", "8", "--url", valkey_url, "--study", "digits")
    victim = int(demo.wait_for(r"started w1 \(pid (\d+)\)")[1])
    _stop_within_a_trial("w1", victim, valkey_url)
    os.kill(victim, signal.SIGKILL)
    assert demo.finish() == 0, demo.output
    assert "started w2" in demo.output
    assert demo.passed() == list(_CHECKS)
    states = Counter(t.state for t in _trials(valkey_url))
    assert states == {TrialState.COMPLETE: 7, TrialState.FAIL: 1}


def _stop_within_a_trial(worker: str, pid: int, url: str) -> None:
    """Pause a worker at a moment at which one of its trials is RUNNING."""
    deadline = time.monotonic() + _PATIENCE
    with closing(RedisLockedStorage(url)) as storage:
        study = optuna.load_study(study_name="digits", storage=storage)

        def runs() -> bool:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            return any(t.user_attrs.get("worker") == worker for t in running)

        while time.monotonic() < deadline:
            if not runs():
                continue
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.05)  # what it had sent before has arrived
            if runs():
                return
            os.kill(pid, signal.SIGCONT)
    raise AssertionError(f"{worker} was never seen within a trial")


def test_json_is_one_object_and_all_else_goes_to_stderr(valkey_url: str) -> None:
    command = [sys.executable, "-m", "optuna_dlock.cli", "demo", "--json", "--url", valkey_url]
    done = subprocess.run(
        [*command, "--workers", "2", "--trials", "6"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert (outcome["trials"], outcome["ok"]) == (6, True)
    assert [check["name"] for check in outcome["checks"]] == list(_CHECKS)
    assert "6 trials, 2 workers" in done.stderr
