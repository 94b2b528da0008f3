"""Objectives that do not train the same parameters twice: `claim_params`, `skip_duplicates`."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar, cast, overload

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import BaseStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, Trial, TrialState

from optuna_dlock.cache import trial_id_of
from optuna_dlock.duplicates import Duplicate
from optuna_dlock.errors import ClaimError
from optuna_dlock.retry import Backoff
from optuna_dlock.storage import RedisLockedStorage

_logger = logging.getLogger(__name__)
_P = ParamSpec("_P")
_R = TypeVar("_R")
OnRunning = Literal["fail", "prune", "wait"]
_CHOICES = ("fail", "prune", "wait")
_LONGEST_WAIT = 1.0  # seconds between two looks at a trial that is waited for


@dataclass(frozen=True)
class _Options:
    """How to deal with duplicates; the arguments of `claim_params`."""

    on_running: OnRunning = "fail"
    timeout: float | None = None
    extra: Any = None
    copy_user_attrs: bool = False

    def __post_init__(self) -> None:
        if self.on_running not in _CHOICES:
            raise ValueError(
                f"on_running is one of {', '.join(map(repr, _CHOICES))}, not {self.on_running!r}"
            )
        if self.timeout is not None and self.timeout < 0:
            raise ValueError(f"timeout is a number of seconds, not {self.timeout!r}")


def claim_params(
    trial: BaseTrial,
    *,
    on_running: OnRunning = "fail",
    timeout: float | None = None,
    extra: Any = None,
    copy_user_attrs: bool = False,
) -> Duplicate | None:
    """Claim the parameters of a trial, after the last suggestion; tells if another trial has or trains them.

    Of all trials of the study that ask for the same parameters, on whatever host, the first gets None and
    trains. Its claim stands while it is RUNNING or COMPLETE; if it fails, is pruned or is reaped, the next
    one to ask gets the parameters. The cost is one round trip, however many trials there are.

    A worker that dies without heartbeats leaves its trial RUNNING, and its parameters claimed, for ever: give
    the storage a `heartbeat_interval`. Trials that never claimed anything are not seen.

    Example:
        >>> def objective(trial):
        ...     x = trial.suggest_int("x", 0, 9)
        ...     twin = claim_params(trial)
        ...     if twin is not None:
        ...         return twin.value
        ...     return train(x)

    Args:
        trial: The trial of the objective. A `FixedTrial` or `FrozenTrial` belongs to no study: it gets None.
        on_running: What to do if another trial is training these parameters. "fail": the answer has the value
            None, and Optuna fails a trial that returns it. "prune": raise `TrialPruned`; samplers take that
            for a bad result. "wait": wait for that trial and take over its values, or its training if it ends
            without any.
        timeout: Seconds to wait at most, after which it is as with "fail"; None for no limit.
        extra: What else the result depends on, such as the version of a data set; anything that JSON can
            express.
        copy_user_attrs: Whether a trial that takes over values takes over the user attributes too, except
            those it has itself; e.g. where `constraints_func` reads them.

    Returns:
        None if this trial is to train. Else whom it duplicates: return its `.value` from the objective.

    Raises:
        optuna.TrialPruned: See `on_running`.
        ClaimError: If nothing was suggested yet, or the study is in another storage than
            `RedisLockedStorage`.
        FinishedTrialError: If this trial was failed by somebody else meanwhile.
    """
    options = _Options(on_running, timeout, extra, copy_user_attrs)
    if isinstance(trial, (FixedTrial, FrozenTrial)):
        return None
    if not isinstance(trial, Trial):
        raise TypeError(f"claim_params takes the trial of an objective, not {type(trial).__name__}")
    storage = locked_storage(trial.storage)
    twin: Duplicate | None = storage.claim_params(trial._trial_id, extra)
    if twin is not None and twin.state is TrialState.RUNNING:
        if on_running == "prune":
            raise optuna.TrialPruned(f"trial {twin.owner} is training the same parameters")
        if on_running == "wait":
            twin = _wait(trial, storage, twin, options)
    if twin is None:
        return None
    _logger.info("trial %d repeats trial %d, which is %s", trial.number, twin.owner, twin.state.name)
    if copy_user_attrs and twin.state is TrialState.COMPLETE:
        study_id = trial.study._study_id
        missing = storage.get_trial(trial_id_of(study_id, twin.owner)).user_attrs
        for key in missing.keys() - trial.user_attrs.keys():
            trial.set_user_attr(key, missing[key])
    return twin


def locked_storage(storage: BaseStorage) -> RedisLockedStorage:
    """The `RedisLockedStorage` that is this storage, or that stands behind Optuna's cache.

    Raises:
        ClaimError: If it is another one.
    """
    if isinstance(storage, _CachedStorage):
        storage = cast("BaseStorage", storage._backend)
    if isinstance(storage, RedisLockedStorage):
        return storage
    raise ClaimError(
        f"the parameters of a trial are claimed on the server of a RedisLockedStorage; this study is in a "
        f"{type(storage).__name__}: connect to the server itself, or, on one machine, use "
        "RedisLockedStorage('embedded:PATH')",
        number=None,
    )


def _wait(trial: Trial, storage: RedisLockedStorage, twin: Duplicate, options: _Options) -> Duplicate | None:
    """Wait until the other trial is COMPLETE, the parameters are ours, or the time is over."""
    study_id = trial.study._study_id
    timeout = math.inf if options.timeout is None else options.timeout
    waiting = Backoff(timeout, longest=_LONGEST_WAIT)
    if math.isinf(timeout) and storage.heartbeat_interval is None:
        _warn_once(
            "no heartbeats",
            f"trial {trial.number} waits for trial {twin.owner}, without end should its worker have died: "
            "give RedisLockedStorage a heartbeat_interval, or skip_duplicates a timeout",
        )
    next_reaping = time.monotonic()
    while True:
        if storage.heartbeat_interval is not None and time.monotonic() >= next_reaping:
            # Optuna reaps before each new trial; where all workers wait for a dead one, nobody begins one.
            optuna.storages.fail_stale_trials(trial.study)
            next_reaping = time.monotonic() + storage.heartbeat_interval
        if not storage.is_trial_running(trial_id_of(study_id, twin.owner)):
            claimed: Duplicate | None = storage.claim_params(trial._trial_id, options.extra)
            if claimed is None or claimed.state is TrialState.COMPLETE:
                return claimed
            twin = claimed  # another one that had waited was the first
        if not waiting.wait():
            return twin


# -- the decorator ---------------------------------------------------------------------------------------


class _Skipped(BaseException):  # no `except Exception` of an objective's must catch it
    """The parameters are another trial's: the objective ends here."""

    def __init__(self, twin: Duplicate) -> None:
        super().__init__(twin)
        self.twin = twin


