"""What people see of the demo: progress while it runs, the audit at the end."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import FrozenTrial, TrialState
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from optuna_dlock.audit import Check


@dataclass(frozen=True)
class Row:
    """A worker, as shown.

    Attributes:
        status: What to show if it runs no trial: starting, done, SIGKILL, …
    """

    name: str
    pid: int | None
    status: str


_PLAIN = 2.0  # seconds between two lines where nobody sees a live display


class View:
    """Shows progress: live on a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console, wanted: int) -> None:
        self._console = console
        self._wanted = wanted
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None
        self._next_line = 0.0

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._console.print(text, markup=False, soft_wrap=True)

    def started(self, workers: Sequence[Row]) -> None:
        """Name the workers, for those who want to kill one; the live display has its own table."""
        if self._live is None:
            self.note("started " + ", ".join(f"{w.name} (pid {w.pid})" for w in workers))

    def show(self, trials: Sequence[FrozenTrial], workers: Sequence[Row], seconds: float) -> None:
        """Show the state of the study."""
        done = sum(t.state.is_finished() for t in trials)
        progress = f"{seconds:5.1f} s  {done}/{self._wanted} trials  {_rate(trials):5.1f}/s"
        if self._live is not None:
            bar = Table.grid(padding=(0, 1))
            bar.add_row(ProgressBar(total=self._wanted, completed=done, width=30), progress)
            self._live.update(
                Group(bar, _worker_table(trials, workers), Text(_best(trials), style="bold")), refresh=True
            )
        elif done and seconds >= self._next_line:
            self._next_line = seconds + _PLAIN
            self._console.print(f"{progress}  {_best(trials)}", markup=False, soft_wrap=True)


def report(
    console: Console,
    trials: Sequence[FrozenTrial],
    workers: Sequence[Row],
    checks: Sequence[Check],
    seconds: float,
) -> None:
    """Print the audit and the outcome."""
    if not console.is_terminal:  # on a terminal the live display stays
        console.print(_worker_table(trials, workers), _best(trials), markup=False, soft_wrap=True)
    console.print("Audit: what the workers were told, against what the server holds")
    for check in checks:
        word = "[green]ok    [/green]" if check.ok else "[red]FAILED[/red]"
        console.print(f"  {word} {check.name:<13} {escape(check.text)}", soft_wrap=True)
    done = sum(t.state.is_finished() for t in trials)
    console.print(
        f"{done} trials in {seconds:.1f} s, {_rate(trials):.1f} trials/s once running", soft_wrap=True
    )


def _worker_table(trials: Sequence[FrozenTrial], workers: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("worker", "pid", "trials", "median s"):
        table.add_column(title, justify="left" if title == "worker" else "right")
    table.add_column("share", width=20)
    table.add_column("running")
    mine: dict[Any, list[FrozenTrial]] = {}
    for trial in trials:
        mine.setdefault(trial.user_attrs.get("worker"), []).append(trial)
    counts = {name: sum(t.state.is_finished() for t in own) for name, own in mine.items()}
    most = max(counts.values(), default=0) or 1
    for worker in workers:
        own = mine.get(worker.name, [])
        durations = [t.duration.total_seconds() for t in own if t.state.is_finished() and t.duration]
        running = " ".join(str(t.number) for t in own if t.state == TrialState.RUNNING)
        count = counts.get(worker.name, 0)
        table.add_row(
            worker.name,
            str(worker.pid),
            str(count),
            f"{statistics.median(durations):.2f}" if durations else "",
            ProgressBar(total=most, completed=count, width=20, finished_style="bar.complete"),
            running or worker.status,
        )
    return table


def _rate(trials: Sequence[FrozenTrial]) -> float:
    """Finished trials per second, from the first start to the last finish."""
    starts = [t.datetime_start for t in trials if t.datetime_start]
    ends = [t.datetime_complete for t in trials if t.datetime_complete]
    seconds = (max(ends) - min(starts)).total_seconds() if starts and ends else 0.0
    return len(ends) / seconds if seconds > 0 else 0.0


def _best(trials: Sequence[FrozenTrial]) -> str:
    complete = [
        (t.value, -t.number, t) for t in trials if t.state == TrialState.COMPLETE and t.value is not None
    ]
    if not complete:
        return "no trial complete yet"
    value, _, trial = max(complete, key=lambda entry: entry[:2])
    params = ", ".join(
        f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in trial.params.items()
    )
    return f"best accuracy {value:.4f}, trial {trial.number} of {trial.user_attrs.get('worker')}: {params}"
