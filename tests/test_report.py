"""Statistics by host against hand-made trials, and the layouts that show them."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timedelta
from typing import Any

import pytest
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock import Worker
from optuna_dlock.report import StudyStatistics
from optuna_dlock.report_hosts import HostReport, HostStatistics, seconds_of
from optuna_dlock.report_view import Report, as_csv, as_json, plain, tables

COMPLETE, PRUNED, FAIL, RUNNING, WAITING = (
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.FAIL,
    TrialState.RUNNING,
    TrialState.WAITING,
)
NOON = datetime(2026, 3, 1, 12, 0, 0)
Row = tuple[str | None, TrialState, float | None, float | None, str | None]


def _trial(number: int, row: Row) -> FrozenTrial:
    """Of a host, a state, seconds after noon of its start and its end, and the `msg` of the notes' HOST."""
    host, state, start, end, msg = row
    attribute: dict[str, Any] = {} if host is None else {"host": host}
    if msg is not None:
        attribute |= {"msg": msg, "number": number, "HOST_s": "m8"}
    return FrozenTrial(
        number=number,
        state=state,
        value=float(number) if state is COMPLETE else None,
        datetime_start=None if start is None else NOON + timedelta(seconds=start),
        datetime_complete=None if end is None else NOON + timedelta(seconds=end),
        params={},
        distributions={},
        user_attrs={"HOST": attribute} if attribute else {},
        system_attrs={},
        intermediate_values={},
        trial_id=number,
    )


def _trials(*rows: Row) -> list[FrozenTrial]:
    return [_trial(number, row) for number, row in enumerate(rows)]


def _done(host: str | None, start: float, end: float, msg: str | None = None) -> Row:
    return (host, COMPLETE, start, end, msg)


def _statistics(
    trials: Sequence[FrozenTrial], workers: dict[int, Worker] | None = None, name: str = "P2c_BTC"
) -> StudyStatistics:
    statistics = StudyStatistics(7, name, [StudyDirection.MINIMIZE])
    statistics.update(trials, workers)
    return statistics


def _hosts(trials: Sequence[FrozenTrial], workers: dict[int, Worker] | None = None) -> dict[str, HostReport]:
    report = _statistics(trials, workers).report(NOON + timedelta(hours=1))
    return {host.host: host for host in report.hosts}


# -- the statistics --------------------------------------------------------------------------------


def test_mean_and_median_are_of_the_finished_trials_of_the_host() -> None:
    hosts = _hosts(_trials(_done("m8", 0, 1), _done("m9", 0, 7), _done("m8", 1, 3), _done("m8", 3, 9)))
    assert (hosts["m8"].mean, hosts["m8"].median, hosts["m8"].finished) == (3.0, 2.0, 3)
    assert (hosts["m9"].mean, hosts["m9"].median, hosts["m9"].finished) == (7.0, 7.0, 1)


@pytest.mark.parametrize(("msg", "state"), [("COMPLETE", COMPLETE), ("RUNNING", FAIL)])
def test_a_skipped_duplicate_does_not_spoil_the_median(msg: str, state: TrialState) -> None:
    skipped = [("m8", state, 10.0 + n, 10.001 + n, msg) for n in range(9)]
    host = _hosts(_trials(_done("m8", 0, 4), *skipped, _done("m8", 20, 26)))["m8"]
    assert (host.mean, host.median) == (5.0, 5.0)
    assert (host.finished, host.skipped, host.failed) == (2, 9, 0)


def test_an_attribute_host_without_msg_is_no_duplicate() -> None:
    trials = _trials(_done("m8", 0, 4))
    trials[0].user_attrs = {"HOST": {"host": "m8", "msg": None, "number": 0, "HOST_s": ""}}
    assert _hosts(trials)["m8"].finished == 1


def test_duplicates_that_the_storage_knows_are_skipped_too() -> None:
    statistics = StudyStatistics(0, "s", [StudyDirection.MINIMIZE])
    statistics.update(_trials(_done("m8", 0, 4), _done("m8", 4, 4.001)), {}, {1})
    (host,) = statistics.report(NOON).hosts
    assert (host.finished, host.skipped, host.median) == (1, 1, 4.0)


