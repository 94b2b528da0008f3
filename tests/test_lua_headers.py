"""Each Lua file's header says what the script does: keys, arguments, result codes; and Python calls it so."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Any

import hiredis
import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

import optuna_dlock.node
from optuna_dlock import RedisLockedStorage, scripts
from optuna_dlock.channel import Channel, Connection, open_channel
from optuna_dlock.node import Node
from tests.servers import Server

FOLDER = files("optuna_dlock").joinpath("lua")
SOURCES = {entry.name: entry.read_text("utf-8") for entry in FOLDER.iterdir() if entry.name.endswith(".lua")}
MASTERS_SOURCES = {
    entry.name: entry.read_text("utf-8")
    for entry in FOLDER.joinpath("masters").iterdir()
    if entry.name.endswith(".lua")
}
INCLUDES = sorted(name for name in SOURCES if name.startswith("_"))
SCRIPTS = sorted(script.name for script in scripts.all_scripts())
CODES = {name: value for name, value in vars(scripts).items() if name.isupper() and isinstance(value, int)}
# All arguments are keys, or none is; else the first one is the only key.
ALL_KEYS = {"EXISTS", "DEL"}
NO_KEYS = {"TIME"}
# What keys are called in headers, and how their names end.
KEY_NAMES = {
    "names": ":names",
    "studies": ":studies",
    "trash": ":trash",
    "registry info": ":info",
    "meta": ":meta",
    "study meta": ":meta",
    "section lock": ":lock(:none)?",
    "study ballots": ":ballots",
    "ops": ":ops",
    "live": ":live",
    "log": ":log",
    "waiting": ":waiting",
    "finished": ":finished",
    "order": ":order",
    "dists": ":dists",
    "distribution ids": ":distids",
    "claims": ":claims",
    "offers": ":offers",
    "heartbeats": ":heartbeats",
    "ran by": ":ranby",
    "workers": ":workers",
    "trial": r":t:\d+",
    "attributes": ":(user|system)",
    "lock": ":lock",
    "fence": ":lock:fence",
    "queue": ":lock:queue",
    "wake list of this ticket": r":lock:wake:\S+\.\d+",
    "mark that this ticket waits": r":lock:wake:\S+\.\d+:waits",
    "what this connection released last": r":lock:wake:[^.]+",
    "key of the Redlock": "^redlock:.*:lock",
    "note": ":lock:wake:pottery",
}


class Header:
    """The comment a Lua file begins with."""

    def __init__(self, source: str) -> None:
        lines = list(
            itertools.takewhile(lambda line: re.match(r"-- (?!include )", line), source.splitlines())
        )
        self.first = lines[0] if lines else ""
        self.text = "\n".join(line.removeprefix("--").strip() for line in lines)
        self.returns = self._part("Returns", "Retry-safe")

    def _part(self, start: str, end: str) -> str:
        found = re.search(rf"^{start}\b(.*?)(?=^{end}\b|\Z)", self.text, re.MULTILINE | re.DOTALL)
        return found[1] if found else ""

    def indexes(self, name: str) -> tuple[list[int], bool]:
        """The declared indexes of KEYS or ARGV, and whether any number of others may follow."""
        found = re.findall(rf"\b{name}\[(\d+)(\.\.)?\]", self.text)
        return [int(index) for index, dots in found if not dots], any(dots for _, dots in found)

    def keys(self) -> list[str]:
        """What KEYS[1], KEYS[2], ... are called."""
        return re.findall(r"KEYS\[\d+\] (.*?)(?=\s*(?:\(|:|$|KEYS|\n))", self.text)

    def codes(self) -> dict[str, int]:
        """The declared result codes below zero, by name."""
        return {
            name: int(code)
            for code, name in re.findall(r"\{?(?<!\w)(-\d+)(?:, [^}]*)?\}? ([A-Z][A-Z_]+)\b", self.returns)
        }


def strip_comments(source: str) -> str:
    """The Lua code alone: no string of ours holds two hyphens."""
    return re.sub(r"--.*", "", source)


def body(name: str) -> str:
    """The code of a script with that of its includes."""
    return strip_comments(scripts.script(name).source)


def arguments(text: str) -> list[str]:
    """The arguments of a call, of which the text begins after the opening bracket."""
    depth, quoted, current = 0, False, ""
    found: list[str] = []
    for letter in text:
        if letter == "'":
            quoted = not quoted
        if not quoted and letter in "([{":
            depth += 1
        if not quoted and letter in ")]}":
            if depth == 0:
                return [*found, current.strip()]
            depth -= 1
        if letter == "," and depth == 0 and not quoted:
            found.append(current.strip())
            current = ""
        else:
            current += letter
    raise AssertionError(f"no end of the call: {text[:80]}")


def calls(code: str, function: str) -> list[list[str]]:
    """The arguments of all calls of a function."""
    pattern = rf"(?<!function )\b{re.escape(function)}\("
    return [arguments(code[found.end() :]) for found in re.finditer(pattern, code)]


def key_arguments(command: list[str]) -> list[str]:
    """Those arguments of redis.call that are keys."""
    name = command[0].strip("'")
    if name in NO_KEYS:
        return []
    return command[1:] if name in ALL_KEYS else command[1:2]


def function_of(include: str) -> tuple[str, list[str]]:
    """The function that an include defines, and its parameters."""
    found = re.findall(r"local function (\w+)\(([^)]*)\)", strip_comments(SOURCES[include]))
    assert len(found) == 1
    return found[0][0], [part.strip() for part in found[0][1].split(",")]


def undeclared_keys(source: str, parameters: list[str]) -> list[str]:
    """Keys in a file's commands that are neither KEYS[..] nor one of these parameters."""
    keys = [key for command in calls(strip_comments(source), "redis.call") for key in key_arguments(command)]
    return [key for key in keys if not re.fullmatch(r"KEYS\[\w+\]", key) and key not in parameters]


