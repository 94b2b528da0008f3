"""One connection to a real server, and all that can happen to it."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from optuna_dlock import keys as keys_module
from optuna_dlock import node as node_module
from optuna_dlock.errors import (
    AccessDeniedError,
    CorruptRecordError,
    DLockError,
    ServerConfigurationError,
    StorageUnavailableError,
)
from optuna_dlock.keys import StudyKeys
from optuna_dlock.node import Node, Post, connection_factory, type_of_key
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import Script
from tests.proxy import CuttingProxy
from tests.servers import FLAVOURS, Server

SECRET = "s3cret"  # noqa: S105 -- what must not be shown

WRITE = Script("write", "redis.call('SET', KEYS[1], ARGV[1])\nreturn redis.call('GET', KEYS[1])")
COUNT = Script("count", "return redis.call('INCR', KEYS[1])")
# Executes each sequence number once, as the scripts behind a Post do, and keeps a list of all that came.
APPEND = Script(
    "append",
    """
    redis.call('RPUSH', KEYS[1] .. ':arrived', ARGV[3])
    if tonumber(ARGV[3]) > tonumber(redis.call('GET', KEYS[1] .. ':last') or '0') then
      redis.call('SET', KEYS[1] .. ':last', ARGV[3])
      redis.call('RPUSH', KEYS[1], ARGV[2])
    end
    return 1
    """,
)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes load these scripts, and not the package's."""
    monkeypatch.setattr(node_module, "all_scripts", lambda: (WRITE, COUNT, APPEND))


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A key that no other test uses."""
    return f"{request.node.name}:{time.monotonic_ns()}"


@pytest.fixture
def proxy(valkey: Server) -> Iterator[CuttingProxy]:
    with CuttingProxy(valkey.port) as proxy:
        yield proxy


def open_node(server: Server | CuttingProxy, timeout: float = 20.0, **options: Any) -> Node:
    return Node(connection_factory(server.url, timeout), f"127.0.0.1:{server.port}", timeout, **options)


def instead_of_waiting(*steps: Callable[[], object]) -> Callable[[float], Backoff]:
    """A back-off whose first waits do these steps; there must be no more of them than steps."""
    left = list(steps)

    def sleep(seconds: float) -> None:
        assert left, "waited more often than expected"
        left.pop(0)()

    return lambda timeout: Backoff(timeout, sleep=sleep)


def patiently(step: Callable[[], object]) -> Callable[[float], Backoff]:
    """A back-off whose first wait does this step, and whose further waits are short ones."""
    done: list[object] = []

    def sleep(seconds: float) -> None:
        if not done:
            done.append(True)
            step()
        time.sleep(0.01)

    return lambda timeout: Backoff(timeout, sleep=sleep)


no_retry = instead_of_waiting()


def append(node: Node, key: str, value: str, settled: list[Any] | None = None, expected: int = 1) -> Post:
    """Post a write of `value`; unexpected replies go to `settled`."""

    def settle(subject: Any, reply: Any) -> None:
        assert settled is not None, f"unexpected reply {reply!r} to the write of {subject!r}"
        settled.append((subject, reply))

    head = node.make_head(APPEND, [key], [])
    with node.lock:  # the numbers rise on the wire
        post = Post(head, b"field", value.encode(), node.next_sequence(), expected, value, settle)
        node.post(post)
    return post


def written(server: Server, key: str) -> list[bytes]:
    found: list[bytes] = server.command("LRANGE", key, 0, -1)
    return found


def arrived(server: Server, key: str) -> list[int]:
    return [int(sequence) for sequence in server.command("LRANGE", key + ":arrived", 0, -1)]


# -- calls that wait -------------------------------------------------------------------------------


def test_a_call_is_one_round_trip_and_connecting_loads_the_scripts(server: Server, key: str) -> None:
    server.command("SCRIPT", "FLUSH")
    node = open_node(server, backoff=no_retry)
    assert node.run(WRITE, [key], ["a"]) == b"a"
    assert node.run_many(COUNT, [([key + "1"], ()), ([key + "1"], ()), ([key + "2"], ())]) == [1, 2, 1]
    assert node.command("GET", key) == b"a"
    assert node.commands([("GET", key), ("GET", key + "1")]) == [b"a", b"2"]
    assert node.waits == 4
    node.close()


def test_threads_share_one_connection_and_get_their_own_replies(valkey: Server, key: str) -> None:
    node = open_node(valkey)
    wrong: list[Any] = []

    def work(name: str) -> None:
        for i in range(100):
            append(node, key, f"{name}{i}")
            reply = node.run(WRITE, [f"{key}:{name}"], [f"{name}{i}"])
            if reply != f"{name}{i}".encode():
                wrong.append(reply)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(written(valkey, key)) == 400
    for name in "abcd":
        own = [value for value in written(valkey, key) if value.startswith(name.encode())]
        assert own == [f"{name}{i}".encode() for i in range(100)]
    node.close()


def test_an_interrupted_call_does_not_leave_its_reply_to_the_next_one(key: str) -> None:
    with Server() as server:
        node = open_node(server, backoff=no_retry)
        node.run(WRITE, [key], ["before"])
        append(node, key + "l", "posted")

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        old = signal.signal(signal.SIGALRM, interrupt)
        try:
            server.pause()
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(KeyboardInterrupt):
                node.run(WRITE, [key], ["interrupted"])
        finally:
            signal.signal(signal.SIGALRM, old)
            server.resume()
        assert node.run(WRITE, [key], ["after"]) == b"after"
        assert node.outstanding == 0
        assert written(server, key + "l") == [b"posted"]
        node.close()


# -- a server that is away -------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_call_goes_on_after_a_restart(flavour: str, key: str) -> None:
    with Server(flavour, appendonly=True) as server:
        node = open_node(server, backoff=instead_of_waiting(server.start))
        assert node.run(COUNT, [key]) == 1
        server.stop()
        assert node.run(COUNT, [key]) == 2
        node.close()


def test_a_call_whose_reply_was_lost_is_sent_again(valkey: Server, proxy: CuttingProxy, key: str) -> None:
    node = open_node(proxy, backoff=instead_of_waiting(lambda: None))
    node.run(WRITE, [key], ["a"])
    proxy.cut_next_reply(containing=key.encode())
    assert node.run(WRITE, [key], ["b"]) == b"b"
    assert proxy.cuts == 1
    node.close()


def test_swallowed_bytes_are_a_lost_connection(proxy: CuttingProxy, key: str) -> None:
    node = Node(
        connection_factory(proxy.url + "?socket_timeout=0.2", 20.0),
        "here",
        20.0,
        backoff=instead_of_waiting(proxy.restore),
    )
    node.run(COUNT, [key])
    proxy.black_hole()
    assert node.run(COUNT, [key]) == 2
    node.close()


def test_after_the_timeout_the_error_names_host_and_port_and_no_password(key: str) -> None:
    with Server(password=SECRET) as server, CuttingProxy(server.port, password=SECRET) as proxy:
        node = open_node(proxy, timeout=0.3)
        node.run(COUNT, [key])
        proxy.refuse()
        proxy.cut_all()
        started = time.monotonic()
        with pytest.raises(StorageUnavailableError, match=rf"127\.0\.0\.1:{proxy.port} .*0\.3 s") as caught:
            node.run(COUNT, [key])
        assert 0.3 <= time.monotonic() - started < 2.0
        assert caught.value.__dict__["address"] == f"127.0.0.1:{proxy.port}"
        assert caught.value.__dict__["timeout"] == 0.3
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        proxy.restore()
        assert node.run(COUNT, [key]) == 2, "and the node is as good as new"
        node.close()


def test_a_paused_server_is_unavailable_and_its_late_reply_is_nobodys(key: str) -> None:
    with Server() as server:
        node = open_node(server, timeout=0.3)
        node.run(WRITE, [key], ["a"])
        server.pause()
        with pytest.raises(StorageUnavailableError):
            node.run(WRITE, [key], ["late"])
        server.resume()
        assert node.run(WRITE, [key], ["b"]) == b"b"
        node.close()


def test_a_server_that_still_loads_its_data_is_waited_for(key: str) -> None:
    slow = ("--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024")
    with Server(extra=slow) as server:
        for i in range(1000):
            server.command("SET", f"{key}{i}", "x" * 50)
        server.command("SAVE")
        server.kill()
        starting = threading.Thread(target=server.start)
        starting.start()
        while first_word(server.port, b"PING\r\n") != b"-LOADING":
            assert starting.is_alive(), "it never was seen loading"
        waits: list[bool] = []
        node = open_node(server, backoff=patiently(lambda: waits.append(True)))
        assert node.command("GET", f"{key}7") == b"x" * 50
        assert waits, "the server had its data already: nothing was tested"
        starting.join()
        node.close()


def first_word(port: int, request: bytes) -> bytes:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(request)
            return connection.recv(100).split(b" ")[0]
    except OSError:
        return b""


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_read_only_replica_is_waited_for_until_it_is_a_master(flavour: str, key: str) -> None:
    with Server(flavour) as master, Server(flavour) as replica:
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        while replica.command("INFO", "replication")["master_link_status"] != "up":
            time.sleep(0.01)
        promote = lambda: replica.command("REPLICAOF", "NO", "ONE")  # noqa: E731
        node = open_node(replica, backoff=patiently(promote))
        append(node, key + "l", "posted")
        assert node.run(WRITE, [key], ["a"]) == b"a"
        assert written(replica, key + "l") == [b"posted"]
        node.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_read_only_replica_that_stays_one_is_unavailable(flavour: str, key: str) -> None:
    with Server(flavour) as master, Server(flavour) as replica:
        replica.command("REPLICAOF", "127.0.0.1", master.port)
        node = open_node(replica, timeout=0.3)
        with pytest.raises(StorageUnavailableError, match="replica"):
            node.run(WRITE, [key], ["a"])
        node.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_busy_with_somebodys_endless_script_is_waited_for(flavour: str, key: str) -> None:
    with Server(flavour, extra=("--lua-time-limit", "20")) as server:
        node = open_node(server, backoff=patiently(lambda: server.command("SCRIPT", "KILL")))
        node.run(COUNT, [key])
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            other.sendall(b'EVAL "while true do end" 0\r\n')
            while first_word(server.port, b"PING\r\n") != b"-BUSY":
                time.sleep(0.005)
            append(node, key + "l", "posted")
            assert node.run(COUNT, [key]) == 2
        assert written(server, key + "l") == [b"posted"]
        node.close()


# -- a server that refuses for good ----------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("user", [f":{SECRET}x@", f"bob:{SECRET}x@", ""])
def test_a_wrong_password_is_refused_at_once_and_not_shown(flavour: str, user: str, key: str) -> None:
    with Server(flavour, password=SECRET) as server:
        url = f"redis://{user}127.0.0.1:{server.port}/0"
        node = Node(connection_factory(url, 20.0), "somewhere:1", 20.0, backoff=no_retry)
        with pytest.raises(AccessDeniedError, match="somewhere:1") as caught:
            node.run(COUNT, [key])
        shown = "".join(traceback.format_exception(caught.value)) + repr(caught.value.__dict__)
        assert SECRET not in shown
        node.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize(
    "rights",
    [
        ("~other:*", "+@all"),  # not this key
        ("~*", "+@all", "-evalsha"),  # no scripts
        ("~*", "+@all", "-script"),  # no loading of scripts
        ("~*", "+@all", "-set"),  # not what the script does
    ],
)
def test_a_user_who_may_not_is_refused_at_once(flavour: str, rights: tuple[str, ...], key: str) -> None:
    with Server(flavour) as server:
        server.command("ACL", "SETUSER", "bob", "on", f">{SECRET}", *rights)
        url = f"redis://bob:{SECRET}@127.0.0.1:{server.port}/0"
        node = Node(connection_factory(url, 20.0), "somewhere:1", 20.0, backoff=no_retry)
        with pytest.raises(AccessDeniedError, match="somewhere:1") as caught:
            node.run(WRITE, [key], ["a"])
        assert SECRET not in "".join(traceback.format_exception(caught.value))
        with pytest.raises(AccessDeniedError):  # on a connection that exists, too
            node.run(WRITE, [key], ["a"])
        node.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_full_memory_is_an_error_at_once_for_calls_and_for_posts(flavour: str, key: str) -> None:
    with Server(flavour) as server:
        node = open_node(server, backoff=no_retry)
        node.run(WRITE, [key], ["a"])
        server.command("CONFIG", "SET", "maxmemory", "1000")
        with pytest.raises(ServerConfigurationError, match="maxmemory"):
            node.run(WRITE, [key], ["b"])
        settled: list[Any] = []
        append(node, key, "c", settled)
        node.collect()
        assert [(subject, type(reply)) for subject, reply in settled] == [("c", ServerConfigurationError)]
        server.command("CONFIG", "SET", "maxmemory", "0")
        assert node.run(WRITE, [key], ["d"]) == b"d"
        node.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_somebody_elses_key_is_named(flavour: str, key: str) -> None:
    with Server(flavour) as server:
        server.command("RPUSH", key, "theirs")
        node = open_node(server, backoff=no_retry)
        with pytest.raises(CorruptRecordError, match="prefix") as caught:
            node.run(COUNT, [key])
        assert caught.value.__dict__["key"] == key
        assert node.run(COUNT, [key + "other"]) == 1
        node.close()


def test_any_other_refusal_is_an_error_with_the_servers_words(valkey: Server) -> None:
    node = open_node(valkey, backoff=no_retry)
    with pytest.raises(DLockError, match="wrong number of arguments"):
        node.command("GET")
    assert node.command("PING") == b"PONG"
    node.close()


# -- posts -----------------------------------------------------------------------------------------


def test_posts_wait_for_nothing_and_are_read_with_the_next_call(valkey: Server, key: str) -> None:
    node = open_node(valkey, backoff=no_retry)
    node.run(COUNT, [key + "n"])
    waits = node.waits
    for value in "abc":
        append(node, key, value)
    assert (node.waits - waits, node.outstanding) == (0, 3)
    assert node.run(COUNT, [key + "n"]) == 2
    assert (node.waits - waits, node.outstanding) == (1, 0)
    assert written(valkey, key) == [b"a", b"b", b"c"]
    node.close()


def test_posts_before_the_first_call_are_sent_with_it_in_order(valkey: Server, key: str) -> None:
    node = open_node(valkey, backoff=no_retry)
    append(node, key, "a")
    append(node, key, "b")
    assert written(valkey, key) == []
    node.run(COUNT, [key + "n"])
    assert written(valkey, key) == [b"a", b"b"]
    node.close()


def test_an_unexpected_reply_is_settled_and_the_others_are_not(valkey: Server, key: str) -> None:
    node = open_node(valkey, backoff=no_retry)
    settled: list[Any] = []
    append(node, key, "a", settled)
    append(node, key, "b", settled, expected=7)
    append(node, key, "c", settled)
    node.collect()
    assert settled == [("b", 1)]
    assert node.outstanding == 0
    node.close()


def test_posts_are_sent_again_in_order_with_the_same_numbers_after_a_cut(
    valkey: Server, proxy: CuttingProxy, key: str
) -> None:
    node = open_node(proxy, backoff=instead_of_waiting(lambda: None))
    node.run(COUNT, [key + "n"])
    proxy.cut_next_reply(containing=b"second")
    for value in ("first", "second", "third"):
        append(node, key, value)
    node.collect()
    assert proxy.cuts == 1
    assert written(valkey, key) == [b"first", b"second", b"third"]
    assert set(arrived(valkey, key)) == {1, 2, 3}
    assert arrived(valkey, key).count(2) == 2, "it was sent twice and executed once"
    assert arrived(valkey, key)[-1] == 3
    node.close()


def test_posts_to_a_server_that_is_gone_are_kept_until_it_is_back(key: str) -> None:
    with Server(appendonly=True) as server:
        node = open_node(server, backoff=instead_of_waiting(server.start))
        append(node, key, "a")
        node.collect()
        server.stop()
        for value in "bcd":  # the first is sent into the void; the others find no connection
            append(node, key, value)
        assert node.outstanding == 3
        node.collect()
        assert written(server, key) == [b"a", b"b", b"c", b"d"]
        node.close()


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_after_script_flush_calls_and_posts_go_on_each_once_and_in_order(flavour: str, key: str) -> None:
    with Server(flavour) as server:
        node = open_node(server)
        append(node, key, "a")
        node.collect()
        server.command("SCRIPT", "FLUSH")
        append(node, key, "b")
        append(node, key, "c")
        assert node.run(COUNT, [key + "n"]) == 1
        assert written(server, key) == [b"a", b"b", b"c"]
        server.command("SCRIPT", "FLUSH")
        assert node.run(COUNT, [key + "n"]) == 2
        node.close()


def test_a_post_sent_between_flush_and_reload_does_not_overtake_an_earlier_one(
    valkey: Server, key: str
) -> None:
    node = open_node(valkey)
    append(node, key, "a")
    node.collect()
    valkey.command("SCRIPT", "FLUSH")
    append(node, key, "b")  # refused: the server does not know the script
    wait_for_reply(node)
    for script in (WRITE, COUNT, APPEND):  # somebody else connects
        valkey.command("SCRIPT", "LOAD", script.source)
    append(node, key, "c")  # taken
    node.collect()
    assert [value for value in written(valkey, key) if value != b"c"] == [b"a", b"b"]
    assert written(valkey, key)[-1] == b"c", "the last word is the last one's"
    node.close()


def wait_for_reply(node: Node) -> None:
    """Return when the server's answer to a post has arrived; it stays unread."""
    channel = node._channel
    assert channel is not None
    sock: socket.socket = channel.connection._sock  # type: ignore[attr-defined]
    sock.recv(1, socket.MSG_PEEK)


