"""Finished trials written to a database in bulk: the rows `create_new_trial` writes, in a few statements.

Only preparations use this. One call for each trial takes a database 12-30 ms, so that the larger sizes
would take longer to prepare than the whole rest of a run.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from typing import Any

from optuna.distributions import distribution_to_json
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

_CHUNK = 1000


def fill_database(storage: RDBStorage, study_id: int, trials: Iterable[FrozenTrial]) -> None:
    """Store finished trials with float params, one value and reports, numbered from 0."""
    import sqlalchemy
    from optuna.storages._rdb import models

    chunk: list[FrozenTrial] = []
    number = 0
    with storage.engine.begin() as connection:
        last_id = connection.execute(sqlalchemy.select(sqlalchemy.func.max(models.TrialModel.trial_id)))
        first_id = (last_id.scalar() or 0) + 1

        def write() -> None:
            rows = _rows(chunk, study_id, number, first_id, models)
            for model, found in rows.items():
                if found:
                    connection.execute(model.__table__.insert(), found)
            chunk.clear()

        for trial in trials:
            chunk.append(trial)
            if len(chunk) == _CHUNK:
                write()
                number += _CHUNK
        if chunk:
            write()
        if connection.dialect.name == "postgresql":  # ids were given by hand: tell the sequence
            connection.execute(
                sqlalchemy.text(
                    "SELECT setval(pg_get_serial_sequence('trials', 'trial_id'), max(trial_id)) FROM trials"
                )
            )


def _rows(
    trials: list[FrozenTrial], study_id: int, number: int, first_id: int, models: Any
) -> dict[Any, list[dict[str, Any]]]:
    now = datetime.datetime.now(datetime.timezone.utc).replace(tzinfo=None)
    found: dict[Any, list[dict[str, Any]]] = {
        models.TrialModel: [],
        models.TrialParamModel: [],
        models.TrialValueModel: [],
        models.TrialIntermediateValueModel: [],
    }
    finite = models.TrialValueModel.TrialValueType.FINITE
    step_finite = models.TrialIntermediateValueModel.TrialIntermediateValueType.FINITE
    for index, trial in enumerate(trials, number):
        trial_id = first_id + index
        found[models.TrialModel].append(
            {
                "trial_id": trial_id,
                "number": index,
                "study_id": study_id,
                "state": trial.state,
                "datetime_start": now,
                "datetime_complete": now,
            }
        )
        found[models.TrialValueModel].append(
            {"trial_id": trial_id, "objective": 0, "value": trial.value, "value_type": finite}
        )
        found[models.TrialParamModel] += [
            {
                "trial_id": trial_id,
                "param_name": name,
                "param_value": value,
                "distribution_json": distribution_to_json(trial.distributions[name]),
            }
            for name, value in trial.params.items()
        ]
        found[models.TrialIntermediateValueModel] += [
            {
                "trial_id": trial_id,
                "step": step,
                "intermediate_value": value,
                "intermediate_value_type": step_finite,
            }
            for step, value in trial.intermediate_values.items()
        ]
    return found
