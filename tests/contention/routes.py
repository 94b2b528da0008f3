"""Storages that differ in how they reach the masters, and in what time they think it is."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from optuna_dlock import RedisLockedStorage
from optuna_dlock.ensemble import Ensemble
from optuna_dlock.server import Server

OWN_ROUTE = "tests.contention.routes:OwnRoute"


class OwnRoute(RedisLockedStorage):
    """Reaches servers through proxies, under the names by which all others know them.

    Args:
        detour: Port of a server -> port of the proxy through which this process reaches it.
        skew: Seconds by which this process's clock of ballots is ahead.
    """

    def __init__(
        self, url: str, *, detour: Mapping[int, int] | None = None, skew: float = 0.0, **options: Any
    ) -> None:
        self._detour, self._skew = detour or {}, skew
        super().__init__(url, **options)

    def _connect(self) -> None:
        masters = tuple(self._rerouted(master) for master in self._server.masters)
        self._server = replace(self._rerouted(self._server), masters=masters)
        super()._connect()
        if self._skew:
            for ensemble in (self._node, self._locks._ensemble):  # type: ignore[attr-defined]
                assert isinstance(ensemble, Ensemble)
                ensemble._clock = self._wrong_time
                ensemble._start_anew()

    def _wrong_time(self) -> float:
        return time.time() + self._skew

    def _rerouted(self, server: Server) -> Server:
        for port, proxy in self._detour.items():
            if server.redis_url and f":{port}/" in server.redis_url:
                return replace(server, redis_url=server.redis_url.replace(f":{port}/", f":{proxy}/"))
        return server
