"""The README: its examples run, and its tables say what the code does."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from optuna_dlock import InvalidURLError, RedisLockedStorage
from optuna_dlock.url import parse_url

_TEXT = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
_EXAMPLES = re.findall(r"```python\n(.*?)```", _TEXT, re.DOTALL)


def _section(title: str) -> str:
    return _TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


# What some of them print; the others only have to end well.
_WORDS = {0: "{'x': ", 2: "trained of 50"}


@pytest.mark.parametrize("example", range(len(_EXAMPLES)))
def test_the_examples_run_as_they_stand(example: int) -> None:
    with tempfile.TemporaryDirectory() as folder:  # `tmp_path` is too long for the name of a unix socket
        done = subprocess.run(
            [sys.executable, "-W", "error::DeprecationWarning:optuna_dlock", "-c", _EXAMPLES[example]],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert _WORDS.get(example, "") in done.stdout
        assert (Path(folder) / "optuna.valkey").is_dir() == ("RedisLockedStorage(" in _EXAMPLES[example])
        assert example != 1 or (Path(folder) / "data.txt").exists()


def test_the_parameters_are_those_of_the_code() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", _section("Parameters"), re.MULTILINE)
    parameters = list(inspect.signature(RedisLockedStorage).parameters.values())
    assert parameters[0].name == "url"
    assert rows == [(p.name, repr(p.default).replace("'", '"')) for p in parameters[1:]]


def test_the_url_options_are_those_of_the_code() -> None:
    text = _section("URLs").partition("These options")[2].partition("Special")[0]
    options = sorted(re.findall(r"`(\w+)`", text))
    with pytest.raises(InvalidURLError) as raised:
        parse_url("rediss://host/?no_such_option=1")
    known = str(raised.value).rpartition(": ")[2].split(", ")
    assert known == sorted([*options, "prefix"])


def test_the_url_schemes_are_those_of_the_code() -> None:
    named = set(re.findall(r"`(\w+):", _section("URLs")))
    hosts = {"redis", "rediss", "valkey", "valkeys", "keydb", "keydbs"}
    assert named == {*hosts, "unix", "embedded"}
    for scheme in hosts:
        assert parse_url(f"{scheme}://user:password@host:1/0").address == "host:1"
    with pytest.raises(InvalidURLError, match="unknown storage URL"):
        parse_url("redis+sentinel://host:26379/mymaster/0")


def test_the_commands_for_a_fresh_machine_name_what_pyproject_has() -> None:
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text("utf-8")
    commands = re.findall(r"```sh\n(.*?)\n```", _TEXT)
    assert [re.findall(r"\.\[(\w+)\]", command) for command in commands] == [["demo"], ["test"]]
    for extra in ("demo", "test"):
        assert f"\n{extra} = [" in project
    assert 'optuna-dlock = "optuna_dlock.cli:main"' in project
