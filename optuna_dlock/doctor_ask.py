"""What the doctor asks the servers; it changes nothing there."""

from __future__ import annotations

import os
import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from optuna_dlock.doctor import Link, Master, Membership, Persistence, Replication, Report, judge
from optuna_dlock.errors import DLockError, InvalidURLError
from optuna_dlock.keys import RegistryKeys, StudyKeys, on_master, unpack_members
from optuna_dlock.url import Location, parse_url, split_url

_PINGS = 9
_TIME_QUESTIONS = 3
_now = time.time  # a test puts another clock here


def examine(urls: Sequence[str], timeout: float) -> Report:
    """Look at the servers that URLs name.

    Args:
        urls: Each names one server, or several as in keydb://h1:6373,h2:6374/0.
        timeout: Seconds to wait for a connection and for a reply; timeouts in a URL go before it.

    Raises:
        InvalidURLError: If a URL cannot be understood. A server that cannot be reached is a finding.
    """
    locations = [parse_url(one) for url in urls for one in split_url(url)]
    for location in locations:
        if location.embedded_path is not None and not os.path.exists(location.embedded_path):
            # Opening it would create it, and then find it in order.
            raise InvalidURLError(
                f"there is no embedded storage at {location.embedded_path}", url=location.address
            )
    # One after the other: threads of one process would measure each other's round trips.
    masters = [_gather(location, timeout) for location in locations]
    masters = _with_membership(masters, locations, timeout)
    return Report(tuple(masters), tuple(judge(masters)))


# -- gathering -------------------------------------------------------------------------------------


def _gather(location: Location, timeout: float) -> Master:
    embedded_path = location.embedded_path
    if embedded_path is None:
        return _ask(location.address, location.redis_url or "", timeout)
    from optuna_dlock import embedded  # needs the extra `embedded`, and only here

    try:
        return _ask(location.address, "unix://" + quote(embedded.acquire(embedded_path)), timeout)
    except DLockError as error:
        return Master(location.address, error=str(error))
    finally:
        embedded.release(embedded_path)


def _ask(address: str, redis_url: str, timeout: float) -> Master:
    try:
        client = _client(redis_url, timeout)
    except (redis.RedisError, OSError, ValueError) as error:
        return Master(address, error=_reason(error, None))
    try:
        return _told(address, client)
    except (redis.RedisError, OSError, ValueError) as error:
        return Master(address, error=_reason(error, client.connection_pool.connection_kwargs.get("password")))
    finally:
        client.close()


def _client(redis_url: str, timeout: float) -> redis.Redis:
    return redis.Redis.from_url(
        redis_url,
        protocol=2,
        retry=Retry(NoBackoff(), 0),
        decode_responses=True,
        encoding_errors="replace",
        socket_timeout=timeout,
        socket_connect_timeout=timeout,
    )


def _reason(error: Exception, password: str | None) -> str:
    """What an error says, without the password: a server that does not know AUTH quotes it in its reply."""
    text = " ".join(str(error).partition(", with args beginning")[0].split())
    if isinstance(error, redis.ResponseError) and password and password in text:
        text = "a reply that quotes the password"
    return f"{type(error).__name__}: {text.rstrip('.')}"


def _told(address: str, client: redis.Redis) -> Master:
    client.ping()  # opens the connection, and says whether we may be here at all
    info: dict[str, Any] = _permitted(client.info) or {}
    config = {
        name: (_permitted(client.config_get, name) or {}).get(name)
        for name in ("appendonly", "appendfsync", "save", "maxmemory-policy", "active-replica")
    }
    flavour, version = _flavour(info)
    return Master(
        address,
        flavour=flavour,
        version=version,
        run_id=str(info["run_id"]) if info.get("run_id") else None,
        round_trip_ms=_round_trip_ms(client),
        clock_offset_ms=_permitted(_clock_offset_ms, client),
        persistence=Persistence(
            _switch(config["appendonly"] or info.get("aof_enabled")), config["appendfsync"], config["save"]
        ),
        maxmemory_policy=config["maxmemory-policy"] or info.get("maxmemory_policy"),
        replication=_replication(info, config["active-replica"]) if "role" in info else None,
    )


