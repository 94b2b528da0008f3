"""Claims of parameter sets: one trial trains a set, the others are told who does.

All methods run under the node's lock.
"""

from __future__ import annotations

from typing import Any

from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.codec import state_of
from optuna_dlock.duplicates import Duplicate, duplicate_of, fingerprint, read_duplicates
from optuna_dlock.errors import ClaimError, CorruptRecordError
from optuna_dlock.live_trial import LiveTrial
from optuna_dlock.scripts import BEHIND, FINISHED, NO_STUDY, NO_TRIAL, NOT_RUNNING, OK, script
from optuna_dlock.trials import StudyTrials

_BATCH = 500  # trials for which one script call claims
_OWNER_COMPLETE, _OWNER_RUNNING = 1, 2  # answers of claim_params


class ClaimedTrials(StudyTrials):
    """The trials of one study, and which of them may train which parameters."""

    def claim_params(self, number: int, extra: Any) -> Duplicate | None:
        """Claim the parameters of a RUNNING trial; None if it is to train them.

        Raises:
            ClaimError: If the trial has no parameters yet, or is not RUNNING, or the trial that claimed them
                first got more of them afterwards.
            FinishedTrialError, TrialNotFoundError: If it is finished or there is none.
        """
        trial = self._writable(number)
        while True:
            digest = self._fingerprint(trial, extra)
            known = len(self._cache.table)
            reply = self._claim(trial, digest, known)
            code = reply[0]
            if code == OK:
                return None
            if code == _OWNER_COMPLETE:
                owner = self._take(int(reply[3]), reply, known)
                self._check_owner(trial, owner, digest, extra)
                return Duplicate(owner.number, TrialState.COMPLETE, tuple(owner.values))
            if code == _OWNER_RUNNING:
                return Duplicate(int(reply[1]), TrialState.RUNNING)
            if code == NO_STUDY:
                raise self._gone()
            if code == NO_TRIAL:
                self._cache.forget_live(number)
                raise self._trial_not_found(number)
            if code == FINISHED:
                self._cache.forget_live(number)
                raise self._finished_error(number)
            if code == NOT_RUNNING:
                self._mark_stale(trial)
                raise ClaimError(f"trial {number} is not RUNNING: nobody works on it", number=number)
            assert code == BEHIND  # noqa: S101 the only code left
            self._raise_refusal(trial)
            trial = self._refetch(number)

    def _fingerprint(self, trial: LiveTrial, extra: Any) -> bytes:
        if not trial.internal:
            raise ClaimError(
                f"trial {trial.number} has no parameters yet: claim them after the last suggestion",
                number=trial.number,
            )
        params = ((name, trial.distributions[name], value) for name, (_, value) in trial.internal.items())
        return fingerprint(params, extra)

    def _claim(self, trial: LiveTrial, digest: bytes, known: int) -> Any:
        keys, number = self._keys, trial.number
        return self._section.run(
            script("claim_params"),
            [
                *(keys.meta, self._section.key(), keys.live, keys.trial(number), keys.finished),
                *(keys.param_sets, keys.duplicates, keys.dists),
            ],
            [number, trial.version, digest, known],
        )

    def _check_owner(self, trial: LiveTrial, owner: FrozenTrial, digest: bytes, extra: Any) -> None:
        """Take over no values of other parameters: the owner may have claimed before it had all of them."""
        if _fingerprint_of(owner, extra) != digest:
            later = sorted(owner.params.keys() - trial.params.keys())
            raise ClaimError(
                f"trial {owner.number} claimed the parameters of trial {trial.number} and was then suggested "
                f"{', '.join(map(repr, later)) or 'others'}: claim after the last suggestion",
                number=trial.number,
            )

    def claim_finished(self, extra: Any) -> int:
        """Let the COMPLETE trials own their parameters where nobody does; how many became owners."""
        recorded = self.duplicates()
        trials = [
            trial
            for trial in self.get_all((TrialState.COMPLETE,))
            if trial.params and duplicate_of(trial, recorded) is None
        ]
        keys, made = self._keys, 0
        for start in range(0, len(trials), _BATCH):
            batch = trials[start : start + _BATCH]
            reply = self._section.run(
                script("claim_finished"),
                [keys.meta, self._section.key(), keys.live, keys.finished, keys.param_sets],
                [
                    " ".join(str(trial.number) for trial in batch),
                    b"".join(_fingerprint_of(trial, extra) for trial in batch),
                ],
            )
            if reply[0] == NO_STUDY:
                raise self._gone()
            made += int(reply[1])
        return made

    def is_running(self, number: int) -> bool:
        """Whether a trial is RUNNING now; reads nothing else of it."""
        record = self._node.command("HGET", self._keys.live, number)
        return record is not None and state_of(record) is TrialState.RUNNING

    def duplicates(self) -> dict[int, Duplicate]:
        """The trials that found their parameters claimed by another one, by number."""
        key = self._keys.duplicates
        reply = self._node.run(script("get_study_attrs"), [self._keys.meta, key])
        if reply[0] == NO_STUDY:
            raise self._gone()
        flat = reply[1]
        try:
            return read_duplicates(zip(flat[::2], flat[1::2], strict=True))
        except (ValueError, KeyError) as error:
            raise CorruptRecordError(f"key {key!r} holds an unreadable entry: {error}", key=key) from error


def _fingerprint_of(trial: FrozenTrial, extra: Any) -> bytes:
    params = (
        (name, distribution, distribution.to_internal_repr(trial.params[name]))
        for name, distribution in trial.distributions.items()
    )
    return fingerprint(params, extra)
