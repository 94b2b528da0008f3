"""One run of `optuna-dlock report`: look once, write it in one of the formats."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from optuna_dlock.report_source import ReportSource
from optuna_dlock.report_view import Report, as_csv, as_json, plain, tables

FORMATS = ("table", "plain", "json", "csv", "html")


def look(source: ReportSource, begun: float | None = None) -> Report:
    """A report of how things are now; only what changed since the last look is read and counted.

    Args:
        source: Where to look.
        begun: When the work began, by `time.perf_counter`; None for now.
    """
    begun = time.perf_counter() if begun is None else begun
    now = datetime.now()
    studies = source.refresh(now)
    return Report(source.database, studies, time.perf_counter() - begun, now, source.window)


def run_report(
    *,
    url: str,
    pattern: str | None,
    form: str | None,
    output: str | None,
    lang: str,
    window: float,
    timeout: float,
) -> None:
    """Report on a storage.

    Args:
        url, pattern, window, timeout: See `ReportSource`.
        form: One of `FORMATS`; None for a table on a terminal, where rich is installed, else plain.
        output: Path of the file to write; None for standard output.
        lang: "en" or "zh"; JSON and CSV are always English.

    Raises:
        DLockError: If it cannot look, or no study matches.
        OSError: If the file cannot be written.
    """
    begun = time.perf_counter()
    source = ReportSource(url, pattern, timeout=timeout, window=window)
    try:
        report = look(source, begun)
        if form is None:
            on_terminal = output is None and sys.stdout.isatty()
            form = "table" if on_terminal and find_spec("rich") else "plain"
        if form == "table" and output is None:
            from rich.console import Console

            Console().print(tables(report, lang))
            return
        text = _text(report, source, form, lang)
    finally:
        source.close()
    if output is None:
        print(text)
    else:
        Path(output).write_text(text + "\n", "utf-8")


def _text(report: Report, source: ReportSource, form: str, lang: str) -> str:
    if form == "json":
        return as_json(report)
    if form == "csv":
        return as_csv(report)
    if form == "html":
        from optuna_dlock.report_html import page

        return page(report, list(source.statistics.values()), lang)
    if form == "table":
        from rich.console import Console

        console = Console(width=160, color_system=None)
        with console.capture() as capture:
            console.print(tables(report, lang))
        return capture.get().rstrip("\n")
    return plain(report, lang)
