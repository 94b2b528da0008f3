"""What people and programs see of a report: the notes' plain layout, a rich table, JSON, CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from optuna_dlock.report import WINDOW, StudyReport
from optuna_dlock.report_hosts import HostReport

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group
    from rich.table import Table

# The Chinese words are those of the notes that this layout comes from.
_WORDS = {
    "en": {
        "database": "database",
        "mean": "mean",
        "median": "median",
        "took": "took {seconds:.3f} s",
        "no studies": "no studies",
        "throughput": "throughput",
        "throughput over time": "throughput over time, of all hosts and of each",
        "per minute": "/min",
        "rate": "per min",
        "recently": "last {span}",
        "idle": "idle",
        "failed": "failed",
        "pruned": "pruned",
        "skipped": "skipped",
        "waiting": "waiting",
        "running": "running",
        "finished": "finished",
        "host": "host",
        "workers": "workers",
        "best": "best",
        "minutes": "{n:g} min",
        "seconds": "{n:g} s",
        "duration": "duration of a trial (box: middle half, whiskers: 5 to 95 %, bar: median, dot: mean)",
        "best over time": "best value over time",
        "objective": "objective {n}",
        "pareto": "objectives 0 and 1, and their Pareto front",
        "minimize": "minimize",
        "maximize": "maximize",
        "no trials": "no finished trials yet",
    },
    "zh": {
        "database": "数据库",
        "mean": "平均",
        "median": "中位",
        "took": "耗时：{seconds:.3f}秒",  # noqa: RUF001
        "no studies": "没有研究",
        "throughput": "吞吐",
        "throughput over time": "吞吐随时间变化: 全部与各主机",
        "per minute": "/分钟",
        "rate": "每分钟",
        "recently": "最近{span}",
        "idle": "空闲",
        "failed": "失败",
        "pruned": "剪枝",
        "skipped": "跳过",
        "waiting": "等待",
        "running": "运行",
        "finished": "完成",
        "host": "主机",
        "workers": "进程",
        "best": "最优",
        "minutes": "{n:g}分钟",
        "seconds": "{n:g}秒",
        "duration": "单次训练时长 (箱: 中间一半, 须: 5% 至 95%, 竖线: 中位, 圆点: 平均)",
        "best over time": "最优值随时间变化",
        "objective": "目标 {n}",
        "pareto": "目标 0 与 1 及其帕累托前沿",
        "minimize": "最小化",
        "maximize": "最大化",
        "no trials": "尚无完成的试验",
    },
}
LANGUAGES = tuple(_WORDS)
_NAME_WIDTH = 8


@dataclass(frozen=True)
class Report:
    """All that a report shows.

    Attributes:
        database: Its URL without user and password.
        studies: Newest first.
        seconds: The time that reading and counting took.
        time: When it was made, local.
        window: Seconds of the recent throughput.
    """

    database: str
    studies: list[StudyReport]
    seconds: float
    time: datetime
    window: float = WINDOW


class Words:
    """The words of one language, and how numbers are written."""

    def __init__(self, lang: str) -> None:
        self.lang = lang
        self._words = _WORDS[lang]

    def __call__(self, key: str, **values: Any) -> str:
        """The word or phrase of this key."""
        return self._words[key].format(**values)

    def recently(self, window: float) -> str:
        """Name of the recent throughput, such as "last 10 min"."""
        span = self("minutes", n=window / 60) if window % 60 == 0 else self("seconds", n=window)
        return self("recently", span=span)


def number(value: float | None, digits: int = 2) -> str:
    """A number of a report; "-" where nothing is known."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(share: float | None) -> str:
    """A share, such as "4.2%"."""
    return "-" if share is None else f"{share * 100:.1f}%"


def value(best: float | None) -> str:
    """A value of an objective."""
    return "-" if best is None else f"{best:.6g}"


def printable(name: str) -> str:
    """A name that cannot drive the terminal: names are whatever their users chose."""
    return name if name.isprintable() else repr(name)


# -- plain -----------------------------------------------------------------------------------------


def plain(report: Report, lang: str = "en") -> str:
    """The layout of the notes: fit for a file, a mail or `diff`."""
    words = Words(lang)
    lines = [f"{words('database')}({report.database})"]
    for study in report.studies:
        lines += [*plain_study(study, words, report.window), ""]
    if not report.studies:
        lines.append(words("no studies"))
    lines.append(words("took", seconds=report.seconds))
    return "\n".join(lines)


def plain_study(study: StudyReport, words: Words, window: float) -> list[str]:
    """The lines of one study."""
    names = [printable(host.host) for host in study.hosts]
    width = max([_NAME_WIDTH, *(len(name) + 2 for name in names)])
    lines = [f"{study.number} {printable(study.name)}", f"COMPLETE: {study.complete}"]
    for name, host in zip(names, study.hosts, strict=True):
        counts = f"{host.finished}|{host.running}" if host.running else f"{host.finished}"
        lines.append(
            f"{name + ':':<{width}}{words('mean')} = {number(host.mean)}, "
            f"{words('median')} = {number(host.median)} ({counts})"
        )
    lines.append(summary(study, words, window))
    return lines


