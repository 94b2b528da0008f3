"""The doctor sees each trouble on a real server that has it, says what to change, and shows no password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from optuna_dlock import InvalidURLError, RedisLockedStorage, cli, doctor, doctor_ask
from optuna_dlock.doctor import Finding, Link, Master, Persistence, Replication, Report
from optuna_dlock.doctor_ask import examine
from optuna_dlock.doctor_view import report_json, report_text
from optuna_dlock.url import split_url
from tests.masters import Masters
from tests.servers import FLAVOURS, Server, find_binary, free_port

_TIMEOUT = 2.0
_MESH = ("--active-replica", "yes", "--multi-master", "yes")


def _examine(*urls: str) -> Report:
    return examine(urls, _TIMEOUT)


def _found(report: Report, level: str) -> list[Finding]:
    return [finding for finding in report.findings if finding.level == level]


def _one(report: Report, level: str, words: str) -> Finding:
    """The only finding of a level that has these words."""
    (finding,) = (finding for finding in _found(report, level) if words in finding.text)
    return finding


def _address(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def _until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "optuna_dlock.cli", "doctor", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture(scope="module", params=FLAVOURS)
def kept(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server of each flavour with nothing to complain about."""
    with Server(request.param, appendonly=True) as server:
        yield server


@pytest.fixture
def mesh() -> Iterator[tuple[Server, Server]]:
    """Two KeyDB masters that copy from each other, link up."""
    if find_binary("keydb") is None:
        pytest.skip("no keydb server here")
    with Server("keydb", extra=_MESH) as one, Server("keydb", extra=_MESH) as two:
        two.command("REPLICAOF", "127.0.0.1", one.port)
        one.command("REPLICAOF", "127.0.0.1", two.port)
        _until(lambda: _linked(one, two))
        yield one, two


def _linked(*servers: Server) -> bool:
    return all(
        b"\r\nmaster_link_status:up" in info and b",state=online" in info
        for info in (_raw_info(server) for server in servers)
    )


def _raw_info(server: Server) -> bytes:
    done = server.command("EVAL", "return redis.call('INFO', 'replication')", 0)
    assert isinstance(done, bytes)
    return done


# -- what is told of a server ------------------------------------------------------------------------


def test_a_server_in_order_passes_and_everything_is_known_of_it(kept: Server) -> None:
    report = _examine(kept.url)
    assert report.ok
    assert report.verdict == "ok: 1 master, 0 warnings"
    assert {finding.level for finding in report.findings} == {"ok"}
    (master,) = report.masters
    assert (master.address, master.error, master.flavour) == (_address(kept), None, kept.flavour)
    assert master.version is not None
    assert master.version[0].isdigit()
    assert master.run_id is not None
    assert len(master.run_id) == 40
    assert master.round_trip_ms is not None
    assert 0 < master.round_trip_ms < 1000
    assert master.clock_offset_ms is not None
    assert abs(master.clock_offset_ms) < 1000
    assert master.persistence == Persistence(True, "everysec", "")
    assert master.maxmemory_policy == "noeviction"
    active = False if kept.flavour == "keydb" else None
    assert master.replication == Replication("master", active, None, (), ())


def test_two_keydb_masters_show_both_links_up(mesh: tuple[Server, Server]) -> None:
    one, two = mesh
    report = _examine(f"keydb://127.0.0.1:{one.port},127.0.0.1:{two.port}/0")
    assert report.ok
    assert [master.flavour for master in report.masters] == ["keydb", "keydb"]
    for master, other in zip(report.masters, (two, one), strict=True):
        link = Link(_address(other), up=True)
        assert master.replication == Replication("active-replica", True, None, (link,), (link,))
    assert not [finding for finding in report.findings if "link" in finding.text]
    assert _one(report, "warn", "2 masters: works, but stops when either is down").address is None
    assert f"from {_address(two)} up, to {_address(two)} up" in report_text(report)


