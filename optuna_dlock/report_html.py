"""The report as one HTML page with plots: no script, no network, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from optuna_dlock.report import StudyReport, StudyStatistics
from optuna_dlock.report_plots import best_plot, duration_plot, pareto_plot, throughput_plot
from optuna_dlock.report_svg import Element, svg_text
from optuna_dlock.report_view import Report, Words, cells, columns, number, percent, value


def page(report: Report, statistics: Sequence[StudyStatistics], lang: str = "en") -> str:
    """The page.

    Args:
        report: What the tables show.
        statistics: Of the same studies, in the same order: what the plots show.
        lang: Language of the page.
    """
    words = Words(lang)
    title = f"{words('database')}({report.database})"
    links = "".join(
        f'<a href="#study{s.number}">{s.number} {escape(s.name)}</a>' for s in report.studies[:50]
    )
    sections = [
        _section(study, kept, report, words) for study, kept in zip(report.studies, statistics, strict=True)
    ]
    return f"""<!DOCTYPE html>
<html lang="{words.lang}">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{escape(title)}</title>
<style>{_style()}</style>
</head>
<body>
<header><h1>{escape(title)}</h1>{report.time:%Y-%m-%d %H:%M:%S}</header>
<nav>{links if len(report.studies) > 1 else ""}</nav>
{"".join(sections) or f"<section>{escape(words('no studies'))}</section>"}
<footer>{escape(words("took", seconds=report.seconds))}</footer>
</body>
</html>"""


def _style() -> str:
    return files("optuna_dlock").joinpath("report.css").read_text("utf-8")


def _section(study: StudyReport, kept: StudyStatistics, report: Report, words: Words) -> str:
    head = f"<h2>{study.number} {escape(study.name)} <small>COMPLETE: {study.complete}</small></h2>"
    plots = "".join(
        f"<h3>{escape(title)}</h3>{svg_text(plot)}"
        for title, plot in _plots(study, kept, words)
        if plot is not None
    )
    return (
        f'<section id="study{study.number}">{head}{_figures(study, report.window, words)}'
        f"{_table(study, report.window, words)}{plots}</section>\n"
    )


def _figures(study: StudyReport, window: float, words: Words) -> str:
    per_minute = words("per minute")
    shown = [
        (words("throughput"), f"{number(study.throughput, 1)}{per_minute}"),
        (words.recently(window), f"{number(study.recent, 1)}{per_minute}"),
        (words("idle"), percent(study.idle)),
        *(
            (words(name), getattr(study, name))
            for name in ("running", "waiting", "pruned", "failed", "skipped")
        ),
        (words("best"), ", ".join(map(value, study.best))),
    ]
    return (
        f"<dl>{''.join(f'<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>' for k, v in shown)}</dl>"
    )


def _table(study: StudyReport, window: float, words: Words) -> str:
    if not study.hosts:
        return f"<p>{escape(words('no trials'))}</p>"
    head = "".join(f"<th>{escape(title)}</th>" for title in columns(words, window).values())
    rows = (
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells(host).values())}</tr>\n"
        for host in study.hosts
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _plots(study: StudyReport, kept: StudyStatistics, words: Words) -> list[tuple[str, Element | None]]:
    hosts = [(host.host, kept.hosts[host.host]) for host in study.hosts]
    titles = [
        f"{words('best over time')}, {words(direction)}"
        if len(kept.directions) == 1
        else f"{words('best over time')}: {words('objective', n=at)}, {words(direction)}"
        for at, direction in enumerate(study.directions)
    ]
    plots: list[tuple[str, Element | None]] = []
    if len(kept.directions) == 2:
        title = words("pareto")
        plots.append((title, pareto_plot(kept.results, kept.directions, title)))
    plots += [
        (title, best_plot(kept.results, at, kept.directions[at], title)) for at, title in enumerate(titles)
    ]
    title = words("throughput over time")
    plots.append((title, throughput_plot(hosts, title, words("per minute"))))
    title = words("duration")
    plots.append((title, duration_plot(hosts, title)))
    return plots