def test_refused_posts_are_kept_when_the_connection_breaks_while_they_are_read(
    valkey: Server, proxy: CuttingProxy, key: str
) -> None:
    node = open_node(proxy)
    append(node, key, "a")
    node.collect()
    valkey.command("SCRIPT", "FLUSH")
    proxy.cut_next_reply(containing=b"third")
    append(node, key, "second")
    wait_for_reply(node)  # its refusal
    append(node, key, "third")
    node.collect()
    assert written(valkey, key) == [b"a", b"second", b"third"]
    node.close()


def test_no_more_than_the_limit_is_ever_outstanding(
    valkey: Server, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_module, "MAX_OUTSTANDING", 5)
    node = open_node(valkey, backoff=no_retry)
    most = 0
    for i in range(12):
        append(node, key, str(i))
        most = max(most, node.outstanding)
    assert most == 5
    assert node.waits == 2
    node.collect()
    assert written(valkey, key) == [str(i).encode() for i in range(12)]
    node.close()


def test_random_cuts_lose_and_repeat_nothing(valkey: Server, proxy: CuttingProxy, key: str) -> None:
    node = open_node(proxy, backoff=lambda timeout: Backoff(timeout, first=0.0001, longest=0.001))
    node.run(COUNT, [key + "n"])
    proxy.cut_randomly(0.05, seed=3)
    for i in range(200):
        append(node, key, str(i))
        if i % 7 == 0:
            node.run(WRITE, [key + "w"], [i])
    node.collect()
    proxy.cut_randomly(0)
    assert proxy.cuts > 5
    assert written(valkey, key) == [str(i).encode() for i in range(200)]
    node.close()