# -- the files for several masters -----------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MASTERS_SOURCES))
def test_the_header_of_a_script_for_several_masters_tells_its_name_codes_and_retries(name: str) -> None:
    source, title = MASTERS_SOURCES[name], name.removesuffix(".lua").removeprefix("_")
    header = Header(source)
    assert header.first.startswith(f"-- {title}: ")
    returned = {int(code) for code in re.findall(r"\breturn \{?(-\d+)\b", strip_comments(source))}
    assert header.codes() == {code: CODES[code] for code in header.codes()}
    assert set(header.codes().values()) == returned
    assert name.startswith("_") or "Retry-safe" in header.text


@pytest.mark.parametrize("kind", ["KEYS", "ARGV"])
@pytest.mark.parametrize("name", sorted(name for name in MASTERS_SOURCES if not name.startswith("_")))
def test_a_script_for_several_masters_uses_what_it_declares(name: str, kind: str) -> None:
    declared, _ = Header(MASTERS_SOURCES[name]).indexes(kind)
    used = {int(index) for index in re.findall(rf"\b{kind}\[(\d+)\]", strip_comments(MASTERS_SOURCES[name]))}
    assert used <= set(declared)


@pytest.mark.parametrize("script", scripts.all_masters_scripts(), ids=lambda script: script.name)
def test_every_script_for_several_masters_compiles(script: scripts.Script, valkey: Server) -> None:
    assert valkey.command("SCRIPT", "LOAD", script.source).decode() == script.sha


# -- the files by themselves ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_first_line_names_the_file(name: str) -> None:
    title = name.removesuffix(".lua").removeprefix("_")
    assert Header(SOURCES[name]).first.startswith(f"-- {title}: ")


