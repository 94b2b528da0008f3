"""The Lua scripts: one per critical section, loaded from the files beside this one."""

from __future__ import annotations

import hashlib
import re
from functools import cache
from importlib.resources import files

# Result codes shared by all scripts; each script's header names the ones it gives.
OK = 0
NO_STUDY = -1
NO_TRIAL = -2
FINISHED = -3
BEHIND = -4
BUSY = -5
INCOMPATIBLE = -6
EXISTS = -7
FOREIGN = -8
NOT_WAITING = -9
NOT_HELD = -10
STALE = -11
NOT_RUNNING = -12
TAKEN = -15
EXHAUSTED = -30
STOPPED = -31
DIFFERENT = -32
# With several masters, what stands around the reply of a section:
NO_DATA = -20
STALE_BALLOT = -21
GAP = -22
LEASED = -23
OPEN = -24

_INCLUDE = re.compile(r"^-- include (\w+)\n", re.MULTILINE)


class Script:
    """One Lua file, with what it includes, and the SHA-1 under which the server knows it."""

    __slots__ = ("name", "sha", "source")

    def __init__(self, name: str, source: str) -> None:
        self.name = name
        self.source = source
        self.sha = hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()

    def __repr__(self) -> str:
        return f"Script({self.name!r})"


@cache
def script(name: str) -> Script:
    """The script in `lua/<name>.lua`."""
    return Script(name, _read(name))


@cache
def all_scripts() -> tuple[Script, ...]:
    """The scripts for one server, in the order of their names; files that begin with `_` are included."""
    return tuple(script(name) for name in _names("lua"))


# -- several masters: the same bodies, with what several masters need around them ------------------------

# Which sections change an object's state, and so have to be run by all masters in the same order.
SECTIONS = (
    *("claim_finished", "claim_params"),
    *("create_study", "create_trial", "define_param", "delete_study", "finish_trial", "move_trial"),
    *("next_study_id", "set_study_attr", "set_trial_field", "sweep_study"),
    *("claim_point", "define_grid", "set_budget", "stop_study"),
    *("confirm_state", "drop_lease", "renew_lease", "take_lease"),
    "take_back_trial",
)
READS = (
    *(
        "get_changes",
        "get_limits",
        "get_stale_trials",
        "get_study_attrs",
        "get_trial",
        "get_workers",
        "read_key",
    ),
)
HINTS = ("record_heartbeat",)
_BODY, _BODIES = "-- body\n", "-- bodies\n"


@cache
def wrapped(wrapper: str, name: str) -> Script:
    """The script `name` as the body of `lua/masters/_<wrapper>.lua`; its own name stays."""
    around = _file("masters", "_" + wrapper)
    return Script(name, _including(around).replace(_BODY, _body(name), 1))


@cache
def masters_script(name: str) -> Script:
    """The script in `lua/masters/<name>.lua`."""
    source = _including(_file("masters", name))
    if _BODIES in source:
        bodies = (f"bodies.{each} = function(KEYS, ARGV)\n{_body(each)}end\n" for each in (*SECTIONS, *READS))
        source = source.replace(_BODIES, "".join(bodies), 1)
    return Script(name, source)


def _body(name: str) -> str:
    return _read(name) if name in _names("lua") else _file("masters", name)


def _including(source: str) -> str:
    return _INCLUDE.sub(lambda match: _file("masters", "_" + match[1]), source)


@cache
def all_masters_scripts() -> tuple[Script, ...]:
    """Everything that one of several masters has to know."""
    own = set(_names("lua", "masters")) - set(SECTIONS) - set(READS)
    return (
        *(wrapped("fenced", name) for name in (*SECTIONS, *READS)),
        *(wrapped("sequenced", name) for name in (*SECTIONS, *READS)),
        *(wrapped("versioned", name) for name in READS),
        *(wrapped("present", name) for name in HINTS),
        *(masters_script(name) for name in sorted(own)),
    )


@cache
def on_keydb(script: Script) -> Script:
    """The same script for a KeyDB server: see `lua/masters/_keydb.lua`."""
    return Script(script.name, _file("masters", "_keydb") + script.source.replace("--[keydb] ", ""))


@cache
def _names(*folder: str) -> tuple[str, ...]:
    entries = files("optuna_dlock").joinpath(*folder).iterdir()
    names = sorted(entry.name for entry in entries if entry.name.endswith(".lua"))
    return tuple(name.removesuffix(".lua") for name in names if not name.startswith("_"))


def _file(*path: str) -> str:
    *folder, name = path
    return files("optuna_dlock").joinpath("lua", *folder, name + ".lua").read_text("utf-8")


def _read(name: str) -> str:
    return _INCLUDE.sub(lambda match: _read("_" + match[1]), _file(name))