# -- who looks at the server on each connect -------------------------------------------------------


def test_the_check_of_the_server_comes_before_outstanding_posts(valkey: Server, key: str) -> None:
    seen: list[int] = []
    node = open_node(
        valkey, on_connect=lambda node: seen.append(int(node.command("LLEN", key))), backoff=no_retry
    )
    append(node, key, "a")
    node.collect()
    assert seen == [0]
    node.close()
    append(node, key, "b")
    node.collect()
    assert seen == [0, 1]
    node.close()


def test_a_failed_check_is_raised_and_nothing_is_sent(valkey: Server, key: str) -> None:
    problems = [ServerConfigurationError("it evicts keys"), AccessDeniedError("no CONFIG for you")]

    def check(node: Node) -> None:
        if problems:
            raise problems.pop(0)

    node = open_node(valkey, on_connect=check, backoff=no_retry)
    append(node, key, "a")
    with pytest.raises(ServerConfigurationError, match="evicts"):
        node.collect()
    with pytest.raises(AccessDeniedError, match="no CONFIG"):
        node.collect()
    assert written(valkey, key) == []
    node.collect()
    assert written(valkey, key) == [b"a"]
    node.close()


def test_a_connection_lost_during_the_check_is_checked_anew(
    valkey: Server, proxy: CuttingProxy, key: str
) -> None:
    seen: list[bytes] = []
    node = open_node(proxy, on_connect=lambda node: seen.append(node.command("ECHO", "are you well")))
    proxy.cut_next_reply(containing=b"are you well")
    append(node, key, "a")
    assert node.run(COUNT, [key + "n"]) == 1
    assert proxy.cuts == 1
    assert written(valkey, key) == [b"a"]
    assert seen[-1] == b"are you well"
    node.close()


