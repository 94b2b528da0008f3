"""`optuna-dlock studies`: which studies there are, and how many trials are in which state."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

from optuna_dlock.cli_output import OK, URL_HELP, AddCommand, open_to_look, table, to_json

_STATES = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
_EXAMPLES = """\
examples:
  optuna-dlock studies redis://localhost:6379/0
  optuna-dlock studies keydb://:password@h1:6379,h2:6379,h3:6379/0 --json
  optuna-dlock studies embedded:optuna.valkey --json | jq -r '.[].study'

The newest study comes first.
Exit codes: 0 listed (there may be none), 2 it could not look."""


def add_to(add_command: AddCommand) -> None:
    """Make the command known."""
    parser = add_command("studies", "list the studies, newest first", _EXAMPLES, _run)
    parser.add_argument("url", metavar="URL", help=URL_HELP)
    parser.add_argument("--json", action="store_true", help="print JSON, one list with an object per study")


def _run(args: argparse.Namespace) -> int:
    with open_to_look(args.url) as storage:
        found: list[dict[str, Any]] = []
        for study in sorted(storage.get_all_studies(), key=lambda study: -study._study_id):
            trials = storage.get_all_trials(study._study_id, deepcopy=False)
            counts = Counter(trial.state.name for trial in trials)
            found.append(
                {
                    "study": study.study_name,
                    "id": study._study_id,
                    "directions": [direction.name.lower() for direction in study.directions],
                    "trials": len(trials),
                    "states": {state: counts[state] for state in _STATES},
                }
            )
    print(to_json(found) if args.json else _text(found))
    return OK


def _text(found: list[dict[str, Any]]) -> str:
    if not found:
        return "no studies"
    rows: list[tuple[object, ...]] = [("study", "directions", "trials", *_STATES)]
    for study in found:
        directions = ", ".join(study["directions"])
        rows.append((study["study"], directions, study["trials"], *study["states"].values()))
    return table(rows, left=(0, 1))