def test_three_keydb_masters_show_every_link_and_that_they_are_multi_master(
    mesh: tuple[Server, Server],
) -> None:
    with Server("keydb", extra=_MESH) as three:
        for server in mesh:
            three.command("REPLICAOF", "127.0.0.1", server.port)
            server.command("REPLICAOF", "127.0.0.1", three.port)
        _until(lambda: _raw_info(three).count(b"link_status:up") == 3)  # the whole, and both
        report = _examine(three.url, *(server.url for server in mesh))
    replication = report.masters[0].replication
    assert replication is not None
    assert replication.multi_master
    assert {link.address for link in replication.masters if link.up} == {_address(s) for s in mesh}
    assert _one(report, "ok", "3 masters: works while no more than 1 of them is down")


def test_save_points_are_told_and_are_no_substitute_for_an_append_only_file() -> None:
    with Server("valkey", extra=("--save", "3600 1 300 100")) as server:
        report = _examine(server.url)
    assert report.masters[0].persistence == Persistence(False, "everysec", "3600 1 300 100")
    assert "appendonly yes" in _one(report, "warn", "after the last save point").change
    assert report.ok


def test_a_server_without_config_is_looked_at_by_info() -> None:
    with Server("valkey", extra=("--rename-command", "CONFIG", "")) as server:
        report = _examine(server.url)
    (master,) = report.masters
    assert master.persistence == Persistence(False, None, None)
    assert master.maxmemory_policy == "noeviction"
    assert _one(report, "warn", "no append-only file, save points unknown")
    assert report.ok


def test_a_user_who_may_do_next_to_nothing_makes_it_unknown_and_no_crash() -> None:
    with Server("valkey") as server:
        server.command("ACL", "SETUSER", "guest", "on", ">s3cret", "+ping")
        report = _examine(f"redis://guest:s3cret@127.0.0.1:{server.port}")
    (master,) = report.masters
    assert master == replace(
        Master(_address(server), persistence=Persistence(None, None, None)),
        round_trip_ms=master.round_trip_ms,
    )
    assert _one(report, "warn", "maxmemory-policy is unknown").change == "make sure it is noeviction"
    assert _one(report, "warn", "persistence is unknown")
    assert report.ok
    text = report_text(report)
    assert text.count("unknown") >= 6
    assert "s3cret" not in text


def test_an_embedded_server_is_looked_at_too(tmp_path: Path) -> None:
    folder = tmp_path / "e"
    with pytest.raises(InvalidURLError, match="there is no embedded storage"):
        _examine(f"embedded:{folder}")
    assert not folder.exists()
    folder.mkdir()
    report = _examine(f"embedded:{folder}")
    assert report.ok
    assert not _found(report, "warn")
    assert report.masters[0].flavour == "valkey"


# -- findings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_that_evicts_fails(flavour: str) -> None:
    with Server(flavour, appendonly=True, extra=("--maxmemory-policy", "allkeys-lru")) as server:
        report = _examine(server.url)
        assert not report.ok
        assert "maxmemory-policy noeviction" in _one(report, "fail", "allkeys-lru").change
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")  # what it says to do
        assert _examine(server.url).ok


def test_no_persistence_is_a_warning_that_goes_when_its_advice_is_taken() -> None:
    with Server("valkey") as server:
        report = _examine(server.url)
        assert report.ok
        assert report.verdict == "ok: 1 master, 1 warning"
        assert "CONFIG SET appendonly yes" in _one(report, "warn", "no persistence").change
        server.command("CONFIG", "SET", "appendonly", "yes")
        server.command("CONFIG", "SET", "appendfsync", "no")
        assert "appendfsync everysec" in _one(_examine(server.url), "warn", "appendfsync no").change
        server.command("CONFIG", "SET", "appendfsync", "always")
        assert not _found(_examine(server.url), "warn")


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_plain_replica_fails_and_names_its_master(flavour: str) -> None:
    with Server(flavour) as master, Server(flavour) as replica:
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        report = _examine(replica.url)
    assert not report.ok
    change = _one(report, "fail", f"a replica of {_address(master)}").change
    assert f"name {_address(master)} instead" in change
    assert ("active-replica yes" in change) == (flavour == "keydb")


