"""`optuna-dlock completion`: a script that lets a shell complete commands and options, made by shtab."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from optuna_dlock.cli_output import OK, USAGE, AddCommand

_EXAMPLES = """\
examples:
  optuna-dlock completion bash > ~/.local/share/bash-completion/completions/optuna-dlock
  optuna-dlock completion zsh > "${fpath[1]}/_optuna-dlock"
  source <(optuna-dlock completion bash)             # for this shell only

The script is made once and needs nothing when it completes; make it anew after an upgrade.
Exit codes: 0 printed, 2 it needs more: pip install "optuna-dlock[completion]"."""


def add_to(add_command: AddCommand, parser_of_all: Callable[[], argparse.ArgumentParser]) -> None:
    """Make the command known.

    Args:
        parser_of_all: Gives the parser of the whole tool.
    """

    def run(args: argparse.Namespace) -> int:
        try:
            import shtab
        except ImportError:
            print('optuna-dlock: this needs shtab: pip install "optuna-dlock[completion]"', file=sys.stderr)
            return USAGE
        print(shtab.complete(parser_of_all(), shell=args.shell))
        return OK

    parser = add_command("completion", "print a script for the completion of a shell", _EXAMPLES, run)
    parser.add_argument("shell", metavar="SHELL", choices=["bash", "zsh"], help="bash or zsh")
