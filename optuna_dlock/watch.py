"""Watch the studies of a storage: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

from optuna_dlock.errors import StorageUnavailableError
from optuna_dlock.report import StudyReport
from optuna_dlock.report_run import look
from optuna_dlock.report_source import ReportSource
from optuna_dlock.report_view import Report, Words, as_json, plain, plain_study, tables

# Takes the latest report, and what is wrong now if that is why there is no later one.
Show = Callable[[Report, "str | None"], None]


def watch(
    source: ReportSource,
    *,
    interval: float,
    lang: str,
    as_lines: bool = False,
    once: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the studies again and again, until interrupted.

    On a terminal with rich, a live table. Elsewhere the first look is printed whole, then each study that
    changed. A storage that does not answer is asked again, unless it is the first look.

    Args:
        source: Where to look.
        interval: Seconds between two looks.
        lang: "en" or "zh".
        as_lines: Print each look as one line of JSON instead.
        once: Look once and return.
        sleep: Waits between two looks.
    """
    is_live = sys.stdout.isatty() and find_spec("rich") is not None
    with _json_lines() if as_lines else _live(lang) if is_live else _lines(lang) as show:
        report = look(source)
        show(report, None)
        while not once:
            sleep(interval)
            try:
                report = look(source)
                problem = None
            except StorageUnavailableError as error:
                problem = " ".join(str(error).split())
            show(report, problem)


def run_watch(
    *,
    url: str,
    pattern: str | None,
    interval: float,
    once: bool,
    as_lines: bool,
    lang: str,
    window: float,
    timeout: float,
) -> None:
    """Open a storage and watch it; see `ReportSource` and `watch`.

    Raises:
        DLockError: If it cannot look, or no study matches.
    """
    source = ReportSource(url, pattern, timeout=timeout, window=window)
    try:
        watch(source, interval=interval, lang=lang, as_lines=as_lines, once=once)
    finally:
        source.close()


@contextlib.contextmanager
def _live(lang: str) -> Iterator[Show]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(), auto_refresh=False, vertical_overflow="crop") as live:

        def show(report: Report, problem: str | None) -> None:
            shown = tables(report, lang)
            live.update(Group(Text(problem, style="red"), shown) if problem else shown, refresh=True)

        yield show


@contextlib.contextmanager
def _json_lines() -> Iterator[Show]:
    def show(report: Report, problem: str | None) -> None:
        if problem is not None:
            print("optuna-dlock:", problem, file=sys.stderr, flush=True)
        else:
            print(as_json(report, indent=None), flush=True)

    yield show


@contextlib.contextmanager
def _lines(lang: str) -> Iterator[Show]:
    words = Words(lang)
    last: dict[str, tuple[int, ...]] | None = None

    def show(report: Report, problem: str | None) -> None:
        nonlocal last
        counts = {study.name: _counts(study) for study in report.studies}
        if problem is not None:
            print("optuna-dlock:", problem, file=sys.stderr, flush=True)
        elif last is None:
            print(plain(report, lang), flush=True)
        else:
            for study in report.studies:
                if last.get(study.name) != counts[study.name]:
                    lines = plain_study(study, words, report.window)
                    print(f"\n{report.time:%H:%M:%S}", *lines, sep="\n", flush=True)
        last = counts

    yield show


def _counts(study: StudyReport) -> tuple[int, ...]:
    """What changes when something happened; a throughput changes by itself."""
    return (
        *(study.trials, study.complete, study.running, study.waiting),
        *(study.pruned, study.failed, study.skipped),
    )
