"""Whether servers are fit to be masters of a storage, and what to change on those that are not.

Three steps: `examine` asks each server (and changes nothing there), `judge` draws the findings, `report_text`
shows both. It does not look at studies (`audit` does), and tells of this moment only.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import textwrap
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from optuna_dlock.errors import DLockError, InvalidURLError
from optuna_dlock.url import Location, parse_url

LEVELS = ("ok", "warn", "fail")

_PINGS = 9
_TIME_QUESTIONS = 3
_LARGEST_CLOCK_OFFSET_MS = 1000.0
_WIDTH = 100
_now = time.time  # a test puts another clock here


@dataclass(frozen=True)
class Link:
    """A replication connection to another server: who it is, and whether data flows."""

    address: str
    up: bool


@dataclass(frozen=True)
class Replication:
    """Where a server copies from and to; None is unknown.

    Attributes:
        role: "master", "replica" or "active-replica" (KeyDB: it copies and takes writes).
        active_replica, multi_master: Options of KeyDB. It does not tell the second one: known only from a
            server that copies from several.
        masters: Where it copies from.
        replicas: Who copies from it.
    """

    role: str
    active_replica: bool | None
    multi_master: bool | None
    masters: tuple[Link, ...]
    replicas: tuple[Link, ...]


@dataclass(frozen=True)
class Persistence:
    """What survives a restart of the server; None is unknown.

    Attributes:
        appendonly: Whether there is an append-only file.
        appendfsync: When it is forced to disk.
        save: Points at which the whole is saved, as `CONFIG GET save` tells them; "" for none.
    """

    appendonly: bool | None
    appendfsync: str | None
    save: str | None


@dataclass(frozen=True)
class Master:
    """What one server told; None is unknown.

    Attributes:
        address: As people may see it: no user, no password.
        error: Why nothing is known of it; None if it answered.
        clock_offset_ms: By how much its clock is ahead of ours; off by half a round trip at most.
    """

    address: str
    error: str | None = None
    flavour: str | None = None
    version: str | None = None
    run_id: str | None = None
    round_trip_ms: float | None = None
    clock_offset_ms: float | None = None
    persistence: Persistence | None = None
    maxmemory_policy: str | None = None
    replication: Replication | None = None


@dataclass(frozen=True)
class Finding:
    """One judgement.

    Attributes:
        level: One of `LEVELS`.
        address: Of the master it is about; None if it is about all of them.
        text: What was found.
        change: What to do about it; "" if nothing.
    """

    level: str
    address: str | None
    text: str
    change: str = ""


@dataclass(frozen=True)
class Report:
    """What was seen and what follows from it."""

    masters: tuple[Master, ...]
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed; there may be warnings."""
        return not self._count("fail")

    @property
    def verdict(self) -> str:
        """All of it in one line."""
        warnings = _plural(self._count("warn"), "warning")
        if not self.ok:
            return f"fail: {_plural(self._count('fail'), 'problem')}, {warnings}"
        return f"ok: {_plural(len(self.masters), 'master')}, {warnings}"

    def _count(self, level: str) -> int:
        return sum(finding.level == level for finding in self.findings)


def examine(urls: Sequence[str], timeout: float) -> Report:
    """Look at the servers that URLs name.

    Args:
        urls: Each names one server, or several as in keydb://h1:6373,h2:6374/0.
        timeout: Seconds to wait for a connection and for a reply; timeouts in a URL go before it.

    Raises:
        InvalidURLError: If a URL cannot be understood. A server that cannot be reached is a finding.
    """
    locations = [parse_url(url) for url in _split(list(urls))]
    for location in locations:
        if location.embedded_path is not None and not os.path.exists(location.embedded_path):
            # Opening it would create it, and then find it in order.
            raise InvalidURLError(
                f"there is no embedded storage at {location.embedded_path}", url=location.address
            )
    # One after the other: threads of one process would measure each other's round trips.
    masters = tuple(_gather(location, timeout) for location in locations)
    return Report(masters, tuple(judge(masters)))


