"""Storages that are wrong on purpose, each in one way: the audit has to see what they do."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Container, Sequence
from typing import Any

import redis
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock import RedisLockedStorage
from optuna_dlock.cache import trial_id_of
from optuna_dlock.codec import pack_running
from optuna_dlock.node import Node
from optuna_dlock.scripts import Script


class NumbersByCount(RedisLockedStorage):
    """Reads how many trials there are, then writes one of that number: two steps (G1)."""

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        number = self.get_n_trials(study_id)
        trials, keys = self._trials(study_id), self._registry.study_keys(study_id)
        if template_trial is None:
            record, state = pack_running(self._now()), TrialState.RUNNING
        else:
            record, state = trials._pack_template(template_trial), template_trial.state
        commands: list[tuple[str | bytes | int, ...]] = [("HSET", keys.meta, "n", number + 1)]
        if state.is_finished():
            commands += [("HSET", keys.finished, number, record), ("RPUSH", keys.order, number)]
        else:
            entry = b"%d:0:2:.b%b" % (number, record)
            commands += [("HSET", keys.live, number, record), ("RPUSH", keys.log, entry)]
            if state is TrialState.WAITING:
                commands.append(("ZADD", keys.waiting, number, number))
        self._node.commands(commands)
        return trial_id_of(study_id, number)

    @staticmethod
    def _now() -> Any:
        from datetime import datetime

        return datetime.now()


class NewOperationAfterCut(RedisLockedStorage):
    """Retries a creation as if it were another one (G6)."""

    def _connect(self) -> None:
        super()._connect()
        self._node.__class__ = _ForgetfulNode


class _ForgetfulNode(Node):
    def run(self, script: Script, keys: Sequence[str], args: Sequence[str | bytes | int] = ()) -> Any:
        if script.name != "create_trial":
            return super().run(script, keys, args)
        host, _, port = self.address.partition(":")
        again = list(args)
        with redis.Redis(host=host, port=int(port), protocol=2, retry=None) as client:  # type: ignore[arg-type]
            while True:
                try:
                    return client.eval(script.source, len(keys), *keys, *again)
                except (redis.ConnectionError, redis.TimeoutError):
                    again[2] = self.next_sequence()


class StaleReads(RedisLockedStorage):
    """Answers from what it has read a moment ago (G5)."""

    _read: tuple[float, list[FrozenTrial]] = (0.0, [])

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        if states is not None:
            return super().get_all_trials(study_id, deepcopy, states)
        if time.monotonic() > self._read[0] + 0.3:
            self._read = time.monotonic(), super().get_all_trials(study_id, deepcopy)
        return self._read[1]


class FinishesTwice(RedisLockedStorage):
    """Does not say that a trial was finished by somebody else (G3)."""

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        with contextlib.suppress(UpdateFinishedTrialError):
            return super().set_trial_state_values(trial_id, state, values)
        return True


class ClaimsTwice(RedisLockedStorage):
    """Takes a WAITING trial that somebody else took first (G4)."""

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        return super().set_trial_state_values(trial_id, state, values) or state is TrialState.RUNNING


class DropsWrites(RedisLockedStorage):
    """Loses one attribute of twenty (G2)."""

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        if random.random() < 0.95:
            super().set_trial_user_attr(trial_id, key, value)


class ForgetsFinishes(RedisLockedStorage):
    """Acknowledges a finish and sends it when it next creates a trial: a SIGKILL loses it (G2)."""

    _later: tuple[int, TrialState, Sequence[float] | None] | None = None

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        if self._later is not None:
            later, self._later = self._later, None
            with contextlib.suppress(UpdateFinishedTrialError):
                super().set_trial_state_values(*later)
        return super().create_new_trial(study_id, template_trial)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        if state is not TrialState.COMPLETE:
            return super().set_trial_state_values(trial_id, state, values)
        self._later = trial_id, state, values
        return True