def test_only_complete_trials_are_finished_and_have_a_duration() -> None:
    host = _hosts(
        _trials(
            _done("m8", 0, 4),
            ("m8", PRUNED, 4.0, 5.0, None),
            ("m8", FAIL, 5.0, 5.5, None),
            ("m8", RUNNING, 6.0, None, None),
        )
    )["m8"]
    assert (host.finished, host.running, host.pruned, host.failed, host.median) == (1, 1, 1, 1, 4.0)


def test_hosts_stand_fastest_first_and_those_without_a_finished_trial_last() -> None:
    trials = _trials(
        *(("idle", RUNNING, 0.0, None, None), _done("slow", 0, 9), _done("fast", 0, 1)),
        # By the mean, as in the notes: "m8: 平均 = 1.91, 中位 = 1.91" before "M10: 平均 = 1.93, 中位 = 1.88".
        *(_done("m8", 0, 1.91), _done("M10", 0, 1.88), _done("M10", 0, 1.88), _done("M10", 0, 2.03)),
    )
    assert list(_hosts(trials)) == ["fast", "m8", "M10", "slow", "idle"]


def test_a_trial_without_a_host_is_listed_under_a_question_mark() -> None:
    trials = _trials(_done(None, 0, 1), _done("m8", 0, 2))
    trials += [_trial(2, _done(None, 0, 3))]
    trials[2].user_attrs = {"HOST": "not a mapping"}
    assert {name: host.finished for name, host in _hosts(trials).items()} == {"?": 2, "m8": 1}


def test_what_the_storage_recorded_goes_before_the_attribute() -> None:
    worker = Worker("container", 1, "w")
    hosts = _hosts(_trials(_done("m8", 0, 1), _done("m8", 0, 2)), {0: worker})
    assert {name: host.workers for name, host in hosts.items()} == {"container": 1, "m8": None}


@pytest.mark.parametrize(("start", "end"), [(None, 5.0), (5.0, None), (None, None), (5.0, 4.0)], ids=str)
def test_a_finished_trial_without_a_duration_counts_but_has_no_part_in_the_median(
    start: float | None, end: float | None
) -> None:
    trials = _trials(_done("m8", 0, 4), ("m8", COMPLETE, start, end, None))
    host = _hosts(trials)["m8"]
    assert (host.finished, host.mean, host.median) == (2, 4.0, 4.0)
    alone = _hosts(_trials(("m8", COMPLETE, start, end, None)))["m8"]
    assert (alone.finished, alone.mean, alone.median, alone.idle) == (1, None, None, None)


def test_throughput_is_of_what_was_worked_on_over_all_and_within_the_window() -> None:
    trials = _trials(
        *(_done("m8", 60.0 * n, 60.0 * n + 30) for n in range(10)),
        ("m8", PRUNED, 600.0, 630.0, None),
        ("m8", FAIL, 630.0, 660.0, None),
        _done("m8", 661, 661, "COMPLETE"),
    )
    report = _statistics(trials).report(NOON + timedelta(seconds=720), window=120.0)
    assert report.throughput == pytest.approx(11 / (661 / 60))
    # The window begins at 600, and with it what ended later: the pruned trial.
    assert report.recent == pytest.approx(1 / 2)
    # A window longer than the study does not thin it out.
    assert _statistics(trials).report(NOON + timedelta(seconds=720), window=9e9).recent == pytest.approx(
        11 / 12
    )


def test_idle_is_the_time_between_trials_of_a_worker() -> None:
    assert _hosts(_trials(_done("m8", 0, 3), _done("m8", 4, 10)))["m8"].idle == pytest.approx(0.1)


def test_the_gap_between_a_worker_and_its_successor_is_not_idle() -> None:
    trials = _trials(_done(None, 0, 10), _done(None, 1000, 1010))
    workers = {0: Worker("m8", 1, "a"), 1: Worker("m8", 2, "b")}
    assert _hosts(trials, workers)["m8"].idle == pytest.approx(0.0)
    assert _hosts(trials, dict.fromkeys((0, 1), workers[0]))["m8"].idle == pytest.approx(1 - 20 / 1010)


