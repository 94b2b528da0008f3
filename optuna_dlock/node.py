"""One connection to one server: calls that wait, writes whose replies are read later, retries.

A node is used by all threads of a process, under one lock, over one connection: what a thread wrote
earlier is on the wire before what any thread asks later, so a read sees every write of this process.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import hiredis
import redis
import redis.exceptions as redis_errors

from optuna_dlock.channel import Channel, Connection, RefusalError, open_channel, refusal
from optuna_dlock.errors import (
    AccessDeniedError,
    CorruptRecordError,
    DLockError,
    ServerConfigurationError,
    StorageUnavailableError,
)
from optuna_dlock.retry import Backoff
from optuna_dlock.scripts import Script, all_scripts

Argument = str | bytes | int
Packed = bytes

_logger = logging.getLogger(__name__)
# hiredis's own annotation takes tuples of one element only.
pack_command: Callable[[tuple[Argument, ...]], bytes] = cast("Any", hiredis.pack_command)
# A deferred write is collected by the next call that waits; past this many, posting waits for it.
MAX_OUTSTANDING = 1000
# Refusals that pass by themselves: the server is loading, a failover is under way, a script runs long.
_PASSING = frozenset(
    ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "BUSY", "NOREPLICAS", "NOSCRIPT")
)
_DENIED = frozenset(("WRONGPASS", "NOAUTH", "NOPERM"))
_LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)


class Post:
    """A write that was sent and whose reply is still to be read.

    Args:
        head: The command up to the arguments that follow; see `Node.make_head`.
        field, value: The next two arguments.
        sequence: The last argument. The server executes a number once, however often it is sent (G6).
        expected: The reply that says that all is as the sender thought.
        subject: What the write is about.
        settle: Called with the subject and any other reply.
    """

    __slots__ = ("expected", "field", "head", "sequence", "settle", "subject", "value")

    def __init__(
        self,
        head: Any,
        field: bytes,
        value: bytes,
        sequence: int,
        expected: int,
        subject: Any,
        settle: Callable[[Any, Any], None],
    ) -> None:
        self.head = head
        self.field = field
        self.value = value
        self.sequence = sequence
        self.expected = expected
        self.subject = subject
        self.settle = settle

    def packed(self) -> bytes:
        """The whole command."""
        sequence = b"%d" % self.sequence
        return b"%b$%d\r\n%b\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
            self.head,
            len(self.field),
            self.field,
            len(self.value),
            self.value,
            len(sequence),
            sequence,
        )


class Node:
    """One server, as one process sees it.

    Args:
        make_connection: Gives a new, not yet connected connection.
        address: How the server is named in messages; never a password.
        timeout: Seconds for which a call goes on trying while the server is away.
        on_connect: Called with the node after each connect, to check what it is connected to.
        on_fork: Called in a forked child, so that the owner forgets what belongs to the parent.
        backoff: Makes the waits between tries.
    """

    def __init__(
        self,
        make_connection: Callable[[], Connection],
        address: str,
        timeout: float,
        on_connect: Callable[[Node], None] | None = None,
        on_fork: Callable[[], None] | None = None,
        backoff: Callable[[float], Backoff] = Backoff,
    ) -> None:
        self.address = address
        self.timeout = timeout
        self.lock = threading.RLock()
        self.waits = 0  # round trips waited for, which the budget tests count
        self._make_connection = make_connection
        self._on_connect = on_connect
        self._on_fork = on_fork
        self._backoff = backoff
        self._channel: Channel | None = None
        self._checking = False
        self._outstanding: deque[Post] = deque()
        self._sequence = 0
        forget_in_children(self)

    # -- calls -----------------------------------------------------------------------------------

    def next_sequence(self) -> int:
        """A number that rises with every operation of this client; the server refuses repeats by it."""
        self._sequence += 1
        return self._sequence

    def run(self, script: Script, keys: Sequence[str], args: Sequence[Argument] = ()) -> Any:
        """Run a script and return its reply, retrying while the server is away.

        Raises:
            StorageUnavailableError: If there is no answer within `timeout`.
            AccessDeniedError, ServerConfigurationError, CorruptRecordError: What retrying cannot mend.
        """
        packed = _pack(script, keys, args)
        with self.lock:
            channel = self._channel
            if channel is not None:
                try:
                    channel.send(packed)
                    self.waits += 1
                    if self._outstanding:
                        self._read_outstanding(channel)
                    reply = channel.read()
                    if not isinstance(reply, RefusalError):
                        return reply
                except _LOST as error:
                    self._drop_channel(error)
                except BaseException:  # Ctrl-C: the next reply on this channel would not be the next call's
                    self.close()
                    raise
                else:
                    if reply.code not in _PASSING:
                        raise self._final(reply, keys)
            return self._ask([packed], lambda _: keys)[0]

    def run_many(
        self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]
    ) -> list[Any]:
        """Run one script several times in one round trip; the replies in order."""
        return self._ask([_pack(script, keys, args) for keys, args in calls], lambda index: calls[index][0])

    def command(self, *args: Argument) -> Any:
        """Run a plain command and return its reply."""
        return self._ask([pack_command(args)], lambda _: [str(a) for a in args[1:2]])[0]

    def commands(self, commands: Sequence[Sequence[Argument]]) -> list[Any]:
        """Run several plain commands in one round trip."""
        return self._ask(
            [pack_command(tuple(args)) for args in commands],
            lambda index: [str(a) for a in commands[index][1:2]],
        )

    def make_head(self, script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """The unchanging first part of the command of a Post: three more arguments follow."""
        packed = _pack(script, keys, (*args, b"", b"", b""))
        return packed[: -len(b"$0\r\n\r\n" * 3)]

    def post(self, post: Post) -> None:
        """Send a write now, read its reply with the next call that waits."""
        with self.lock:
            if len(self._outstanding) >= MAX_OUTSTANDING:
                self.collect()
            self._outstanding.append(post)
            if self._channel is None:
                return  # sent, in order, with the next call that connects
            try:
                self._channel.send(post.packed())
            except _LOST as error:
                self._drop_channel(error)
            except BaseException:
                self.close()
                raise

    def collect(self) -> None:
        """Wait for the replies of all posts."""
        if self._outstanding:
            self._ask([], lambda _: [])

    @property
    def outstanding(self) -> int:
        """Number of posts whose replies were not read yet."""
        return len(self._outstanding)

    # -- the one loop ----------------------------------------------------------------------------

    def _ask(self, packed: list[Packed], keys_of: Callable[[int], Sequence[str]]) -> list[Any]:
        with self.lock:
            waiting: Backoff | None = None
            while True:
                try:
                    replies = self._exchange(packed)
                    problem = self._passing_problem(replies, keys_of)
                    if problem is None:
                        return replies
                except redis_errors.AuthenticationError as error:  # redis-py counts it as a ConnectionError
                    self.close()
                    raise self._final(refusal(error), []) from None
                except DLockError:  # some are OSErrors; no other try mends them, and all replies were read
                    raise
                except (hiredis.ProtocolError, redis_errors.InvalidResponse) as error:
                    self.close()
                    raise DLockError(f"{self.address} is no Redis, Valkey or KeyDB server: {error}") from None
                except _LOST as error:
                    self._drop_channel(error)
                    problem = error
                except BaseException:
                    self.close()
                    raise
                if isinstance(problem, RefusalError) and problem.code == "NOSCRIPT":
                    self._drop_channel(problem)  # connecting loads the scripts
                if waiting is None:
                    waiting = self._backoff(self.timeout)
                if not waiting.wait():
                    raise StorageUnavailableError(
                        f"{self.address} did not answer for {self.timeout:g} s "
                        f"({type(problem).__name__}: {problem}); is the server up and reachable?",
                        address=self.address,
                        timeout=self.timeout,
                    ) from problem

    def _exchange(self, packed: list[Packed]) -> list[Any]:
        channel = self._channel or self._connect()
        if packed:
            channel.send(b"".join(packed))
        self.waits += 1
        if self._outstanding:
            self._read_outstanding(channel)
        return [channel.read() for _ in packed]

    def _read_outstanding(self, channel: Channel) -> None:
        """Read the replies of all posts; what was refused for a passing reason is sent again.

        Order decides: once one post was refused, all later ones are sent again after it, as new
        operations, even if the server took them.
        """
        posts = self._outstanding
        refused: list[Post] = []
        try:
            while posts:
                reply = channel.read()
                post = posts.popleft()
                if reply == post.expected and not refused:
                    continue
                if refused or _is_passing(reply):
                    refused.append(post)
                else:
                    post.settle(post.subject, self._final(reply, []))
        except BaseException:
            self.close()  # the next reply would not be the next call's
            raise
        finally:
            if refused:  # also if the connection broke before all were read
                refused.extend(posts)
                posts.clear()
                posts.extend(refused)
                for post in posts:
                    post.sequence = self.next_sequence()
        if refused:
            raise redis_errors.ConnectionError("the server refused a deferred write for now")

    def _passing_problem(
        self, replies: list[Any], keys_of: Callable[[int], Sequence[str]]
    ) -> Exception | None:
        for index, reply in enumerate(replies):
            if isinstance(reply, Exception):
                if _is_passing(reply):
                    return reply
                raise self._final(reply, keys_of(index))
        return None

    def _final(self, reply: Any, keys: Sequence[str]) -> Any:
        """The error to raise for a refusal that no retry mends; other replies as they are."""
        if not isinstance(reply, RefusalError):
            return reply
        if reply.code in _DENIED:
            return AccessDeniedError(
                f"{self.address} refused access: {reply}; check user, password and ACL of the URL",
                address=self.address,
            )
        if reply.code == "OOM":
            return ServerConfigurationError(
                f"{self.address} has no memory left: {reply}; raise its maxmemory or delete old studies",
                address=self.address,
            )
        if reply.code == "MISCONF":
            return ServerConfigurationError(
                f"{self.address} refuses writes as it cannot save its data: {reply}", address=self.address
            )
        if "WRONGTYPE" in str(reply):  # in a script it is not the first word everywhere
            key = self._foreign_key(keys)
            return CorruptRecordError(
                f"key {key!r} on {self.address} is of another type: somebody else's data stands under our "
                "prefix; choose another one with ?prefix=NAME",
                key=key,
            )
        # The server quotes what it did not understand, which may be a password: AUTH can be renamed away.
        return DLockError(f"{self.address}: {str(reply).partition(', with args beginning')[0]}")

    def _foreign_key(self, keys: Sequence[str]) -> str:
        if len(keys) < 2:
            return "".join(keys) or "of a trial"
        types = self.commands([("TYPE", key) for key in keys])
        for key, found in zip(keys, types, strict=True):
            wanted = type_of_key(key)
            if found not in (b"none", "none", wanted, wanted.encode()):
                return key
        return ", ".join(keys)

    # -- connection ------------------------------------------------------------------------------

    def _connect(self) -> Channel:
        connection = self._make_connection()
        try:
            connection.connect()
        except redis_errors.ResponseError as error:
            problem = refusal(error)
            if problem.code in _PASSING:
                raise redis_errors.ConnectionError(str(error)) from error
            raise self._final(problem, []) from None
        channel = open_channel(connection)
        try:
            self._prepare(channel)
        except BaseException:
            channel.close()
            raise
        self._channel = channel
        return channel

    def _prepared(self, reply: Any) -> Any:
        if _is_passing(reply):
            raise redis_errors.ConnectionError(str(reply))
        if isinstance(reply, RefusalError):
            raise self._final(reply, [])
        return reply

    def _prepare(self, channel: Channel) -> None:
        scripts = all_scripts()
        # Nearly always all are there: then a bad line has one reply to lose and not dozens.
        channel.send(pack_command(("SCRIPT", "EXISTS", *(s.sha for s in scripts))))
        known = self._prepared(channel.read())
        missing = [s for s, is_known in zip(scripts, known, strict=True) if not is_known]
        channel.send(b"".join(pack_command(("SCRIPT", "LOAD", s.source)) for s in missing))
        for reply in [channel.read() for _ in missing]:
            self._prepared(reply)
        if self._on_connect is not None and not self._checking:
            self._check(channel, self._on_connect)
        for post in self._outstanding:
            channel.send(post.packed())

    def _check(self, channel: Channel, on_connect: Callable[[Node], None]) -> None:
        """Let the owner look at the server before any outstanding write is sent to it."""
        held, self._outstanding = self._outstanding, deque()
        self._channel, self._checking = channel, True
        try:
            on_connect(self)
            if self._channel is not channel:
                raise redis_errors.ConnectionError("connection lost while the server was checked")
        finally:
            if self._channel is not channel:
                self.close()
            self._channel = None
            self._outstanding, self._checking = held, False

    def _drop_channel(self, error: BaseException) -> None:
        _logger.debug("connection to %s lost: %s", self.address, type(error).__name__)
        self.close()

    def close(self) -> None:
        """Close the connection; the next call opens another one."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def forget(self) -> None:
        """In a forked child: leave the parent's connection and writes to the parent."""
        self.lock = threading.RLock()
        self._channel = None
        self._outstanding = deque()
        self._checking = False
        if self._on_fork is not None:
            self._on_fork()