def _split(urls: list[str]) -> list[str]:
    """URLs of one server each: a URL of several hosts stands for one URL per host, all else shared."""
    found: list[str] = []
    for url in urls:
        scheme, separator, rest = url.partition("://")
        netloc = re.split("[/?#]", rest, maxsplit=1)[0]
        user, at, hosts = netloc.rpartition("@")
        if scheme.lower() in ("unix", "embedded") or "," not in netloc.partition("@")[2] + hosts:
            found.append(url)
        elif "@" in user:  # a@one,b@two; or a password that is not percent-encoded, so nothing is shown
            raise InvalidURLError(
                f"'{scheme}://***' has several '@': all hosts share the user and password before the first "
                "one, as in keydb://user:password@h1,h2/0; for others give one URL per server",
                url=f"{scheme}://***",
            )
        else:
            tail = rest[len(netloc) :]
            found.extend(f"{scheme}{separator}{user}{at}{host}{tail}" for host in hosts.split(","))
    return found


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
        client = redis.Redis.from_url(
            redis_url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            decode_responses=True,
            encoding_errors="replace",
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
        )
    except (redis.RedisError, OSError, ValueError) as error:
        return Master(address, error=_reason(error, None))
    try:
        return _told(address, client)
    except (redis.RedisError, OSError, ValueError) as error:
        return Master(address, error=_reason(error, client.connection_pool.connection_kwargs.get("password")))
    finally:
        client.close()


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


# -- judging: pure ---------------------------------------------------------------------------------


def judge(masters: Sequence[Master]) -> Iterator[Finding]:
    """Findings about each master, then about all together."""
    for master in masters:
        findings = [
            Finding(level, master.address, text, change) for level, text, change in _judge_one(master)
        ]
        yield from findings or [Finding("ok", master.address, "nothing to change")]
    same = _same_servers(masters)
    for addresses, run_id in same:
        yield Finding(
            "fail",
            None,
            f"{' and '.join(addresses)} are one server (run {run_id[:8]})",
            "name each server once: a majority must be one of different servers",
        )
    yield _judge_count(len(masters) - sum(len(addresses) - 1 for addresses, _ in same))


def _judge_one(master: Master) -> Iterator[tuple[str, str, str]]:
    """Level, text and change of what is wrong with one master."""
    if master.error is not None:
        yield (
            "fail",
            f"not usable: {master.error}",
            "check that it runs, its address, the firewall, user and password",
        )
        return
    policy = master.maxmemory_policy
    if policy is None:
        yield "warn", "maxmemory-policy is unknown", "make sure it is noeviction"
    elif policy != "noeviction":
        yield (
            "fail",
            f"maxmemory-policy {policy}: it may throw trials away",
            "CONFIG SET maxmemory-policy noeviction, and in its configuration file",
        )
    if master.persistence is not None:
        active = master.replication is not None and master.replication.role == "active-replica"
        yield from _judge_persistence(master.persistence, active)
    offset = master.clock_offset_ms
    if offset is not None and abs(offset) > _LARGEST_CLOCK_OFFSET_MS:
        direction = "ahead of" if offset > 0 else "behind"
        yield (
            "warn",
            f"its clock is {abs(offset) / 1000:.1f} s {direction} that of this machine",
            "synchronise both, as with chrony or NTP",
        )
    if master.replication is not None:
        yield from _judge_replication(master.replication)


def _judge_persistence(persistence: Persistence, active: bool) -> Iterator[tuple[str, str, str]]:
    turn_on = "CONFIG SET appendonly yes, and in its configuration file"
    if active:  # KeyDB's append-only file does not keep what came from the other master
        turn_on = "CONFIG SET save '60 1', and in its configuration file"
    if persistence.appendonly is None:
        yield "warn", "persistence is unknown", "make sure that it keeps an append-only file"
    elif not persistence.appendonly and persistence.save:
        yield "warn", "no append-only file: a crash loses what came after the last save point", turn_on
    elif not persistence.appendonly:
        saved = "no persistence" if persistence.save == "" else "no append-only file, save points unknown"
        yield "warn", f"{saved}: a restart loses all studies", turn_on
    elif persistence.appendfsync == "no":
        yield (
            "warn",
            "appendfsync no: a crash of its machine can lose half a minute",
            "CONFIG SET appendfsync everysec, or always",
        )


def _judge_replication(replication: Replication) -> Iterator[tuple[str, str, str]]:
    if replication.role == "replica":
        origin = ", ".join(link.address for link in replication.masters)
        change = f"name {origin or 'its master'} instead, or REPLICAOF NO ONE here"
        if replication.active_replica is not None:
            change += ", or start this KeyDB with active-replica yes"
        yield "fail", f"a replica of {origin or 'another server'}, no master", change
        return
    for link in replication.masters:
        if not link.up:
            yield (
                "warn",
                f"its replication link to {link.address} is down",
                "check that one, the network between them, and masterauth",
            )


