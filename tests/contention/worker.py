"""A worker process: a random mix of all that Optuna's storage contract offers, until it is told to stop."""

from __future__ import annotations

import importlib
import random
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import FloatDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import StorageUnavailableError
from tests.contention import board as entries
from tests.contention.board import SLOTS, Board
from tests.contention.facts import Ledger

DISTRIBUTION = FloatDistribution(0.0, 1.0)
MIX: Mapping[str, int] = {
    "run_trial": 30,
    "enqueue": 12,
    "add_finished": 6,
    "add_waiting": 6,
    "add_running": 5,
    "duel": 8,
    "join_duel": 12,
    "set_study_attr": 6,
    "read_all": 8,
    "read_some": 6,
    "read_best": 6,
    "read_attrs": 6,
}


@dataclass(frozen=True)
class Job:
    """What a worker is to do; goes through pickle.

    Attributes:
        storage_class, worker_class: "module:name" of the class of its storage, and of the worker itself.
        mix: Operations and how often each is chosen, relatively.
        pause: Longest random pause between two operations, in seconds.
        patience: Seconds after which it leaves by itself, should nobody tell it to.
        options: Further arguments of its storage.
    """

    slot: int
    url: str
    study_name: str
    folder: Path
    timeout: float = 5.0
    lock: Literal["redlock", "pottery"] = "redlock"
    storage_class: str = "optuna_dlock:RedisLockedStorage"
    worker_class: str = "tests.contention.worker:Worker"
    mix: Mapping[str, int] = field(default_factory=lambda: MIX)
    pause: float = 0.004
    patience: float = 120.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The worker's name."""
        return f"w{self.slot:03d}"

    def open_storage(self) -> RedisLockedStorage:
        """A storage of its own."""
        storage: RedisLockedStorage = _find(self.storage_class)(
            self.url, timeout=self.timeout, lock=self.lock, **self.options
        )
        return storage