_TYPES = {
    "log": "list",
    "order": "list",
    "dists": "list",
    "waiting": "zset",
    "heartbeats": "zset",
    "trash": "set",
    "lock": "string",
    "fence": "string",
    "queue": "list",
    "sections": "list",
    "reissues": "list",
    "ranby": "list",
}


def type_of_key(key: str) -> str:
    """What kind of value stands under one of our keys."""
    return _TYPES.get(key.rpartition(":")[2], "hash")


def _pack(script: Script, keys: Sequence[str], args: Sequence[Argument]) -> Packed:
    return pack_command(("EVALSHA", script.sha, len(keys), *keys, *args))


def _is_passing(reply: Any) -> bool:
    return isinstance(reply, RefusalError) and reply.code in _PASSING


def connection_factory(redis_url: str, timeout: float) -> Callable[[], Connection]:
    """Connections to a URL, by redis-py's own pool: TLS, passwords and databases are its business."""
    pool = redis.ConnectionPool.from_url(
        redis_url,
        protocol=2,
        retry=None,
        retry_on_error=[],
        **_default_timeouts(redis_url, timeout),
    )
    # Not pool.make_connection: it counts all connections ever made against a limit.
    return lambda: cast("Connection", pool.connection_class(**pool.connection_kwargs))


def _default_timeouts(redis_url: str, timeout: float) -> dict[str, float]:
    wanted = {"socket_timeout": min(timeout, 10.0), "socket_connect_timeout": min(timeout, 5.0)}
    return {name: value for name, value in wanted.items() if name + "=" not in redis_url}


class Forgetful(Protocol):
    """What has to be told in a forked child that it is another process now."""

    def forget(self) -> None:  # noqa: D102
        ...


_nodes: weakref.WeakSet[Forgetful] = weakref.WeakSet()


def forget_in_children(node: Forgetful) -> None:
    """Call the node's `forget` in every forked child."""
    _nodes.add(node)


def _after_fork() -> None:
    for node in list(_nodes):
        node.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
