"""Bytes to and from one server over a connection that redis-py made.

redis-py connects, authenticates and encrypts. After that its calls cost more than the round trip, so
that commands go to the socket directly, and replies through hiredis. Where there is no socket
(fakeredis), or it speaks RESP3, redis-py's own calls are used.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Any, Protocol, cast

import hiredis
import redis.exceptions as redis_errors

_RECEIVE = 65536  # bytes asked for at once


class Connection(Protocol):
    """The part of redis-py's Connection that is used here; fakeredis has it too."""

    def connect(self) -> None:  # noqa: D102
        ...

    def disconnect(self) -> None:  # noqa: D102
        ...

    def send_packed_command(self, command: Any, check_health: bool = True) -> None:  # noqa: D102
        ...

    def read_response(self, disable_decoding: bool = False) -> Any:  # noqa: D102
        ...


# Redis 6.2 and KeyDB wrap what a script ran into: "ERR Error running script (…): @user_script: 1: -OOM …".
_WRAPPED = re.compile(r"^ERR Error running script .*?@user_script: ?\d+: -?([A-Z]{3,}) ")
# No server gives these their code NOPERM within a script.
_FORBIDDEN = re.compile(r"^ERR .*(ACL failure in script|The user executing the script can't )")


class RefusalError(Exception):
    """An error reply. The text begins with the server's code, such as NOSCRIPT or OOM."""

    @property
    def code(self) -> str:
        """The first word, or that of the error inside a script."""
        text = str(self)
        if text.startswith("ERR "):
            if wrapped := _WRAPPED.match(text):
                return wrapped[1]
            if _FORBIDDEN.match(text):
                return "NOPERM"
        return text.partition(" ")[0]


# redis-py takes the code off the text of these.
_CODES: tuple[tuple[type[Exception], str], ...] = (
    (redis_errors.NoScriptError, "NOSCRIPT"),
    (redis_errors.BusyLoadingError, "LOADING"),
    (redis_errors.ReadOnlyError, "READONLY"),
    (redis_errors.MasterDownError, "MASTERDOWN"),
    (redis_errors.ClusterDownError, "CLUSTERDOWN"),
    (redis_errors.TryAgainError, "TRYAGAIN"),
    (redis_errors.OutOfMemoryError, "OOM"),
    (redis_errors.NoPermissionError, "NOPERM"),
    (redis_errors.AuthenticationError, "NOAUTH"),
)


def refusal(error: Exception) -> RefusalError:
    """The error reply behind an exception of redis-py."""
    text = str(error)
    for kind, code in _CODES:
        if isinstance(error, kind) and not text.startswith(code):
            return RefusalError(f"{code} {text}")
    return RefusalError(text)


class Channel:
    """A connected connection, for one thread at a time.

    Attributes:
        send: Sends packed commands.
    """

    __slots__ = ("connection", "send")

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.send: Callable[[bytes], None] = self._send

    def _send(self, packed: bytes) -> None:
        self.connection.send_packed_command((packed,), check_health=False)

    def read(self) -> Any:
        """The next reply; an error reply is returned as a RefusalError."""
        try:
            return self.connection.read_response(disable_decoding=True)
        except (redis_errors.ResponseError, redis_errors.AuthenticationError) as error:
            return refusal(error)

    def close(self) -> None:
        """Close the connection."""
        self.connection.disconnect()


class SocketChannel(Channel):
    """The same, straight to the socket."""

    __slots__ = ("_gets", "_reader", "_recv")

    def __init__(self, connection: Connection, sock: socket.socket) -> None:
        super().__init__(connection)
        self._reader = hiredis.Reader(replyError=RefusalError, notEnoughData=_INCOMPLETE)
        self._gets = self._reader.gets
        timeout = sock.gettimeout()
        if timeout and not isinstance(sock, ssl.SSLSocket):
            # The kernel's own timeouts: Python's cost a call of poll() before each send and each receive.
            limit = struct.pack("@ll", int(timeout), int(timeout % 1 * 1e6))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            sock.settimeout(None)
        self._recv = sock.recv
        self.send = sock.sendall

    def read(self) -> Any:
        """The next reply; an error reply is returned as a RefusalError."""
        reply = self._gets()
        while reply is _INCOMPLETE:
            try:
                data = self._recv(_RECEIVE)
            except BlockingIOError:  # how the kernel says that its timeout is over
                raise TimeoutError("no reply in time") from None
            if not data:
                raise ConnectionResetError("connection closed by the server")
            self._reader.feed(data)
            reply = self._gets()
        return reply

    @property
    def sock(self) -> socket.socket:
        """The socket. Not kept: a garbage collector that finds it first complains that nobody closed it."""
        return cast("socket.socket", self.connection._sock)  # type: ignore[attr-defined]

    def read_available(self) -> list[Any]:
        """All replies that have arrived; waits for none, once the socket was found readable.

        Raises:
            OSError: If the connection is closed or lost.
        """
        sock = self.sock
        encrypted = isinstance(sock, ssl.SSLSocket)
        while True:
            try:
                data = sock.recv(_RECEIVE, 0 if encrypted else socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if not data:
                raise ConnectionResetError("connection closed by the server")
            self._reader.feed(data)
            if len(data) < _RECEIVE or (isinstance(sock, ssl.SSLSocket) and not sock.pending()):
                break
        replies = []
        while (reply := self._gets()) is not _INCOMPLETE:
            replies.append(reply)
        return replies


_INCOMPLETE = object()


def open_channel(connection: Connection) -> Channel:
    """A channel over a connected connection."""
    sock = getattr(connection, "_sock", None)
    if isinstance(sock, socket.socket) and str(getattr(connection, "protocol", None)) == "2":
        return SocketChannel(connection, sock)
    return Channel(connection)
