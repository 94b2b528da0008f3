"""A grid that a cluster searches together: each point is handed out exactly once."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.budget import COUNTED, Objective, limits_of, run_within_limits
from optuna_dlock.errors import BudgetExhaustedError, GridMismatchError
from optuna_dlock.grid import Grid, GridValue
from optuna_dlock.limits import GridUse, StudyLimits

_LARGEST = 2**53  # what Lua can count to; nobody gets there


class _Point(NamedTuple):
    values: dict[str, GridValue]
    retries: int


class ClusterGridSampler(BaseSampler):
    """Optuna's `GridSampler` for many workers: each point of the grid is evaluated by exactly one trial.

    The server hands out the points. One whose trial failed, or died and was failed by heartbeats, is handed
    out again when all others were, to whichever worker asks next. When no point is left no trial begins:
    there are none in excess. A trial stores its parameters and nothing of the grid.

    `sampler.optimize(study, objective)` ends cleanly in every worker, and waits for points that may come
    back. With plain `study.optimize(objective)` a worker ends when no point is left for it, and one that
    comes too late for the last point gets `BudgetExhaustedError`. Before the study knows its grid nothing is
    refused: if a study begins with more workers than points, those in excess have their first trial failed.

    Enqueued trials with fixed parameters get no point, as with Optuna's. Do not combine it with
    `RetryFailedTrialCallback`: failed points come back by themselves, and would be evaluated twice.

    Example:
        >>> sampler = ClusterGridSampler({"x": [1, 2, 3], "kind": ["a", "b"]})
        >>> study = optuna.create_study(storage=storage, study_name="grid", sampler=sampler)
        >>> sampler.optimize(study, objective)

    Args:
        search_space: Parameter -> its values; the same in all workers.
        seed: Of the order of the points; the same in all workers.
        shuffle: False for the order of an odometer, the last name (alphabetically) turning fastest.
        states: The final states in which a point is done; with FAIL among them none is handed out twice.
        max_retry: How often a point is handed out again, so that one that always fails does not go on for
            ever; None for no limit.

    Raises:
        ValueError: If a parameter has no values or one twice, or a value is no str, float, int, bool or None.
    """

    def __init__(
        self,
        search_space: Mapping[str, Sequence[GridValue]],
        *,
        seed: int = 0,
        shuffle: bool = True,
        states: Collection[TrialState] = COUNTED,
        max_retry: int | None = 3,
    ) -> None:
        if max_retry is not None and max_retry < 0:
            raise ValueError(f"max_retry is a number of 0 or more, or None, not {max_retry!r}")
        self._grid = Grid(search_space, seed if shuffle else None)
        self._states = tuple(states)
        self._max_retry = max_retry
        self._digest = self._grid.digest(sorted(state.name for state in self._states), max_retry)
        self._points: dict[tuple[int, int], _Point] = {}
        self._ends_by_refusal = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_points": {}, "_ends_by_refusal": False}

    @property
    def size(self) -> int:
        """How many points the grid has."""
        return self._grid.size

    def optimize(
        self,
        study: optuna.Study,
        func: Objective,
        n_trials: int | None = None,
        timeout: float | None = None,
        *,
        wait: bool = True,
        **options: Any,
    ) -> None:
        """Run `study.optimize` until every point is done, or the study is told to stop.

        Args:
            study: Whose sampler this is.
            func: The objective.
            n_trials: Trials of this worker at most.
            timeout: Seconds after which this worker begins no further trial.
            wait: Whether to stay while the last points are being evaluated elsewhere, and to take over those
                that fail.
            **options: What else `study.optimize` takes: `n_jobs`, `catch`, `callbacks` and so on.

        Raises:
            GridMismatchError: If the study searches another grid.
            UnsupportedStorageError: If the study is not on a `RedisLockedStorage`.
        """
        if study.sampler is not self:
            raise ValueError("this study has another sampler: create or load it with sampler=...")
        limits = limits_of(study, "ClusterGridSampler")
        self._define(limits)
        self._ends_by_refusal = True
        try:
            run_within_limits(study, limits, func, n_trials, timeout, wait, options)
        finally:
            self._ends_by_refusal = False

    def progress(self, study: optuna.Study) -> GridUse:
        """How many points are done, held by unfinished trials, and given up; one round trip."""
        use = limits_of(study, "ClusterGridSampler").get().grid
        return use if use is not None else GridUse(self.size, 0, 0, 0)

    def is_exhausted(self, study: optuna.Study) -> bool:
        """Whether no point will be handed out any more: all are done, or given up."""
        use = self.progress(study)
        return use.done + use.given_up >= use.size

    # -- Optuna's side -----------------------------------------------------------------------------

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """See `BaseSampler`. Gets the trial's point from the server."""
        if "fixed_params" not in trial.system_attrs:
            self._point(study, trial)

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """See `BaseSampler`."""
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """See `BaseSampler`."""
        return {}

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """See `BaseSampler`. Refuses and warns where Optuna's `GridSampler` does."""
        if "fixed_params" in trial.system_attrs:
            raise ValueError(
                "All parameters must be specified when using ClusterGridSampler with enqueue_trial."
            )
        if param_name not in self._grid.search_space:
            raise ValueError(f"The parameter name, {param_name}, is not found in the given grid.")
        value = self._point(study, trial).values[param_name]
        if not param_distribution._contains(param_distribution.to_internal_repr(value)):
            warnings.warn(
                f"The value `{value}` is out of range of the parameter `{param_name}`. "
                f"The value will be used but the actual distribution is: `{param_distribution}`.",
                stacklevel=2,
            )
        return value

    def after_trial(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        state: TrialState,
        values: Sequence[float] | None,
    ) -> None:
        """See `BaseSampler`. Ends this worker's `study.optimize` if no point is left for it."""
        point = self._points.pop((id(study._storage), trial._trial_id), None)
        if self._ends_by_refusal or (state not in self._states and self._comes_back(point)):
            return
        # This trial still holds its point: what is left is the same as when that will be done, or given up.
        left = limits_of(study, "ClusterGridSampler").get().remaining
        if left == 0:
            with contextlib.suppress(RuntimeError):  # not within study.optimize: ask and tell
                study.stop()

    def _comes_back(self, point: _Point | None) -> bool:
        """Whether a point that failed will be handed out again."""
        return self._max_retry is None or point is None or point.retries < self._max_retry

    def _point(self, study: optuna.Study, trial: FrozenTrial) -> _Point:
        key = (id(study._storage), trial._trial_id)
        point = self._points.get(key)
        if point is None:
            limits = limits_of(study, "ClusterGridSampler")
            try:
                claimed = limits.claim_point(trial.number, self._digest)
                if claimed is None:
                    self._define(limits)
                    claimed = limits.claim_point(trial.number, self._digest)
            except (BudgetExhaustedError, GridMismatchError):
                study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
                raise
            assert claimed is not None  # noqa: S101 the study has a grid now
            position, retries = claimed
            point = self._points[key] = _Point(self._grid.point(position), retries)
        return point

    def _define(self, limits: StudyLimits) -> None:
        limits.define_grid(self._digest, min(self.size, _LARGEST), self._states, self._max_retry)
