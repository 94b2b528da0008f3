"""What the clients of a schedule do: a real `RedisLockedStorage` each, and a history of what it told them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import DataLostError, QuorumError, StudyExistsError
from tests.simulation.invariants import Finish, History, Violation

STUDY = "study"
_ANY = FloatDistribution(0.0, 1e6)


class Surroundings(Protocol):
    """What a client needs of the schedule it lives in."""

    history: History
    url: str

    def sleep(self, microseconds: int) -> None:
        """Let time pass."""

    def stamp(self) -> datetime:
        """The start that the last creation of this process was given."""


class Own:
    """A trial that a client created or claimed."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.pending: dict[str, int] = {}  # what was written to it, and not acknowledged yet


class Client:
    """One worker process.

    Args:
        rng: Decides what it does.
        calls: How many calls it makes.
        deferred: Whether its writes are deferred.
    """

    def __init__(
        self, name: str, world: Surroundings, rng: random.Random, calls: int, deferred: bool
    ) -> None:
        self.name = name
        self._world = world
        self._history = world.history
        self._rng = rng
        self._calls = calls
        self._deferred = deferred
        self._own: list[Own] = []
        self._others: list[int] = []  # trials of others that run
        self._queue: list[int] = []  # trials that wait
        self._counter = 0
        self._creations = 0

    def run(self) -> None:
        """Live, from the first connection to the last call."""
        try:
            self._run()
        except (KeyError, DataLostError) as error:
            # Nobody deletes anything, and all that a client knows of was acknowledged, or shown by a read.
            raise Violation(f"G2: {self.name} was told: {type(error).__name__}: {error}") from error

    def _run(self) -> None:
        try:
            storage = RedisLockedStorage(self._world.url, deferred_writes=self._deferred)
            self._study = self._join(storage)
        except QuorumError:
            return
        acts = [
            *(self._create, self._create, self._create, self._enqueue, self._claim, self._claim),
            *(self._write, self._write, self._write, self._finish, self._finish),
            *(self._reap, self._write_to_other, self._write_to_study, self._read),
        ]
        for _ in range(self._calls):
            self._world.sleep(int(self._rng.expovariate(1.0) * self._rng.choice((50, 1000, 1000))))
            with contextlib.suppress(QuorumError):  # it may have been done or not
                self._rng.choice(acts)(storage)
        with contextlib.suppress(QuorumError):
            self._read(storage)
            storage.close()

    def _join(self, storage: RedisLockedStorage) -> int:
        while True:
            try:
                return int(storage.get_study_id_from_name(STUDY))
            except KeyError:
                pass
            try:
                return int(storage.create_new_study([StudyDirection.MINIMIZE], STUDY))
            except StudyExistsError:
                pass

    # -- calls -------------------------------------------------------------------------------------

    def _create(self, storage: RedisLockedStorage) -> None:
        number = _number(storage.create_new_trial(self._study))
        self._history.created(str(self._world.stamp()), number)
        self._own.append(Own(number))

    def _enqueue(self, storage: RedisLockedStorage) -> None:
        history = self._history
        self._creations += 1
        tag = f"{self.name}.{self._creations}"
        history.tried.add(tag)
        history.waiting.add(tag)
        template = create_trial(state=TrialState.WAITING, user_attrs={"tag": tag})
        number = _number(storage.create_new_trial(self._study, template))
        history.created(tag, number)
        self._queue.append(number)

    def _claim(self, storage: RedisLockedStorage) -> None:
        if not self._queue or self._rng.random() < 0.5:
            found = storage.get_all_trials(self._study, deepcopy=False, states=(TrialState.WAITING,))
            self._queue = [trial.number for trial in found]
        if not self._queue:
            return
        number = self._queue.pop(0)
        history = self._history
        maybe = history.maybe_claims.setdefault(number, [])
        maybe.append(self.name)
        try:
            is_ours = storage.set_trial_state_values(self._id(number), TrialState.RUNNING)
        except UpdateFinishedTrialError:
            history.refused(number)
            is_ours = False
        else:
            if is_ours:
                history.claimed(number, self.name)
                self._own.append(Own(number))
            else:
                history.lost(number, self.name)
        if not is_ours:
            maybe.remove(self.name)

    def _write(self, storage: RedisLockedStorage) -> None:
        if not self._own:
            return self._create(storage)
        own = self._rng.choice(self._own)
        try:
            what, value = self._set(storage, own.number)
        except UpdateFinishedTrialError:
            self._history.refused(own.number)
            self._own.remove(own)
            return None
        if self._deferred:
            own.pending[what] = value
        else:
            self._history.kept(own.number, what, value)
        return None

    def _write_to_other(self, storage: RedisLockedStorage) -> None:
        if not self._others:
            return self._read(storage)
        number = self._rng.choice(self._others)
        try:
            what, value = self._set(storage, number)
        except UpdateFinishedTrialError:
            self._history.refused(number)
            return None
        self._history.kept(number, what, value)
        return None

    def _set(self, storage: RedisLockedStorage, number: int) -> tuple[str, int]:
        """Write an attribute, a parameter or a report, named after this client; which one, and what."""
        self._counter = value = self._counter + 1
        what = self.name + self._rng.choice(("", "/x", "/i"))
        self._history.tried_attrs[number, what] = value
        if what.endswith("/x"):
            storage.set_trial_param(self._id(number), what, value, _ANY)
        elif what.endswith("/i"):
            storage.set_trial_intermediate_value(self._id(number), int(self.name[1:]), value)
        else:
            storage.set_trial_user_attr(self._id(number), what, value)
        return what, value

    def _write_to_study(self, storage: RedisLockedStorage) -> None:
        self._counter = value = self._counter + 1
        history = self._history
        history.tried_attrs[-1, self.name] = value
        storage.set_study_user_attr(self._study, self.name, value)
        history.kept(-1, self.name, value)
        known = history.snapshot()
        history.look_at_attrs(-1, storage.get_study_user_attrs(self._study), known)

    def _finish(self, storage: RedisLockedStorage) -> None:
        if not self._own:
            return self._create(storage)
        own = self._rng.choice(self._own)
        self._own.remove(own)
        if self._tell(storage, own.number, TrialState.COMPLETE):
            for what, value in own.pending.items():
                self._history.kept(own.number, what, value)
        return None

    def _reap(self, storage: RedisLockedStorage) -> None:
        if not self._others:
            return self._read(storage)
        number = self._others.pop(self._rng.randrange(len(self._others)))
        self._tell(storage, number, TrialState.FAIL)
        return None

    def _tell(self, storage: RedisLockedStorage, number: int, state: TrialState) -> bool:
        history = self._history
        value = self._rng.random() if state is TrialState.COMPLETE else None
        finish = Finish(state, value)
        maybe = history.maybe_finishes.setdefault(number, [])
        maybe.append(finish)
        try:
            storage.set_trial_state_values(self._id(number), state, None if value is None else [value])
        except UpdateFinishedTrialError:
            maybe.remove(finish)
            history.refused(number)
            return False
        history.finished(number, finish)
        return True

    def _read(self, storage: RedisLockedStorage) -> None:
        history = self._history
        known = history.snapshot()
        pending = [(own.number, dict(own.pending)) for own in self._own]
        trials = storage.get_all_trials(self._study, deepcopy=False)
        history.read(trials, known)
        self._others = [
            trial.number
            for trial in trials
            if trial.state is TrialState.RUNNING and trial.number not in {own.number for own in self._own}
        ]
        for number, written in pending:
            if not trials[number].state.is_finished():
                history.check_pending(trials[number], self.name, written)

    def _id(self, number: int) -> int:
        return self._study << 32 | number


def _number(trial_id: int) -> int:
    return trial_id & 0xFFFFFFFF


def read_all(storage: RedisLockedStorage) -> tuple[int, Sequence[FrozenTrial]]:
    """Study id and trials, as a new process sees them."""
    study = storage.get_study_id_from_name(STUDY)
    return study, storage.get_all_trials(study, deepcopy=False)