def test_a_keydb_link_that_is_down_is_a_warning(mesh: tuple[Server, Server]) -> None:
    one, two = mesh
    two.kill()
    _until(lambda: not _linked(one))
    report = _examine(one.url)
    assert report.ok
    assert "masterauth" in _one(report, "warn", f"its replication link to {_address(two)} is down").change


def test_a_killed_server_fails_and_the_others_are_told_of() -> None:
    with Server("valkey") as one, Server("valkey") as two:
        two.kill()
        report = _examine(f"redis://127.0.0.1:{two.port},127.0.0.1:{one.port}/0")
    assert not report.ok
    assert report.verdict == "fail: 1 problem, 2 warnings"
    assert "refused" in _one(report, "fail", "not usable").text
    assert [master.flavour for master in report.masters] == [None, "valkey"]
    assert "error" in report_text(report)


def test_a_server_that_does_not_answer_is_given_up_after_the_timeout() -> None:
    with Server("valkey") as server:
        server.pause()
        start = time.monotonic()
        report = examine([server.url], 0.2)
        assert time.monotonic() - start < 5.0
    assert "Timeout" in _one(report, "fail", "not usable").text


@pytest.mark.parametrize("url", ["redis://:s3cret@127.0.0.1:{0}", "redis://127.0.0.1:{0}?password=s3cret"])
def test_a_wrong_password_fails_and_is_not_shown(url: str) -> None:
    with Server("valkey", password="right") as server:  # noqa: S106  # a server of our own
        done = _run(url.format(server.port))
        as_json = _run(url.format(server.port), "--json")
        none = _examine(f"redis://127.0.0.1:{server.port}")
        assert _examine(server.url).ok
    assert done.returncode == as_json.returncode == 1
    assert "AuthenticationError" in done.stdout
    assert "s3cret" not in done.stdout + done.stderr + as_json.stdout + as_json.stderr
    assert _one(none, "fail", "AuthenticationError")


