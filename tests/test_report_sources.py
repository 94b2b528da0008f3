"""`optuna-dlock report` on real storages: one master, several, SQLite, journals; several hosts."""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalRedisBackend, JournalStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock import RedisLockedStorage, cli, cli_output, cli_report
from optuna_dlock.errors import DLockError, InvalidURLError, StorageUnavailableError, StudyNotFoundError
from optuna_dlock.open_storage import open_storage
from optuna_dlock.report_hosts import HostStatistics
from optuna_dlock.report_source import ReportSource
from tests.masters import Masters
from tests.servers import Server, find_binary, free_port

_WORKER = """
import sys, optuna
from optuna_dlock import RedisLockedStorage
optuna.logging.disable_default_handler()
url, n = sys.argv[1:]
with RedisLockedStorage(url) as storage:
    study = optuna.load_study(storage=storage, study_name="P2c_BTC")
    study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=int(n))
"""
KINDS = ("one", "three")


@pytest.fixture(scope="module")
def three() -> Iterator[Masters]:
    """Three plain masters that no test stops."""
    with Masters("valkey", 3) as masters:
        yield masters


@pytest.fixture
def any_url(request: pytest.FixtureRequest, valkey_url: str) -> str:
    """One Valkey server, or three plain masters; a key space of its own."""
    if request.param == "one":
        return valkey_url
    masters: Masters = request.getfixturevalue("three")
    return f"{masters.url}?{valkey_url.partition('?')[2]}"


