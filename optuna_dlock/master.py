"""One of several masters: a connection made in the background, requests whose replies come when they come.

Nothing here waits: a master that is slow, paused or away does not hold up the others.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import redis.exceptions as redis_errors

from optuna_dlock.channel import Connection, RefusalError, SocketChannel, open_channel, refusal
from optuna_dlock.errors import AccessDeniedError, DLockError, MembershipError, ServerConfigurationError
from optuna_dlock.keys import RegistryKeys, on_master, run_key, unpack_members
from optuna_dlock.node import Argument, pack_command
from optuna_dlock.scripts import Script, all_masters_scripts, on_keydb

_logger = logging.getLogger(__name__)
_PATIENCE = 3.0  # seconds for which one reply may be outstanding before the connection counts as lost
_SLOW = 0.05  # seconds for which a reply may be outstanding before nobody waits for this master
_MOST_OWED = 2000  # replies
_FIRST_PAUSE, _LONGEST_PAUSE = 0.02, 1.0  # seconds between two attempts to connect
_LOST = (redis_errors.ConnectionError, redis_errors.TimeoutError, OSError)
_DENIED = ("WRONGPASS", "NOAUTH", "NOPERM")


class Request:
    """One question to several masters.

    Attributes:
        replies: By master, as far as they have come; a RefusalError for an error reply.
        lost: Masters that will not answer this any more.
    """

    __slots__ = ("lost", "replies")

    def __init__(self) -> None:
        self.replies: dict[int, Any] = {}
        self.lost: set[int] = set()


class Master:
    """One master, as one process sees it.

    Args:
        index: Its place in the list.
        address: How it is named, in messages and in key names.
        make_connection: Gives a new, not yet connected connection.
        prefix: Key space.
        members: The addresses of all masters, in order.

    Attributes:
        run: Which run of the server this is; other runs have other keys.
        earlier_runs: Those that have left data, the last one first.
        key_prefix: What its key names begin with in this run.
        problem: Why it is not connected; None before the first attempt.
        fatal: A problem that no retry mends.
    """

    def __init__(
        self,
        index: int,
        address: str,
        make_connection: Callable[[], Connection],
        prefix: str,
        members: Sequence[str],
    ) -> None:
        self.index = index
        self.address = address
        self.run = ""
        self.earlier_runs: list[str] = []
        self.key_prefix = ""
        self.problem: Exception | None = None
        self.fatal: DLockError | None = None
        self._make_connection = make_connection
        self._prefix = prefix
        self._members = list(members)
        self._channel: SocketChannel | None = None
        self._owed: deque[tuple[Request, float]] = deque()
        self._attempt: threading.Thread | None = None
        self._made: tuple[SocketChannel, str, list[str]] | None = None
        self._file = -1
        self._is_keydb = False
        self._pause = _FIRST_PAUSE
        self._next_attempt = 0.0

    # -- connection ------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether requests can be sent."""
        return self._channel is not None

    def fileno(self) -> int:
        """The socket to wait for."""
        return self._file

    def tend(self) -> bool:
        """Take over a connection that was made, or begin to make one; whether it has just been connected."""
        if self._channel is not None:
            if self._is_overdue:
                self.receive()  # it may have come long ago, while nobody looked
            if self._is_overdue:
                self.drop(TimeoutError(f"no reply for {_PATIENCE:g} s"))
            return False
        if self._attempt is not None:
            if self._attempt.is_alive():
                return False
            self._attempt = None
            if self._made is not None:
                (self._channel, self.run, self.earlier_runs), self._made = self._made, None
                self._file = self._channel.sock.fileno()
                self.key_prefix = on_master(self._prefix, self.address, self.run)
                self.problem, self._pause = None, _FIRST_PAUSE
                return True
            self._next_attempt = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        if time.monotonic() >= self._next_attempt:
            self._attempt = threading.Thread(
                target=self._connect, name=f"connect {self.address}", daemon=True
            )
            self._attempt.start()
        return False

    @property
    def _is_overdue(self) -> bool:
        return bool(self._owed) and time.monotonic() - self._owed[0][1] > _PATIENCE

    def _connect(self) -> None:
        channel: SocketChannel | None = None
        try:
            connection = self._make_connection()
            connection.connect()
            opened = open_channel(connection)
            if not isinstance(opened, SocketChannel):
                raise ServerConfigurationError(
                    f"{self.address}: several masters need plain connections", address=self.address
                )
            channel = opened
            run, earlier = self._look_at(channel)
            scripts = [self._as_here(script) for script in all_masters_scripts()]
            known = self._call(channel, "SCRIPT", "EXISTS", *(s.sha for s in scripts)) if scripts else ()
            for script, is_known in zip(scripts, known, strict=True):
                if not is_known:
                    self._call(channel, "SCRIPT", "LOAD", script.source)
            if threading.current_thread() is self._attempt:
                self._made = channel, run, earlier
            else:
                channel.close()  # nobody waits for it any more
            return
        except (redis_errors.AuthenticationError, redis_errors.ResponseError) as error:
            self._refused(refusal(error))
        except RefusalError as error:
            self._refused(error)
        except DLockError as error:
            self.problem = self.fatal = error
        except Exception as error:
            self.problem = error
        if channel is not None:
            channel.close()

    def _refused(self, error: RefusalError) -> None:
        self.problem = error = RefusalError(str(error).partition(", with args beginning")[0])
        if error.code in _DENIED:
            self.fatal = AccessDeniedError(
                f"{self.address} refused access: {error}; check user, password and ACL of the URL",
                address=self.address,
            )

    @staticmethod
    def _call(channel: SocketChannel, *args: Argument) -> Any:
        channel.send(pack_command(args))
        reply = channel.read()
        if isinstance(reply, RefusalError):
            raise reply
        return reply

    def _look_at(self, channel: SocketChannel) -> tuple[str, list[str]]:
        """Refuse what must not be one of these masters (G8); which run this is, and which came before."""
        keys = RegistryKeys(self._prefix)
        info = _fields(self._call(channel, "INFO"))
        policy = info.get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise ServerConfigurationError(
                f"{self.address} has maxmemory-policy {policy!r}: it may throw trials away; "
                "set maxmemory-policy noeviction",
                address=self.address,
            )
        if info.get("loading", "0") != "0":
            raise ConnectionError("it is loading its data")
        if self._call(channel, "EXISTS", keys.info):
            raise MembershipError(
                f"{self.address} holds studies of a single server under this prefix, which workers with "
                "the URL of that one server use; choose another ?prefix=NAME",
                address=self.address,
                members=[self.address],
            )
        self.check_members(self._call(channel, "GET", keys.members))
        self._is_keydb = "mvcc_depth" in info
        run = info["run_id"][:8]
        flat = self._call(channel, "HGETALL", run_key(self._prefix, self.address))
        runs = dict(zip(flat[::2], flat[1::2], strict=True))
        runs.pop(run.encode(), None)
        return run, [name.decode() for name in sorted(runs, key=lambda name: int(runs[name]), reverse=True)]

    def check_members(self, found: bytes | None) -> None:
        """Raise MembershipError if the list of masters stored on a master is another one."""
        if found is None:
            return
        members = unpack_members(found)
        if members != self._members:
            raise MembershipError(
                f"{self.address} belongs to the masters {', '.join(members)}; this list is "
                f"{', '.join(self._members)}: give all workers the same list, with the same names",
                address=self.address,
                members=members,
            )

    def drop(self, error: BaseException) -> None:
        """Give up the connection; another one is made in the background."""
        channel, self._channel = self._channel, None
        if channel is not None:
            _logger.debug("connection to %s lost: %s", self.address, type(error).__name__)
            channel.close()
        self.problem = error if isinstance(error, Exception) else None
        for request, _ in self._owed:
            request.lost.add(self.index)
        self._owed.clear()
        self._next_attempt = 0.0

    def close(self) -> None:
        """Give up the connection, and an attempt to make one; `tend` makes another one."""
        self.drop(ConnectionError("closed"))
        self._attempt, made, self._made = None, self._made, None
        if made is not None:
            made[0].close()

    def __del__(self) -> None:
        if "_made" in self.__dict__:
            self.close()

    def forget(self) -> None:
        """In a forked child: leave the parent's connection to the parent."""
        self._channel = None
        self._owed = deque()
        self._attempt = self._made = None
        self._next_attempt = 0.0

    # -- requests --------------------------------------------------------------------------------

    def key(self, name: str) -> str:
        """A key's name on this master, in this run."""
        return self.key_prefix + name[len(self._prefix) :]

    def staged(self, name: str) -> str:
        """A key's name while it is being copied to this master, in this run."""
        return self.key_prefix + "+" + name[len(self._prefix) :]

    def send(self, packed: bytes, request: Request) -> None:
        """Send one command; its reply goes to the request."""
        if self._channel is None:
            request.lost.add(self.index)
            return
        if len(self._owed) >= _MOST_OWED:
            request.lost.add(self.index)
            self.drop(TimeoutError(f"{_MOST_OWED} replies outstanding"))
            return
        self._owed.append((request, time.monotonic()))
        try:
            self._channel.send(packed)
        except _LOST as error:
            self.drop(error)
        except BaseException as error:  # Ctrl-C: half of a command may be on its way
            self.drop(error)
            raise

    def send_plain(self, words: Sequence[Argument], request: Request) -> None:
        """Send a command whose keys do not belong to a run."""
        self.send(pack_command(tuple(words)), request)

    @property
    def run_key(self) -> str:
        """Hash: the runs in which this master had data."""
        return run_key(self._prefix, self.address)

    @property
    def owes(self) -> int:
        """How many replies are outstanding."""
        return len(self._owed)

    @property
    def slow(self) -> bool:
        """Whether a reply has been outstanding for longer than others take."""
        return bool(self._owed) and time.monotonic() - self._owed[0][1] > _SLOW

    def send_script(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], request: Request
    ) -> None:
        """Run a script; key names as `keys.py` makes them."""
        prefix, cut = self.key_prefix, len(self._prefix)
        self.run_script(script, [prefix + key[cut:] for key in keys], args, request)

    def run_script(
        self, script: Script, keys: Sequence[str], args: Sequence[Argument], request: Request
    ) -> None:
        """Run a script; key names as they are on the server."""
        self.send(pack_command(("EVALSHA", self._as_here(script).sha, len(keys), *keys, *args)), request)

    def _as_here(self, script: Script) -> Script:
        return on_keydb(script) if self._is_keydb else script

    def receive(self) -> None:
        """Take the replies that have arrived."""
        if self._channel is None:
            return
        try:
            replies = self._channel.read_available()
        except _LOST as error:
            self.drop(error)
            return
        except BaseException as error:  # Ctrl-C: what was read may be lost
            self.drop(error)
            raise
        for reply in replies:
            request, _ = self._owed.popleft()
            request.replies[self.index] = reply
            if isinstance(reply, RefusalError) and reply.code in ("NOSCRIPT", "LOADING"):
                self.drop(reply)  # connecting looks at the server again, and loads the scripts
                request.replies[self.index] = reply
                return


def _fields(info: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in info.decode("utf-8", "replace").splitlines())
    return {name: value.strip() for name, _, value in lines}