@pytest.mark.parametrize("password", ["s3cret", "s3cret" * 50, "unknown"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_that_quotes_the_password_in_its_reply_is_not_quoted(flavour: str, password: str) -> None:
    with Server(flavour, extra=("--rename-command", "AUTH", "")) as server:
        report = _examine(f"redis://:{password}@127.0.0.1:{server.port}")
    assert "ResponseError" in _one(report, "fail", "not usable").text
    shown = report_text(report) + report_json(report)
    assert "s3cret" not in shown
    assert "unknown" not in shown or password != "unknown"  # noqa: S105  # of a server of our own


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_one_server_named_twice_fails_and_counts_once(flavour: str) -> None:
    with Server(flavour) as server:
        report = _examine(server.url, f"redis://localhost:{server.port}/1")
    finding = _one(report, "fail", f"{_address(server)} and localhost:{server.port} are one server")
    assert finding.address is None
    assert str(report.masters[0].run_id)[:8] in finding.text
    assert _one(report, "ok", "1 master:")
    assert not report.ok


@pytest.mark.parametrize(("shift", "words"), [(-5.0, "5.0 s ahead of"), (5.0, "5.0 s behind"), (0.5, "")])
def test_a_clock_that_differs_by_more_than_a_second_is_a_warning(
    shift: float, words: str, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_ask, "_now", lambda: time.time() + shift)
    report = _examine(valkey.url)
    assert report.masters[0].clock_offset_ms == pytest.approx(-1000 * shift, abs=300)
    assert report.ok
    if words:
        assert "NTP" in _one(report, "warn", words).change
    else:
        assert not [finding for finding in report.findings if "clock" in finding.text]


def test_something_else_that_listens_there_fails() -> None:
    with Server("valkey") as server:
        report = _examine(f"rediss://127.0.0.1:{server.port}")  # it does not speak TLS
    assert _one(report, "fail", "not usable")


@pytest.mark.parametrize(
    ("count", "level", "words"),
    [
        (1, "ok", "1 master: workers wait"),
        (2, "warn", "stops when either is down"),
        (3, "ok", "no more than 1 of them is down"),
        (4, "warn", "no more than 1 of them is down, as 3 would"),
        (5, "ok", "no more than 2 of them are down"),
    ],
)
def test_the_number_of_masters_is_judged_by_how_many_may_be_down(count: int, level: str, words: str) -> None:
    masters = [Master(f"h{number}:6379", error="away") for number in range(count)]
    (finding,) = (finding for finding in doctor.judge(masters) if finding.address is None)
    assert finding.level == level
    assert words in finding.text


# -- URLs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "split"),
    [
        ("redis://h1:1/0", ["redis://h1:1/0"]),
        ("keydb://h1:1,h2:2/3?prefix=a,b", ["keydb://h1:1/3?prefix=a,b", "keydb://h2:2/3?prefix=a,b"]),
        ("rediss://me:p,w@[::1]:1,h2", ["rediss://me:p,w@[::1]:1", "rediss://me:p,w@h2"]),
        ("redis://me:p,w@h1", ["redis://me:p,w@h1"]),
        ("redis://h1,h2?db=1", ["redis://h1?db=1", "redis://h2?db=1"]),
        ("unix:///a,b.sock", ["unix:///a,b.sock"]),
        ("embedded:a,b", ["embedded:a,b"]),
        ("embedded://a,b", ["embedded://a,b"]),
    ],
)
def test_a_url_of_several_hosts_stands_for_one_url_of_each(url: str, split: list[str]) -> None:
    assert split_url(url) == split


# -- several masters of one storage ----------------------------------------------------------------


def _fill(url: str, trials: int) -> None:
    with RedisLockedStorage(url) as storage:
        study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
        for _ in range(trials):
            study.ask()


def test_masters_that_have_all_say_so_and_nothing_fails() -> None:
    with Masters("valkey", 3) as masters:
        _fill(masters.url, 5)
        report = _examine(masters.url)
        assert report.ok
        for master in report.masters:
            assert master.membership is not None
            assert set(master.membership.members) == {_address(server) for server in masters.servers}
            assert (master.membership.objects, master.membership.missing) == (2, 0)
            assert master.membership.behind == 0
        assert "2 of 2 objects, 0 sections behind" in report_text(report)


def test_a_master_that_was_away_is_told_to_be_behind_and_an_empty_one_to_have_nothing() -> None:
    with Masters("valkey", 3) as masters:
        _fill(masters.url, 1)
        with RedisLockedStorage(masters.url) as storage:
            (away,) = (m for m in storage._node.masters if m.address == _address(masters.servers[0]))  # type: ignore[attr-defined]
            away.close()
            away._next_attempt = float("inf")
            study = optuna.load_study(storage=storage, study_name="s")
            for _ in range(7):
                study.ask()
        report = _examine(masters.url)
        finding = _one(report, "warn", "sections behind the others")
        assert finding.address == _address(masters.servers[0])
        assert int(finding.text.split()[0]) >= 7
        masters.restart_empty(0)
        nothing = _one(_examine(masters.url), "warn", "no data of 2 of 2 objects")
        assert nothing.address == _address(masters.servers[0])


def test_another_list_than_the_masters_keep_fails_and_the_right_one_is_told() -> None:
    with Masters("valkey", 3) as masters:
        _fill(masters.url, 1)
        report = _examine(masters.urls[0], masters.urls[2])
        assert not report.ok
        for finding in _found(report, "fail"):
            assert all(_address(server) in finding.text for server in masters.servers)


@pytest.mark.parametrize(
    "url",
    [
        "redis://me:s3cret@h1,me:s3cret@h2/0",
        "redis://me:s3cr@s3cret,s3cret@h/0",
        "redis://me:s3cret,s3cret/s3cret@h/0",
        "redis://me:s3cret@h1,,h2/0",
        "redis://me:s3cret@h1:1,h2:x/0",
        "mysql://me:s3cret@h1,h2/db",
        "redis://h1,h2?password=s3cret&bad=s3cret",
        "me:s3cret@h1,h2",
    ],
)
def test_a_bad_url_is_refused_before_any_server_is_asked_and_shows_no_password(
    url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", f"redis://127.0.0.1:{free_port()}", url]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("optuna-dlock: ")
    assert printed.err.count("\n") == 1
    assert "s3cret" not in printed.err


# -- the command -------------------------------------------------------------------------------------


def test_help_shows_examples_and_exit_codes() -> None:
    done = _run("--help")
    assert done.returncode == 0
    assert "optuna-dlock doctor " in done.stdout.partition("examples:")[2]
    assert "Exit codes" in done.stdout


def test_no_url_is_a_usage_error() -> None:
    done = _run()
    assert done.returncode == 2
    assert "usage: optuna-dlock doctor" in done.stderr


def test_the_exit_code_is_0_when_nothing_failed_and_1_otherwise() -> None:
    with Server("valkey") as server:
        warned = _run(server.url)
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-random")
        failed = _run(server.url)
    assert (warned.returncode, failed.returncode) == (0, 1)
    assert warned.stdout.splitlines()[-1] == "verdict: ok: 1 master, 1 warning"
    assert failed.stdout.splitlines()[-1] == "verdict: fail: 1 problem, 1 warning"
    assert warned.stderr == failed.stderr == ""


def test_the_text_is_aligned_and_no_wider_than_100_columns(mesh: tuple[Server, Server]) -> None:
    text = report_text(_examine(*(server.url for server in mesh), f"redis://127.0.0.1:{free_port()}"))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines[1:9]] == [
        "server",
        "run",
        "round",
        "clock",
        "persistence",
        "eviction",
        "replication",
        "links",
    ]
    assert {line[15] != " " and line[14] == " " for line in lines[1:9]} == {True}
    levels = [line[2:8] for line in lines[lines.index("findings") + 1 : -2]]
    assert set(levels) == {"ok    ", "warn  ", "fail  ", "      "}
    assert lines[-2] == ""
    assert lines[-1].startswith("verdict: fail: 1 problem, ")


def test_json_is_one_object_with_masters_findings_and_the_verdict(valkey: Server) -> None:
    done = _run(valkey.url, f"redis://127.0.0.1:{free_port()}", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert list(report) == ["ok", "verdict", "masters", "findings"]
    assert report["ok"] is False
    alive, dead = report["masters"]
    assert list(alive) == list(dead)
    assert (alive["error"], dead["flavour"], dead["persistence"]) == (None, None, None)
    assert alive["persistence"] == {"appendonly": False, "appendfsync": "everysec", "save": ""}
    assert alive["replication"] == {
        "role": "master",
        "active_replica": None,
        "multi_master": None,
        "masters": [],
        "replicas": [],
    }
    assert [list(finding) for finding in report["findings"]] == [["level", "address", "text", "change"]] * 3
    assert [finding["level"] for finding in report["findings"]] == ["warn", "fail", "warn"]


def test_it_changes_nothing_on_the_server() -> None:
    with Server("valkey", appendonly=True) as server:
        _examine(server.url)
        assert server.command("DBSIZE") == 0
        assert b"incr.aof" in b"".join(
            os.fsencode(p.name) for p in (server.folder / "appendonlydir").iterdir()
        )
        assert all(not p.stat().st_size for p in (server.folder / "appendonlydir").glob("*.incr.aof"))