def _permitted(question: Any, *args: Any) -> Any:
    """The answer, or None where the server refuses it; managed services have no CONFIG."""
    try:
        return question(*args)
    except redis.ResponseError:
        return None


def _flavour(info: dict[str, Any]) -> tuple[str | None, str | None]:
    if "valkey_version" in info:
        return "valkey", str(info["valkey_version"])
    if "redis_version" not in info:
        return None, None
    # KeyDB says "redis_version" too; only it has a section about its snapshots.
    return "keydb" if "mvcc_depth" in info else "redis", str(info["redis_version"])


def _round_trip_ms(client: redis.Redis) -> float:
    times = []
    for _ in range(_PINGS):
        start = time.perf_counter()
        client.ping()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1000


def _clock_offset_ms(client: redis.Redis) -> float:
    """By how much the server's clock is ahead, by the question that was answered soonest."""
    answers = []
    for _ in range(_TIME_QUESTIONS):
        sent = _now()
        seconds, microseconds = client.time()
        received = _now()
        answers.append((received - sent, seconds + microseconds / 1e6 - (sent + received) / 2))
    return min(answers)[1] * 1000


def _switch(value: Any) -> bool | None:
    return None if value is None else value in ("yes", 1)


def _replication(info: dict[str, Any], active_replica: str | None) -> Replication:
    # KeyDB: master_host, master_1_host, master_2_host, …
    masters = tuple(
        Link(f"{info[f'{name}_host']}:{info[f'{name}_port']}", info.get(f"{name}_link_status") == "up")
        for name in (key.removesuffix("_host") for key in info if re.fullmatch(r"master(_\d+)?_host", key))
    )
    replicas = tuple(
        Link(f"{value.get('ip')}:{value.get('port')}", value.get("state") == "online")
        for key, value in info.items()
        if re.fullmatch(r"slave\d+", key) and isinstance(value, dict)
    )
    role = "replica" if info["role"] == "slave" else str(info["role"])
    active = True if role == "active-replica" else _switch(active_replica)
    return Replication(role, active, True if len(masters) > 1 else None, masters, replicas)


# -- several masters: the list they keep, and how far each one is ---------------------------------


def _with_membership(
    masters: Sequence[Master], locations: Sequence[Location], timeout: float
) -> list[Master]:
    asked = [
        (at, _client(location.redis_url, timeout))
        for at, (master, location) in enumerate(zip(masters, locations, strict=True))
        if master.error is None and master.run_id is not None and location.redis_url is not None
    ]
    found = list(masters)
    try:
        prefixes = {at: locations[at].prefix for at, _ in asked}
        # Twice: what a master had not run yet at the second look, though another one had at the first.
        first, second = (
            {at: _permitted(_sections, client, prefixes[at], masters[at]) for at, client in asked}
            for _ in range(2)
        )
        latest: dict[str, int] = {}
        for sections in first.values():
            for name, count in (sections or {}).items():
                latest[name] = max(count, latest.get(name, 0))
        for at, client in asked:
            members = _permitted(client.get, RegistryKeys(prefixes[at]).members)
            own = second[at]
            if own is None:
                continue
            behind = [count - own[name] for name, count in latest.items() if name in own]
            found[at] = replace(
                masters[at],
                membership=Membership(
                    tuple(unpack_members(members.encode())) if members else (),
                    len(latest),
                    len(latest.keys() - own.keys()),
                    sum(count for count in behind if count > 0),
                ),
            )
    except (redis.RedisError, OSError):
        pass  # one of them went away just now: nothing is known of how far they are
    finally:
        for _, client in asked:
            client.close()
    return found


def _sections(client: redis.Redis, prefix: str, master: Master) -> dict[str, int]:
    """How many sections a master has run of each object, as the masters of one list name it."""
    here = on_master(prefix, master.address, (master.run_id or "")[:8])
    registry = RegistryKeys(prefix)
    ids = client.hkeys(here + registry.studies[len(prefix) :])
    listed: list[RegistryKeys | StudyKeys] = [registry, *(StudyKeys(prefix, int(number)) for number in ids)]
    found = {}
    for keys in listed:
        count = client.hget(here + keys.ballots[len(prefix) :], "s")
        if count is not None:
            found[keys.ballots] = int(count)
    return found
