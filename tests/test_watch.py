"""`optuna-dlock watch`: live on a terminal, plain lines elsewhere, a clean end."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import optuna
import pytest

from optuna_dlock import RedisLockedStorage, cli, cli_output
from optuna_dlock.errors import StorageUnavailableError
from optuna_dlock.report_source import ReportSource
from optuna_dlock.watch import watch
from tests.masters import Masters
from tests.servers import Server, free_port

_DEADLINE = 60.0


class _Enough(Exception):
    """Ends a watch that would go on for ever."""


def _after_each_look(*steps: Callable[[], object]) -> Callable[[float], None]:
    """A sleep that takes the next step instead of time, and ends the watch after the last one."""
    left = list(steps)

    def sleep(seconds: float) -> None:
        assert seconds == 7.0
        if not left:
            raise _Enough
        left.pop(0)()

    return sleep


@pytest.fixture(params=["one", "three"])
def url(request: pytest.FixtureRequest, valkey_url: str) -> Iterator[str]:
    """One server, or three plain masters."""
    if request.param == "one":
        yield valkey_url
    else:
        with Masters("valkey", 3) as masters:
            yield masters.url


@pytest.fixture
def study(url: str) -> Iterator[optuna.Study]:
    """A study with one finished trial, of host m8."""
    with RedisLockedStorage(url) as storage:
        study = optuna.create_study(storage=storage, study_name="P2c_BTC")
        _finish(study, "m8")
        yield study


def _finish(study: optuna.Study, host: str) -> None:
    trial = study.ask()
    trial.set_user_attr("HOST", {"host": host})
    study.tell(trial, 1.0)


def _blocks(text: str) -> list[str]:
    """The output without what differs from run to run."""
    text = re.sub(r"\d+\.\d+|\d\d:\d\d:\d\d|took.*", "#", text)
    return text.split("\n\n")


def test_without_a_terminal_what_changed_is_printed_and_nothing_else(
    study: optuna.Study, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    optuna.create_study(storage=study._storage, study_name="quiet")
    source = ReportSource(url)
    steps = _after_each_look(lambda: _finish(study, "m8"), lambda: None, study.ask)
    with pytest.raises(_Enough):
        watch(source, interval=7.0, lang="en", sleep=steps)
    source.close()
    quiet, first, end, second, third = _blocks(capsys.readouterr().out)
    assert "1 quiet\nCOMPLETE: 0" in quiet
    assert "0 P2c_BTC\nCOMPLETE: 1\n" in first
    assert end == "#"
    assert second.startswith("#\n0 P2c_BTC\nCOMPLETE: 2\n")
    assert "(2)" in second
    assert "(2|1)" in third


def test_once_looks_once(study: optuna.Study, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["watch", url, "--once"]) == 0
    assert capsys.readouterr().out.count("COMPLETE: 1") == 1


def test_json_is_one_line_a_look(study: optuna.Study, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    steps = _after_each_look(lambda: _finish(study, "m8"))
    source = ReportSource(url)
    with pytest.raises(_Enough):
        watch(source, interval=7.0, lang="en", as_lines=True, sleep=steps)
    source.close()
    looks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [look["studies"][0]["complete"] for look in looks] == [1, 2]
    assert cli.main(["watch", url, "--once", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["studies"][0]["complete"] == 2


def test_a_server_that_is_not_there_at_the_first_look_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_output, "TIMEOUT", 0.3)
    port = free_port()
    assert cli.main(["watch", f"redis://127.0.0.1:{port}/0"]) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err


def test_a_server_that_goes_away_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    with Server("valkey", appendonly=True) as server:
        storage = RedisLockedStorage(server.url)
        study = optuna.create_study(storage=storage, study_name="P2c_BTC")
        _finish(study, "m8")
        source = ReportSource(server.url, timeout=0.3)

        def back() -> None:
            server.start()
            _finish(study, "m8")

        with pytest.raises(_Enough):
            watch(source, interval=7.0, lang="en", sleep=_after_each_look(server.stop, back))
        storage.close()
        source.close()
    captured = capsys.readouterr()
    assert f"127.0.0.1:{server.port}" in captured.err
    assert captured.err.count("\n") == 1
    assert "COMPLETE: 2" in captured.out


def test_a_server_that_lost_its_data_ends_the_watch() -> None:
    with Server("valkey") as server:
        storage = RedisLockedStorage(server.url)
        _finish(optuna.create_study(storage=storage, study_name="P2c_BTC"), "m8")
        storage.close()
        source = ReportSource(server.url, timeout=0.3)

        def lose() -> None:
            server.stop()
            server.start()

        with pytest.raises(Exception, match="lost its data") as raised:
            watch(source, interval=7.0, lang="en", sleep=_after_each_look(lose))
        assert not isinstance(raised.value, StorageUnavailableError)
        source.close()


def _command(url: str) -> list[str]:
    return [sys.executable, "-m", "optuna_dlock.cli", "watch", url, "--interval", "0.05"]


def test_ctrl_c_ends_it_with_130_and_no_traceback(valkey_url: str) -> None:
    with RedisLockedStorage(valkey_url) as storage:
        study = optuna.create_study(storage=storage, study_name="P2c_BTC")
        process = subprocess.Popen(
            _command(valkey_url), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline().startswith("database(")
        _finish(study, "m8")
        for line in process.stdout:
            if line == "COMPLETE: 1\n":
                break
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=_DEADLINE)
    assert (process.returncode, errors) == (130, "")


def test_on_a_terminal_the_table_is_drawn_again_and_ctrl_c_leaves_the_cursor(valkey_url: str) -> None:
    with RedisLockedStorage(valkey_url) as storage:
        study = optuna.create_study(storage=storage, study_name="P2c_BTC")
        ours, theirs = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "140", "LINES": "40"}
        process = subprocess.Popen(
            _command(valkey_url), stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True
        )
        os.close(theirs)
        seen = _read_until(ours, "COMPLETE: 0")
        _finish(study, "m8")
        seen += _read_until(ours, "COMPLETE: 1")
        process.send_signal(signal.SIGINT)
        seen += _read_until(ours, None)
        assert process.wait(_DEADLINE) == 130
        os.close(ours)
    assert "\x1b[?25l" in seen  # the cursor was hidden,
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # and is there again
    assert "Traceback" not in seen


def _read_until(terminal: int, text: str | None) -> str:
    """What stands on the terminal, up to this text or, for None, to its end."""
    seen = ""
    deadline = time.monotonic() + _DEADLINE
    while time.monotonic() < deadline:
        if not select.select([terminal], [], [], 0.1)[0]:
            continue
        try:
            chunk = os.read(terminal, 65536)
        except OSError:  # Linux: nobody has the other end open any more
            chunk = b""
        seen += chunk.decode("utf-8", "replace")
        if not chunk or (text is not None and text in seen):
            break
    assert text is None or text in seen
    return seen
