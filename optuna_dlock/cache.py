"""What this process knows of a study's trials, brought up to date by differences. No I/O."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Container, Iterable, Sequence
from operator import attrgetter

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.codec import is_whole, unpack_trial
from optuna_dlock.distributions import DistributionTable
from optuna_dlock.errors import CorruptRecordError
from optuna_dlock.live_trial import BASE, LiveTrial

_by_number = attrgetter("_number")

StateKey = tuple[TrialState, ...]


def trial_id_of(study_id: int, number: int) -> int:
    """The id of a trial: unique for ever, and it tells study and number without a look-up."""
    return study_id << 32 | number


def concerns_unfinished(states: Container[TrialState] | None) -> bool:
    """Whether a question about trials in these states is one about unfinished trials too."""
    return states is None or TrialState.RUNNING in states or TrialState.WAITING in states


class StudyCache:
    """The trials of one study.

    Finished trials never change (G3): their records are kept as they come, in the order in which the trials
    finished, and decoded when somebody asks for them. Unfinished ones follow the log of changes; a
    trial that missed one is reported to be fetched again.

    Attributes:
        order_read: How many entries of the server's list of finished trials were read.
        revision: Up to where the log of changes was read; None if unfinished trials are not followed yet.
        n_seen: The largest number of trials the server has told.
        live: The unfinished trials by number.
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
        self._finished: list[FrozenTrial | bytes | None] = []  # by number; bytes: not decoded yet
        self._n_finished = 0
        self._undecoded: list[int] = []
        self._views: dict[StateKey, list[FrozenTrial]] = {}
        self._waiting: list[int] = []  # numbers, ascending
        self._waiting_frozen: list[FrozenTrial | None] = []  # the trials of these numbers, once asked for
        self._best: FrozenTrial | None = None

    # -- taking in ---------------------------------------------------------------------------------

    def add_records(self, numbers: Iterable[int], records: Iterable[bytes | None]) -> None:
        """Take in finished trials as the server stores them."""
        for number, record in zip(numbers, records, strict=True):
            if record is None:
                raise CorruptRecordError(
                    f"trial {number} is missing in {self._finished_key!r}", key=self._finished_key
                )
            if self._put(number, record):
                self._undecoded.append(number)

    def add_finished(self, trial: FrozenTrial) -> None:
        """Take in one finished trial; it replaces the unfinished one."""
        if self._put(trial._number, trial):
            self._enter(trial)

    def _put(self, number: int, trial: FrozenTrial | bytes) -> bool:
        """Keep a finished trial, unless it is known."""
        finished = self._finished
        if number >= len(finished):
            finished.extend([None] * (number + 1 - len(finished)))
        elif finished[number] is not None:
            return False
        finished[number] = trial
        self._n_finished += 1
        self.forget_live(number)
        return True

    def _decode(self) -> list[FrozenTrial]:
        """Decode what has not been; returns all trials, with holes where unfinished ones are."""
        finished = self._finished
        if self._undecoded:
            undecoded, self._undecoded = self._undecoded, []
            for number in undecoded:
                if isinstance(finished[number], bytes):
                    self._decode_one(number)
        return finished  # type: ignore[return-value]

    def _decode_one(self, number: int) -> FrozenTrial:
        record = self._finished[number]
        assert isinstance(record, bytes)  # noqa: S101
        try:
            trial = unpack_trial(record, number, trial_id_of(self.study_id, number), self.table)
        except ValueError as error:
            self._undecoded.append(number)
            raise CorruptRecordError(
                f"trial {number} in {self._finished_key!r} is unreadable: {error}", key=self._finished_key
            ) from error
        self._finished[number] = trial
        self._enter(trial)
        return trial

    def _enter(self, trial: FrozenTrial) -> None:
        """Enter a finished trial in the views it belongs to, and compare it with the best one."""
        state = trial.state
        for key, view in self._views.items():
            if state in key:
                if not view or view[-1]._number < trial._number:
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
        if better or (new == old and trial._number < best._number):
            self._best = trial

    def add_live(self, trial: LiveTrial) -> None:
        """Take in an unfinished trial, or a newer state of it."""
        number = trial.number
        if self.is_finished(number):
            return
        known = self.live.get(number)
        if known is not None and known is not trial:
            trial.owned = known.owned and trial.state is TrialState.RUNNING
            trial.refusal = known.refusal
        self.live[number] = trial
        self._note_waiting(number, trial.state is TrialState.WAITING)

    def forget_live(self, number: int) -> None:
        """Forget an unfinished trial: it is none any more."""
        if self.live.pop(number, None) is not None:
            self._note_waiting(number, False)

    def note_change(self, trial: LiveTrial) -> None:
        """An unfinished trial was written to."""
        if trial.state is TrialState.WAITING:
            self._note_waiting(trial.number, True)

    def _note_waiting(self, number: int, waits: bool) -> None:
        waiting = self._waiting
        if not waits and not waiting:
            return
        at = bisect_left(waiting, number)
        known = at < len(waiting) and waiting[at] == number
        if waits and known:
            self._waiting_frozen[at] = None  # it may have changed
        elif waits:
            waiting.insert(at, number)
            self._waiting_frozen.insert(at, None)
        elif known:
            del waiting[at], self._waiting_frozen[at]

    def apply_log(self, entries: Iterable[bytes]) -> set[int]:
        """Take in entries of the log; returns the numbers of trials that have to be fetched instead."""
        missed: set[int] = set()
        for entry in entries:
            number_text, version_text, rest = entry.split(b":", 2)
            number, version = int(number_text), int(version_text)
            if number in missed or self.is_finished(number):
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
                trial_id = trial_id_of(self.study_id, number)
                self.add_live(LiveTrial.from_record(value, number, trial_id, version, self.table))
            elif trial is None or version != trial.version + 1:
                missed.add(number)
            else:
                trial.apply(field, value, self.table)
                trial.version = version
                self.note_change(trial)
        return missed

    def replace_live(self, numbers: Sequence[int], records: Sequence[bytes]) -> set[int]:
        """Take in the records of all unfinished trials; returns the numbers of those to be fetched."""
        listed = set(numbers)
        for number in [n for n in self.live if n not in listed]:
            self.forget_live(number)
        missed: set[int] = set()
        for number, record in zip(numbers, records, strict=True):
            if number in self.live or not self._is_whole(number, record):
                missed.add(number)
            else:
                # Of which version it is does not matter: the log has what comes after it.
                trial_id = trial_id_of(self.study_id, number)
                self.add_live(LiveTrial.from_record(record, number, trial_id, 0, self.table))
        return missed

    def _is_whole(self, number: int, record: bytes) -> bool:
        try:
            return is_whole(record)
        except ValueError as error:
            raise CorruptRecordError(
                f"unfinished trial {number} is unreadable: {error}", key=f"live[{number}]"
            ) from error

    # -- giving out --------------------------------------------------------------------------------

    def is_finished(self, number: int) -> bool:
        """Whether the trial of this number is known to be finished."""
        return number < len(self._finished) and self._finished[number] is not None

    def is_decoded(self, number: int) -> bool:
        """Whether that finished trial was decoded: a record may name distributions not heard of yet."""
        return self.is_finished(number) and not isinstance(self._finished[number], bytes)

    def finished(self, number: int) -> FrozenTrial | None:
        """The finished trial of this number, None if it is not known to be finished."""
        if not self.is_finished(number):
            return None
        trial = self._finished[number]
        return self._decode_one(number) if isinstance(trial, bytes) else trial

    def trials(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """A new list of all trials in these states, by number."""
        if states is None:
            return self._all()
        wanted = tuple(state for state in TrialState if state in states)
        finished = tuple(state for state in wanted if state.is_finished())
        result = self._view(finished).copy() if finished else []
        if len(finished) < len(wanted):
            result += [t.freeze() for t in self.live.values() if t.state in wanted]
            result.sort(key=_by_number)
        return result

    def waiting(self, head: Sequence[int]) -> list[FrozenTrial]:
        """The WAITING trials by number, beginning with the one that the server wants us to try first."""
        frozen = self._waiting_frozen
        for at, trial in enumerate(frozen):
            if trial is None:
                frozen[at] = self.live[self._waiting[at]].freeze()
        at = bisect_left(self._waiting, head[0]) if head else 0
        return frozen[at:] + frozen[:at]  # type: ignore[return-value]  # all are filled in

    def best(self) -> FrozenTrial | None:
        """The best COMPLETE trial of a study with one objective."""
        self._decode()
        return self._best

    def _all(self) -> list[FrozenTrial]:
        result: list[FrozenTrial | None] = list(self._decode())
        for number in sorted(self.live):
            if number >= len(result):
                result.extend([None] * (number + 1 - len(result)))
            result[number] = self.live[number].freeze()
        if self._n_finished + len(self.live) == len(result):
            return result  # type: ignore[return-value]  # no holes
        return [t for t in result if t is not None]

    def _view(self, states: StateKey) -> list[FrozenTrial]:
        trials = self._decode()
        view = self._views.get(states)
        if view is None:
            view = self._views[states] = [t for t in trials if t is not None and t.state in states]
        return view
