"""The HTML page in a real browser: drawn, quiet, alone, legible in light and dark."""

from __future__ import annotations

import itertools
import math
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.report import StudyStatistics
from optuna_dlock.report_html import page
from optuna_dlock.report_plots import pareto_front
from optuna_dlock.report_svg import Scale, scale, ticks, time_scale, time_ticks
from optuna_dlock.report_view import Report
from tests.browser import Drawn, contrast, draw, needs_browser

NOON = datetime(2026, 3, 1, 12, 0, 0)
MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
Box = tuple[float, float, float, float]


def _study(number: int, directions: list[StudyDirection], hosts: int, n: int) -> StudyStatistics:
    """A study of so many hosts with long names and n trials, always the same ones."""
    rng = random.Random(number)
    free = [rng.random() for _ in range(hosts)]
    trials = []
    for at in range(n):
        host = min(range(hosts), key=free.__getitem__)
        start = free[host]
        free[host] = start + rng.lognormvariate(math.log(2 + host / 2), 0.3)
        trials.append(_trial(at, f"gpu-node-{host:02d}.cluster", start, free[host], _values(rng, directions)))
    statistics = StudyStatistics(number, f"study <b>{number}</b> & Co", directions)
    statistics.update(trials)
    return statistics


def _values(rng: random.Random, directions: list[StudyDirection]) -> list[float]:
    return [rng.lognormvariate(0, 3) for _ in directions]


def _trial(number: int, host: str, start: float, end: float, values: list[float]) -> FrozenTrial:
    return FrozenTrial(
        number=number,
        state=TrialState.COMPLETE,
        value=None,
        values=values,
        datetime_start=NOON + timedelta(seconds=start),
        datetime_complete=NOON + timedelta(seconds=end),
        params={},
        distributions={},
        user_attrs={"HOST": {"host": host}},
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )


def _page(*statistics: StudyStatistics, lang: str = "en") -> str:
    now = NOON + timedelta(minutes=10)
    reports = [study.report(now) for study in statistics]
    return page(Report("keydb://m8:6373,m10:6374", reports, 0.25, now), statistics, lang)


@pytest.fixture(scope="module", params=["light", "dark"])
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """A page with 20 hosts, one objective and two."""
    studies = [_study(1, [MINIMIZE], 20, 1000), _study(0, [MAXIMIZE, MINIMIZE], 3, 200)]
    return draw(_page(*studies), tmp_path_factory.mktemp("page"), dark=request.param == "dark")


def _plots(drawn: Drawn) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for plot in drawn.found["plots"]:
        found.setdefault(plot["title"].split(",")[0].split(":")[0].split(" (")[0], []).append(plot)
    return found


def _shapes(plot: dict[str, Any], name: str) -> list[Box]:
    """Left, top, right and bottom of all shapes of a class."""
    return [tuple(box) for shape, *box in plot["shapes"] if shape == name]


@needs_browser
def test_the_browser_has_nothing_to_complain_of(drawn: Drawn) -> None:
    assert drawn.console == []


@needs_browser
def test_a_wrong_page_is_seen(tmp_path: Path) -> None:
    """That the two tests around this one can fail."""
    wrong = "<script>throw new Error('boom')</script><img src='http://h.invalid/a.png'>"
    seen = draw(_page(_study(0, [MINIMIZE], 1, 3)).replace("</body>", f"{wrong}</body>"), tmp_path)
    assert any("boom" in line for line in seen.console)
    assert "http://h.invalid/a.png" in seen.found["loaded"]


