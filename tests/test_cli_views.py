"""`optuna-dlock studies`, `trials`, `locks`, `completion`: what they show, their JSON, their exit codes."""

from __future__ import annotations

import importlib.util
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState, create_trial

from optuna_dlock import LockLostError, RedisLockedStorage, cli
from optuna_dlock.lock_table import list_locks
from tests.contention.crew import wait_until
from tests.servers import free_port

Connect = Callable[..., RedisLockedStorage]
NEW = ("studies", "trials", "locks", "completion")


@pytest.fixture
def url(any_url: str) -> str:
    return any_url


def _cells(text: str) -> list[list[str]]:
    return [re.split(r" {2,}", line.strip()) for line in text.splitlines()]


Show = Callable[..., str]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str]) -> Show:
    """Runs the tool, which has to exit with 0; what it printed."""

    def run(*args: str) -> str:
        assert cli.main(args) == 0
        return capsys.readouterr().out

    return run


# -- studies ---------------------------------------------------------------------------------------------


def test_studies_come_newest_first_with_their_counts(url: str, connect: Connect, show: Show) -> None:
    storage = connect(url)
    assert show("studies", url) == "no studies\n"
    assert json.loads(show("studies", url, "--json")) == []
    old = optuna.create_study(study_name="old one", storage=storage)
    new = optuna.create_study(study_name="新的", storage=storage, directions=["maximize", "minimize"])
    for state, values in (("COMPLETE", [1.0]), ("COMPLETE", [2.0]), ("FAIL", None), ("PRUNED", None)):
        old.add_trial(create_trial(state=TrialState[state], values=values))
    old.enqueue_trial({})
    new.ask()
    assert _cells(show("studies", url)) == [
        ["study", "directions", "trials", "COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING"],
        ["新的", "maximize, minimize", "1", "0", "0", "0", "1", "0"],
        ["old one", "minimize", "5", "2", "1", "1", "0", "1"],
    ]
    assert json.loads(show("studies", url, "--json"))[1] == {
        "study": "old one",
        "id": old._study_id,
        "directions": ["minimize"],
        "trials": 5,
        "states": {"COMPLETE": 2, "PRUNED": 1, "FAIL": 1, "RUNNING": 0, "WAITING": 1},
    }


def test_a_name_cannot_drive_the_terminal(valkey_url: str, connect: Connect, show: Show) -> None:
    optuna.create_study(study_name="a\x1b[2Jb\n", storage=connect(valkey_url))
    text = show("studies", valkey_url)
    assert "\x1b" not in text
    assert text.count("\n") == 2


# -- trials ----------------------------------------------------------------------------------------------