on_both = pytest.mark.parametrize("any_url", KINDS, indirect=True)


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    """The tool in this process: a process of its own takes a second."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(args)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def _run_apart(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "optuna_dlock.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _json(url: str, *args: str) -> Any:
    done = _run("report", url, "--json", *args)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


def _fill(storage: BaseStorage, *names: str) -> None:
    """Studies with three finished trials of two hosts as the notes write them, and one that runs."""
    for name in names:
        study = optuna.create_study(storage=storage, study_name=name)
        for host in ("m8", "m9", "m9", "m8"):
            trial = study.ask()
            trial.set_user_attr("HOST", {"host": host})
            if trial.number < 3:
                study.tell(trial, float(trial.number))


# -- processes on several hosts --------------------------------------------------------------------


@on_both
def test_processes_on_several_hosts_are_told_apart(any_url: str) -> None:
    with RedisLockedStorage(any_url) as storage:
        optuna.create_study(storage=storage, study_name="P2c_BTC")
        workers = [("m8", 5), ("m8", 6), ("m9", 7), ("bric", 4)]
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _WORKER, any_url, str(n)],
                env={**os.environ, "OPTUNA_DLOCK_HOST": host},
            )
            for host, n in workers
        ]
        assert [process.wait(60) for process in processes] == [0] * len(workers)
        optuna.load_study(storage=storage, study_name="P2c_BTC").ask()
    (study,) = _json(any_url)["studies"]
    hosts = {host["host"]: (host["workers"], host["finished"], host["running"]) for host in study["hosts"]}
    here = hosts.keys() - {"m8", "m9", "bric"}
    assert len(here) == 1
    assert hosts == {"m8": (2, 11, 0), "m9": (1, 7, 0), "bric": (1, 4, 0), here.pop(): (0, 0, 1)}
    means = [host["mean"] for host in study["hosts"][:3]]
    assert means == sorted(means)
    assert (study["complete"], study["running"]) == (22, 1)
    assert 0 <= study["idle"] < 1
    assert study["throughput"] > 0


# -- what is not there, and what must not come to be -----------------------------------------------


def test_an_empty_server_has_no_studies_and_stays_empty(valkey: Server, valkey_url: str) -> None:
    done = _run("report", valkey_url)
    assert done.returncode == 0
    assert "no studies" in done.stdout
    assert valkey.command("KEYS", f"{valkey_url.partition('prefix=')[2]}*") == []


def test_several_masters_that_nobody_has_worked_on_stay_empty(three: Masters, valkey_url: str) -> None:
    prefix = valkey_url.partition("prefix=")[2]
    done = _run("report", f"{three.url}?prefix={prefix}")
    assert done.returncode == 2
    assert "there are no studies on 127.0.0.1:" in done.stderr
    assert [server.command("KEYS", f"{prefix}*") for server in three.servers] == [[], [], []]


def test_several_masters_that_are_not_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_output, "TIMEOUT", 0.3)
    ports = [free_port() for _ in range(3)]
    done = _run("report", f"redis://{','.join(f'127.0.0.1:{port}' for port in ports)}/0")
    assert done.returncode == 2
    assert all(f"127.0.0.1:{port}" in done.stderr for port in ports)


def test_a_report_changes_nothing_on_the_server() -> None:
    with Server("valkey") as server:
        with RedisLockedStorage(server.url) as storage:
            _fill(storage, "a", "b")
        before = server.command("INFO", "persistence")["rdb_changes_since_last_save"]
        assert _run("report", server.url).returncode == 0
        after = server.command("INFO", "persistence")["rdb_changes_since_last_save"]
    assert after == before > 0


@pytest.mark.parametrize(
    "url", ["sqlite:///{}", "journal:{}", "embedded:{}", "{}"], ids=["sqlite", "journal", "embedded", "path"]
)
def test_a_file_that_is_not_there_is_an_error_and_is_not_created(url: str, tmp_path: Path) -> None:
    path = tmp_path / "nothing"
    done = _run("report", url.format(path))
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_sqlite_file_of_somebody_else_is_refused_and_gets_no_tables(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("create table mine (x)")
    connection.close()
    before = path.read_bytes()
    done = _run("report", f"sqlite:///{path}")
    assert done.returncode == 2
    assert "no studies of Optuna" in done.stderr
    assert path.read_bytes() == before


def test_a_sqlite_file_is_opened_so_that_nothing_can_be_written(tmp_path: Path) -> None:
    url, storage = _sqlite(tmp_path)
    _fill(storage, "s")
    storage.remove_session()
    _, opened = open_storage(url, 1.0)
    with pytest.raises(StorageInternalError) as raised:
        opened.create_new_study([StudyDirection.MINIMIZE], "another")
    assert "readonly" in str(raised.value.__cause__)
    opened.remove_session()


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("once upon a time\nthere was\n")
    done = _run("report", str(path))
    assert done.returncode == 2
    assert done.stderr.startswith(f"optuna-dlock: cannot read {path}: ")
    assert done.stderr.count("\n") == 1


def test_a_redis_without_a_journal_is_refused_and_stays_empty() -> None:
    with Server("valkey") as server:
        done = _run("report", f"journal+{server.url}")
        assert server.command("DBSIZE") == 0
    assert done.returncode == 2
    assert f"no journal of Optuna on journal+redis://127.0.0.1:{server.port}/0" in done.stderr


@pytest.mark.parametrize(
    "url", ["redis://me:s3cret@127.0.0.1:{}/0", "journal+redis://me:s3cret@127.0.0.1:{}/0"]
)
def test_a_server_that_is_not_there_is_named_in_one_line_without_its_password(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_output, "TIMEOUT", 0.3)
    port = free_port()
    done = _run("report", url.format(port))
    assert done.returncode == 2
    assert f"127.0.0.1:{port}" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "s3cret" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    "url", ["http://host/db", "nonsense://me:s3cret@host/db", "mysql://me:s3cret@h/x?a=b"]
)
def test_a_url_nobody_can_open_is_refused_without_its_password(url: str) -> None:
    done = _run("report", url)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "s3cret" not in done.stderr


def test_no_study_that_matches_is_an_error_that_names_some(valkey_url: str) -> None:
    with RedisLockedStorage(valkey_url) as storage:
        _fill(storage, "P2c_BTC", "P2c_ETH")
    done = _run("report", valkey_url, "--study", "P4_*")
    assert done.returncode == 2
    assert "no study of" in done.stderr
    assert "'P4_*'" in done.stderr
    assert "P2c_BTC, P2c_ETH" in done.stderr


# -- any storage -----------------------------------------------------------------------------------


def _sqlite(folder: Path) -> tuple[str, BaseStorage]:
    url = f"sqlite:///{folder / 'a study #1.db'}"
    return url, RDBStorage(url)


def _journal(folder: Path) -> tuple[str, BaseStorage]:
    path = str(folder / "journal.log")
    return path, JournalStorage(JournalFileBackend(path))


@pytest.mark.parametrize("make", [_sqlite, _journal])
def test_other_storages_of_optuna_are_reported_on_and_not_written_to(make: Any, tmp_path: Path) -> None:
    url, storage = make(tmp_path)
    _fill(storage, "old", "new")
    storage.remove_session()
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found = _json(url)
    assert [(s["number"], s["name"], s["complete"], s["running"]) for s in found["studies"]] == [
        (1, "new", 3, 1),
        (0, "old", 3, 1),
    ]
    hosts = {h["host"]: (h["workers"], h["finished"], h["running"]) for h in found["studies"][0]["hosts"]}
    assert hosts == {"m8": (None, 1, 1), "m9": (None, 2, 0)}
    by_path = _json(url.removeprefix("sqlite:///"))["studies"]
    assert [study["hosts"][0]["median"] for study in by_path] == [
        study["hosts"][0]["median"] for study in found["studies"]
    ]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_journal_on_redis_is_reported_on() -> None:
    with Server("valkey") as server:
        _fill(JournalStorage(JournalRedisBackend(server.url)), "old", "new")
        done = _run_apart("report", f"journal+{server.url}", "--json")
    assert done.stderr == ""  # no warning that the journal is experimental
    found = json.loads(done.stdout)
    assert [study["name"] for study in found["studies"]] == ["new", "old"]
    assert found["database"] == f"journal+redis://127.0.0.1:{server.port}/0"


@pytest.mark.skipif(not find_binary("valkey"), reason="no valkey server here")
def test_an_embedded_storage_is_reported_on(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    with RedisLockedStorage(f"embedded:{folder}") as storage:
        _fill(storage, "s")
        assert [study["name"] for study in _json(f"embedded:{folder}")["studies"]] == ["s"]
    shutil.rmtree(folder, ignore_errors=True)


# -- which studies, which format -------------------------------------------------------------------


@on_both
def test_a_pattern_chooses_studies_which_keep_their_numbers(any_url: str) -> None:
    with RedisLockedStorage(any_url) as storage:
        _fill(storage, "P2c_BTC", "P4_BTC", "P2c_ETH")
    studies = _json(any_url, "--study", "P2c_*")["studies"]
    assert [(study["number"], study["name"]) for study in studies] == [(2, "P2c_ETH"), (0, "P2c_BTC")]


def test_without_a_terminal_the_plain_layout_is_printed(valkey_url: str) -> None:
    with RedisLockedStorage(valkey_url) as storage:
        _fill(storage, "P2c_BTC")
    lines = _run("report", valkey_url, "--lang", "zh").stdout.splitlines()
    assert lines[0].startswith("数据库(127.0.0.1:")
    assert lines[1:3] == ["0 P2c_BTC", "COMPLETE: 3"]
    assert lines[-1].startswith("耗时")


def test_empty_studies_and_those_that_only_run_are_shown_in_every_format(valkey_url: str) -> None:
    with RedisLockedStorage(valkey_url) as storage:
        optuna.create_study(storage=storage, study_name="empty")
        optuna.create_study(storage=storage, study_name="begun").ask()
        optuna.create_study(storage=storage, study_name="queued").enqueue_trial({"x": 1})
    for form in ("table", "plain", "json", "csv", "html"):
        done = _run("report", valkey_url, "--format", form)
        assert (done.returncode, done.stderr) == (0, ""), form
        assert all(name in done.stdout for name in ("empty", "begun", "queued")), form


def test_csv_and_json_of_a_storage_tell_the_same(valkey_url: str) -> None:
    with RedisLockedStorage(valkey_url) as storage:
        _fill(storage, "a", "b")
    rows = list(csv.DictReader(io.StringIO(_run("report", valkey_url, "--format", "csv").stdout)))
    hosts = [(study, host) for study in _json(valkey_url)["studies"] for host in study["hosts"]]
    assert len(rows) == len(hosts) > 0
    for row, (study, host) in zip(rows, hosts, strict=True):
        assert (row["study"], row["host"]) == (study["name"], host["host"])
        for name in ("finished", "running", "failed", "skipped"):
            assert int(row[name]) == host[name]


def test_the_report_goes_to_a_file_that_was_asked_for(valkey_url: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    done = _run("report", valkey_url, "--format", "html", "--output", str(path))
    assert (done.returncode, done.stdout) == (0, "")
    assert path.read_text("utf-8").startswith("<!DOCTYPE html>")
    refused = _run("report", valkey_url, "--output", str(tmp_path / "no" / "folder"))
    assert refused.returncode == 2
    assert refused.stderr.startswith("optuna-dlock: cannot write ")


def test_a_table_without_rich_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], valkey_url: str
) -> None:
    monkeypatch.setattr(cli_report, "find_spec", lambda name: None)
    assert cli.main(["report", valkey_url, "--format", "table"]) == 2
    assert 'pip install "optuna-dlock[report]"' in capsys.readouterr().err


@pytest.mark.parametrize(
    "args", [["report"], ["watch"], ["report", "x", "--lang", "fr"], ["watch", "x", "--interval", "0"]]
)
def test_wrong_arguments_are_a_usage_error(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(args)
    assert raised.value.code == 2
    assert "usage: optuna-dlock" in capsys.readouterr().err


# -- refreshing ------------------------------------------------------------------------------------


@on_both
def test_a_refresh_takes_in_what_changed_and_nothing_else(
    any_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    add = HostStatistics.add

    def noting(self: HostStatistics, trial: FrozenTrial, skipped: bool, worker: Any) -> None:
        taken.append(trial.number)
        add(self, trial, skipped, worker)

    monkeypatch.setattr(HostStatistics, "add", noting)
    with RedisLockedStorage(any_url) as storage:
        study = optuna.create_study(storage=storage, study_name="s")
        asked = [study.ask() for _ in range(3)]
        study.tell(asked[1], 1.0)
        source = ReportSource(any_url)
        assert [report.running for report in source.refresh()] == [2]
        assert taken == [1]
        study.tell(asked[0], state=TrialState.FAIL)
        study.tell(study.ask(), 0.5)
        (report,) = source.refresh()
        assert sorted(taken) == [0, 1, 3]
        assert (report.complete, report.running, report.failed, report.best) == (2, 1, 1, [0.5])
        assert [host.workers for host in report.hosts] == [1]
        optuna.create_study(storage=storage, study_name="later")
        assert [report.name for report in source.refresh()] == ["later", "s"]
        optuna.delete_study(storage=storage, study_name="s")
        assert [(report.number, report.name) for report in source.refresh()] == [(0, "later")]
        source.close()


def test_duplicates_that_were_skipped_are_told_apart(valkey_url: str) -> None:
    if not hasattr(RedisLockedStorage, "get_duplicates"):
        pytest.skip("skip_duplicates comes with another branch")
    dlock = importlib.import_module("optuna_dlock.skipping")

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_int("x", 0, 1)
        dlock.claim_or_skip(trial)
        return float(x)

    with RedisLockedStorage(valkey_url) as storage:
        study = optuna.create_study(storage=storage, study_name="s", sampler=optuna.samplers.RandomSampler(1))
        study.optimize(dlock.skip_duplicates(objective), n_trials=20)
    (found,) = _json(valkey_url)["studies"]
    (host,) = found["hosts"]
    assert (host["finished"], host["skipped"], host["failed"], found["complete"]) == (2, 18, 0, 20)


def test_errors_have_their_class(tmp_path: Path, valkey_url: str) -> None:
    with pytest.raises(InvalidURLError):
        ReportSource(f"sqlite:///{tmp_path / 'x.db'}")
    with pytest.raises(StorageUnavailableError):
        ReportSource(f"journal+redis://127.0.0.1:{free_port()}/0")
    (tmp_path / "x.db").touch()
    with pytest.raises(DLockError, match="no studies of Optuna"):
        ReportSource(f"sqlite:///{tmp_path / 'x.db'}")
    with RedisLockedStorage(valkey_url) as storage:
        _fill(storage, "a")
    source = ReportSource(valkey_url, "b")
    with pytest.raises(StudyNotFoundError):
        source.refresh()
    source.close()
