"""What must be true of a study's trials, checked from outside: numbers, states, acknowledgements (G1, G2)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from optuna.trial import FrozenTrial, TrialState


@dataclass(frozen=True)
class Audit:
    """What is wrong with a study's trial numbers.

    Attributes:
        missing: Numbers below the highest one that no trial has.
        doubled: Numbers that more than one trial has.
        total: How many numbers there were, doubled ones counted each time.
    """

    missing: tuple[int, ...]
    doubled: tuple[int, ...]
    total: int

    @property
    def ok(self) -> bool:
        """Whether the numbers are exactly 0..total-1."""
        return not self.missing and not self.doubled


def audit_numbers(numbers: Iterable[int]) -> Audit:
    """Compare numbers with 0..n-1.

    It cannot know of trials lost at the upper end: compare `total` with what was created.
    """
    counts = Counter(numbers)
    missing = tuple(n for n in range(max(counts, default=-1) + 1) if n not in counts)
    doubled = tuple(sorted(n for n, count in counts.items() if count > 1))
    return Audit(missing, doubled, counts.total())


def zombies(trials: Sequence[FrozenTrial], now: datetime, after: float) -> tuple[int, ...]:
    """Numbers of trials RUNNING for more than `after` seconds at `now` (local, naive: as Optuna's times)."""
    return tuple(
        t.number
        for t in trials
        if t.state == TrialState.RUNNING
        and t.datetime_start is not None
        and (now - t.datetime_start).total_seconds() > after
    )


@dataclass
class Acknowledged:
    """What the storage told one worker.

    Attributes:
        numbers: Numbers of the trials it was given.
        finished: State and value of each trial whose finish was acknowledged.
    """

    numbers: list[int] = field(default_factory=list)
    finished: dict[int, tuple[TrialState, float | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class Check:
    """One line of the audit of a run."""

    name: str
    ok: bool
    text: str


def audit_run(
    trials: Sequence[FrozenTrial],
    workers: Mapping[str, Acknowledged],
    expected: int | None,
    silent: int = 0,
) -> list[Check]:
    """Compare what is on the server with what the workers were told.

    Args:
        trials: All trials of the study, which nobody but these workers used.
        workers: What each worker, by name, was told.
        expected: How many trials there must be; None if the run was interrupted.
        silent: How many workers died between being sent for a trial and reporting its number; each may
            have created one.
    """
    return [
        _check_numbers(trials, expected),
        _check_acknowledged(trials, workers, silent),
        _check_finished(trials),
        _check_results(trials, workers),
    ]


def _check_numbers(trials: Sequence[FrozenTrial], expected: int | None) -> Check:
    audit = audit_numbers(t.number for t in trials)
    wrong = []
    if audit.missing:
        wrong.append(f"missing {_some(audit.missing)}")
    if audit.doubled:
        wrong.append(f"given twice {_some(audit.doubled)}")
    if expected is not None and audit.total != expected:
        wrong.append(f"{audit.total} trials instead of {expected}")
    text = f"exactly 0..{audit.total - 1}: none missing, none twice" if audit.total else "no trials"
    return Check("numbers", not wrong, "; ".join(wrong) or text)


def _check_acknowledged(
    trials: Sequence[FrozenTrial], workers: Mapping[str, Acknowledged], silent: int
) -> Check:
    given = Counter(n for told in workers.values() for n in told.numbers)
    on_server = {t.number for t in trials}
    wrong = []
    if twice := sorted(n for n, count in given.items() if count > 1):
        wrong.append(f"given to two workers: {_some(twice)}")
    if lost := sorted(set(given) - on_server):
        wrong.append(f"given to a worker, but not on the server: {_some(lost)}")
    unreported = sorted(on_server - set(given))
    if len(unreported) > silent:
        wrong.append(f"on the server, but given to no worker: {_some(unreported)}")
    text = f"{given.total()} numbers given to {len(workers)} workers, each to one; all are on the server"
    if unreported:
        text += f" ({_some(unreported)}: whose worker was killed before it could report)"
    return Check("acknowledged", not wrong, "; ".join(wrong) or text)


def _check_finished(trials: Sequence[FrozenTrial]) -> Check:
    open_ = [t.number for t in trials if not t.state.is_finished()]
    states = Counter(t.state.name for t in trials)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(states.items())) or "nothing to finish"
    return Check("finished", not open_, f"{counts}; not finished: {_some(open_) if open_ else 'none'}")


def _check_results(trials: Sequence[FrozenTrial], workers: Mapping[str, Acknowledged]) -> Check:
    by_number = {t.number: t for t in trials}
    wrong, count = [], 0
    for name, told in workers.items():
        for number, result in told.finished.items():
            count += 1
            trial = by_number.get(number)
            if trial is None:
                continue  # reported by the check of acknowledged numbers
            if (trial.state, trial.value) != result or trial.user_attrs.get("worker") != name:
                wrong.append(number)
    return Check(
        "results",
        not wrong,
        f"differ from what the worker was told: {_some(wrong)}"
        if wrong
        else f"{count} finishes acknowledged, all on the server with the same state, value and worker",
    )


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 10} more" if len(numbers) > 10 else ""
    return ", ".join(map(str, numbers[:10])) + more