@pytest.mark.parametrize("kind", ["KEYS", "ARGV"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_declared_indexes_are_those_used(name: str, kind: str) -> None:
    declared, open_end = Header(SOURCES[f"{name}.lua"]).indexes(kind)
    code = body(name)
    used = {int(index) for index in re.findall(rf"\b{kind}\[(\d+)\]", code)}
    assert declared == list(range(1, len(declared) + 1))
    assert set(declared) == used
    in_loops = re.findall(rf"\b{kind}\[([a-z]\w*)\]", code)
    assert bool(in_loops) == open_end
    for variable in in_loops:
        assert re.search(rf"for {variable} = \d+, #{kind} do", code)


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_declared_result_codes_are_those_returned(name: str) -> None:
    returned = {int(code) for code in re.findall(r"\breturn \{?(-\d+)\b", body(name))}
    declared = Header(SOURCES[f"{name}.lua"]).codes()
    assert set(declared.values()) == returned
    assert declared == {code: CODES[code] for code in declared}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_below_zero_in_returns_has_a_name(name: str) -> None:
    header = Header(SOURCES[f"{name}.lua"])
    numbers = {int(code) for code in re.findall(r"(?<!\w)-\d+", header.returns)}
    assert numbers == set(header.codes().values())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_result_that_is_no_refusal_is_declared(name: str) -> None:
    returned = set(re.findall(r"\breturn \{(\d+)\b", body(name)))
    header = Header(SOURCES[f"{name}.lua"])
    assert header.returns
    assert set(re.findall(r"\{(\d+)[,}]", header.returns)) == returned


def test_every_code_has_a_number_of_its_own_and_a_script_that_returns_it() -> None:
    headers = [*(SOURCES[f"{name}.lua"] for name in SCRIPTS), *MASTERS_SOURCES.values()]
    returned = set().union(*(Header(source).codes() for source in headers))
    assert returned == set(CODES) - {"OK"}
    assert len(set(CODES.values())) == len(CODES)
    assert CODES["OK"] == 0


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_header_says_why_a_retry_is_safe(name: str) -> None:
    assert re.search(r"^Retry-safe( \(G\d\))?: \S.{9}", Header(SOURCES[f"{name}.lua"]).text, re.MULTILINE)


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_include_is_there_and_called(name: str) -> None:
    for include in re.findall(r"^-- include (\w+)$", SOURCES[f"{name}.lua"], re.MULTILINE):
        function, _ = function_of(f"_{include}.lua")
        assert function == include
        assert calls(strip_comments(SOURCES[f"{name}.lua"]), function)


# -- keys and commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_every_key_is_declared_or_the_file_explains_why_not(name: str) -> None:
    parameters = function_of(name)[1] if name in INCLUDES else []
    undeclared = undeclared_keys(SOURCES[name], parameters)
    if undeclared:
        assert all(key.startswith("wake .. ") for key in undeclared), undeclared
        assert "cannot be declared in KEYS" in SOURCES[name].replace("\n-- ", " ")


@pytest.mark.parametrize("include", INCLUDES)
def test_an_include_gets_declared_keys_only(include: str) -> None:
    function, parameters = function_of(include)
    code = strip_comments(SOURCES[include])
    used = {key for command in calls(code, "redis.call") for key in key_arguments(command)}
    positions = [at for at, parameter in enumerate(parameters) if parameter in used]
    assert positions
    passed = [call for name in SCRIPTS for call in calls(strip_comments(SOURCES[f"{name}.lua"]), function)]
    assert passed
    for call in passed:
        assert len(call) == len(parameters)
        assert all(re.fullmatch(r"KEYS\[\d+\]", call[at]) for at in positions), call


def test_only_commands_and_options_of_redis_6_2_are_used(valkey_url: str) -> None:
    used = {
        name: {word.upper() for call in group for word in call[1:] if re.fullmatch(r"'[A-Za-z]+'", word)}
        for name, group in _commands_used().items()
    }
    assert used
    with RedisLockedStorage(valkey_url) as storage:
        replies = storage._node.commands([("COMMAND", "DOCS", name) for name in used])
    for (name, words), reply in zip(used.items(), replies, strict=True):
        assert reply, f"no server knows {name}"
        docs = _pairs(reply[1])
        assert _version(docs["since"]) <= (6, 2, 99), name
        newer = {f"'{token}'" for token in _newer_options(docs.get("arguments", []))}
        assert not words & newer, name


def test_the_keys_of_every_command_are_those_that_the_server_takes_for_keys(valkey_url: str) -> None:
    used = _commands_used()
    with RedisLockedStorage(valkey_url) as storage:
        replies = storage._node.commands([("COMMAND", "INFO", name) for name in used])
    for (name, group), reply in zip(used.items(), replies, strict=True):
        first, last, step = reply[0][3:6]
        for command in group:
            words = [
                word for part in command for word in ([part] if part != "unpack(numbers)" else [part] * 2)
            ]
            end = last if last >= 0 else len(words) + last
            declared = [words[at] for at in range(first, end + 1, step)] if first else []
            assert declared == key_arguments(command), name


def _commands_used() -> dict[str, list[list[str]]]:
    used: dict[str, list[list[str]]] = {}
    for source in SOURCES.values():
        code = strip_comments(source)
        assert "redis.pcall" not in code
        for call in calls(code, "redis.call"):
            assert re.fullmatch(r"'[A-Z]+'", call[0]), "the name of a command is written out"
            used.setdefault(call[0].strip("'"), []).append(call)
    return used


def _pairs(reply: Any) -> dict[str, Any]:
    return {key.decode(): value for key, value in zip(reply[::2], reply[1::2], strict=True)}


def _version(since: bytes) -> tuple[int, ...]:
    return tuple(int(part) for part in since.split(b"."))


def _newer_options(documented: Any, newer: bool = False) -> Iterator[str]:
    """The options that came after 6.2; what belongs to such an option is as new."""
    for argument in documented:
        fields = _pairs(argument)
        new = newer or ("since" in fields and _version(fields["since"]) > (6, 2, 99))
        if new and "token" in fields:
            yield fields["token"].decode().upper()
        yield from _newer_options(fields.get("arguments", []), new)


# -- what Python sends ---------------------------------------------------------------------------------


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """Every EVALSHA that goes over a connection opened from now on, as it stands on the wire."""
    commands: list[list[bytes]] = []

    def watched(connection: Connection) -> Channel:
        channel, reader = open_channel(connection), hiredis.Reader()
        send = channel.send

        def record(packed: bytes) -> None:
            reader.feed(packed)
            while (words := reader.gets()) is not False:
                if words[0] == b"EVALSHA":
                    commands.append(words)
            send(packed)

        channel.send = record
        return channel

    monkeypatch.setattr(optuna_dlock.node, "open_channel", watched)
    return commands


def test_every_call_passes_the_keys_and_arguments_that_the_header_declares(
    valkey_url: str, sent: list[list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_sha = {script.sha.encode(): script.name for script in scripts.all_scripts()}
    with RedisLockedStorage(valkey_url, heartbeat_interval=60) as storage:
        _use_studies_and_trials(storage)
        _use_locks(storage, lambda: [by_sha[words[1]] for words in sent], monkeypatch)
    with RedisLockedStorage(valkey_url, lock="pottery") as storage, storage.lock("mine"):
        pass
    touched = set()
    for _, sha, key_count, *words in sent:
        name = by_sha[sha]
        touched.add(name)
        header = Header(SOURCES[f"{name}.lua"])
        keys, open_end = header.indexes("KEYS")
        args, more_args = header.indexes("ARGV")
        n_keys = int(key_count)
        assert n_keys == len(keys) or (open_end and n_keys > len(keys)), name
        n_args = len(words) - n_keys
        assert n_args == len(args) or (more_args and n_args > len(args)), name
        for called, key in zip(header.keys()[: len(keys)], words, strict=False):
            assert re.search(KEY_NAMES[called] + "$", key.decode()), f"{name}: {called}"
    assert touched == set(SCRIPTS)


def _use_studies_and_trials(storage: RedisLockedStorage) -> None:
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], "mnist")
    gone = storage.create_new_study([StudyDirection.MINIMIZE])
    storage.set_study_user_attr(study_id, "key", 1)
    storage.set_study_system_attr(study_id, "key", 1)
    storage.get_all_studies()
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1))
    storage.set_trial_intermediate_value(trial_id, 1, 0.5)
    storage.set_trial_user_attr(trial_id, "key", 1)
    storage.set_trial_system_attr(trial_id, "key", 1)
    storage.record_heartbeat(trial_id)
    storage._get_stale_trial_ids(study_id)
    storage.get_trial(trial_id)
    storage.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    waiting = storage.create_new_trial(study_id, create_trial(state=TrialState.WAITING))
    storage.get_all_trials(study_id, states=(TrialState.WAITING,))
    storage.set_trial_state_values(waiting, TrialState.RUNNING)
    storage.get_all_trials(study_id)
    storage.get_n_trials(study_id)
    storage.get_best_trial(study_id)
    storage.get_trial_workers(study_id)
    [lost] = storage._trials(study_id).workers(1).values()
    storage._trials(study_id).take_back(1, lost, requeue=True)
    storage.delete_study(gone)


