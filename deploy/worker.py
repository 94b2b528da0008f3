"""A worker of the stacks in this folder: put your own objective here.

Environment: OPTUNA_DLOCK_URL (where the data is), STUDY (its name), TRIALS (how many in all; workers that are
on their last one may exceed it), WORKERS (how many there are, for the sampler).

SIGINT finishes the running trial and ends the worker.
"""

from __future__ import annotations

import os
import signal

import optuna
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState

from optuna_dlock import RedisLockedStorage
from optuna_dlock.samplers import cluster_sampler


def objective(trial: optuna.Trial) -> float:
    """What is to be minimized."""
    x = trial.suggest_float("x", -10.0, 10.0)
    y = trial.suggest_int("y", -5, 5)
    return (x - 2) ** 2 + y**2


def main() -> None:
    """Work until the study has its trials."""
    trials = int(os.environ.get("TRIALS", "200"))
    study = optuna.create_study(
        storage=RedisLockedStorage(heartbeat_interval=30),  # the trials of a worker that died get failed
        study_name=os.environ.get("STUDY", "example"),
        sampler=cluster_sampler("tpe", workers=int(os.environ.get("WORKERS", "4"))),
        load_if_exists=True,
    )
    signal.signal(signal.SIGINT, lambda *_: study.stop())
    study.optimize(objective, callbacks=[MaxTrialsCallback(trials, states=(TrialState.COMPLETE,))])


if __name__ == "__main__":
    main()
