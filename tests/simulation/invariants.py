"""What every schedule must keep (G1-G6 of design.md), checked at each read and at the end.

Every creation has a tag, every finish a value, and every attribute counts up: so one can tell whose is whose.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from optuna.trial import FrozenTrial, TrialState


class Violation(AssertionError):
    """A guarantee was broken."""


class Finish(NamedTuple):
    """What a call told a trial to become."""

    state: TrialState
    value: float | None


def tag_of(trial: FrozenTrial) -> str:
    """What tells which call created a trial."""
    return str(trial.user_attrs.get("tag", trial.datetime_start))


def written_to(trial: FrozenTrial) -> dict[str, int]:
    """What clients have written to a trial; each only ever writes more than before."""
    return {
        **{name: value for name, value in trial.user_attrs.items() if name != "tag"},
        **{name: int(value) for name, value in trial.params.items()},
        **{f"c{step}/i": int(value) for step, value in trial.intermediate_values.items()},
    }


def _finish_of(trial: FrozenTrial) -> Finish:
    return Finish(trial.state, trial.values[0] if trial.values else None)


def _record(trial: FrozenTrial) -> tuple[object, ...]:
    """All that must not change once a trial is finished."""
    return tag_of(trial), _finish_of(trial), tuple(sorted(written_to(trial).items())), trial.datetime_complete


class History:
    """What was told to whom in one schedule: the calls, what they returned, what reads have shown."""

    def __init__(self) -> None:
        self.tried: set[str] = set()  # tags of all creations that were begun
        self.numbers: dict[str, int] = {}  # tag -> number, as acknowledged
        self.waiting: set[str] = set()  # tags of those that began as WAITING
        self.finishes: dict[int, Finish] = {}  # acknowledged
        self.maybe_finishes: dict[int, list[Finish]] = {}  # begun, and not refused
        self.claims: dict[int, str] = {}  # number -> client, as acknowledged
        self.maybe_claims: dict[int, list[str]] = {}  # begun, and not lost
        self.attrs: dict[tuple[int, str], int] = {}  # acknowledged, or shown by a read; -1: the study's
        self.tried_attrs: dict[tuple[int, str], int] = {}
        self.tags: dict[int, str] = {}  # shown by a read
        self.records: dict[int, tuple[object, ...]] = {}  # of finished trials, shown by a read
        self.most = 0  # trials shown by a read
        self.reads = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was acknowledged and nothing shown."""
        return not (self.numbers or self.attrs or self.tags)

    # -- what clients were told ------------------------------------------------------------------

    def created(self, tag: str, number: int) -> None:
        """G1, G6: a number is given once."""
        other = next((tag for tag, known in self.numbers.items() if known == number), None)
        if other is not None and other != tag:
            raise Violation(f"G1: number {number} was given to {other} and to {tag}")
        if self.tags.get(number, tag) != tag:
            raise Violation(f"G1: number {number} was given to {tag}; a read had shown {self.tags[number]}")
        self.numbers[tag] = number

    def finished(self, number: int, finish: Finish) -> None:
        """G3: of all that finish a trial, one succeeds."""
        known = self.finishes.get(number)
        if known is not None:
            raise Violation(f"G3: trial {number} was finished twice: {known} and {finish}")
        self.finishes[number] = finish

    def claimed(self, number: int, client: str) -> None:
        """G4: of all that claim a trial, one succeeds."""
        if number in self.claims:
            raise Violation(f"G4: trial {number} was claimed by {self.claims[number]} and by {client}")
        self.claims[number] = client

    def lost(self, number: int, client: str) -> None:
        """G6: who is told that another one has a trial did not get it by itself."""
        others = [name for name in self.maybe_claims.get(number, ()) if name != client]
        if number not in self.finishes and not self.maybe_finishes.get(number) and not others:
            raise Violation(f"G6: {client} lost trial {number} to nobody")

    def refused(self, number: int) -> None:
        """G3, G6: who is told that a trial is finished did not finish it by itself."""
        if number not in self.finishes and not self.maybe_finishes.get(number):
            raise Violation(f"G3: trial {number} was said to be finished, and nobody finished it")

    def kept(self, number: int, client: str, value: int) -> None:
        """An attribute was acknowledged."""
        self.attrs[number, client] = max(value, self.attrs.get((number, client), 0))

    # -- what reads show ---------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What a read that starts now has to show."""
        return Snapshot(
            dict(self.numbers),
            dict(self.finishes),
            set(self.claims),
            dict(self.attrs),
            dict(self.tags),
            dict(self.records),
            self.most,
        )

    def read(self, trials: Sequence[FrozenTrial], known: Snapshot) -> None:
        """G1, G2, G3, G5: check what a read has shown that started when `known` was known."""
        self.reads += 1
        numbers = [trial.number for trial in trials]
        if numbers != list(range(len(trials))):
            raise Violation(f"G1: a read shows the numbers {numbers}")
        if len(trials) < known.most:
            raise Violation(f"G5: a read shows {len(trials)} trials, an earlier one {known.most}")
        tags = Counter(map(tag_of, trials))
        for tag, count in tags.items():
            if count > 1 or tag not in self.tried:
                raise Violation(f"G6: {count} trials of creation {tag}: {trials}")
        for tag, number in known.numbers.items():
            if number >= len(trials) or tag_of(trials[number]) != tag:
                raise Violation(f"G2: trial {number} of creation {tag} is not among {trials}")
        for trial in trials:
            self._look_at(trial, known)
        self.most = max(self.most, len(trials))

    def _look_at(self, trial: FrozenTrial, known: Snapshot) -> None:
        number, tag = trial.number, tag_of(trial)
        if self.tags.setdefault(number, tag) != tag:
            raise Violation(f"G1: number {number} is that of {tag}, and was that of {self.tags[number]}")
        was_finished = number in known.records or number in known.finishes
        if was_finished and not trial.state.is_finished():
            raise Violation(f"G3: trial {number} was finished, and is {trial.state.name}")
        if trial.state.is_finished():
            finish = _finish_of(trial)
            told = self.finishes.get(number)
            if finish != told and (told is not None or finish not in self.maybe_finishes.get(number, ())):
                raise Violation(f"G3: trial {number} is {finish}; told was {told}")
            record = _record(trial)
            if self.records.setdefault(number, record) != record:
                raise Violation(f"G3: finished trial {number} is {record}, and was {self.records[number]}")
        elif trial.state is TrialState.WAITING and number in known.claims:
            raise Violation(f"G4: trial {number} was claimed, and is WAITING")
        elif (
            trial.state is TrialState.RUNNING
            and tag in self.waiting
            and number not in self.claims
            and not self.maybe_claims.get(number)
        ):
            raise Violation(f"G4: trial {number} is RUNNING, and nobody claimed it")
        self.look_at_attrs(number, written_to(trial), known)

    def look_at_attrs(self, number: int, attrs: Mapping[str, Any], known: Snapshot) -> None:
        """G2, G5: the attributes of a trial, or of the study (-1)."""
        for (of, client), value in known.attrs.items():
            if of == number and attrs.get(client, 0) < value:
                raise Violation(f"G2: attribute {client} of trial {number} was {value}, and is {attrs}")
        for client, value in attrs.items():
            if value > self.tried_attrs.get((number, client), 0):
                raise Violation(f"attribute {client} of trial {number} is {value}, which nobody wrote")
            self.kept(number, client, value)

    def check_pending(self, trial: FrozenTrial, client: str, written: Mapping[str, int]) -> None:
        """G5: a client sees its own deferred writes."""
        seen = written_to(trial)
        if any(seen.get(what, 0) < value for what, value in written.items()):
            raise Violation(f"G5: {client} wrote {written} to {trial.number}, and sees {seen}")


class Snapshot(NamedTuple):
    """What was acknowledged, or shown, at one time."""

    numbers: dict[str, int]
    finishes: dict[int, Finish]
    claims: set[int]
    attrs: dict[tuple[int, str], int]
    tags: dict[int, str]
    records: dict[int, tuple[object, ...]]
    most: int