@pytest.mark.parametrize("in_order", [True, False])
def test_a_worker_with_n_jobs_is_available_once_for_each_trial_under_way(in_order: bool) -> None:
    rows = [_done("m8", 0, 10), _done("m8", 0, 4), _done("m8", 5, 10), _done("m8", 10, 20)]
    trials = _trials(*rows)
    statistics = StudyStatistics(0, "s", [StudyDirection.MINIMIZE])
    if in_order:
        statistics.update(trials)
    else:  # the long one ends last: all others are known and counted before
        running = _trial(0, ("m8", RUNNING, 0.0, None, None))
        for n in range(2, 5):
            statistics.update([running, *trials[1:n]])
            statistics.report(NOON)
        statistics.update(trials)
    # Two slots over 20 s, of which 29 s were busy.
    assert statistics.report(NOON).idle == pytest.approx(1 - 29 / 40)


def test_trials_one_after_the_other_take_one_slot_though_they_touch() -> None:
    assert _hosts(_trials(*(_done("m8", n, n + 1) for n in range(100))))["m8"].idle == pytest.approx(0.0)


def test_the_best_value_is_that_of_a_feasible_trial() -> None:
    trials = _trials(_done("m8", 0, 1), _done("m8", 0, 1), _done("m8", 0, 1))
    trials[0].system_attrs = {"constraints": [0.0, 0.5]}
    trials[1].system_attrs = {"constraints": [0.0, -1.0]}
    assert _statistics(trials).report(NOON).best == [1.0]


def test_each_objective_has_its_best_value() -> None:
    statistics = StudyStatistics(0, "s", [StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE])
    trials = _trials(_done("m8", 0, 1), _done("m8", 0, 1))
    trials[0].values, trials[1].values = [1.0, 2.0], [0.5, -math.inf]
    statistics.update(trials)
    assert statistics.report(NOON).best == [0.5, 2.0]


def test_an_update_takes_in_only_what_was_open_or_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    add = HostStatistics.add

    def noting(self: HostStatistics, trial: FrozenTrial, skipped: bool, worker: Any) -> None:
        taken.append(trial.number)
        add(self, trial, skipped, worker)

    monkeypatch.setattr(HostStatistics, "add", noting)
    trials = _trials(_done("m8", 0, 1), ("m8", RUNNING, 1.0, None, None), _done("m8", 0, 3))
    statistics = _statistics(trials)
    assert (taken, statistics.first_open) == ([0, 2], 1)
    statistics.update([trials[0], _trial(1, _done("m8", 1, 6)), trials[2], _trial(3, _done("m8", 6, 7))])
    assert (taken, statistics.first_open) == ([0, 2, 1, 3], 4)
    report = statistics.report(NOON)
    assert (report.complete, report.running, report.hosts[0].median) == (4, 0, 2.0)


def test_updates_one_by_one_tell_the_same_as_one_for_all() -> None:
    """What is kept incrementally against what is counted at once."""
    rows = [
        (f"m{n % 3}", COMPLETE if n % 5 else FAIL, n * 0.7, n * 0.7 + (n * 37 % 11) / 3, None)
        for n in range(60)
    ]
    trials = _trials(*rows)
    now = NOON + timedelta(minutes=1)
    one_by_one = StudyStatistics(7, "P2c_BTC", [StudyDirection.MINIMIZE])
    ended: list[FrozenTrial] = [_trial(n, (f"m{n % 3}", RUNNING, n * 0.7, None, None)) for n in range(60)]
    for n in sorted(range(60), key=lambda n: n * 7919 % 61):
        ended[n] = trials[n]
        one_by_one.update(ended)
        one_by_one.report(now)
    report, expected = one_by_one.report(now), _statistics(trials).report(now)
    for host, other in zip(report.hosts, expected.hosts, strict=True):
        for field in fields(HostReport):
            mine, theirs = getattr(host, field.name), getattr(other, field.name)
            assert mine == (pytest.approx(theirs) if isinstance(theirs, float) else theirs), field.name
    assert report.complete == expected.complete
    assert report.idle == pytest.approx(expected.idle)


# -- the layouts -----------------------------------------------------------------------------------


