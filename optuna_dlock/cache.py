"""What this process knows of a study's trials, brought up to date by differences. No I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Sequence
from operator import attrgetter

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.codec import unpack_trial
from optuna_dlock.distributions import DistributionTable
from optuna_dlock.errors import CorruptRecordError
from optuna_dlock.live_trial import BASE, LiveTrial

_by_number = attrgetter("_number")
_FINISHED_STATES = tuple(state for state in TrialState if state.is_finished())

StateKey = tuple[TrialState, ...]


def trial_id_of(study_id: int, number: int) -> int:
    """The id of a trial: unique for ever, and it tells study and number without a look-up."""
    return study_id << 32 | number


def study_and_number(trial_id: int) -> tuple[int, int]:
    """Study id and number of a trial."""
    return trial_id >> 32, trial_id & 0xFFFFFFFF


class StudyCache:
    """The trials of one study.

    Finished trials never change (G3): they are decoded once, in the order in which they finished.
    Unfinished ones follow the log of changes; a trial that missed one is reported to be fetched again.

    Attributes:
        order_read: How many entries of the server's list of finished trials were read.
        revision: Up to where the log of changes was read; None if unfinished trials are not followed yet.
        n_seen: The largest number of trials the server has told.
    """

    def __init__(self, study_id: int, directions: Sequence[StudyDirection], finished_key: str) -> None:
        self.study_id = study_id
        self.table = DistributionTable()
        self.live: dict[int, LiveTrial] = {}
        self.order_read = 0
        self.revision: int | None = None
        self.n_seen = 0
        self._directions = list(directions)
        self._finished_key = finished_key
        self._trials: list[FrozenTrial | None] = []
        self._n_finished = 0
        self._pending: tuple[list[int], list[bytes | None]] = ([], [])
        self._views: dict[StateKey, list[FrozenTrial]] = {}
        self._waiting: set[int] = set()
        self._best: FrozenTrial | None = None

    # -- taking in ---------------------------------------------------------------------------------

    def add_records(self, numbers: Iterable[int], records: Iterable[bytes | None]) -> None:
        """Take in finished trials as the server stores them."""
        trials, table, high_id = self._trials, self.table, self.study_id << 32
        for number, record in zip(numbers, records, strict=True):
            if number < len(trials) and trials[number] is not None:
                continue
            if record is None:
                raise CorruptRecordError(
                    f"trial {number} is missing in {self._finished_key!r}", key=self._finished_key
                )
            try:
                trial = unpack_trial(record, number, high_id | number, table)
            except ValueError as error:
                raise CorruptRecordError(
                    f"trial {number} in {self._finished_key!r} is unreadable: {error}",
                    key=self._finished_key,
                ) from error
            self.add_finished(trial)

    def defer_records(self, numbers: list[int], records: list[bytes | None]) -> None:
        """Keep finished trials to be taken in by `settle_records`, should anybody ask for them."""
        self._pending[0].extend(numbers)
        self._pending[1].extend(records)

    def settle_records(self) -> None:
        """Take in what was deferred."""
        if self._pending[0]:
            (numbers, records), self._pending = self._pending, ([], [])
            self.add_records(numbers, records)

    def add_finished(self, trial: FrozenTrial) -> None:
        """Take in one finished trial; it replaces the unfinished one."""
        number = trial._number
        trials = self._trials
        if number >= len(trials):
            trials.extend([None] * (number + 1 - len(trials)))
        elif trials[number] is not None:
            return
        trials[number] = trial
        self._n_finished += 1
        self.forget_live(number)
        state = trial.state
        for key, view in self._views.items():
            if state in key:
                if not view or view[-1]._number < number:
                    view.append(trial)
                else:
                    insort(view, trial, key=_by_number)
        if state is TrialState.COMPLETE and len(self._directions) == 1:
            self._compare_with_best(trial)

    def _compare_with_best(self, trial: FrozenTrial) -> None:
        best = self._best
        if best is None:
            self._best = trial
            return
        old, new = best.value, trial.value
        if old is None or new is None:
            return
        better = new > old if self._directions[0] is StudyDirection.MAXIMIZE else new < old
        # Of equal trials the first one is the best, in whatever order they finished.
        if better or (new == old and trial.number < best.number):
            self._best = trial

    def add_live(self, trial: LiveTrial) -> None:
        """Take in an unfinished trial, or a newer state of it."""
        if self.finished(trial.number) is not None:
            return
        known = self.live.get(trial.number)
        if known is not None:
            trial.owned = known.owned
            trial.refusal = known.refusal
        self.live[trial.number] = trial
        if trial.state is TrialState.WAITING:
            self._waiting.add(trial.number)
        else:
            self._waiting.discard(trial.number)

    def apply_log(self, entries: Iterable[bytes]) -> set[int]:
        """Take in entries of the log; returns the numbers of trials that have to be fetched instead."""
        missed: set[int] = set()
        for entry in entries:
            number_text, version_text, rest = entry.split(b":", 2)
            number, version = int(number_text), int(version_text)
            if number in missed or self.finished(number) is not None:
                continue
            trial = self.live.get(number)
            if trial is not None and version <= trial.version:
                continue  # our own write, or fetched since
            if rest == b"!":
                missed.add(number)
                continue
            length, _, data = rest.partition(b":")
            field = data[: int(length)].decode("utf-8", "surrogatepass")
            value = data[int(length) :]
            if field == BASE:
                self.add_live(
                    LiveTrial.from_record(
                        value, number, trial_id_of(self.study_id, number), version, self.table
                    )
                )
            elif trial is None or version != trial.version + 1:
                missed.add(number)
            else:
                trial.apply(field, value, self.table)
                trial.version = version
        return missed

    def forget_live(self, number: int) -> None:
        """Forget an unfinished trial: it is none any more."""
        self.live.pop(number, None)
        self._waiting.discard(number)

    def drop_live_except(self, numbers: set[int]) -> None:
        """Forget unfinished trials that the server does not count among them any more."""
        for number in [n for n in self.live if n not in numbers]:
            self.forget_live(number)

    # -- giving out --------------------------------------------------------------------------------

    def finished(self, number: int) -> FrozenTrial | None:
        """The finished trial of this number, None if it is not known to be finished."""
        return self._trials[number] if number < len(self._trials) else None

    def trials(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """A new list of all trials in these states, by number."""
        if states is None:
            return self._all()
        wanted = tuple(state for state in TrialState if state in states)
        finished = [state for state in wanted if state.is_finished()]
        result = self._view(tuple(finished)).copy() if finished else []
        if len(finished) < len(wanted):
            result += [t.freeze() for t in self.live.values() if t.state in wanted]
            result.sort(key=_by_number)
        return result

    def waiting(self, head: Sequence[int]) -> list[FrozenTrial]:
        """The WAITING trials by number, but first the one that the server wants us to try first."""
        numbers = sorted(self._waiting)
        if head and head[0] in self._waiting and numbers[0] != head[0]:
            del numbers[bisect_left(numbers, head[0])]
            numbers.insert(0, head[0])
        return [self.live[number].freeze() for number in numbers]

    def best(self) -> FrozenTrial | None:
        """The best COMPLETE trial of a study with one objective."""
        return self._best

    def _all(self) -> list[FrozenTrial]:
        result = self._trials.copy()
        for number in sorted(self.live):
            if number >= len(result):
                result.extend([None] * (number + 1 - len(result)))
            result[number] = self.live[number].freeze()
        if self._n_finished + len(self.live) == len(result):
            return result  # type: ignore[return-value]  # no holes
        return [t for t in result if t is not None]

    def _view(self, states: StateKey) -> list[FrozenTrial]:
        view = self._views.get(states)
        if view is None:
            view = self._views[states] = [t for t in self._trials if t is not None and t.state in states]
        return view

    def is_all_finished_states(self, states: Container[TrialState] | None) -> bool:
        """Whether a question about these states concerns finished trials only."""
        if states is None:
            return False
        return TrialState.RUNNING not in states and TrialState.WAITING not in states
