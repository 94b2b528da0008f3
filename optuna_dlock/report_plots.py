"""The plots of the HTML report, as inline SVG: pure, coloured by the page's style sheet.

Made by hand rather than by a plotting library: a page of eight studies stays below a megabyte, needs no
script and no network, follows the light or dark colours of its reader, and looks the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

import numpy as np
from optuna.study import StudyDirection

from optuna_dlock.report import HostStatistics, datetime_of

WIDTH = 960
_LEFT, _RIGHT, _TOP, _BOTTOM = 110, 24, 10, 34
_ROW = 22
_BINS = 96
# Seconds between two ticks of a time axis, and how they are written.
_TIME_STEPS = (
    *((step, "%H:%M:%S") for step in (1, 2, 5, 10, 20, 30)),
    *((step * 60, "%H:%M") for step in (1, 2, 5, 10, 20, 30)),
    *((step * 3600, "%m-%d %H:%M") for step in (1, 2, 3, 6, 12)),
    *((step * 86400, "%Y-%m-%d") for step in (1, 2, 7, 14, 30, 91, 365)),
)

Element = ET.Element


@dataclass(frozen=True)
class Scale:
    """From data to pixels, linear."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """A scale over these values, widened if they are all the same."""
    if high <= low:
        margin = abs(low) * 0.05 or 0.5
        low, high = low - margin, high + margin
    return Scale(low, high, start, end)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About so many round numbers within an interval."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{at * step:.12g}") for at in range(first, math.floor(high / step + 1e-9) + 1)]


def time_ticks(low: float, high: float, count: int = 7) -> list[tuple[float, str]]:
    """About so many round times within an interval of seconds, with their texts."""
    longest = _TIME_STEPS[-1]
    step, form = next((s for s in _TIME_STEPS if s[0] >= (high - low) / count), longest)
    times = [float(at * step) for at in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(at, datetime_of(at).strftime(form)) for at in times]


def svg_text(element: Element) -> str:
    """The element as it stands in a page."""
    return ET.tostring(element, encoding="unicode")


# -- durations -------------------------------------------------------------------------------------


def duration_plot(hosts: Sequence[tuple[str, HostStatistics]], title: str, unit: str = "s") -> Element | None:
    """Durations on each host: whiskers from 5 % to 95 %, a box around the middle half, median, mean."""
    shown = [
        (name, np.quantile(h.durations, (0.05, 0.25, 0.5, 0.75, 0.95)), h) for name, h in hosts if h.durations
    ]
    if not shown:
        return None
    high = max(float(quantiles[-1]) for _, quantiles, _ in shown)
    bottom = _TOP + _ROW * len(shown)
    plot = _svg(bottom + _BOTTOM, title)
    x = scale(0.0, high * 1.02, _LEFT, WIDTH - _RIGHT)
    _x_axis(plot, [(at, f"{at:g} {unit}") for at in ticks(0.0, x.high)], x, bottom)
    for row, (name, quantiles, host) in enumerate(shown):
        y = _TOP + _ROW * row + _ROW / 2
        low5, low, middle, up, up95 = (float(q) for q in quantiles)
        box = ET.SubElement(plot, "g", {"class": "box"})
        _title(
            box,
            f"{name}: {len(host.durations)}, {host.durations[0]:.3g} … {host.durations[-1]:.3g} {unit}; "
            f"5 % {low5:.3g}, 25 % {low:.3g}, 50 % {middle:.3g}, 75 % {up:.3g}, 95 % {up95:.3g}",
        )
        _label(plot, name, y)
        _line(box, x(low5), y, x(up95), y, "whisker")
        for end in (low5, up95):
            _line(box, x(end), y - 4, x(end), y + 4, "whisker")
        _rect(box, x(low), y - 7, max(x(up) - x(low), 1.5), 14, "quartiles")
        _line(box, x(middle), y - 7, x(middle), y + 7, "median")
        if host.mean is not None and host.mean <= x.high:
            _circle(box, x(host.mean), y, "mean")
    return plot


# -- throughput ------------------------------------------------------------------------------------


def throughput_plot(
    hosts: Sequence[tuple[str, HostStatistics]], title: str, per_minute: str
) -> Element | None:
    """Trials per minute over time: all hosts as an area, each host as a row of a heat map, gaps visible."""
    shown = [(name, host.ends) for name, host in hosts if host.ends]
    if not shown:
        return None
    low = min(ends[0] for _, ends in shown)
    high = max(ends[-1] for _, ends in shown)
    x = scale(low, high, _LEFT, WIDTH - _RIGHT)
    minutes = (x.high - x.low) / _BINS / 60
    edges = np.linspace(x.low, x.high, _BINS + 1)
    rates = [np.histogram(ends, edges)[0] / minutes for _, ends in shown]
    total = np.sum(rates, axis=0)
    area_bottom = _TOP + 130
    bottom = area_bottom + 12 + _ROW * len(shown)
    plot = _svg(bottom + _BOTTOM, title)
    y = scale(0.0, float(total.max()) * 1.05, area_bottom, _TOP)
    for at in ticks(0.0, y.high, 4):
        _line(plot, _LEFT, y(at), WIDTH - _RIGHT, y(at), "grid")
        _text(plot, _LEFT - 8, y(at) + 4, f"{at:g}{per_minute if at else ''}", "end")
    corners = [f"M{_LEFT} {area_bottom}"]
    for at, rate in enumerate(total):
        corners.append(f"V{y(float(rate))}H{x(float(edges[at + 1]))}")
    ET.SubElement(plot, "path", {"class": "area", "d": "".join(corners) + f"V{area_bottom}Z"})
    most = float(np.max(rates))
    for row, ((name, _), own) in enumerate(zip(shown, rates, strict=True)):
        top = area_bottom + 12 + _ROW * row
        _label(plot, name, top + _ROW / 2)
        _rect(plot, _LEFT, top + 2, WIDTH - _RIGHT - _LEFT, _ROW - 4, "empty")
        for at, rate in enumerate(own):
            if rate > 0:
                left = x(float(edges[at]))
                cell = _rect(plot, left, top + 2, x(float(edges[at + 1])) - left + 0.2, _ROW - 4, "heat")
                cell.set("fill-opacity", f"{0.12 + 0.88 * float(rate) / most:.2f}")
                _title(cell, f"{name}: {rate:.3g}{per_minute}")
    _x_axis(plot, time_ticks(x.low, x.high), x, bottom)
    return plot


# -- values ----------------------------------------------------------------------------------------


def best_plot(
    results: Sequence[tuple[float, int, Sequence[float]]],
    objective: int,
    direction: StudyDirection,
    title: str,
) -> Element | None:
    """Each value of one objective as a point over time, and the best one so far as a line."""
    points = sorted(
        (end, values[objective]) for end, _, values in results if math.isfinite(values[objective])
    )
    if not points:
        return None
    times = np.array([end for end, _ in points])
    values = np.array([value for _, value in points])
    is_min = direction is StudyDirection.MINIMIZE
    best = np.minimum.accumulate(values) if is_min else np.maximum.accumulate(values)
    # The worst tenth may be anywhere: it would press all that matters into one line.
    low, high = (best[-1], np.quantile(values, 0.9)) if is_min else (np.quantile(values, 0.1), best[-1])
    low, high = min(float(low), float(best[-1])), max(float(high), float(best[-1]))
    margin = (high - low) * 0.05
    bottom = _TOP + 190
    plot = _svg(bottom + _BOTTOM, title)
    x = scale(float(times[0]), float(times[-1]), _LEFT, WIDTH - _RIGHT)
    y = scale(low - margin, high + margin, bottom, _TOP)
    _y_axis(plot, y)
    _points(plot, zip(times, values, strict=True), x, y)
    steps = np.flatnonzero(np.diff(best)) + 1
    line: list[str] = []
    for at in (0, *steps.tolist()):
        shown = y(min(max(float(best[at]), y.low), y.high))  # the first ones may lie beyond the axis
        line.append(f"M{x(float(times[at]))} {shown}" if not line else f"H{x(float(times[at]))}V{shown}")
    ET.SubElement(plot, "path", {"class": "best", "d": "".join(line) + f"H{WIDTH - _RIGHT}"})
    _x_axis(plot, time_ticks(x.low, x.high), x, bottom)
    return plot


def pareto_plot(
    results: Sequence[tuple[float, int, Sequence[float]]], directions: Sequence[StudyDirection], title: str
) -> Element | None:
    """The values of two objectives against each other, and the front of those that none beats in both."""
    pairs = [(v[0], v[1]) for _, _, v in results if math.isfinite(v[0]) and math.isfinite(v[1])]
    if not pairs:
        return None
    front = pareto_front(pairs, directions)
    spans = []
    for at in (0, 1):
        low, high = np.quantile([pair[at] for pair in pairs], (0.02, 0.98))
        on_front = [pair[at] for pair in front]
        spans.append((min(float(low), *on_front, on_front[0]), max(float(high), *on_front, on_front[0])))
    bottom = _TOP + 300
    plot = _svg(bottom + _BOTTOM, title)
    margins = [(high - low) * 0.04 for low, high in spans]
    x = scale(spans[0][0] - margins[0], spans[0][1] + margins[0], _LEFT, WIDTH - _RIGHT)
    y = scale(spans[1][0] - margins[1], spans[1][1] + margins[1], bottom, _TOP)
    _y_axis(plot, y)
    _x_axis(plot, [(at, f"{at:g}") for at in ticks(x.low, x.high)], x, bottom)
    _points(plot, pairs, x, y)
    corners = [f"{x(a)} {y(b)}" for a, b in front]
    ET.SubElement(plot, "path", {"class": "front", "d": "M" + "L".join(corners)})
    for a, b in front:
        _title(_circle(plot, x(a), y(b), "winner"), f"{a:.6g}, {b:.6g}")
    return plot


def pareto_front(
    pairs: Sequence[tuple[float, float]], directions: Sequence[StudyDirection]
) -> list[tuple[float, float]]:
    """The pairs that no other one beats, by the first objective."""
    signs = [1 if direction is StudyDirection.MINIMIZE else -1 for direction in directions]
    front: list[tuple[float, float]] = []
    for pair in sorted(set(pairs), key=lambda p: (signs[0] * p[0], signs[1] * p[1])):
        if not front or signs[1] * pair[1] < signs[1] * front[-1][1]:
            front.append(pair)
    return front


# -- marks -----------------------------------------------------------------------------------------


def _points(plot: Element, points: Iterable[tuple[float, float]], x: Scale, y: Scale) -> None:
    """All points as one path; those that would cover each other are drawn once."""
    pixels = {
        (round(x(float(a))), round(y(float(b))))
        for a, b in points
        if x.low <= a <= x.high and y.low <= b <= y.high
    }
    marks = "".join(f"M{a} {b}h0" for a, b in sorted(pixels))
    ET.SubElement(plot, "path", {"class": "points", "d": marks or "M0 0"})


def _svg(height: float, title: str) -> Element:
    plot = ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "class": "plot"})
    plot.set("aria-label", title)
    return plot


def _x_axis(plot: Element, marks: Sequence[tuple[float, str]], x: Scale, bottom: float) -> None:
    for at, text in marks:
        _line(plot, x(at), _TOP, x(at), bottom, "grid")
        _text(plot, x(at), bottom + 18, text, "middle")
    _line(plot, _LEFT, bottom, WIDTH - _RIGHT, bottom, "axis")


def _y_axis(plot: Element, y: Scale) -> None:
    for at in ticks(y.low, y.high, 5):
        _line(plot, _LEFT, y(at), WIDTH - _RIGHT, y(at), "grid")
        _text(plot, _LEFT - 8, y(at) + 4, f"{at:.6g}", "end")


def _label(plot: Element, name: str, y: float) -> None:
    short = name if len(name) <= 15 else name[:14] + "…"
    label = _text(plot, _LEFT - 8, y + 4, short, "end")
    label.set("class", "host")
    if short != name:
        _title(label, name)


def _text(plot: Element, x: float, y: float, text: str, anchor: str) -> Element:
    label = ET.SubElement(plot, "text", {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor})
    label.text = text
    return label


def _line(plot: Element, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
    ET.SubElement(
        plot, "line", {"class": name, "x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}"}
    )


def _rect(plot: Element, x: float, y: float, width: float, height: float, name: str) -> Element:
    size = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return ET.SubElement(plot, "rect", {"class": name, **size})


def _circle(plot: Element, x: float, y: float, name: str) -> Element:
    return ET.SubElement(plot, "circle", {"class": name, "cx": f"{x:g}", "cy": f"{y:g}", "r": "3"})


def _title(element: Element, text: str) -> None:
    title = ET.SubElement(element, "title")
    title.text = text