def _use_locks(
    storage: RedisLockedStorage, names: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = time.monotonic() + 10.0
    with storage.lock("mine", ttl=0.3):
        while "renew_lock" not in names():
            assert time.monotonic() < deadline, "the lock is not renewed"
            time.sleep(0.01)
        with monkeypatch.context() as patch:
            patch.setattr(Node, "command", _interrupt)
            with pytest.raises(KeyboardInterrupt):
                storage.lock("mine").acquire(timeout=5.0)
    storage._locks._hot = "mine"  # as after a short wait: it asks and listens in one go
    with storage.lock("mine"):
        pass


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


# -- these tests themselves ----------------------------------------------------------------------------


def test_an_undeclared_key_is_seen() -> None:
    assert undeclared_keys("redis.call('GET', 'x' .. ARGV[1])", []) == ["'x' .. ARGV[1]"]
    assert undeclared_keys("if redis.call('EXISTS', KEYS[1], name) == 1 then", []) == ["name"]
    assert undeclared_keys("redis.call('SET', lock, f(a, 'b'), 'PX', ttl)", ["lock"]) == []


def test_a_call_within_a_call_is_one_argument() -> None:
    assert calls("x(redis.call('SET', lock, f(a, 'b,'), {1, 2}))", "redis.call") == [
        ["'SET'", "lock", "f(a, 'b,')", "{1, 2}"]
    ]


def test_codes_are_read_with_and_without_brackets() -> None:
    header = Header(
        "-- x: y\n-- Returns {0} | {-7, id} EXISTS\n--   | -2 NO_TRIAL (none)\n-- Retry-safe: -9 A"
    )
    assert header.codes() == {"EXISTS": -7, "NO_TRIAL": -2}
