"""The groups of masters that other tests break must themselves do what they say."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.masters import KINDS, Masters
from tests.replicator import Replicator

_TIMEOUT = 10.0
LINKED = [kind for kind in KINDS if kind.values != ("valkey",)]


def until(condition: Callable[[], bool]) -> None:
    """Poll until it holds, for 10 s."""
    deadline = time.monotonic() + _TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.001)


def get(masters: Masters, key: str) -> list[bytes | None]:
    """What each master holds at a key."""
    return [server.command("GET", key) for server in masters.servers]


def replicator_of(masters: Masters) -> Replicator:
    assert masters.replicator is not None
    return masters.replicator


@pytest.mark.parametrize("n", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_to_one_master_reaches_the_others_unless_they_are_independent(kind: str, n: int) -> None:
    """And afterwards no process and no folder is left."""
    with Masters(kind, n) as masters:
        for number, server in enumerate(masters.servers):
            server.command("SET", f"from {number}", "x")
            wanted = [b"x" if other == number else None for other in range(n)]
            if kind != "valkey":
                wanted = [b"x"] * n
            until(lambda key=f"from {number}", wanted=wanted: get(masters, key) == wanted)  # type: ignore[misc]
        assert masters.urls == [f"redis://127.0.0.1:{server.port}/0" for server in masters.servers]
        assert masters.url == f"redis://{','.join(f'127.0.0.1:{s.port}' for s in masters.servers)}/0"
        pids = [server.pid for server in masters.servers]
    assert not any(server.folder.exists() for server in masters.servers)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("kind", LINKED)
def test_concurrent_writes_under_a_delay_end_swapped(kind: str) -> None:
    """Fact 3: each side blindly executes what it receives, and nothing repairs that."""
    with Masters(kind, delay=0.3) as masters:
        started = time.monotonic()
        masters.servers[0].command("SET", "k", "a")
        masters.servers[1].command("SET", "k", "b")
        until(lambda: get(masters, "k") == [b"b", b"a"])
        assert time.monotonic() - started >= 0.3
        masters.set_delay(0.0)
        masters.servers[0].command("SET", "after", "x")
        until(lambda: get(masters, "after") == [b"x", b"x"])
        assert get(masters, "k") == [b"b", b"a"]


@pytest.mark.parametrize("kind", LINKED)
def test_what_was_written_during_a_cut_comes_late_and_without_its_nx(kind: str) -> None:
    """Fact 2: SET NX arrives as an overwriting SET; its deadline arrives too."""
    with Masters(kind) as masters:
        masters.cut(0, 1, backlog=True, silent=True)
        for server, value in zip(masters.servers, "ab", strict=True):
            assert server.command("SET", "k", value, "NX", "PX", 60_000)
        assert get(masters, "k") == [b"a", b"b"]
        masters.mend(0, 1)
        masters.wait_until_linked()
        until(lambda: get(masters, "k") == [b"b", b"a"])
        assert all(0 < server.command("PTTL", "k") <= 60_000 for server in masters.servers)


@pytest.mark.parametrize("kind", LINKED)
def test_a_cut_of_one_direction_leaves_the_other(kind: str) -> None:
    with Masters(kind) as masters:
        masters.cut(0, 1, both=False)
        masters.servers[0].command("SET", "there", "x")
        masters.servers[1].command("SET", "back", "x")
        until(lambda: get(masters, "back") == [b"x", b"x"])
        assert get(masters, "there") == [b"x", None]
        masters.mend(0, 1, both=False)
        masters.wait_until_linked()
        masters.servers[0].command("SET", "later", "x")
        until(lambda: get(masters, "later") == [b"x", b"x"])
        assert get(masters, "there") == [b"x", b"x" if kind == "keydb" else None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_restarts_empty_and_is_refilled_where_it_is_linked(kind: str) -> None:
    with Masters(kind) as masters:
        masters.servers[0].command("SET", "k", "x")
        masters.servers[1].command("SET", "own", "x")
        if kind != "valkey":
            until(lambda: get(masters, "k") + get(masters, "own") == [b"x"] * 4)
        masters.cut(0, 1)  # else KeyDB may be back before we look
        masters.servers[1].command("SAVE")
        masters.restart_empty(1)
        assert masters.servers[1].command("DBSIZE") == 0
        masters.mend(0, 1)
        masters.wait_until_linked()
        masters.resync(0, 1)
        assert get(masters, "k") == [b"x", None if kind == "valkey" else b"x"]
        assert masters.servers[1].command("DBSIZE") == (0 if kind == "valkey" else 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_master_restarts_with_its_rdb(kind: str) -> None:
    with Masters(kind) as masters:
        server = masters.servers[0]
        masters.cut(0, 1)  # so that what is there was not fetched
        server.command("SET", "k", "x")
        pid = server.pid
        masters.restart_with_rdb(0)
        assert server.pid != pid
        assert get(masters, "k") == [b"x", None]
        masters.mend(0, 1)
        masters.wait_until_linked()
        server.command("SET", "after", "x")
        if kind != "valkey":
            until(lambda: get(masters, "after") == [b"x", b"x"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_paused_master_does_not_answer_and_goes_on_afterwards(kind: str) -> None:
    with Masters(kind) as masters:
        masters.pause(1)
        masters.servers[0].command("SET", "k", "x")
        client = redis.Redis(port=masters.servers[1].port, socket_timeout=0.1, retry=Retry(NoBackoff(), 0))
        with pytest.raises(redis.TimeoutError):
            client.ping()
        client.close()
        masters.resume(1)
        wanted = None if kind == "valkey" else b"x"
        until(lambda: get(masters, "k") == [b"x", wanted])


# -- the replicator alone --------------------------------------------------------------------------


def test_a_transaction_is_executed_as_one_in_its_databases_and_comes_not_back() -> None:
    with Masters("replicated") as masters:
        first, second = masters.servers
        script = "redis.call('INCR', 'n') redis.call('SELECT', 3) redis.call('INCR', 'n')"
        first.command("EVAL", script, 0)
        for _ in range(3):  # a loop would go on
            replicator_of(masters).wait_until_idle()
        assert get(masters, "n") == [b"1", b"1"]
        statistics = second.command("INFO", "commandstats")
        assert statistics["cmdstat_exec"]["calls"] == 1
        assert statistics["cmdstat_incr"]["calls"] == 2
        assert second.command("INFO", "keyspace")["db3"]["keys"] == 1


def test_what_is_cut_without_a_backlog_is_lost_even_if_it_was_under_way() -> None:
    with Masters("replicated", delay=60.0) as masters:
        masters.servers[0].command("SET", "under way", "x")
        masters.servers[0].command("SET", "one more", "x")
        masters.cut(0, 1)
        masters.servers[0].command("SET", "meanwhile", "x")
        replicator_of(masters).wait_until_idle()
        masters.mend(0, 1)
        masters.set_delay(0.0)
        replicator_of(masters).wait_until_idle()
        assert masters.servers[1].command("DBSIZE") == 0
        assert replicator_of(masters).lost(0, 1) == 3
        assert replicator_of(masters).lost(1, 0) == 0


def test_what_a_dead_master_misses_is_lost_and_later_writes_reach_it() -> None:
    with Masters("replicated") as masters:
        masters.kill(1)
        masters.servers[0].command("SET", "meanwhile", "x")
        until(lambda: replicator_of(masters).lost(0, 1) == 1)
        masters.start(1)
        masters.servers[0].command("SET", "later", "x")
        until(lambda: get(masters, "later") == [b"x", b"x"])
        assert get(masters, "meanwhile") == [b"x", None]


@pytest.mark.parametrize("diskless", ["no", "yes"])
def test_a_restarted_master_is_followed_again_past_its_snapshot(diskless: str) -> None:
    """In both forms of a snapshot on the wire, and with one of many chunks."""
    with Masters("replicated", 3, extra=("--repl-diskless-sync", diskless)) as masters:
        masters.servers[0].command("SET", "big", os.urandom(3_000_000))
        replicator_of(masters).wait_until_idle()
        masters.restart_with_rdb(0)
        masters.wait_until_linked()
        masters.servers[0].command("SET", "k", "x")
        until(lambda: get(masters, "k") == [b"x"] * 3)
        masters.servers[2].command("SET", "k", "y")
        until(lambda: get(masters, "k") == [b"y"] * 3)


def test_a_resync_copies_whole_keys_and_what_was_written_before_is_not_executed_again() -> None:
    """Fact 4, where the source wins; what only the target has stays."""
    with Masters("replicated") as masters:
        first, second = masters.servers
        masters.cut(0, 1)
        first.command("HSET", "hash", "a", 1)
        second.command("HSET", "hash", "b", 2)
        second.command("SET", "only here", "x")
        first.command("SET", "deadline", "x", "PX", 60_000)
        first.command("EVAL", "redis.call('SELECT', 3) redis.call('SET', 'k', 'x')", 0)
        replicator_of(masters).wait_until_idle()
        masters.set_delay(60.0)
        masters.mend(0, 1)
        first.command("INCR", "n")
        replicator_of(masters).resync(0, 1)
        masters.set_delay(0.0)
        replicator_of(masters).wait_until_idle()
        assert second.command("HGETALL", "hash") == {b"a": b"1"}
        assert get(masters, "only here") == [None, b"x"]
        assert 0 < second.command("PTTL", "deadline") <= 60_000
        assert second.command("INFO", "keyspace")["db3"]["keys"] == 1
        assert get(masters, "n") == [b"1", b"1"]


@pytest.mark.parametrize("echo", [False, True])
def test_an_echo_executes_the_last_commands_of_a_restarted_master_on_it_once_more(echo: bool) -> None:
    """Fact 7, and the peer keeps its own count: the echo is not sent back."""
    with Masters("replicated", echo=echo) as masters:
        for _ in range(3):
            masters.servers[0].command("INCR", "n")
        masters.servers[1].command("INCR", "m")
        replicator_of(masters).wait_until_idle()
        masters.servers[0].command("CLIENT", "KILL", "TYPE", "replica")  # no restart: no echo
        replicator_of(masters).wait_until_idle()
        assert get(masters, "n") == [b"3", b"3"]
        masters.restart_with_rdb(0)
        masters.wait_until_linked()
        replicator_of(masters).wait_until_idle()
        until(lambda: get(masters, "n") == [b"6" if echo else b"3", b"3"])
        assert get(masters, "m") == [b"1", b"1"]


def test_a_key_that_expired_is_not_deleted_elsewhere_but_an_unlinked_one_is() -> None:
    """Fact 9; in Valkey's stream both look the same."""
    with Masters("replicated") as masters:
        first, second = masters.servers
        first.command("SET", "expires", "old", "PX", 200)
        first.command("SET", "unlinked", "old")
        replicator_of(masters).wait_until_idle()
        assert get(masters, "unlinked") == [b"old", b"old"]
        masters.cut(0, 1, backlog=True)
        second.command("SET", "expires", "new")
        until(lambda: first.command("GET", "expires") is None)
        first.command("UNLINK", "unlinked")
        masters.mend(0, 1)
        replicator_of(masters).wait_until_idle()
        assert get(masters, "unlinked") == [None, None]
        assert get(masters, "expires") == [b"new", b"new"]
