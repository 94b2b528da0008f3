"""Shared servers. A test that stops, pauses, fills or reconfigures a server starts one of its own."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator

import pytest

from optuna_dlock import RedisLockedStorage
from tests.masters import Masters
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


@pytest.fixture(scope="session")
def three_masters() -> Iterator[Masters]:
    """Three plain Valkey masters for the whole run."""
    with Masters("valkey", 3) as masters:
        yield masters


@pytest.fixture(params=["1 master", "3 masters"])
def any_url(request: pytest.FixtureRequest) -> str:
    """URL of a key space that no other test uses, on one master and on three."""
    masters = request.getfixturevalue("valkey" if request.param == "1 master" else "three_masters")
    return f"{masters.url}?prefix=a{next(_numbers)}"


@pytest.fixture
def connect() -> Iterator[Callable[..., RedisLockedStorage]]:
    """Makes storages, and closes them in the end."""
    with contextlib.ExitStack() as stack:
        yield lambda url, **options: stack.enter_context(RedisLockedStorage(url, **options))
