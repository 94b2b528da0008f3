"""Whether servers are fit to be masters of a storage, and what to change on those that are not.

`doctor_ask` asks each server, `judge` draws the findings, `doctor_view` shows both. It does not look at
trials (`audit` does), and tells of this moment only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LEVELS = ("ok", "warn", "fail")

_LARGEST_CLOCK_OFFSET_MS = 1000.0


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
class Membership:
    """What a server holds as one of several masters.

    Attributes:
        members: The list of masters stored on it; () if it is none of several.
        objects: How many replicated objects (studies, and the registry) any of these masters has.
        missing: How many of them it has no data of.
        behind: How many sections it has not run yet, of the objects that it has; what was still under way
            when it was asked does not count.
    """

    members: tuple[str, ...]
    objects: int = 0
    missing: int = 0
    behind: int = 0


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
    membership: Membership | None = None


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
    yield from _judge_lists(masters)
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
        yield from _judge_persistence(master.persistence)
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
    if master.membership is not None and master.membership.objects:
        yield from _judge_membership(master.membership)


def _judge_persistence(persistence: Persistence) -> Iterator[tuple[str, str, str]]:
    turn_on = "CONFIG SET appendonly yes, and in its configuration file"
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


def _judge_membership(membership: Membership) -> Iterator[tuple[str, str, str]]:
    repaired = "a worker that uses them brings it up to date; look again in a minute"
    if membership.missing:
        studies = f"{membership.missing} of {_plural(membership.objects, 'object')} (studies, registry)"
        yield "warn", f"no data of {studies}: it does not vote there", repaired
    if membership.behind:
        yield "warn", f"{_plural(membership.behind, 'section')} behind the others", repaired


def _judge_lists(masters: Sequence[Master]) -> Iterator[Finding]:
    """Whether the masters belong together, and are all that do."""
    named = {master.address for master in masters}
    for master in masters:
        members = master.membership.members if master.membership is not None else ()
        if members and set(members) != named:
            yield Finding(
                "fail",
                master.address,
                f"belongs to the masters {', '.join(members)}, not to those named here",
                "give their whole list, with the same names, here and to all workers",
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
