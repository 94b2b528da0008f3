"""Where the suite runs: on one server, and on several masters of each kind. `MASTERS_SLOW=1` adds the rest.

A place is for tests that leave its servers alone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import pytest

from tests.masters import KINDS, Masters
from tests.servers import Server

_IS_SLOW = bool(os.environ.get("MASTERS_SLOW"))
slow = pytest.mark.skipif(not _IS_SLOW, reason="takes minutes: MASTERS_SLOW=1")
ONE = ("one", 1)
# In each run; the others only with MASTERS_SLOW=1, or wherever there is a KeyDB.
QUICK = (("valkey", 3), ("replicated", 2), ("keydb", 2), ("keydb", 3))
SEVERAL = (("valkey", 2), ("valkey", 3), ("valkey", 5), ("replicated", 2), ("replicated", 3), *QUICK[2:])


@dataclass(frozen=True)
class Place:
    """One server or several masters, and a key space on them that no other test uses.

    Attributes:
        url: Names all of them, and the key space.
        servers: Each one.
    """

    url: str
    servers: tuple[Server, ...]

    @property
    def prefix(self) -> str:
        """The key space."""
        return self.url.partition("prefix=")[2]


def groups(*wanted: tuple[str, int]) -> list[Any]:
    """Parameters (kind, how many); what is missing here or takes long is skipped, and says so."""
    missing = {str(param.values[0]): param.marks for param in KINDS}
    return [
        pytest.param(
            (kind, n),
            marks=[*missing.get(kind, ()), *(() if (kind, n) in (ONE, *QUICK) else (slow,))],
            id=kind if kind == "one" else f"{kind}-{n}",
        )
        for kind, n in wanted
    ]


def place_on(servers: Server | Masters, prefix: str) -> Place:
    """A key space on these."""
    many = (servers,) if isinstance(servers, Server) else tuple(servers.servers)
    return Place(f"{servers.url}?prefix={prefix}", many)