def _same_servers(masters: Sequence[Master]) -> list[tuple[list[str], str]]:
    """Addresses that lead to one server, and its run."""
    by_run: dict[str, list[str]] = {}
    for master in masters:
        if master.run_id is not None:
            by_run.setdefault(master.run_id, []).append(master.address)
    return [(addresses, run_id) for run_id, addresses in by_run.items() if len(addresses) > 1]


def _judge_count(count: int) -> Finding:
    if count == 1:
        return Finding("ok", None, "1 master: workers wait while it is down")
    if count == 2:
        return Finding("warn", None, "2 masters: works, but stops when either is down", "add a third one")
    survived = (count - 1) // 2
    text = f"{count} masters: works while no more than {survived} of them {_are(survived)} down"
    if count % 2 == 0:
        return Finding("warn", None, f"{text}, as {count - 1} would", "add one, or leave one out")
    return Finding("ok", None, text)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


# -- rendering -------------------------------------------------------------------------------------


def report_json(report: Report) -> str:
    """The report for programs."""
    content = {"ok": report.ok, "verdict": report.verdict, **asdict(report)}
    return json.dumps(content, ensure_ascii=False, indent=2)


def report_text(report: Report) -> str:
    """The report for people, 100 columns wide."""
    lines: list[str] = []
    for master in report.masters:
        lines.append(master.address)
        for name, value in _rows(master):
            lines += _wrapped(f"  {name:<13}", value)
        lines.append("")
    lines.append("findings")
    subjects = [finding.address or "all" for finding in report.findings]
    width = max(map(len, subjects))
    for finding, subject in zip(report.findings, subjects, strict=True):
        text = finding.text + (f"; {finding.change}" if finding.change else "")
        lines += _wrapped(f"  {finding.level:<4}  {subject:<{width}}  ", text)
    return "\n".join([*lines, "", f"verdict: {report.verdict}"])


def _wrapped(head: str, text: str) -> list[str]:
    indent = " " * min(len(head), _WIDTH // 2)
    return textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _rows(master: Master) -> Iterator[tuple[str, str]]:
    if master.error is not None:
        yield "error", master.error
        return
    yield "server", " ".join(filter(None, (master.flavour, master.version))) or "unknown"
    yield "run", master.run_id[:8] if master.run_id else "unknown"
    yield "round trip", _ms(master.round_trip_ms, ".2f")
    yield "clock", _ms(master.clock_offset_ms, "+.2f")
    yield "persistence", _persistence_text(master.persistence)
    yield "eviction", master.maxmemory_policy or "unknown"
    yield "replication", _replication_text(master.replication)
    if links := _links_text(master.replication):
        yield "links", links


def _ms(value: float | None, form: str) -> str:
    return "unknown" if value is None else f"{round(value, 2) + 0.0:{form}} ms"  # + 0.0: no "-0.0"


def _persistence_text(persistence: Persistence | None) -> str:
    if persistence is None:
        return "unknown"
    aof = _on_off(persistence.appendonly)
    if persistence.appendonly:
        aof += f" (appendfsync {persistence.appendfsync or 'unknown'})"
    save = "unknown" if persistence.save is None else persistence.save or "none"
    return f"AOF {aof}, RDB save points {save}"


def _replication_text(replication: Replication | None) -> str:
    if replication is None:
        return "unknown"
    parts = [replication.role]
    if replication.active_replica is not None:  # a KeyDB
        if replication.role != "active-replica":
            parts.append(f"active-replica {_on_off(replication.active_replica)}")
        parts.append(f"multi-master {_on_off(replication.multi_master)}")
    return ", ".join(parts)


def _links_text(replication: Replication | None) -> str:
    if replication is None:
        return ""
    parts = [f"from {link.address} {_up_down(link)}" for link in replication.masters]
    parts += [f"to {link.address} {_up_down(link)}" for link in replication.replicas]
    return ", ".join(parts)


def _on_off(value: bool | None) -> str:
    return "unknown" if value is None else "on" if value else "off"


def _up_down(link: Link) -> str:
    return "up" if link.up else "down"
