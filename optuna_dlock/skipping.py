"""`@skip_duplicates`: the decorator of an objective that does not train the same parameters twice."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar, overload

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import TrialPruned
from optuna.trial import BaseTrial

from optuna_dlock.duplicates import Duplicate
from optuna_dlock.errors import ClaimError
from optuna_dlock.twins import ClaimOptions, OnRunning, claim_params, warn_once

_P = ParamSpec("_P")
_R = TypeVar("_R")


class _Skipped(BaseException):  # no `except Exception` of an objective's must catch it
    """The parameters are another trial's: the objective ends here, with its value or pruned."""

    def __init__(self, end: Duplicate | TrialPruned) -> None:
        super().__init__(end)
        self.end = end


@dataclass
class _Run:
    """One run of a decorated objective."""

    options: ClaimOptions
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
    try:
        twin = claim_params(
            trial,
            on_running=options.on_running,
            timeout=options.timeout,
            extra=options.extra,
            copy_user_attrs=options.copy_user_attrs,
        )
    except TrialPruned as pruned:
        raise _Skipped(pruned) from None
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
    options = ClaimOptions(on_running, timeout, extra, copy_user_attrs)

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
                if isinstance(skipped.end, TrialPruned):
                    raise skipped.end from None
                return skipped.end.value
            finally:
                _run.reset(outer)
            if not run.has_claimed:
                warn_once(name, f"{name} has @skip_duplicates and did not call claim_or_skip(trial)")
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