def _report() -> Report:
    """Two studies: one with three hosts, one that has only begun."""
    trials = _trials(
        *(_done("m8", 0, 2), _done("m8", 2, 4.02), _done("bric", 0, 3.78), _done("M10", 0, 3.5)),
        *(_done("m8", 5, 5.001, "COMPLETE"), ("bric", FAIL, 4.0, 5.0, None)),
        *(("m8", RUNNING, 6.0, None, None), ("m8", RUNNING, 6.0, None, None)),
    )
    now = NOON + timedelta(minutes=5)
    begun = StudyStatistics(0, "P4_ETH", [StudyDirection.MAXIMIZE])
    begun.update(_trials(("m4", RUNNING, 0.0, None, None), (None, WAITING, None, None, None)))
    studies = [_statistics(trials, name="P4_BTC").report(now), begun.report(now)]
    return Report("keydb://m8:6373", studies, 0.3834, now)


def test_the_plain_layout_is_that_of_the_notes() -> None:
    assert plain(_report()).splitlines() == [
        "database(keydb://m8:6373)",
        "7 P4_BTC",
        "COMPLETE: 5",
        "m8:     mean = 2.01, median = 2.01 (2|2)",
        "M10:    mean = 3.50, median = 3.50 (1)",
        "bric:   mean = 3.78, median = 3.78 (1)",
        "throughput = 47.99/min (last 10 min: 0.80/min), idle = 8.9%, failed = 1, skipped = 1",
        "",
        "0 P4_ETH",
        "COMPLETE: 0",
        "m4:     mean = -, median = - (0|1)",
        "throughput = -/min (last 10 min: -/min), idle = -, failed = 0, skipped = 0, waiting = 1",
        "",
        "took 0.383 s",
    ]


def test_the_plain_layout_in_chinese_has_the_words_of_the_notes() -> None:
    assert plain(_report(), "zh").splitlines() == [
        "数据库(keydb://m8:6373)",
        "7 P4_BTC",
        "COMPLETE: 5",
        "m8:     平均 = 2.01, 中位 = 2.01 (2|2)",
        "M10:    平均 = 3.50, 中位 = 3.50 (1)",
        "bric:   平均 = 3.78, 中位 = 3.78 (1)",
        "吞吐 = 47.99/分钟 (最近10分钟: 0.80/分钟), 空闲 = 8.9%, 失败 = 1, 跳过 = 1",
        "",
        "0 P4_ETH",
        "COMPLETE: 0",
        "m4:     平均 = -, 中位 = - (0|1)",
        "吞吐 = -/分钟 (最近10分钟: -/分钟), 空闲 = -, 失败 = 0, 跳过 = 0, 等待 = 1",
        "",
        "耗时：0.383秒",  # noqa: RUF001
    ]


def test_a_long_host_name_moves_the_column() -> None:
    trials = _trials(_done("gpu-node-17.cluster", 0, 1), _done("m8", 0, 2))
    lines = plain(Report("db", [_statistics(trials).report(NOON)], 0.0, NOON)).splitlines()[3:5]
    assert [line.index("mean") for line in lines] == [21, 21]


def test_a_database_without_studies_says_so() -> None:
    assert plain(Report("db", [], 0.0, NOON)).splitlines()[1] == "no studies"
    assert plain(Report("db", [], 0.0, NOON), "zh").splitlines()[1] == "没有研究"


