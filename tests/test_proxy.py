"""The proxy that other tests break connections with must itself do what it says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import redis

from tests.proxy import CuttingProxy
from tests.servers import Server


@pytest.fixture
def proxy(valkey: Server) -> Iterator[CuttingProxy]:
    with CuttingProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: CuttingProxy) -> Iterator[redis.Redis]:
    client = redis.Redis.from_url(proxy.url, socket_timeout=0.5, retry=None, single_connection_client=True)
    client.delete("n")
    yield client
    client.close()


def test_the_request_is_executed_and_its_reply_is_not_delivered(
    valkey: Server, proxy: CuttingProxy, client: redis.Redis
) -> None:
    proxy.cut_next_reply()
    with pytest.raises(redis.ConnectionError):
        client.incr("n")
    assert valkey.command("GET", "n") == b"1"
    assert client.incr("n") == 2, "only one reply is cut"
    assert proxy.cuts == 1


def test_only_the_reply_of_a_matching_request_is_cut(proxy: CuttingProxy, client: redis.Redis) -> None:
    proxy.cut_next_reply(containing=b"needle")
    client.incr("n")
    with pytest.raises(redis.ConnectionError):
        client.set("the-needle", 1)


def test_delay_is_added_in_both_directions_but_once_for_chunks_in_flight_together(
    proxy: CuttingProxy, client: redis.Redis
) -> None:
    client.ping()
    proxy.delay = 0.05
    started = time.monotonic()
    assert client.connection is not None
    for _ in range(5):  # five chunks, 5 ms apart
        client.connection.send_command("PING")  # type: ignore[no-untyped-call]
        time.sleep(0.005)
    for _ in range(5):
        client.connection.read_response()
    assert 0.1 < time.monotonic() - started < 0.19


def test_a_black_hole_swallows_and_is_over_after_restore(proxy: CuttingProxy, client: redis.Redis) -> None:
    client.ping()
    proxy.black_hole()
    with pytest.raises(redis.TimeoutError):
        client.incr("n")
    proxy.restore()
    assert client.incr("n") == 1


def test_refused_connections_are_refused_and_old_ones_go_on(proxy: CuttingProxy, client: redis.Redis) -> None:
    client.ping()
    proxy.refuse()
    assert client.ping()
    proxy.cut_all()
    with pytest.raises(redis.ConnectionError, match=r"refused|closed"):
        client.ping()
    with pytest.raises(redis.ConnectionError, match="refused"):
        client.ping()
    proxy.restore()
    assert client.ping()


def test_random_cuts_come_again_with_the_same_seed(proxy: CuttingProxy, client: redis.Redis) -> None:
    def outcomes() -> list[bool]:
        client.ping()
        proxy.cut_randomly(0.3, seed=7)
        found = []
        for _ in range(30):
            try:
                client.execute_command("INCR", "n")  # type: ignore[no-untyped-call]
                found.append(True)
            except redis.ConnectionError:
                found.append(False)
        proxy.cut_randomly(0.0)
        return found

    first = outcomes()
    assert 3 < first.count(False) < 30  # redis-py's handshake is cut at times too
    assert outcomes() == first
