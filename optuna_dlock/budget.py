"""A trial budget of the whole cluster: exactly n trials over all workers, threads and restarts."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import optuna
from optuna.trial import TrialState

from optuna_dlock.errors import BudgetExhaustedError, StudyStoppedError, UnsupportedStorageError
from optuna_dlock.limits import StudyLimits
from optuna_dlock.retry import Backoff
from optuna_dlock.storage import RedisLockedStorage, fail_stale_trials

Objective = Callable[[optuna.Trial], float | Sequence[float]]
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED)


class TrialBudget:
    """Exactly `n_trials` trials of a study, over all workers, threads and restarts.

    `n_trials` of `study.optimize` counts per worker, and `MaxTrialsCallback` overshoots. Here the place of a
    trial is taken on the server, in one step with its number: while as many trials count or run as may, none
    begins, and `study.ask` raises `BudgetExhaustedError`. A trial that ends in a state that does not count
    gives its place back. Trials that the study has already count too. An enqueued trial takes its place when
    it is started.

    A trial whose worker died keeps its place until heartbeats fail it: give the storage a
    `heartbeat_interval`.

    Example:
        >>> budget = TrialBudget(study, n_trials=1000)
        >>> budget.optimize(objective)  # in every worker

    Args:
        study: On a `RedisLockedStorage`.
        n_trials: How many. If the study has a budget already, the larger one holds for all: to raise it,
            restart workers with a larger number; workers that still give the smaller one change nothing.
        states: Which final states count.

    Raises:
        UnsupportedStorageError: If the study is on another storage.
        BudgetMismatchError: If the study's budget counts other states.
        ValueError: If `n_trials` is below 1, or `states` are no final ones.
    """

    def __init__(self, study: optuna.Study, n_trials: int, states: Collection[TrialState] = COUNTED) -> None:
        self.study = study
        self._states = tuple(states)
        self._limits = limits_of(study, "TrialBudget")
        self._limits.join_budget(n_trials, self._states)

    def optimize(
        self,
        func: Objective,
        n_trials: int | None = None,
        timeout: float | None = None,
        *,
        wait: bool = True,
        **options: Any,
    ) -> None:
        """Run `study.optimize` until the budget is used up, or the study is told to stop.

        Args:
            func: The objective.
            n_trials: Trials of this worker at most.
            timeout: Seconds after which this worker begins no further trial.
            wait: Whether to stay while the last trials run elsewhere, and to replace those that fail.
            **options: What else `study.optimize` takes: `n_jobs`, `catch`, `callbacks` and so on.
        """
        run_within_limits(self.study, self._limits, func, n_trials, timeout, wait, options)

    def remaining(self) -> int:
        """How many trials may still begin; one round trip."""
        left = self._limits.get().remaining
        return 0 if left is None else left

    def change(self, n_trials: int) -> None:
        """Set the budget of the whole cluster, higher or lower; running trials are not ended."""
        self._limits.set_budget(n_trials, self._states)

    def lift(self) -> None:
        """Take the budget away: nothing bounds the study any more."""
        self._limits.set_budget(None, self._states)


def limits_of(study: optuna.Study, what: str) -> StudyLimits:
    """The limits of a study.

    Raises:
        UnsupportedStorageError: If it is on a storage whose server cannot count.
    """
    storage = study._storage
    if not isinstance(storage, RedisLockedStorage):
        raise UnsupportedStorageError(
            f"{what} needs a RedisLockedStorage, whose server decides in one step which trial may begin; "
            f"this study is on {type(storage).__name__}"
        )
    return storage.limits(study._study_id)


def run_within_limits(
    study: optuna.Study,
    limits: StudyLimits,
    func: Objective,
    n_trials: int | None,
    timeout: float | None,
    wait: bool,
    options: dict[str, Any],
) -> None:
    """Run `study.optimize` until no trial may begin any more; see `TrialBudget.optimize`."""
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    run: list[int] = []
    callbacks = [*(options.pop("callbacks", None) or ()), lambda _, trial: run.append(trial.number)]
    while True:
        left = None if n_trials is None else n_trials - len(run)
        seconds = None if timeout is None else max(0.0, deadline - time.monotonic())
        try:
            study.optimize(func, left, seconds, callbacks=callbacks, **options)
            return
        except (BudgetExhaustedError, StudyStoppedError) as error:
            if error.study_id != limits.study_id:
                raise  # the objective works on another study
            if isinstance(error, StudyStoppedError) or not wait:
                return
        if not _wait_for_turn(study, limits, deadline):
            return


def _wait_for_turn(study: optuna.Study, limits: StudyLimits, deadline: float) -> bool:
    """Wait until a trial may begin; False if none will, or the worker was told to stop."""
    pause = Backoff(deadline - time.monotonic(), first=0.05, longest=1.0)
    while not study._stop_flag:
        now = limits.get()
        if now.has_turn:
            return True
        if now.stopped or now.is_used_up:
            return False
        fail_stale_trials(study)
        if not pause.wait():
            return False
    return False