def test_json_has_all_that_is_known_and_parses_everywhere() -> None:
    found = json.loads(as_json(_report()), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (found["database"], found["seconds"], found["window"]) == ("keydb://m8:6373", 0.3834, 600.0)
    first, second = found["studies"]
    assert [(h["host"], h["finished"], h["running"]) for h in first["hosts"]] == [
        *(("m8", 2, 2), ("M10", 1, 0), ("bric", 1, 0)),
    ]
    assert first["hosts"][0]["median"] == pytest.approx(2.01)
    assert (first["number"], first["name"], first["complete"], first["skipped"]) == (7, "P4_BTC", 5, 1)
    assert datetime.fromisoformat(first["first_start"]) == NOON
    assert (second["waiting"], second["throughput"], second["first_start"]) == (1, None, None)


def test_json_of_an_infinite_value_is_null() -> None:
    statistics = StudyStatistics(0, "s", [StudyDirection.MAXIMIZE])
    trials = _trials(_done("m8", 0, 1))
    trials[0].values = [math.inf]
    statistics.update(trials)
    found = json.loads(as_json(Report("db", [statistics.report(NOON)], 0.0, NOON)))
    assert found["studies"][0]["best"] == [None]


def test_csv_has_a_row_for_each_host_and_one_for_an_empty_study() -> None:
    report = _report()
    empty = StudyStatistics(9, 'a, "b"', [StudyDirection.MINIMIZE]).report(NOON)
    report.studies.append(empty)
    rows = list(csv.DictReader(io.StringIO(as_csv(report))))
    assert [(row["number"], row["study"], row["host"], row["finished"], row["running"]) for row in rows] == [
        ("7", "P4_BTC", "m8", "2", "2"),
        ("7", "P4_BTC", "M10", "1", "0"),
        ("7", "P4_BTC", "bric", "1", "0"),
        ("0", "P4_ETH", "m4", "0", "1"),
        ("9", 'a, "b"', "", "0", "0"),
    ]
    assert float(rows[0]["mean"]) == pytest.approx(2.01)
    assert rows[3]["mean"] == ""


@pytest.mark.parametrize(("lang", "word"), [("en", "median s"), ("zh", "中位 s")])
def test_the_table_has_a_row_for_each_host_in_order(lang: str, word: str) -> None:
    from rich.console import Console

    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(tables(_report(), lang))
    lines = capture.get().splitlines()
    assert any(word in line for line in lines)
    order = [
        line.split()[0] for line in lines if line.split() and line.split()[0] in ("m8", "M10", "bric", "m4")
    ]
    assert order == ["m8", "M10", "bric", "m4"]
    assert any(line.split()[:6] == ["m8", "2.01", "2.01", "2", "2", "0"] for line in lines)


@pytest.mark.parametrize(
    ("width", "last", "gone"),
    [(40, "median s", "finished"), (60, "idle", "failed"), (80, "idle", "pruned"), (120, "idle", None)],
)
def test_a_table_gives_up_columns_rather_than_digits(width: int, last: str, gone: str | None) -> None:
    from rich.console import Console

    trials = _trials(*(_done(f"gpu-node-{n:02d}.cluster", 0, 1 + n) for n in range(3)))
    trials += [_trial(3, ("m8", FAIL, 0.0, 1.0, None)), _trial(4, ("m8", PRUNED, 0.0, 1.0, None))]
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(tables(Report("db", [_statistics(trials).report(NOON)], 0.0, NOON)))
    rows = [line.split() for line in capture.get().splitlines() if line.startswith("gpu")]
    assert [row[:3] for row in rows] == [
        [f"gpu-node-{n:02d}.cluster", f"{1 + n}.00", f"{1 + n}.00"] for n in range(3)
    ]
    heads = capture.get().splitlines()[3]
    assert heads.rstrip().endswith(last)
    assert "…" not in heads
    assert gone is None or gone not in heads
    assert gone is not None or "last 10 min" in heads


def test_a_name_with_markup_is_shown_as_it_is() -> None:
    from rich.console import Console

    trials = _trials(_done("[red]m8", 0, 1))
    report = Report("db", [_statistics(trials, name="[bold]x").report(NOON)], 0.0, NOON)
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(tables(report))
    assert "[red]m8" in capture.get()
    assert "[bold]x" in capture.get()


def test_a_name_cannot_drive_the_terminal() -> None:
    report = Report(
        "db", [_statistics(_trials(_done("m8\x1b[2J", 0, 1)), name="x\n9 y").report(NOON)], 0.0, NOON
    )
    assert "\x1b" not in plain(report)
    assert r"7 'x\n9 y'" in plain(report)


def test_to_wait_for_the_twin_of_a_duplicate_is_idle() -> None:
    host = _hosts(_trials(_done("m8", 0, 5), _done("m8", 5, 10, "RUNNING")))["m8"]
    assert host.idle == pytest.approx(0.5)


def test_seconds_are_those_of_the_clock_on_the_wall() -> None:
    assert seconds_of(datetime(1970, 1, 2)) == 86400.0