@dataclass
class _Run:
    """One run of a decorated objective."""

    options: _Options
    has_claimed: bool = False


_run: ContextVar[_Run | None] = ContextVar("_run", default=None)


def claim_or_skip(trial: BaseTrial, *, extra: Any = None) -> None:
    """Within an objective with `@skip_duplicates`: train what follows, or end the objective here.

    To be called after the last suggestion, once. See `claim_params`.

    Args:
        trial: The trial of the objective.
        extra: Instead of that of `skip_duplicates`, if it is not None.

    Raises:
        ClaimError: Outside of such an objective; and as `claim_params` does.
    """
    run = _run.get()
    if run is None:
        raise ClaimError(
            "claim_or_skip ends an objective that has the decorator @skip_duplicates, and is called from "
            "there; without it, use claim_params",
            number=trial.number,
        )
    run.has_claimed = True
    options = run.options if extra is None else replace(run.options, extra=extra)
    twin = claim_params(
        trial,
        on_running=options.on_running,
        timeout=options.timeout,
        extra=options.extra,
        copy_user_attrs=options.copy_user_attrs,
    )
    if twin is not None:
        raise _Skipped(twin)


_Space = Callable[[Any], Any] | Mapping[str, BaseDistribution]


@overload
def skip_duplicates(objective: Callable[_P, _R], /) -> Callable[_P, _R]: ...
@overload
def skip_duplicates(
    *,
    on_running: OnRunning = ...,
    timeout: float | None = ...,
    extra: Any = ...,
    copy_user_attrs: bool = ...,
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]: ...
@overload
def skip_duplicates(
    *,
    suggest: _Space,
    on_running: OnRunning = ...,
    timeout: float | None = ...,
    extra: Any = ...,
    copy_user_attrs: bool = ...,
) -> Callable[[Callable[..., _R]], Callable[..., _R]]: ...
def skip_duplicates(
    objective: Callable[..., Any] | None = None,
    /,
    *,
    suggest: _Space | None = None,
    on_running: OnRunning = "fail",
    timeout: float | None = None,
    extra: Any = None,
    copy_user_attrs: bool = False,
) -> Any:
    """Decorator of an objective: parameters that another trial has or trains are not trained again.

    In a study that defines its space by running, only the objective knows when the suggestions are over: it
    says so with `claim_or_skip(trial)`. If another trial is COMPLETE with the same parameters, the objective
    ends there with that trial's value or values; if one is RUNNING, see `on_running` of `claim_params`.

    Example:
        >>> @skip_duplicates(on_running="wait")
        ... def objective(trial):
        ...     x = trial.suggest_int("x", 0, 9)
        ...     claim_or_skip(trial)
        ...     return train(x)

    With `suggest` the objective gets the parameters as its last argument, and has nothing else to call:

        >>> @skip_duplicates(suggest={"x": IntDistribution(0, 9)})
        ... def objective(trial, params):
        ...     return train(params["x"])

    Args:
        objective: The objective, where the decorator stands without brackets.
        suggest: The space by name, or a function of the trial that makes all suggestions; what it returns is
            passed to the objective.
        on_running: See `claim_params`, as for the others.
        timeout: Seconds.
        extra: Anything that JSON can express.
        copy_user_attrs: Whether a duplicate takes over the user attributes too.

    Returns:
        The objective for `study.optimize`; its last positional argument is the trial.
    """
    options = _Options(on_running, timeout, extra, copy_user_attrs)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        name = getattr(function, "__qualname__", repr(function))

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            run = _Run(options)
            outer = _run.set(run)
            try:
                if suggest is not None:
                    trial = args[-1]
                    args = (
                        *args,
                        suggest_all(trial, suggest) if isinstance(suggest, Mapping) else suggest(trial),
                    )
                    claim_or_skip(trial)
                result = function(*args, **kwargs)
            except _Skipped as skipped:
                return skipped.twin.value
            finally:
                _run.reset(outer)
            if not run.has_claimed:
                _warn_once(name, f"{name} has @skip_duplicates and did not call claim_or_skip(trial)")
            return result

        return wrapper

    return decorate if objective is None else decorate(objective)


def suggest_all(trial: BaseTrial, space: Mapping[str, BaseDistribution]) -> dict[str, Any]:
    """Suggest every parameter of a fixed space.

    Raises:
        TypeError: If a distribution is none that can be suggested.
    """
    params: dict[str, Any] = {}
    for name, d in space.items():
        if isinstance(d, FloatDistribution):
            params[name] = trial.suggest_float(name, d.low, d.high, step=d.step, log=d.log)
        elif isinstance(d, IntDistribution):
            params[name] = trial.suggest_int(name, d.low, d.high, step=d.step, log=d.log)
        elif isinstance(d, CategoricalDistribution):
            params[name] = trial.suggest_categorical(name, d.choices)
        else:
            raise TypeError(f"the space of {name!r} is no distribution of Optuna: {d!r}")
    return params


_warned: set[str] = set()


def _warn_once(about: str, text: str) -> None:
    if about not in _warned:
        _warned.add(about)
        _logger.warning("%s", text)
