"""The plots of the HTML report: durations, throughput, best values. Pure; the style sheet colours them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from optuna.study import StudyDirection

from optuna_dlock import report_svg as draw
from optuna_dlock.report_hosts import HostStatistics
from optuna_dlock.report_svg import BOTTOM, LEFT, RIGHT, ROW, TOP, WIDTH, Element, Scale

_BINS = 96
_TOO_FAR = 1e300  # differences of such values overflow

Hosts = Sequence[tuple[str, HostStatistics]]
Results = Sequence[tuple[float, int, Sequence[float]]]


def duration_plot(hosts: Hosts, title: str, unit: str = "s") -> Element | None:
    """Durations on each host: whiskers from 5 % to 95 %, a box around the middle half, median, mean."""
    shown = [(name, host) for name, host in hosts if host.durations]
    if not shown:
        return None
    spread = [np.quantile(host.durations, (0.05, 0.25, 0.5, 0.75, 0.95)).tolist() for _, host in shown]
    left = draw.left_of(name for name, _ in shown)
    bottom = TOP + ROW * len(shown)
    plot = draw.svg(bottom + BOTTOM, title)
    longest = max(*(quantiles[-1] for quantiles in spread), 1e-6)
    x = Scale(0.0, longest * 1.02, left, WIDTH - RIGHT)
    draw.x_axis(plot, [(at, f"{at:g} {unit}") for at in draw.ticks(x)], x, bottom)
    for row, ((name, host), (low5, low, middle, high, high95)) in enumerate(zip(shown, spread, strict=True)):
        y = TOP + ROW * (row + 0.5)
        draw.row_name(plot, name, left, y)
        box = draw.group(plot, "box")
        draw.tip(
            box,
            f"{name}: {len(host.durations)}, {host.durations[0]:.3g} … {host.durations[-1]:.3g} {unit}; 5 % "
            f"{low5:.3g}, 25 % {low:.3g}, 50 % {middle:.3g}, 75 % {high:.3g}, 95 % {high95:.3g}",
        )
        draw.line(box, x(low5), y, x(high95), y, "whisker")
        for end in (low5, high95):
            draw.line(box, x(end), y - 4, x(end), y + 4, "whisker")
        draw.rect(box, x(low), y - 7, max(x(high) - x(low), 1.5), 14, "quartiles")
        draw.line(box, x(middle), y - 7, x(middle), y + 7, "median")
        if host.mean is not None and x.holds(host.mean):
            draw.circle(box, x(host.mean), y, "mean")
    return plot


def throughput_plot(hosts: Hosts, title: str, per_minute: str) -> Element | None:
    """Trials per minute over time: all hosts as an area, each one as a row of a heat map with its gaps."""
    shown = [(name, host.ends) for name, host in hosts if host.ends]
    if not shown:
        return None
    left = draw.left_of(name for name, _ in shown)
    x = draw.time_scale(min(ends[0] for _, ends in shown), max(ends[-1] for _, ends in shown), left)
    edges = np.linspace(x.low, x.high, _BINS + 1)
    pixels = [x(edge) for edge in edges.tolist()]
    minutes = (x.high - x.low) / _BINS / 60
    rates = np.array([np.histogram(ends, edges)[0] / minutes for _, ends in shown])
    total = rates.sum(axis=0)
    middle = TOP + 130
    bottom = middle + 12 + ROW * len(shown)
    plot = draw.svg(bottom + BOTTOM, title)
    y = Scale(0.0, float(total.max()) * 1.05, middle, TOP)
    draw.y_axis(plot, y, left, 4, per_minute)
    steps = [f"V{y(rate)}H{end}" for rate, end in zip(total.tolist(), pixels[1:], strict=True)]
    draw.path(plot, f"M{left:g} {middle}{''.join(steps)}V{middle}Z", "area")
    for row, ((name, _), own) in enumerate(zip(shown, rates.tolist(), strict=True)):
        top = middle + 12 + ROW * row
        draw.row_name(plot, name, left, top + ROW / 2)
        draw.rect(plot, left, top + 2, WIDTH - RIGHT - left, ROW - 4, "empty")
        for at, rate in enumerate(own):
            if rate > 0:
                width = pixels[at + 1] - pixels[at] + 0.2  # no seams
                cell = draw.rect(plot, pixels[at], top + 2, width, ROW - 4, "heat")
                cell.set("fill-opacity", f"{0.12 + 0.88 * rate / rates.max():.2f}")
    draw.x_axis(plot, draw.time_ticks(x), x, bottom)
    return plot


def best_plot(results: Results, objective: int, direction: StudyDirection, title: str) -> Element | None:
    """Each value of one objective as a point over time, and the best one so far as a line."""
    pairs = sorted((end, v[objective]) for end, _, v in results if abs(v[objective]) < _TOO_FAR)
    if not pairs:
        return None
    times = [end for end, _ in pairs]
    values = np.array([value for _, value in pairs])
    if direction is StudyDirection.MINIMIZE:
        best, worst = np.minimum.accumulate(values), np.quantile(values, 0.9)
    else:
        best, worst = np.maximum.accumulate(values), np.quantile(values, 0.1)
    # The worst tenth may be anywhere: it would press all that matters into one line.
    low, high = sorted((float(best[-1]), float(worst)))
    bottom = TOP + 190
    plot = draw.svg(bottom + BOTTOM, title)
    x = draw.time_scale(times[0], times[-1], LEFT)
    y = draw.scale(low, high, bottom, TOP)
    draw.y_axis(plot, y)
    draw.points(plot, pairs, x, y)
    steps: list[str] = []
    for at in (0, *(np.flatnonzero(np.diff(best)) + 1).tolist()):
        pixel = y(min(max(float(best[at]), y.low), y.high))  # the first ones may lie beyond the axis
        steps.append(f"H{x(times[at])}V{pixel}" if steps else f"M{x(times[at])} {pixel}")
    draw.path(plot, f"{''.join(steps)}H{x.end:g}", "best")
    draw.x_axis(plot, draw.time_ticks(x), x, bottom)
    return plot


def pareto_plot(results: Results, directions: Sequence[StudyDirection], title: str) -> Element | None:
    """The values of two objectives against each other, and the front of those that none beats."""
    pairs = [(v[0], v[1]) for _, _, v in results if max(abs(v[0]), abs(v[1])) < _TOO_FAR]
    if not pairs:
        return None
    front = pareto_front(pairs, directions)
    bottom = TOP + 300
    plot = draw.svg(bottom + BOTTOM, title)
    spans = []
    for at in (0, 1):
        low, high = np.quantile([pair[at] for pair in pairs], (0.02, 0.98)).tolist()
        on_front = [pair[at] for pair in front]
        spans.append((min(low, *on_front), max(high, *on_front)))
    x = draw.scale(*spans[0], LEFT, WIDTH - RIGHT)
    y = draw.scale(*spans[1], bottom, TOP)
    draw.y_axis(plot, y)
    draw.x_axis(plot, [(at, f"{at:.6g}") for at in draw.ticks(x)], x, bottom)
    draw.points(plot, pairs, x, y)
    draw.path(plot, "M" + "L".join(f"{x(a)} {y(b)}" for a, b in front), "front")
    for a, b in front:
        draw.tip(draw.circle(plot, x(a), y(b), "winner"), f"{a:.6g}, {b:.6g}")
    return plot


def pareto_front(
    pairs: Sequence[tuple[float, float]], directions: Sequence[StudyDirection]
) -> list[tuple[float, float]]:
    """The pairs that no other one beats, each once, from the best in the first objective on."""
    first, second = (1 if direction is StudyDirection.MINIMIZE else -1 for direction in directions)
    front: list[tuple[float, float]] = []
    for pair in sorted(set(pairs), key=lambda p: (first * p[0], second * p[1])):
        if not front or second * pair[1] < second * front[-1][1]:
            front.append(pair)
    return front
