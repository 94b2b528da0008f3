"""The command line tool: exit codes, one-line errors without passwords, the audit of existing studies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_dlock import RedisLockedStorage, __version__, cli
from tests.servers import Server, free_port


def _run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optuna_dlock.cli", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


def _assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line that says what is wrong, and nothing else."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("optuna-dlock: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


@pytest.fixture
def study(valkey_url: str) -> Iterator[optuna.Study]:
    """Two finished trials and one that runs, in a study named 'digits'."""
    storage = RedisLockedStorage(valkey_url)
    study = optuna.create_study(storage=storage, study_name="digits")
    study.tell(study.ask(), 1.0)
    study.tell(study.ask(), state=TrialState.FAIL)
    study.ask()
    yield study
    storage.close()


def test_version_names_the_versions_that_a_bug_report_needs() -> None:
    done = _run("--version")
    assert done.returncode == 0
    for version in (__version__, optuna.__version__, sys.version.split()[0]):
        assert version in done.stdout


@pytest.mark.parametrize("command", ["demo", "audit", "report", "watch"])
def test_help_shows_examples_and_exit_codes(command: str) -> None:
    done = _run(command, "--help")
    assert done.returncode == 0
    assert f"optuna-dlock {command} " in done.stdout.partition("examples:")[2]
    assert "Exit codes" in done.stdout


@pytest.mark.parametrize("args", [[], ["demo", "--workers", "0"], ["demo", "--trials", "x"], ["audit"]])
def test_wrong_arguments_are_a_usage_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(args)
    assert raised.value.code == 2
    assert "usage: optuna-dlock" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo --url", "audit"])
def test_a_bad_url_is_refused_in_one_line_without_its_password(command: str) -> None:
    _assert_refused(_run(*command.split(), "mysql://me:s3cret@host/db"), "mysql://***@host/db")
    assert "s3cret" not in _run(*command.split(), "redis://me:s3cret@host:notaport/0").stderr


@pytest.mark.parametrize("command", ["demo --url", "audit"])
def test_a_server_that_is_not_there_is_named_and_given_up_soon(command: str) -> None:
    port = free_port()
    start = time.monotonic()
    done = _run(*command.split(), f"redis://me:s3cret@127.0.0.1:{port}/0")
    assert time.monotonic() - start < 30
    _assert_refused(done, f"127.0.0.1:{port}")
    assert "s3cret" not in done.stderr


def test_a_wrong_password_is_refused_at_once_and_not_shown() -> None:
    with Server("valkey", password="right") as server:  # noqa: S106  # a server of our own
        done = _run("audit", f"redis://:s3cret@127.0.0.1:{server.port}/0")
    _assert_refused(done, f"127.0.0.1:{server.port}")
    assert "s3cret" not in done.stderr


@pytest.mark.parametrize("missing", ["rich", "sklearn"])
def test_the_demo_says_what_to_install(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == missing else object())
    assert cli.main(["demo"]) == 2
    assert 'pip install "optuna-dlock[demo]"' in capsys.readouterr().err


def test_the_demo_takes_no_study_that_exists(study: optuna.Study, valkey_url: str) -> None:
    _assert_refused(_run("demo", "--url", valkey_url, "--study", "digits"), "new study", "'digits'")
    assert len(study.trials) == 3


def test_audit_shows_each_study_as_a_row(study: optuna.Study, valkey_url: str) -> None:
    optuna.create_study(storage=study._storage, study_name="empty")
    done = _run("audit", valkey_url)
    assert done.returncode == 0
    assert [line.split() for line in done.stdout.splitlines()] == [
        ["study", "trials", "COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING", "zombies", "numbers"],
        ["digits", "3", "1", "0", "1", "1", "0", "0", "0..n-1"],
        ["empty", "0", "0", "0", "0", "0", "0", "0", "0..n-1"],
    ]


def test_audit_prints_json_of_the_study_that_was_asked_for(study: optuna.Study, valkey_url: str) -> None:
    optuna.create_study(storage=study._storage, study_name="other")
    done = _run("audit", valkey_url, "--study", "digits", "--json", "--zombie-after", "0")
    assert done.returncode == 0
    assert json.loads(done.stdout) == [
        {
            "study": "digits",
            "trials": 3,
            "states": {"COMPLETE": 1, "FAIL": 1, "RUNNING": 1},
            "zombies": [2],
            "missing": [],
            "doubled": [],
            "ok": True,
        }
    ]


def test_audit_of_a_study_that_is_not_there_is_refused(study: optuna.Study, valkey_url: str) -> None:
    _assert_refused(_run("audit", valkey_url, "--study", "nothing"), "nothing")


def test_audit_fails_when_a_number_is_missing_or_doubled(
    study: optuna.Study, valkey_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(self: optuna.Study, deepcopy: bool = True) -> list[FrozenTrial]:
        trials = [create_trial(state=TrialState.FAIL) for _ in range(4)]
        for trial, number in zip(trials, (0, 2, 2, 3), strict=True):
            trial.number = number
        return trials

    monkeypatch.setattr(optuna.Study, "get_trials", damaged)
    assert cli.main(["audit", valkey_url, "--study", "digits"]) == 1
    assert "missing (1,), doubled (2,)" in capsys.readouterr().out


def test_audit_does_not_create_the_embedded_storage_it_looks_for(tmp_path: Path) -> None:
    path = tmp_path / "nothing.valkey"
    _assert_refused(_run("audit", f"embedded:{path}"), str(path))
    assert not path.exists()
