"""A worker of the stacks in this folder: put your own objective here.

Environment: OPTUNA_DLOCK_URL (where the data is), STUDY (its name), TRIALS (how many in all),
WORKERS (how many there are, for the sampler).

SIGINT finishes the running trial and ends the worker; SIGTERM puts the running trial back in the queue.
"""

from __future__ import annotations

import os

import optuna

from optuna_dlock import RedisLockedStorage, TrialBudget, cluster_sampler, graceful_stop


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
    with graceful_stop(study, on_abort="requeue"):
        TrialBudget(study, n_trials=trials).optimize(objective)


if __name__ == "__main__":
    main()
