"""What bounds a study, on the server: its stop flag, its trial budget, the points of its grid."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

from optuna.trial import TrialState

from optuna_dlock.ensemble import AnyNode
from optuna_dlock.errors import (
    BudgetExhaustedError,
    BudgetMismatchError,
    DLockError,
    GridMismatchError,
    StudyStoppedError,
    TrialNotFoundError,
)
from optuna_dlock.keys import StudyKeys
from optuna_dlock.scripts import DIFFERENT, EXHAUSTED, NO_STUDY, NO_TRIAL, STOPPED, script
from optuna_dlock.section import Section


class BudgetUse(NamedTuple):
    """What is used of a trial budget: its limit, the states that count, and how many trials count already."""

    n_trials: int
    states: tuple[TrialState, ...]
    counted: int


class GridUse(NamedTuple):
    """What became of the points of a grid.

    Attributes:
        size: How many there are.
        done: Points whose trial has finished in a state that counts.
        held: Points that unfinished trials hold.
        given_up: Points that failed more often than they may be given out again.
    """

    size: int
    done: int
    held: int
    given_up: int


class Limits(NamedTuple):
    """Everything that bounds a study, at one moment.

    Attributes:
        stopped: Whether no trial may begin at all.
        running: RUNNING trials.
        waiting: WAITING trials; they take their place in the budget when they are claimed.
        budget: None if there is none.
        grid: None if there is none.
    """

    stopped: bool
    running: int
    waiting: int
    budget: BudgetUse | None
    grid: GridUse | None

    @property
    def remaining(self) -> int | None:
        """How many trials may still begin; None if nothing bounds them."""
        left = []
        if self.budget is not None:
            left.append(self.budget.n_trials - self.budget.counted - self.running)
        if self.grid is not None:
            left.append(self.grid.size - self.grid.done - self.grid.held - self.grid.given_up)
        return max(0, min(left)) if left else None

    @property
    def has_turn(self) -> bool:
        """Whether a worker that asks now gets a trial: a new one, or one of the queue."""
        if self.stopped:
            return False
        queue = self.waiting > 0 and (self.budget is None or self._begun < self.budget.n_trials)
        return queue or self.remaining != 0

    @property
    def is_used_up(self) -> bool:
        """Whether no trial can begin any more, whatever becomes of those that run."""
        budget, grid = self.budget, self.grid
        if budget is not None and budget.counted >= budget.n_trials:
            return True
        return grid is not None and grid.done + grid.given_up >= grid.size and not self.waiting

    @property
    def _begun(self) -> int:
        return self.running + (self.budget.counted if self.budget is not None else 0)


def check_limits(reply: Sequence[Any], study_id: int) -> None:
    """Raise what the server said to a trial that was to begin, if it was refused.

    Raises:
        StudyStoppedError: If the study was told to stop.
        BudgetExhaustedError: If its budget, or its grid, has no place left.
    """
    if reply[0] == STOPPED:
        raise StudyStoppedError(
            f"study {study_id} was told to stop: no trial begins until it is resumed", study_id=study_id
        )
    if reply[0] == EXHAUSTED:
        counted, running, limit = (int(number) for number in reply[1:])
        raise BudgetExhaustedError(
            f"study {study_id} may have {limit} trials: {counted} count, {running} run, none may begin",
            study_id=study_id,
            n_trials=limit,
            counted=counted,
            running=running,
        )


def _pack_states(states: Collection[TrialState]) -> str:
    """The states that count, as digits.

    Raises:
        ValueError: If there are none, or one that is not final.
    """
    if not states or not all(isinstance(s, TrialState) and s.is_finished() for s in states):
        raise ValueError(f"states are some of COMPLETE, PRUNED and FAIL, not {states!r}")
    return "".join(str(state.value) for state in sorted(set(states), key=lambda s: s.value))


def _unpack_states(digits: bytes) -> tuple[TrialState, ...]:
    return tuple(TrialState(int(digit)) for digit in digits.decode())


class StudyLimits:
    """The limits of one study. Threads may share it.

    Args:
        client: Names this process to the server, which remembers its last operation (G6).
        section: The critical sections of the study.
        gone: Makes the error for a study that is not there any more.
    """

    def __init__(
        self,
        node: AnyNode,
        keys: StudyKeys,
        client: str,
        section: Section,
        gone: Callable[[], DLockError],
        study_id: int,
    ) -> None:
        self.study_id = study_id
        self._node = node
        self._keys = keys
        self._client = client
        self._section = section
        self._gone = gone

    def stop(self) -> None:
        """Let no trial begin any more."""
        self._set_stopped(True)

    def resume(self) -> None:
        """Let trials begin again."""
        self._set_stopped(False)

    def _set_stopped(self, stopped: bool) -> None:
        with self._node.lock:
            self._check(
                self._section.run(
                    script("stop_study"),
                    [self._keys.meta, self._section.key(), self._keys.ops],
                    [int(stopped), self._client, self._node.next_sequence()],
                )
            )

    def join_budget(self, n_trials: int, states: Collection[TrialState]) -> None:
        """Give the study a budget; one that is there may only grow: the largest number ever given holds.

        Raises:
            ValueError: If it is no number of trials, or no set of final states.
            BudgetMismatchError: If the study's budget counts other states.
        """
        self._set_budget(n_trials, states, "join")

    def set_budget(self, n_trials: int | None, states: Collection[TrialState]) -> None:
        """Set the study's budget, whatever it was; None: no budget.

        Raises:
            ValueError: If it is no number of trials, or no set of final states.
        """
        self._set_budget(n_trials, states, "set")

    def _set_budget(self, n_trials: int | None, states: Collection[TrialState], how: str) -> None:
        if n_trials is not None and (isinstance(n_trials, bool) or int(n_trials) != n_trials or n_trials < 1):
            raise ValueError(f"n_trials is a number of 1 or more, not {n_trials!r}")
        digits = _pack_states(states)
        keys = self._keys
        with self._node.lock:
            reply = self._section.run(
                script("set_budget"),
                [keys.meta, self._section.key(), keys.ops, keys.order, keys.finished],
                [
                    *("" if n_trials is None else int(n_trials), digits, how),
                    *(self._client, self._node.next_sequence()),
                ],
            )
            self._check(reply)
        if reply[0] == DIFFERENT:
            known = _unpack_states(reply[2])
            raise BudgetMismatchError(
                f"the budget of study {self.study_id}, {int(reply[1])} trials, counts "
                f"{', '.join(s.name for s in known)}: give the same states, or change the budget",
                study_id=self.study_id,
                n_trials=int(reply[1]),
                states=known,
            )

    def define_grid(
        self, digest: str, size: int, states: Collection[TrialState], max_retry: int | None
    ) -> None:
        """Let the trials of the study share the points of a grid; the same again changes nothing.

        Raises:
            GridMismatchError: If it has another one.
        """
        with self._node.lock:
            reply = self._node.run(
                script("define_grid"),
                [self._keys.meta, self._keys.order],
                [digest, size, _pack_states(states), "" if max_retry is None else max_retry],
            )
            self._check(reply)
        if reply[0] == DIFFERENT:
            raise self._other_grid(reply)

    def claim_point(self, number: int, digest: str) -> tuple[int, int] | None:
        """The point of the grid that belongs to an unfinished trial; None if the study has no grid yet.

        Returns:
            Its position in the order of the grid, and how often it was handed out again; the same whenever
            that trial asks.

        Raises:
            GridMismatchError: If the study has another grid.
            BudgetExhaustedError: If no point is left.
            TrialNotFoundError: If the trial has finished.
        """
        keys = self._keys
        with self._node.lock:
            reply = self._node.run(
                script("claim_point"),
                [keys.meta, keys.live, keys.order, keys.finished, keys.points, keys.reissues],
                [number, digest],
            )
            self._check(reply)
        if reply[0] == DIFFERENT:
            if not reply[1]:
                return None
            raise self._other_grid(reply)
        if reply[0] == NO_TRIAL:
            raise TrialNotFoundError(f"study {self.study_id} has no unfinished trial {number}")
        return int(reply[1]), int(reply[2])

    def get(self) -> Limits:
        """The limits, and what is used of them; one round trip."""
        keys = self._keys
        with self._node.lock:
            reply = self._node.run(
                script("get_limits"),
                [
                    *(keys.meta, keys.live, keys.waiting, keys.order),
                    *(keys.finished, keys.points, keys.reissues),
                ],
            )
            self._check(reply)
        _, stopped, running, waiting, budget, grid = reply
        return Limits(
            stopped is not None,
            running,
            waiting,
            BudgetUse(int(budget[0]), _unpack_states(budget[1]), budget[2]) if budget else None,
            GridUse(*(int(number) for number in grid)) if grid else None,
        )

    def _check(self, reply: Any) -> None:
        if reply[0] == NO_STUDY:
            raise self._gone()
        check_limits(reply, self.study_id)

    def _other_grid(self, reply: Any) -> GridMismatchError:
        size = int(reply[2])
        return GridMismatchError(
            f"study {self.study_id} searches another grid, of {size} points: all workers have to give the "
            "same names, values, order, seed, states and max_retry; another grid needs another study",
            study_id=self.study_id,
            size=size,
        )
