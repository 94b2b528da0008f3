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
    """All scripts, in the order of their names; files that start with `_` are only included."""
    folder = files("optuna_dlock").joinpath("lua")
    names = sorted(entry.name.removesuffix(".lua") for entry in folder.iterdir())
    return tuple(script(name) for name in names if not name.startswith("_"))


def _read(name: str) -> str:
    text = files("optuna_dlock").joinpath("lua", name + ".lua").read_text("utf-8")
    return _INCLUDE.sub(lambda match: _read("_" + match[1]), text)
