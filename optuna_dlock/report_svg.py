"""Axes and marks of the report's plots, as SVG elements: scales, ticks, lines, labels.

Made by hand rather than by a plotting library: a page of eight studies has about a megabyte, needs no script
and no network, follows the light or dark colours of its reader, and looks the same everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from optuna_dlock.report_hosts import datetime_of

WIDTH, RIGHT, TOP, BOTTOM = 960, 24, 10, 34
LEFT = 90  # of a plot whose rows have no names
ROW = 22
_LONGEST_NAME = 26  # letters of a host that are shown
_LETTER = 7.0  # pixels, about
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
    """From data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)

    def holds(self, value: float) -> bool:
        """Whether the value lies on it."""
        return self.low <= value <= self.high


def scale(low: float, high: float, start: float, end: float) -> Scale:
    """A scale over these values with a margin; logarithmic if they are positive and span two decades.

    Values that are all about the same are put in its middle.
    """
    if low > 0 and high / low > 100:
        return Scale(low / 1.3, high * 1.3, start, end, is_log=True)
    margin = (high - low) * 0.05
    if margin <= 1e-9 * max(abs(low), abs(high)) or margin < 1e-300:
        margin = max(abs(low), abs(high)) * 0.05 or 0.5
    return Scale(low - margin, high + margin, start, end)


def time_scale(low: float, high: float, left: float) -> Scale:
    """The horizontal scale of two times in seconds."""
    return Scale(low, max(high, low + 1.0), left, WIDTH - RIGHT)


def ticks(scale: Scale, count: int = 6) -> list[float]:
    """About so many round numbers on a scale."""
    low, high = scale.low, scale.high
    if scale.is_log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        marks = (1.0,) if len(decades) > 4 else (1.0, 2.0, 5.0)
        return [
            mark * 10.0**decade
            for decade in decades[:: max(1, len(decades) // 8)]
            for mark in marks
            if scale.holds(mark * 10.0**decade)
        ]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{at * step:.12g}") for at in range(first, last + 1)]


def time_ticks(scale: Scale, count: int = 7) -> list[tuple[float, str]]:
    """At most about so many round times on a scale of seconds, with their texts."""
    wanted = (scale.high - scale.low) / count
    step, form = next((entry for entry in _TIME_STEPS if entry[0] >= wanted), _TIME_STEPS[-1])
    times = [float(at * step) for at in range(math.ceil(scale.low / step), math.floor(scale.high / step) + 1)]
    return [(at, datetime_of(at).strftime(form)) for at in times]


def svg(height: float, title: str) -> Element:
    """An empty plot."""
    plot = ET.Element("svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "class": "plot"})
    plot.set("aria-label", title)
    return plot


def svg_text(element: Element) -> str:
    """The element as it stands in a page."""
    return ET.tostring(element, encoding="unicode")


def left_of(names: Iterable[str]) -> float:
    """Where a plot begins whose rows have these names."""
    return max(LEFT, min(max(map(len, names)), _LONGEST_NAME) * _LETTER + 16)


def x_axis(plot: Element, marks: Sequence[tuple[float, str]], x: Scale, bottom: float) -> None:
    """The line below a plot, with texts and a grid."""
    for at, text in marks:
        line(plot, x(at), TOP, x(at), bottom, "grid")
        label(plot, x(at), bottom + 18, text, "middle")
    line(plot, x.start, bottom, x.end, bottom, "axis")


def y_axis(plot: Element, y: Scale, left: float = LEFT, count: int = 5, unit: str = "") -> None:
    """A grid with numbers at its left."""
    for at in ticks(y, count):
        line(plot, left, y(at), WIDTH - RIGHT, y(at), "grid")
        label(plot, left - 8, y(at) + 4, f"{at:.6g}{unit}", "end")


def row_name(plot: Element, name: str, left: float, y: float) -> None:
    """The name of a row."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    text = label(plot, left - 8, y + 4, short, "end")
    text.set("class", "host")
    if short != name:
        tip(text, name)


def points(plot: Element, pairs: Iterable[tuple[float, float]], x: Scale, y: Scale) -> None:
    """All points as one path; those that would cover each other are drawn once."""
    pixels = {(round(x(a)), round(y(b))) for a, b in pairs if x.holds(a) and y.holds(b)}
    path(plot, "".join(f"M{a} {b}h0" for a, b in sorted(pixels)), "points")


def path(plot: Element, steps: str, name: str) -> Element:
    """A path."""
    return ET.SubElement(plot, "path", {"class": name, "d": steps})


def group(plot: Element, name: str) -> Element:
    """A group of marks."""
    return ET.SubElement(plot, "g", {"class": name})


def label(plot: Element, x: float, y: float, text: str, anchor: str) -> Element:
    """A text."""
    element = ET.SubElement(plot, "text", {"x": f"{x:g}", "y": f"{y:g}", "text-anchor": anchor})
    element.text = text
    return element


def line(plot: Element, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
    """A line."""
    ends = {"x1": f"{x1:g}", "y1": f"{y1:g}", "x2": f"{x2:g}", "y2": f"{y2:g}"}
    ET.SubElement(plot, "line", {"class": name, **ends})


def rect(plot: Element, x: float, y: float, width: float, height: float, name: str) -> Element:
    """A rectangle."""
    size = {"x": f"{x:g}", "y": f"{y:g}", "width": f"{width:g}", "height": f"{height:g}"}
    return ET.SubElement(plot, "rect", {"class": name, **size})


def circle(plot: Element, x: float, y: float, name: str) -> Element:
    """A small circle."""
    return ET.SubElement(plot, "circle", {"class": name, "cx": f"{x:g}", "cy": f"{y:g}", "r": "3"})


def tip(element: Element, text: str) -> None:
    """What shows when the pointer rests on an element."""
    title = ET.SubElement(element, "title")
    title.text = text
