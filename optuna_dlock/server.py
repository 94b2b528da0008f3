"""Which server a storage works on, and how connections to it are made; survives pickling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import redis

from optuna_dlock.channel import Connection
from optuna_dlock.keys import DEFAULT_PREFIX
from optuna_dlock.node import connection_factory
from optuna_dlock.url import parse_url

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
    """

    address: str
    prefix: str
    redis_url: str | None = field(default=None, repr=False)
    embedded_path: str | None = None
    client: tuple[type, dict[str, Any]] | None = field(default=None, repr=False)

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


def server_of_url(url: str | None, prefix: str | None) -> Server:
    """The server that a URL names.

    Raises:
        InvalidURLError: If it cannot be understood.
    """
    location = parse_url(url, prefix)
    return Server(location.address, location.prefix, location.redis_url, location.embedded_path)


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