# -- fork ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_child_has_its_own_connection_and_leaves_the_parents_posts_alone(
    valkey: Server, key: str
) -> None:
    forked: list[bool] = []
    node = open_node(valkey, on_fork=lambda: forked.append(True), backoff=no_retry)
    own = node.command("CLIENT", "ID")
    append(node, key, "parent's")
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with node.lock:
            held.set()
            done.wait(30)

    holder = threading.Thread(target=hold)  # a thread that is in a call, and that the child does not have
    holder.start()
    held.wait(30)
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.alarm(20)  # ends a child that waits for that thread
            assert forked == [True]
            assert node.outstanding == 0
            assert node.command("CLIENT", "ID") != own
            append(node, key, "child's")
            node.collect()
            node.close()
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(status)
    done.set()
    holder.join()
    assert os.waitpid(child, 0)[1] == 0
    assert node.outstanding == 1
    assert node.command("CLIENT", "ID") == own, "the child's end did not close our connection"
    assert node.outstanding == 0
    assert arrived(valkey, key) == [1, 2]
    assert forked == []
    node.close()


def test_the_kind_of_every_key_of_a_study_is_known() -> None:
    """Copies to other masters need it: of a list that is taken for a hash no copy ever gets whole."""
    source = Path(keys_module.__file__).read_text("utf-8")
    told = dict(re.findall(r'base \+ "(\w+)"  # (hash|list|sorted set|set|string)\b', source))
    copied = [key.rpartition(":")[2] for key in StudyKeys("optuna", 1).copied()]
    names = [name for name in copied if name != "lock"]
    assert {name: type_of_key(f":{name}") for name in names} == {
        name: told[name].replace("sorted set", "zset") for name in names
    }