@needs_browser
def test_the_page_loads_nothing_and_its_own_script_is_none(drawn: Drawn) -> None:
    assert [name for name in drawn.found["loaded"] if not name.startswith("data:")] == []
    text = _page(_study(0, [MINIMIZE], 1, 3))
    assert "<script" not in text
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@needs_browser
def test_every_plot_has_its_shapes_within_its_frame(drawn: Drawn) -> None:
    plots = _plots(drawn)
    assert {title: len(found) for title, found in plots.items()} == {
        "best value over time": 3,  # one objective, and each of two
        "objectives 0 and 1": 1,
        "throughput over time": 2,
        "duration of a trial": 2,
    }
    for plot in drawn.found["plots"]:
        left, top, right, bottom = plot["box"]
        assert right - left > 800
        assert bottom - top > 60
        for _, *box in [*plot["shapes"], *((text, *box) for text, _, *box in plot["texts"])]:
            assert left - 2 <= box[0] <= box[2] <= right + 2
            assert top - 2 <= box[1] <= box[3] <= bottom + 2


@needs_browser
def test_the_durations_have_a_box_for_each_host_slower_ones_further_right(drawn: Drawn) -> None:
    plot = _plots(drawn)["duration of a trial"][0]
    boxes, medians = _shapes(plot, "quartiles"), _shapes(plot, "median")
    assert (len(boxes), len(medians), len(_shapes(plot, "mean"))) == (20, 20, 20)
    assert all(right - left > 5 and bottom - top > 5 for left, top, right, bottom in boxes)
    assert medians[0][0] < medians[-1][0] - 100
    assert [top for _, top, _, _ in boxes] == sorted(top for _, top, _, _ in boxes)


@needs_browser
def test_the_throughput_has_an_area_and_a_row_of_cells_for_each_host(drawn: Drawn) -> None:
    plot = _plots(drawn)["throughput over time"][0]
    ((left, top, right, bottom),) = _shapes(plot, "area")
    assert right - left > 600
    assert bottom - top > 80
    cells = _shapes(plot, "heat")
    assert len({round(top) for _, top, _, _ in cells}) == 20
    assert len(cells) > 400


@needs_browser
def test_the_best_value_is_a_line_below_the_points_that_ends_at_the_right(drawn: Drawn) -> None:
    plot = _plots(drawn)["best value over time"][0]
    ((left, _, right, bottom),) = _shapes(plot, "best")
    ((_, _, _, lowest),) = _shapes(plot, "points")
    assert right - left > 600
    assert bottom >= lowest - 5  # minimized: nothing is lower


@needs_browser
def test_two_objectives_have_a_front(drawn: Drawn) -> None:
    plot = _plots(drawn)["objectives 0 and 1"][0]
    assert len(_shapes(plot, "front")) == 1
    assert len(_shapes(plot, "winner")) >= 2


@needs_browser
def test_no_text_of_a_plot_covers_another_one(drawn: Drawn) -> None:
    for plot in drawn.found["plots"]:
        for (one, _, *a), (other, _, *b) in itertools.combinations(plot["texts"], 2):
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 4 or b[3] <= a[1] + 4
            assert apart, f"{one!r} and {other!r} of {plot['title']!r}"


@needs_browser
def test_text_stands_out_from_what_is_behind_it(drawn: Drawn, request: pytest.FixtureRequest) -> None:
    ink, paper = drawn.found["page"]
    card = drawn.found["card"]
    assert contrast(ink, paper) > 7
    assert contrast(ink, card) > 7
    is_dark = "dark" in request.node.name
    assert (contrast(card, "rgb(0, 0, 0)") < contrast(card, "rgb(255, 255, 255)")) == is_dark
    colours = {colour for plot in drawn.found["plots"] for _, colour, *_ in plot["texts"]}
    assert len(colours) == 2
    assert all(contrast(colour, card) > 4.5 for colour in colours)


@needs_browser
def test_names_are_shown_as_they_are(drawn: Drawn) -> None:
    assert drawn.found["text"].count("study <b>1</b> & Co") == 2  # the link and the heading
    assert "gpu-node-19.cluster" in drawn.found["text"]


@needs_browser
def test_there_is_a_picture(drawn: Drawn) -> None:
    assert drawn.image.read_bytes().startswith(b"\x89PNG")
    assert drawn.image.stat().st_size > 50_000  # an empty page of this size has 10 000


@needs_browser
def test_a_narrow_window_does_not_scroll_sideways(tmp_path: Path) -> None:
    seen = draw(_page(_study(1, [MINIMIZE], 20, 200)), tmp_path, width=500)
    assert seen.found["width"][0] <= seen.found["width"][1]


