"""What the doctor saw, for people and for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from optuna_dlock.doctor import Link, Master, Membership, Persistence, Replication, Report

_WIDTH = 100


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
    if master.membership is not None and master.membership.objects:
        yield "one of", ", ".join(master.membership.members) or "not noted yet"
        yield "data", _data_text(master.membership)


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


def _data_text(membership: Membership) -> str:
    has = membership.objects - membership.missing
    return f"{has} of {membership.objects} objects, {membership.behind} sections behind"


def _on_off(value: bool | None) -> str:
    return "unknown" if value is None else "on" if value else "off"


def _up_down(link: Link) -> str:
    return "up" if link.up else "down"
