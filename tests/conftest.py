"""Shared servers. A test that stops, pauses, fills or reconfigures a server starts one of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.servers import FLAVOURS, Server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def valkey() -> Iterator[Server]:
    """One Valkey server for the whole run."""
    with Server("valkey") as server:
        yield server


@pytest.fixture(scope="session", params=FLAVOURS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """One server of each flavour for the whole run: the test runs once with each."""
    if request.param == "valkey":
        yield request.getfixturevalue("valkey")
        return
    with Server(request.param) as server:
        yield server


@pytest.fixture
def url(server: Server) -> str:
    """URL of a key space that no other test uses, on each flavour."""
    return f"{server.url}?prefix=t{next(_numbers)}"


@pytest.fixture
def valkey_url(valkey: Server) -> str:
    """URL of a key space that no other test uses, on Valkey."""
    return f"{valkey.url}?prefix=t{next(_numbers)}"
