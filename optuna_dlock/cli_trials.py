"""`optuna-dlock trials`: the trials of a study, with the host that ran each."""

from __future__ import annotations

import argparse
import json
from datetime import datetime
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.cli_output import OK, URL_HELP, AddCommand, duration, open_to_look, table, to_json
from optuna_dlock.worker import Worker

_EXAMPLES = """\
examples:
  optuna-dlock trials redis://localhost:6379/0 mnist --last 20
  optuna-dlock trials redis://localhost:6379/0 mnist --state RUNNING
  optuna-dlock trials redis://localhost:6379/0 mnist --state FAIL --json

The duration of a RUNNING trial is that so far. A host is missing where nobody ran the trial yet, or where
it was added as a finished one. In JSON, durations are seconds, and infinities are texts: "inf", "-inf".
Exit codes: 0 listed (there may be none), 2 it could not look, or there is no such study."""


def add_to(add_command: AddCommand) -> None:
    """Make the command known."""
    parser = add_command("trials", "list the trials of a study", _EXAMPLES, _run)
    parser.add_argument("url", metavar="URL", help=URL_HELP)
    parser.add_argument("study", metavar="STUDY", help="name of the study")
    parser.add_argument(
        "--state",
        type=str.upper,
        choices=[state.name for state in TrialState],
        help="only those in this state",
    )
    parser.add_argument("--last", type=_positive, metavar="N", help="only the last N of them")
    parser.add_argument("--json", action="store_true", help="print JSON, one list with an object per trial")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _run(args: argparse.Namespace) -> int:
    states = None if args.state is None else (TrialState[args.state],)
    with open_to_look(args.url) as storage:
        study_id = storage.get_study_id_from_name(args.study)
        trials = storage.get_all_trials(study_id, deepcopy=False, states=states)
        if args.last is not None:
            trials = trials[-args.last :]
        workers = storage.get_trial_workers(study_id, trials[0].number) if trials else {}
    now = datetime.now()
    found = [_described(trial, workers.get(trial.number), now) for trial in trials]
    print(to_json(found) if args.json else _text(found))
    return OK


def _described(trial: FrozenTrial, worker: Worker | None, now: datetime) -> dict[str, Any]:
    start, end = trial.datetime_start, trial.datetime_complete
    until = now if trial.state is TrialState.RUNNING else end
    return {
        "number": trial.number,
        "state": trial.state.name,
        "values": trial.values,
        "params": trial.params,
        "host": worker and worker.host,
        "pid": worker and worker.pid,
        "worker": worker and worker.name,
        "start": start and start.isoformat(),
        "end": end and end.isoformat(),
        "duration": (until - start).total_seconds() if start and until else None,
    }


def _text(found: list[dict[str, Any]]) -> str:
    if not found:
        return "no trials"
    rows: list[tuple[object, ...]] = [("number", "state", "values", "host", "duration", "params")]
    for trial in found:
        values = ", ".join(f"{value:.6g}" for value in trial["values"] or ())
        params = ", ".join(
            f"{name}={json.dumps(value, ensure_ascii=False, default=str)}"
            for name, value in trial["params"].items()
        )
        rows.append(
            (
                *(trial["number"], trial["state"], values, trial["host"] or ""),
                *(duration(trial["duration"]), params),
            )
        )
    return table(rows, left=(1, 3, 5))