def summary(study: StudyReport, words: Words, window: float) -> str:
    """Throughput, idle share and what was not finished, in one line."""
    per_minute = words("per minute")
    parts = [
        f"{words('throughput')} = {number(study.throughput)}{per_minute} "
        f"({words.recently(window)}: {number(study.recent)}{per_minute})",
        f"{words('idle')} = {percent(study.idle)}",
        *(
            f"{words(name)} = {getattr(study, name)}"
            for name in ("failed", "pruned", "skipped", "waiting")
            if name in ("failed", "skipped") or getattr(study, name)
        ),
    ]
    return ", ".join(parts)


# -- rich ------------------------------------------------------------------------------------------


def columns(words: Words, window: float) -> dict[str, str]:
    """Heads of the columns of a table of hosts, by name of the field of `HostReport`."""
    names = ("workers", "finished", "running", "pruned", "failed", "skipped")
    return {
        "host": words("host"),
        "mean": f"{words('mean')} s",
        "median": f"{words('median')} s",
        **{name: words(name) for name in names},
        "throughput": words("rate"),
        "recent": words.recently(window),
        "idle": words("idle"),
    }


def cells(host: HostReport) -> dict[str, str]:
    """A row of that table."""
    return {
        "host": printable(host.host),
        "mean": number(host.mean),
        "median": number(host.median),
        "workers": "-" if host.workers is None else str(host.workers),
        **{name: str(getattr(host, name)) for name in ("finished", "running", "pruned", "failed", "skipped")},
        "throughput": number(host.throughput, 1),
        "recent": number(host.recent, 1),
        "idle": percent(host.idle),
    }


class _HostTable:
    """The hosts of a study; columns that say nothing, or for which there is no room, are left out."""

    # The first is the first to go.
    _LEFT_OUT = (
        *("recent", "workers", "pruned", "throughput", "skipped", "failed", "running", "idle"),
        "finished",
    )

    def __init__(self, study: StudyReport, words: Words, window: float) -> None:
        self._rows = [cells(host) for host in study.hosts]
        self._heads = columns(words, window)
        for name in ("workers", "pruned", "failed", "skipped"):
            if all(row[name] in ("-", "0") for row in self._rows):
                del self._heads[name]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        from rich.measure import Measurement

        heads = dict(self._heads)
        unlimited = options.update(max_width=10_000)
        for name in self._LEFT_OUT:
            if Measurement.get(console, unlimited, self._table(heads)).maximum <= options.max_width:
                break
            heads.pop(name, None)
        yield self._table(heads)

    def _table(self, heads: Mapping[str, str]) -> Table:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="dim")
        for name, head in heads.items():
            table.add_column(head, justify="left" if name == "host" else "right", no_wrap=True)
        for row in self._rows:
            table.add_row(*(Text(row[name]) for name in heads))
        return table


def tables(report: Report, lang: str = "en") -> Group:
    """The same as rich tables, one for each study."""
    from rich.console import Group
    from rich.text import Text

    words = Words(lang)
    shown: list[Any] = [Text(f"{words('database')}({report.database})", style="bold")]
    for study in report.studies:
        head = Text.assemble(
            (f"{study.number} {printable(study.name)}", "bold cyan"), f"  COMPLETE: {study.complete}"
        )
        if any(best is not None for best in study.best):
            head.append(f"  {words('best')} {', '.join(map(value, study.best))}", style="green")
        hosts = [_HostTable(study, words, report.window)] if study.hosts else []
        shown += [Text(), head, *hosts, Text(summary(study, words, report.window))]
    if not report.studies:
        shown.append(Text(words("no studies")))
    return Group(*shown, Text(words("took", seconds=report.seconds), style="dim"))


# -- for programs ----------------------------------------------------------------------------------


def as_json(report: Report, indent: int | None = 2) -> str:
    """One object; times are ISO 8601 in local time, infinite values are null."""
    found = {
        "database": report.database,
        "time": report.time,
        "seconds": round(report.seconds, 6),
        "window": report.window,
        "studies": [asdict(study) for study in report.studies],
    }
    return json.dumps(_plain_json(found), ensure_ascii=False, indent=indent, allow_nan=False)


def _plain_json(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _plain_json(entry) for key, entry in item.items()}
    if isinstance(item, list):
        return [_plain_json(entry) for entry in item]
    if isinstance(item, datetime):
        return item.isoformat()
    return None if isinstance(item, float) and not math.isfinite(item) else item


def as_csv(report: Report) -> str:
    """A row for each host of each study; a study without hosts has one row whose host is empty."""
    names = [field.name for field in fields(HostReport)]
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["number", "study", *names])
    for study in report.studies:
        rows.writerows(_csv_rows(study, names))
    return out.getvalue().rstrip("\n")


def _csv_rows(study: StudyReport, names: Sequence[str]) -> list[list[Any]]:
    own = [study.number, study.name]
    if not study.hosts:
        return [own + [0 if name in ("finished", "running") else "" for name in names]]
    return [own + [getattr(host, name) for name in names] for host in study.hosts]
