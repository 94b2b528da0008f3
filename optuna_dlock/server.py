"""Which server a storage works on, and how connections to it are made; survives pickling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import redis

from optuna_dlock.channel import Connection
from optuna_dlock.errors import InvalidURLError
from optuna_dlock.keys import DEFAULT_PREFIX
from optuna_dlock.node import connection_factory
from optuna_dlock.url import parse_url, split_url

# Options of a client's connections that belong to that client: its retries and its notifications.
_NOT_TAKEN_OVER = (
    "himport_registry",
    "maint_notifications_config",
    "maint_notifications_pool_handler",
    "retry",
)


@dataclass(frozen=True)
class Server:
    """Where the data is and how to connect.

    Attributes:
        address: Host and port, or path; never a password.
        prefix: First part of all key names.
        masters: Each one, where the data is on several; else nothing.
    """

    address: str
    prefix: str
    redis_url: str | None = field(default=None, repr=False)
    embedded_path: str | None = None
    client: tuple[type, dict[str, Any]] | None = field(default=None, repr=False)
    masters: tuple[Server, ...] = ()

    def connection_factory(self, timeout: float) -> Callable[[], Connection]:
        """What makes connections; starts an embedded server on first use."""
        if self.client is not None:
            connection_class, options = self.client
            return lambda: connection_class(**options)
        if self.redis_url is not None:
            return connection_factory(self.redis_url, timeout)
        return self._embedded(timeout)

    def _embedded(self, timeout: float) -> Callable[[], Connection]:
        from optuna_dlock import embedded  # needs the extra `embedded`, and only here

        path = self.embedded_path or ""

        def connect() -> Connection:
            socket = embedded.acquire(path)
            return connection_factory("unix://" + quote(socket), timeout)()

        return connect


def server_of_url(url: str | Sequence[str] | None, prefix: str | None) -> Server:
    """The server, or the several masters, that a URL or a list of URLs names.

    Raises:
        InvalidURLError: If it cannot be understood, or if masters of one list have different prefixes.
    """
    urls = [url] if url is None or isinstance(url, str) else list(url)
    locations = [parse_url(one, prefix) for given in urls for one in _split(given)]
    servers = [
        Server(found.address, found.prefix, found.redis_url, found.embedded_path) for found in locations
    ]
    if len(servers) == 1:
        return servers[0]
    masters = tuple(sorted(servers, key=lambda server: server.address))
    addresses = [server.address for server in masters]
    shown = ",".join(addresses)
    if not masters:
        raise InvalidURLError("an empty list of masters: give one URL at least", url=None)
    if len(set(addresses)) < len(masters):
        raise InvalidURLError(f"a master is listed twice: {shown}", url=shown)
    if len({server.prefix for server in masters}) > 1:
        raise InvalidURLError(f"the masters {shown} have different prefixes", url=shown)
    if any(server.embedded_path for server in masters):
        raise InvalidURLError("an embedded server cannot be one of several masters", url=shown)
    return Server(shown, masters[0].prefix, masters=masters)


def _split(url: str | None) -> Sequence[str | None]:
    return split_url(url) if url is None or isinstance(url, str) else [url]


def server_of_client(client: redis.Redis, prefix: str | None) -> Server:
    """The server that a redis-py client is connected to; its own connections are not used."""
    pool = client.connection_pool
    # A bare object() is redis-py's "not given", which pickling would turn into something given.
    options = {n: v for n, v in pool.connection_kwargs.items() if type(v) is not object}
    address = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    for name in _NOT_TAKEN_OVER:
        options.pop(name, None)
    options["protocol"] = 2
    return Server(str(address), prefix or DEFAULT_PREFIX, client=(pool.connection_class, options))