@needs_browser
def test_the_page_in_chinese(tmp_path: Path) -> None:
    seen = draw(_page(_study(1, [MINIMIZE], 2, 20), lang="zh"), tmp_path)
    assert seen.console == []
    for word in ("数据库(keydb://m8:6373,m10:6374)", "平均", "中位", "耗时", "吞吐"):
        assert word in seen.found["text"]


# -- without a browser -----------------------------------------------------------------------------


def _ended(*rows: tuple[float, float, list[float]], objectives: int = 1) -> StudyStatistics:
    statistics = StudyStatistics(0, "s", [MINIMIZE] * objectives)
    statistics.update([_trial(n, "m8", start, end, values) for n, (start, end, values) in enumerate(rows)])
    return statistics


@pytest.mark.parametrize(
    "statistics",
    [
        pytest.param(StudyStatistics(0, "s", [MINIMIZE]), id="empty"),
        pytest.param(_ended((0, 1, [1.0])), id="one trial"),
        pytest.param(_ended((0, 0, [0.0]), (0, 0, [0.0])), id="no time, no difference"),
        pytest.param(_ended((0, 1, [math.inf]), (0, 1, [-math.inf])), id="infinite"),
        pytest.param(_ended((0, 1, [1e308]), (0, 2, [-1e308])), id="huge"),
        pytest.param(_ended((0, 1, [5e-324]), (0, 2, [1e-320])), id="tiny"),
        pytest.param(_ended((0, 1, [1.0]), (0, 2, [1.0 + 1e-15])), id="nearly the same"),
        pytest.param(_ended((0, 1, [1e-9]), (0, 9e8, [1e30])), id="decades and decades"),
        pytest.param(_ended((5, 1, [1.0])), id="a clock set back"),
        pytest.param(_ended((0, 1, [1.0, 1.0]), objectives=2), id="one trial, two objectives"),
        pytest.param(_ended((0, 1, [1.0, math.inf]), objectives=2), id="two objectives, infinite"),
        pytest.param(_ended((0, 1, [1.0, 2.0, 3.0]), objectives=3), id="three objectives"),
    ],
)
def test_whatever_the_numbers_a_page_comes_out(statistics: StudyStatistics) -> None:
    text = _page(statistics)
    plots = text.partition("</h2>")[2]
    assert text.endswith("</html>")
    assert "nan" not in plots
    assert 'inf"' not in plots
    assert "Vinf" not in plots


def test_the_front_is_of_those_that_none_beats() -> None:
    pairs = [(1.0, 5.0), (2.0, 3.0), (2.0, 4.0), (3.0, 3.0), (4.0, 1.0), (4.0, 1.0)]
    assert pareto_front(pairs, [MINIMIZE, MINIMIZE]) == [(1.0, 5.0), (2.0, 3.0), (4.0, 1.0)]
    assert pareto_front(pairs, [MAXIMIZE, MINIMIZE]) == [(4.0, 1.0)]
    assert pareto_front(pairs, [MINIMIZE, MAXIMIZE]) == [(1.0, 5.0)]


def test_ticks_are_round_and_within() -> None:
    assert ticks(Scale(0.0, 10.0, 0, 100), 5) == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert ticks(Scale(-0.31, 0.29, 0, 100), 6) == pytest.approx([-0.3, -0.2, -0.1, 0.0, 0.1, 0.2])
    assert ticks(scale(0.002, 30.0, 0, 100)) == pytest.approx([0.01, 0.1, 1, 10])


def test_times_are_ticked_by_the_clock() -> None:
    day = 86400.0
    assert [text for _, text in time_ticks(time_scale(0.0, day, 0.0))] == [
        *("01-01 00:00", "01-01 06:00", "01-01 12:00", "01-01 18:00", "01-02 00:00"),
    ]
    assert [text for _, text in time_ticks(time_scale(0.0, 60.0, 0.0))][:2] == ["00:00:00", "00:00:10"]