def _find(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def work(job: Job) -> None:
    """Body of a worker process."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _find(job.worker_class)(job, job.open_storage()).run()


class Worker:
    """One worker; see the module."""

    def __init__(self, job: Job, storage: RedisLockedStorage) -> None:
        self._job = job
        self._board = Board(job.folder / "board")
        self._ledger = Ledger(job.folder / f"{job.name}.jsonl")
        self._random = random.Random(job.slot)
        self._storage = storage
        sampler = optuna.samplers.RandomSampler(seed=job.slot)
        self._study = optuna.load_study(study_name=job.study_name, storage=storage, sampler=sampler)
        self._study_id = self._study._study_id
        self._count = 0
        self._duel = -1
        self._seen_n = 0
        self._seen_best = float("inf")
        self._seen_finished: dict[int, tuple[Any, ...]] = {}

    def run(self) -> None:
        """Work until the board says stop."""
        board, slot = self._board, self._job.slot
        deadline = time.monotonic() + self._job.patience
        board.put(slot, entries.READY, 1)
        while not board.going and time.monotonic() < deadline:
            time.sleep(0.002)
        names, weights = list(self._job.mix), list(self._job.mix.values())
        while not board.stopped and time.monotonic() < deadline:
            self._do(getattr(self, self._random.choices(names, weights)[0]))
            board.put(slot, entries.DONE, self._ledger.acknowledged)
            time.sleep(self._random.uniform(0, self._job.pause))
        self._storage.remove_session()
        self._ledger.note("left")

    def _do(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except StorageUnavailableError as error:
            self._ledger.remark("unavailable", text=str(error))
        except Exception:
            self._ledger.remark("error", traceback=traceback.format_exc())
        if self._duel >= 0:
            self._duel = -1
            self._board.put(self._job.slot, entries.DUEL, 0)

    def _next(self) -> int:
        self._count += 1
        return self._count

    def _key(self) -> str:
        return f"{self._job.name}:{self._next()}"

    def _value(self) -> float:
        """A value that nobody else tells."""
        return float(self._random.randrange(1 << 40) * SLOTS + self._job.slot)

    # -- trials ------------------------------------------------------------------------------------

    def run_trial(self) -> None:
        """Ask, work, tell."""
        self._run(self._ask())

    def _ask(self) -> optuna.Trial:
        self._ledger.trying("ask")
        trial = self._study.ask()
        key = trial.user_attrs.get("key")
        if key is None:
            self._ledger.note("created", number=trial.number, how="ask")
            self._board.put(self._job.slot, entries.CREATED, trial.number + 1)
        else:
            self._ledger.note("popped", number=trial.number, key=key)
            self._board.put(self._job.slot, entries.POPPED, trial.number + 1)
        return trial

    def _run(self, trial: optuna.Trial) -> None:
        number = trial.number
        try:
            self._write_to(trial)
            choice = self._random.random()
            if choice < 0.7:
                self._tell(number, TrialState.COMPLETE, [self._value()])
            elif choice < 0.85:
                self._tell(number, TrialState.FAIL, None)
            else:
                self._tell(number, TrialState.PRUNED, None)
        except UpdateFinishedTrialError:
            self._ledger.refused(number)

    def _write_to(self, trial: optuna.Trial) -> None:
        ledger, number = self._ledger, trial.number
        ledger.sent(number, "p", "x", trial.suggest_float("x", 0.0, 1.0))
        for _ in range(self._random.randrange(3)):
            ledger.sent(number, "p", *self._suggest(trial, self._random.randrange(60)))
        for step in range(self._random.randrange(3)):
            value = self._random.random()
            trial.report(value, step)
            ledger.sent(number, "i", str(step), value)
        seen = self._next()
        trial.set_user_attr("seen", seen)
        ledger.sent(number, "u", "seen", seen)
        name = self._job.name * self._random.choice(
            [1, 1, 1, 300]
        )  # the log keeps no more than 1 KiB of a value
        self._storage.set_trial_system_attr(trial._trial_id, "worker", name)
        ledger.sent(number, "s", "worker", name)
        if self._random.random() < 0.3:
            mine = self._storage.get_trial(trial._trial_id)
            ledger.waited()
            if mine.user_attrs.get("seen") != seen and not mine.state.is_finished():
                self._stale(f"trial {number}: my attribute is {mine.user_attrs.get('seen')}, not {seen}")
            if not mine.state.is_finished():
                self._board.put_seen(self._job.slot, number, seen)

    @staticmethod
    def _suggest(trial: optuna.Trial, which: int) -> tuple[str, Any]:
        """One of many parameters, of several kinds."""
        name = f"p{which}"
        if which % 3 == 0:
            return name, trial.suggest_int(name, 0, which)
        if which % 3 == 1:
            return name, trial.suggest_float(name, 0.1, which + 1, log=True)
        return name, trial.suggest_categorical(name, ["a", "b", which])

    def _tell(self, number: int, state: TrialState, values: Sequence[float] | None) -> None:
        self._ledger.trying("tell", number=number, state=state.name, values=values)
        trial = self._study.tell(number, values, state)
        self._told(number, trial.state, trial.values)

    def _told(self, number: int, state: TrialState, values: Sequence[float] | None) -> None:
        self._ledger.note("told", number=number, state=state.name, values=values)
        slot = self._job.slot
        self._board.put(slot, entries.FINISHED, number + 1)
        if state is TrialState.COMPLETE and values:
            best = self._board.get(slot, entries.BEST)
            if not best or values[0] + 1 < best:
                self._board.put(slot, entries.BEST, int(values[0]) + 1)

    def enqueue(self) -> None:
        """Put a trial into the queue."""
        key, x = self._key(), self._random.random()
        self._ledger.trying("create", key=key)
        self._study.enqueue_trial({"x": x}, user_attrs={"key": key})
        self._ledger.note("created", key=key, how="enqueue", x=x)

    def add_finished(self) -> None:
        """Add a trial that has run elsewhere."""
        state = self._random.choice([TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL])
        values = [self._value()] if state is TrialState.COMPLETE else None
        number = self._add(state, values)
        self._board.put(self._job.slot, entries.FINISHED, number + 1)

    def add_waiting(self) -> None:
        """Add a WAITING trial as `add_trial` does."""
        self._add(TrialState.WAITING, None)

    def add_running(self) -> None:
        """Add a trial that runs already, and go on with it."""
        self._run(optuna.Trial(self._study, self._study_id << 32 | self._add(TrialState.RUNNING, None)))

    def _add(self, state: TrialState, values: Sequence[float] | None) -> int:
        key, x = self._key(), self._random.random()
        template = create_trial(
            state=state,
            values=values,
            params={"x": x},
            distributions={"x": DISTRIBUTION},
            user_attrs={"key": key},
        )
        self._ledger.trying("create", key=key, state=state.name)
        trial_id = self._storage.create_new_trial(self._study_id, template)
        number = trial_id & 0xFFFFFFFF
        self._ledger.note(
            "created", number=number, key=key, how="template", x=x, state=state.name, values=values
        )
        self._board.put(self._job.slot, entries.CREATED, number + 1)
        return number

    def duel(self) -> None:
        """Run a trial that others are invited to finish before it is."""
        trial = self._ask()
        number = self._duel = trial.number
        try:
            self._write_to(trial)
            self._storage.get_n_trials(self._study_id)
            self._ledger.waited()
            self._board.put(self._job.slot, entries.DUEL, number + 1)
            time.sleep(self._random.uniform(0, 0.02))
            trial.set_user_attr("late", number)  # it may go to a trial that is finished by now
            self._ledger.sent(number, "u", "late", number)
            self._finish(trial._trial_id)
        except UpdateFinishedTrialError:
            self._ledger.refused(number)

    def join_duel(self) -> None:
        """Finish somebody else's trial."""
        invited = [number - 1 for number in self._board.column(entries.DUEL) if number]
        if invited:
            number = self._random.choice(invited)
            try:
                self._finish(self._study_id << 32 | number)
            except UpdateFinishedTrialError:
                self._ledger.refused(number)

    def _finish(self, trial_id: int) -> None:
        number, values = trial_id & 0xFFFFFFFF, [self._value()]
        self._ledger.trying("tell", number=number, state="COMPLETE", values=values)
        self._storage.set_trial_state_values(trial_id, TrialState.COMPLETE, values)
        self._told(number, TrialState.COMPLETE, values)

    def drain(self) -> None:
        """Claim what is in the queue, and finish it; once it is empty, idle."""
        self._ledger.trying("pop")
        trial_id = self._study._pop_waiting_trial_id()
        if trial_id is None:
            self._ledger.note("empty")
            time.sleep(0.02)
            return
        number = trial_id & 0xFFFFFFFF
        trial = self._storage.get_trial(trial_id)
        self._ledger.note("popped", number=number, key=trial.user_attrs["key"])
        self._finish(trial_id)

    # -- study attributes --------------------------------------------------------------------------

    def set_study_attr(self) -> None:
        """Raise the attribute of the study that bears this worker's name."""
        value = self._next()
        self._ledger.trying("study attr", value=value)
        if self._random.random() < 0.5:
            self._study.set_user_attr(self._job.name, value)
        else:
            self._storage.set_study_user_attr(self._study_id, self._job.name, value)
        self._ledger.note("study attr", value=value)
        self._board.put(self._job.slot, entries.STUDY, value)

    # -- reads, held against what others were told before ------------------------------------------

    def _stale(self, text: str) -> None:
        self._ledger.remark("stale", text=text)

    def read_all(self) -> None:
        """Read all trials: nothing acknowledged is missing, nothing finished has changed."""
        created, finished, popped, seen = (
            self._board.column(entries.CREATED),
            self._board.column(entries.FINISHED),
            self._board.column(entries.POPPED),
            self._board.seen(),
        )
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        self._ledger.waited()
        n = len(trials)
        if [t.number for t in trials] != list(range(n)):
            self._stale(f"numbers read are not 0..{n - 1}")
            return
        if max(*created, *finished, *popped, self._seen_n) > n:
            self._stale(
                f"{n} trials read; {max(*created, *finished, *popped, self._seen_n)} were acknowledged"
            )
            return
        self._seen_n = n
        for number in finished:
            if number and not trials[number - 1].state.is_finished():
                self._stale(f"trial {number - 1} was told finished, and read {trials[number - 1].state.name}")
        for number in popped:
            if number and trials[number - 1].state is TrialState.WAITING:
                self._stale(f"trial {number - 1} was claimed, and read WAITING")
        for number, value in seen:
            if trials[number].user_attrs.get("seen", 0) < value:
                self._stale(f"trial {number}: attribute was {value}, and read {trials[number].user_attrs}")
        self._compare(trials)

    def _compare(self, trials: Sequence[FrozenTrial]) -> None:
        known = self._random.sample(list(self._seen_finished), min(20, len(self._seen_finished)))
        for number in known:
            if _content(trials[number]) != self._seen_finished[number]:
                self._stale(f"finished trial {number} changed to {_content(trials[number])}")
        for trial in self._random.sample(trials, min(10, len(trials))):
            if trial.state.is_finished():
                self._seen_finished.setdefault(trial.number, _content(trial))

    def read_some(self) -> None:
        """Read one trial, the number of trials, and those in some states."""
        finished = [number - 1 for number in self._board.column(entries.FINISHED) if number]
        created = max(self._board.column(entries.CREATED))
        n = self._storage.get_n_trials(self._study_id)
        self._ledger.waited()
        if n < created:
            self._stale(f"{n} trials counted; {created} were acknowledged")
        if not finished:
            return
        number = self._random.choice(finished)
        trial = self._storage.get_trial(self._study_id << 32 | number)
        if not trial.state.is_finished():
            self._stale(f"trial {number} was told finished, and get_trial says {trial.state.name}")
        unfinished = self._storage.get_all_trials(
            self._study_id, deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)
        )
        if still := {t.number for t in unfinished}.intersection(finished):
            self._stale(f"trials {sorted(still)} were told finished, and are among the unfinished")

    def read_best(self) -> None:
        """Read the best trial: it only gets better, and is no worse than what anybody has told."""
        told = min((best - 1 for best in self._board.column(entries.BEST) if best), default=None)
        if told is None:
            return
        best = self._storage.get_best_trial(self._study_id).value
        self._ledger.waited()
        assert best is not None
        if best > min(told, self._seen_best):
            self._stale(f"best value read is {best}; {min(told, self._seen_best)} was acknowledged")
        self._seen_best = best

    def read_attrs(self) -> None:
        """Read the attributes of the study."""
        acknowledged = self._board.column(entries.STUDY)
        attrs = self._storage.get_study_user_attrs(self._study_id)
        self._ledger.waited()
        for slot, value in enumerate(acknowledged):
            if value and attrs.get(f"w{slot:03d}", 0) < value:
                self._stale(f"study attribute w{slot:03d} was {value}, and read {attrs.get(f'w{slot:03d}')}")


def _content(trial: FrozenTrial) -> tuple[Any, ...]:
    return (
        *(trial.state, trial.values, dict(trial.params), dict(trial.intermediate_values)),
        *(dict(trial.user_attrs), dict(trial.system_attrs), trial.datetime_start, trial.datetime_complete),
    )
