"""What an objective asks after its suggestions: does another trial have these parameters, or train them?"""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from typing import Any, Literal, cast

import optuna
from optuna.storages import BaseStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, Trial, TrialState

from optuna_dlock.cache import trial_id_of
from optuna_dlock.duplicates import Duplicate
from optuna_dlock.errors import ClaimError
from optuna_dlock.retry import Backoff
from optuna_dlock.storage import RedisLockedStorage, fail_stale_trials

_logger = logging.getLogger(__name__)
OnRunning = Literal["fail", "prune", "wait"]
_CHOICES = ("fail", "prune", "wait")
_LONGEST_WAIT = 1.0  # seconds between two looks at a trial that is waited for


@dataclass(frozen=True)
class ClaimOptions:
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
    the storage a `heartbeat_interval`. Trials that never claimed anything are not seen: `claim_finished`
    makes up for that.

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
    options = ClaimOptions(on_running, timeout, extra, copy_user_attrs)
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


def claim_finished(study: optuna.Study, *, extra: Any = None) -> int:
    """Let the COMPLETE trials of a study own their parameters, so that they are not trained again.

    For trials of before the study used claims, or that were copied or added to it. One pass over the study,
    to be called once. Trials that are known to duplicate others own nothing.

    Args:
        study: In a `RedisLockedStorage`.
        extra: As the claims to come have it.

    Returns:
        How many trials became owners.

    Raises:
        ClaimError: If the study is in another storage.
    """
    made: int = locked_storage(study._storage).claim_finished(study._study_id, extra)
    return made


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


def _wait(
    trial: Trial, storage: RedisLockedStorage, twin: Duplicate, options: ClaimOptions
) -> Duplicate | None:
    """Wait until the other trial is COMPLETE, the parameters are ours, or the time is over."""
    study_id = trial.study._study_id
    timeout = math.inf if options.timeout is None else options.timeout
    waiting = Backoff(timeout, longest=_LONGEST_WAIT)
    if math.isinf(timeout) and storage.heartbeat_interval is None:
        warn_once(
            "no heartbeats",
            f"trial {trial.number} waits for trial {twin.owner}, without end should its worker have died: "
            "give RedisLockedStorage a heartbeat_interval, or skip_duplicates a timeout",
        )
    next_reaping = time.monotonic()
    while True:
        if storage.heartbeat_interval is not None and time.monotonic() >= next_reaping:
            # Optuna reaps before each new trial; where all workers wait for a dead one, nobody begins one.
            fail_stale_trials(trial.study)
            next_reaping = time.monotonic() + storage.heartbeat_interval
        if not storage.is_trial_running(trial_id_of(study_id, twin.owner)):
            claimed: Duplicate | None = storage.claim_params(trial._trial_id, options.extra)
            if claimed is None or claimed.state is TrialState.COMPLETE:
                return claimed
            twin = claimed  # another one that had waited was the first
        if not waiting.wait():
            return twin


_warned: set[str] = set()


def warn_once(about: str, text: str) -> None:
    """Log a warning, the first time in this process that it is about this."""
    if about not in _warned:
        _warned.add(about)
        _logger.warning("%s", text)
