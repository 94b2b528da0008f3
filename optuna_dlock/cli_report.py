"""`optuna-dlock report` and `optuna-dlock watch`: how fast each host is, once or live."""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from typing import Any

from optuna_dlock import cli_output
from optuna_dlock.cli_output import OK, URL_HELP, USAGE, AddCommand
from optuna_dlock.errors import DLockError

_FORMATS = ("table", "plain", "json", "csv", "html")
_REPORT_EXAMPLES = """\
examples:
  optuna-dlock report redis://localhost:6379/0
  optuna-dlock report keydb://m8:6373,m10:6374/0 --study 'P2c_*' --lang zh
  optuna-dlock report sqlite:///study.db --format html --output report.html
  optuna-dlock report journal.log --json

It changes nothing. The newest study comes first, the fastest host too.
Exit codes: 0 reported (there may be no study), 2 it could not look or no study matches."""
_WATCH_EXAMPLES = """\
examples:
  optuna-dlock watch redis://localhost:6379/0
  optuna-dlock watch redis://localhost:6379/0 --study 'P2c_*' --interval 10
  optuna-dlock watch redis://localhost:6379/0 --once | tail
  optuna-dlock watch redis://localhost:6379/0 --json | jq .studies[0].complete

It changes nothing, and reads only what changed. Ctrl-C ends it.
Exit codes: 0 with --once, 2 it could not look or no study matches, 130 ended by Ctrl-C."""


def add_to(add_command: AddCommand) -> None:
    """Make the commands known."""
    report = add_command("report", "how fast each host is, by study", _REPORT_EXAMPLES, _report)
    _add_options(report)
    report.add_argument("--format", choices=_FORMATS, help="default: table on a terminal, else plain")
    report.add_argument("--json", action="store_true", help="the same as --format json")
    report.add_argument("--output", metavar="FILE", help="write to this file (default: standard output)")
    watch = add_command("watch", "the report, live", _WATCH_EXAMPLES, _watch)
    _add_options(watch)
    watch.add_argument(
        "--interval", type=_seconds, default=2.0, metavar="SECONDS", help="between two looks (default: 2)"
    )
    watch.add_argument("--once", action="store_true", help="look once, for scripts")
    watch.add_argument("--json", action="store_true", help="print each look as one line of JSON")


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "url",
        metavar="URL",
        help=f"{URL_HELP}; or any Optuna storage: sqlite:///file.db, mysql://…, postgresql://…, the path of "
        "a journal or SQLite file, journal+redis://host:6379/0",
    )
    parser.add_argument("--study", metavar="GLOB", help="only studies with such a name (default: all)")
    parser.add_argument("--lang", choices=("en", "zh"), default="en", help="language (default: en)")
    parser.add_argument(
        "--window",
        type=_seconds,
        default=600.0,
        metavar="SECONDS",
        help="of the recent throughput (default: 600)",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _report(args: argparse.Namespace) -> int:
    form = "json" if args.json else args.format
    if form == "table" and find_spec("rich") is None:
        print('optuna-dlock: a table needs more: pip install "optuna-dlock[report]"', file=sys.stderr)
        return USAGE
    from optuna_dlock.report_run import run_report

    try:
        run_report(form=form, output=args.output, **_options(args))
    except (DLockError, BrokenPipeError):  # may be an OSError too
        raise
    except OSError as error:
        print(f"optuna-dlock: cannot write {args.output}: {error.strerror}", file=sys.stderr)
        return USAGE
    return OK


def _watch(args: argparse.Namespace) -> int:
    from optuna_dlock.watch import run_watch

    run_watch(interval=args.interval, once=args.once, as_lines=args.json, **_options(args))
    return OK


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "url": args.url,
        "pattern": args.study,
        "lang": args.lang,
        "window": args.window,
        "timeout": cli_output.TIMEOUT,
    }