def test_trials_are_shown_with_what_they_are_and_who_ran_them(
    url: str, connect: Connect, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_DLOCK_HOST", "m8")
    study = optuna.create_study(study_name="s", storage=connect(url, worker_name="w1"))
    assert show("trials", url, "s") == "no trials\n"
    trial = study.ask({"x": FloatDistribution(0.5, 0.5), "c": CategoricalDistribution(["a b", None])})
    study.tell(trial, float("inf"))
    study.add_trial(create_trial(value=0.123456789))
    study.ask()
    study.enqueue_trial({})
    first, added, running, waiting = json.loads(show("trials", url, "s", "--json"))
    assert (first["number"], first["state"], first["values"]) == (0, "COMPLETE", ["inf"])
    assert first["params"] == trial.params
    assert (first["host"], first["pid"], first["worker"]) == ("m8", os.getpid(), "w1")
    assert 0 <= first["duration"] < 60
    assert first["start"] < first["end"]
    assert (added["host"], added["values"]) == (None, [0.123456789])
    assert (running["state"], running["host"], running["end"]) == ("RUNNING", "m8", None)
    assert running["duration"] > 0
    assert (waiting["state"], waiting["host"], waiting["duration"]) == ("WAITING", None, None)
    rows = _cells(show("trials", url, "s"))
    assert rows[0] == ["number", "state", "values", "host", "duration", "params"]
    assert [row[1] for row in rows[1:]] == ["COMPLETE", "COMPLETE", "RUNNING", "WAITING"]
    choice = "null" if trial.params["c"] is None else '"a b"'
    assert (rows[1][2:4], rows[1][5]) == (["inf", "m8"], f"x=0.5, c={choice}")
    assert rows[2][2] == "0.123457"

    def numbers(*args: str) -> list[int]:
        return [trial["number"] for trial in json.loads(show("trials", url, "s", "--json", *args))]

    assert numbers("--state", "complete") == [0, 1]
    assert numbers("--last", "2") == [2, 3]
    assert numbers("--state", "COMPLETE", "--last", "1") == [1]
    assert numbers("--state", "PRUNED") == []


# -- locks -----------------------------------------------------------------------------------------------


def test_locks_are_shown_with_their_holders_and_waiters(url: str, connect: Connect, show: Show) -> None:
    storage, other = connect(url), connect(url)
    study_id = optuna.create_study(storage=storage)._study_id
    assert show("locks", url) == "no locks are held\n"
    assert json.loads(show("locks", url, "--json")) == []
    name = "data {set}:lock 数"
    waiter = threading.Thread(target=_hold, args=(other, name), name="waiter")
    with storage.lock(name, ttl=20.0) as token, storage.lock(f"study:{study_id}", ttl=20.0):
        waiter.start()
        if not _is_several(storage):
            wait_until(
                lambda: bool(list_locks(storage._node, storage._server.prefix)[0].waiters), "somebody waits"
            )
        mine, of_study = json.loads(show("locks", url, "--json"))
        rows = _cells(show("locks", url))
    waiter.join(30)
    assert (mine["lock"], mine["token"]) == (name, token)
    assert mine["owner"] == f"{os.uname().nodename}:{os.getpid()}:MainThread"
    assert 0 <= mine["held_for"] < 60
    assert 0 < mine["ttl"] <= 20
    assert of_study["lock"] == f"study:{study_id}"
    assert rows[0] == ["lock", "owner", "held for", "ttl", "token", "waiters"]
    if _is_several(storage):
        assert mine["waiters"] is None
        assert rows[1][-1] == "not known"
    else:
        assert mine["waiters"] == [f"{os.uname().nodename}:{os.getpid()}:waiter"] == rows[1][-1:]
        assert of_study["waiters"] == []
        assert rows[2][-1] == "none"
    assert show("locks", url) == "no locks are held\n"


def _hold(storage: RedisLockedStorage, name: str) -> None:
    with storage.lock(name):
        pass


def _is_several(storage: RedisLockedStorage) -> bool:
    return bool(storage._server.masters)


def test_a_broken_lock_is_the_next_ones_and_its_holder_is_told(
    url: str, connect: Connect, show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    storage, other = connect(url), connect(url)
    lock = storage.lock("dataset", ttl=60.0)
    token = lock.acquire()
    got: list[int] = []
    waiter = threading.Thread(target=lambda: got.append(other.lock("dataset").acquire()))
    waiter.start()
    assert "broken" in show("locks", url, "--break", "dataset", "--yes")
    waiter.join(30)
    assert got[0] > token
    with pytest.raises(LockLostError):
        lock.release()
    assert [lock.token for lock in list_locks(storage._node, storage._server.prefix)] == got
    assert cli.main(["locks", url, "--break", "nothing", "--yes"]) == 1
    assert "nobody holds lock 'nothing'" in capsys.readouterr().err


def test_the_lock_of_a_study_is_broken_too(url: str, connect: Connect, show: Show) -> None:
    storage, other = connect(url), connect(url, timeout=5.0)
    study_id = optuna.create_study(storage=storage)._study_id
    storage.lock(f"study:{study_id}", ttl=600.0).acquire()
    show("locks", url, "--break", f"study:{study_id}", "--yes")
    other.create_new_trial(study_id)


def test_a_lock_that_changed_hands_after_it_was_shown_is_not_broken(
    url: str, connect: Connect, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = connect(url)
    lock = storage.lock("dataset")
    lock.acquire()

    def answer(_: object) -> bool:
        lock.release()
        lock.acquire()
        return True

    monkeypatch.setattr("optuna_dlock.cli_locks._is_confirmed", answer)
    assert cli.main(["locks", url, "--break", "dataset"]) == 1
    assert "released meanwhile" in capsys.readouterr().err
    lock.release()


def test_breaking_asks_first(
    valkey_url: str,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    storage = connect(valkey_url)
    storage.lock("dataset").acquire()
    with open(os.devnull) as nobody, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", nobody)
        assert cli.main(["locks", valkey_url, "--break", "dataset"]) == 2
        assert "--yes" in capsys.readouterr().err
    for answer, code in (("n", 1), ("", 1), ("y", 0)):
        terminal, stdin = pty.openpty()
        os.write(terminal, answer.encode() + b"\n")
        with os.fdopen(stdin) as asked, monkeypatch.context() as patch:
            patch.setattr(sys, "stdin", asked)
            assert cli.main(["locks", valkey_url, "--break", "dataset"]) == code
        os.close(terminal)
        assert "Take lock 'dataset' from" in capsys.readouterr().err
        assert bool(list_locks(storage._node, storage._server.prefix)) == (code == 1)


def test_a_pottery_lock_is_shown_and_not_broken(
    valkey_url: str, connect: Connect, show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    with connect(valkey_url, lock="pottery").lock("dataset"):
        [lock] = json.loads(show("locks", valkey_url, "--json"))
        assert (lock["lock"], lock["waiters"]) == ("dataset", None)
        assert str(os.getpid()) in lock["owner"]
        assert cli.main(["locks", valkey_url, "--break", "dataset", "--yes"]) == 2
        assert "pottery" in capsys.readouterr().err
    assert show("locks", valkey_url) == "no locks are held\n"


def test_locks_of_another_prefix_are_not_shown(valkey_url: str, connect: Connect, show: Show) -> None:
    with connect(valkey_url + "x").lock("dataset"), connect(valkey_url).lock("mine"):
        assert [lock["lock"] for lock in json.loads(show("locks", valkey_url, "--json"))] == ["mine"]


# -- what they have in common ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", NEW)
def test_help_shows_examples_and_exit_codes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main([command, "--help"])
    out = capsys.readouterr().out
    assert raised.value.code == 0
    assert f"optuna-dlock {command} " in out.partition("examples:")[2]
    assert "Exit codes: 0" in out
    assert max(map(len, out.splitlines())) <= 110


@pytest.mark.parametrize("command", ["studies URL", "trials URL s", "locks URL"])
def test_a_server_that_is_not_there_is_named_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("optuna_dlock.cli_output.TIMEOUT", 0.3)
    port = free_port()
    assert cli.main(command.replace("URL", f"redis://me:s3cret@127.0.0.1:{port}/0").split()) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("optuna-dlock: ")
    assert said.err.count("\n") == 1
    assert f"127.0.0.1:{port}" in said.err
    assert "s3cret" not in said.err


@pytest.mark.parametrize("command", ["studies URL", "trials URL s", "locks URL"])
def test_an_embedded_storage_that_is_not_there_is_not_created(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "nothing.valkey"
    assert cli.main(command.replace("URL", f"embedded:{path}").split()) == 2
    assert str(path) in capsys.readouterr().err
    assert not path.exists()


def test_a_study_that_is_not_there_is_said(valkey_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trials", valkey_url, "nothing"]) == 2
    assert "'nothing'" in capsys.readouterr().err


@pytest.mark.parametrize("args", [["trials", "URL"], ["trials", "URL", "s", "--last", "0"], ["completion"]])
def test_wrong_arguments_are_a_usage_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(args)
    assert raised.value.code == 2
    assert "usage: optuna-dlock" in capsys.readouterr().err


# -- completion ------------------------------------------------------------------------------------------

needs_shtab = pytest.mark.skipif(importlib.util.find_spec("shtab") is None, reason="no shtab here")


def _completed(script: str, *words: str) -> list[str]:
    """What a real bash offers for the last word."""
    line = " ".join(words)
    asked = f"""
{script}
COMP_WORDS=({" ".join(f"'{word}'" for word in words)}); COMP_CWORD={len(words) - 1}
COMP_LINE='{line}'; COMP_POINT={len(line)}
function_name=$(complete -p optuna-dlock | sed 's/.*-F \\([^ ]*\\).*/\\1/')
"$function_name" optuna-dlock '{words[-1]}' '{words[-2]}'
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    bash = shutil.which("bash") or "bash"
    done = subprocess.run([bash, "-c", asked], capture_output=True, text=True, check=True)
    return done.stdout.split()


@needs_shtab
def test_bash_completes_commands_options_and_choices(show: Show) -> None:
    script = show("completion", "bash")
    assert {"audit", "demo", "doctor", *NEW} <= set(_completed(script, "optuna-dlock", ""))
    assert _completed(script, "optuna-dlock", "stud") == ["studies"]
    assert {"--state", "--last", "--json"} <= set(_completed(script, "optuna-dlock", "trials", "--"))
    assert _completed(script, "optuna-dlock", "trials", "--state", "RUN") == ["RUNNING"]
    assert set(_completed(script, "optuna-dlock", "completion", "")) >= {"bash", "zsh"}


@needs_shtab
def test_zsh_gets_a_script_of_its_own(show: Show) -> None:
    script = show("completion", "zsh")
    assert script.startswith("#compdef optuna-dlock")
    assert "locks:" in script


def test_completion_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert 'pip install "optuna-dlock[completion]"' in capsys.readouterr().err
