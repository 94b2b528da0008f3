"""The table, the JSON, and which targets were met."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.peers import OURS
from bench.plan import Case, Target
from bench.runner import Outcome, Outcomes

_Results = Mapping[str, Outcomes]


@dataclass(frozen=True)
class Verdict:
    """A target and what was measured; `met` is None where nothing was."""

    target: Target
    measured: float | None

    @property
    def met(self) -> bool | None:
        """Whether the target was reached."""
        if self.measured is None:
            return None
        if self.target.at_least:
            return self.measured >= self.target.bound
        return self.measured <= self.target.bound

    def __str__(self) -> str:
        word = {True: "met", False: "NOT MET", None: "not measured"}[self.met]
        measured = "" if self.measured is None else f" ({_number(self.measured)})"
        return f"{self.target.text}: {word}{measured}"


def verdicts(case: Case, results: _Results) -> list[Verdict]:
    """Judge the targets of a case; those against a peer that was not asked for are left out."""
    return [
        Verdict(target, _measured(case, target, results))
        for target in case.targets
        if target.peer is None or target.peer in results.get(target.case or case.key, {})
    ]


def _measured(case: Case, target: Target, results: _Results) -> float | None:
    ours = results[case.key].get(OURS, Outcome())
    if target.extra is not None:
        return ours.extra.get(target.extra)
    if target.peer is None:
        return ours.value
    other = results.get(target.case or case.key, {}).get(target.peer, Outcome())
    if ours.value is None or not other.value:
        return None
    return other.value / ours.value if target.inverse else ours.value / other.value


_PLACES = {"any": "", "same": " (same CPU)", "split": " (two CPUs)"}


def table(case: Case, results: _Results, *, pinned: bool) -> list[str]:
    """One block: a line for each peer, then the targets."""
    outcomes = results[case.key]
    place = _PLACES[case.cpu] if pinned or case.cpu == "any" else " (not pinned)"
    order = "more" if case.higher_is_better else "less"
    lines = [
        f"{case.key}  {case.title}{place}; {case.unit}, {order} is better",
        _row("", case.unit, "min - max", "ours/peer", ""),
    ]
    ours = outcomes.get(OURS, Outcome()).value
    for peer, outcome in outcomes.items():
        if outcome.value is None:
            lines.append(_row(peer, "-", "", "", "; ".join(outcome.failures) or "not measured"))
            continue
        ratio = f"{_number(ours / outcome.value)} x" if ours and outcome.value and peer != OURS else ""
        notes = [f"{name} {_number(value)}" for name, value in outcome.extra.items()]
        if outcome.audit is not None:
            notes.append(f"audit {outcome.audit}" if outcome.audit == "ok" else f"AUDIT: {outcome.audit}")
        notes += outcome.failures
        spread = " - ".join(_number(value) for value in outcome.spread)
        lines.append(_row(peer, _number(outcome.value), spread, ratio, ", ".join(notes)))
    lines += [f"  target {verdict}" for verdict in verdicts(case, results)]
    return lines


def _row(name: str, value: str, spread: str, ratio: str, notes: str) -> str:
    return f"  {name:<13}{value:>10}  {spread:>19}  {ratio:>10}  {notes}".rstrip()


def _number(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.3g}"


def summary(cases: Sequence[Case], results: _Results) -> list[str]:
    """How many targets were met, and which were not."""
    judged = [(case, v) for case in cases for v in verdicts(case, results)]
    met = sum(verdict.met is True for _, verdict in judged)
    lines = [f"{met} of {len(judged)} targets met"]
    lines += [f"  {case.key}: {verdict}" for case, verdict in judged if verdict.met is not True]
    wrong = [
        f"  {case.key}: {peer}: {outcome.audit}"
        for case in cases
        for peer, outcome in results[case.key].items()
        if outcome.audit not in (None, "ok")
    ]
    return lines + (["failed audits", *wrong] if wrong else [])


def as_json(
    environment: Mapping[str, str], options: Mapping[str, Any], cases: Sequence[Case], results: _Results
) -> dict[str, Any]:
    """Everything that was measured."""
    return {
        "environment": dict(environment),
        "options": dict(options),
        "cases": [
            {
                "key": case.key,
                "title": case.title,
                "unit": case.unit,
                "cpu": case.cpu,
                "peers": {peer: _outcome_json(case, peer, o) for peer, o in results[case.key].items()},
                "targets": [
                    {"target": v.target.text, "measured": v.measured, "met": v.met}
                    for v in verdicts(case, results)
                ],
            }
            for case in cases
        ],
    }


def _outcome_json(case: Case, peer: str, outcome: Outcome) -> dict[str, Any]:
    return {
        "median": outcome.value,
        "values": [figure.value for figure in outcome.figures],
        "extra": outcome.extra,
        "audit": outcome.audit,
        "failures": outcome.failures,
        "params": case.params_for(peer),
    }
