"""The audit sees each kind of damage it is there for."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_dlock.audit import Acknowledged, audit_numbers, audit_run, zombies


def test_numbers_without_gap_are_in_order_whatever_their_order() -> None:
    audit = audit_numbers(iter([2, 0, 1, 3]))
    assert audit.ok
    assert (audit.missing, audit.doubled, audit.total) == ((), (), 4)


def test_no_numbers_at_all_are_in_order() -> None:
    assert audit_numbers([]).ok
    assert audit_numbers([]).total == 0


def test_missing_numbers_are_seen() -> None:
    audit = audit_numbers([1, 2, 5])
    assert not audit.ok
    assert audit.missing == (0, 3, 4)
    assert audit.doubled == ()


def test_doubled_numbers_are_seen_and_counted_in_the_total() -> None:
    audit = audit_numbers([0, 1, 1, 2, 2, 2])
    assert not audit.ok
    assert audit.doubled == (1, 2)
    assert audit.missing == ()
    assert audit.total == 6


def _trial(number: int, state: TrialState = TrialState.COMPLETE, worker: str = "w1") -> FrozenTrial:
    trial = create_trial(
        state=state,
        value=float(number) if state == TrialState.COMPLETE else None,
        user_attrs={"worker": worker},
    )
    trial.number = number
    return trial


def _told(*numbers: int) -> Acknowledged:
    return Acknowledged(list(numbers), {n: (TrialState.COMPLETE, float(n)) for n in numbers})


def _failed(
    trials: list[FrozenTrial], workers: dict[str, Acknowledged], expected: int | None, silent: int = 0
) -> dict[str, str]:
    return {check.name: check.text for check in audit_run(trials, workers, expected, silent) if not check.ok}


def test_a_run_in_order_passes() -> None:
    trials = [_trial(0), _trial(1, worker="w2"), _trial(2)]
    assert _failed(trials, {"w1": _told(0, 2), "w2": _told(1)}, 3) == {}


def test_a_run_with_fewer_trials_than_asked_for_fails_unless_it_was_interrupted() -> None:
    trials, workers = [_trial(0)], {"w1": _told(0)}
    assert _failed(trials, workers, 2) == {"numbers": "1 trials instead of 2"}
    assert _failed(trials, workers, None) == {}


def test_an_acknowledged_number_that_the_server_lost_is_seen() -> None:
    failed = _failed([_trial(0)], {"w1": _told(0, 1)}, 1)
    assert failed == {"acknowledged": "given to a worker, but not on the server: 1"}


def test_a_number_given_to_two_workers_is_seen_although_the_server_has_it_once() -> None:
    workers = {"w1": _told(0, 1), "w2": Acknowledged([1])}
    assert _failed([_trial(0), _trial(1)], workers, 2) == {"acknowledged": "given to two workers: 1"}


def test_a_number_given_twice_to_one_worker_is_seen() -> None:
    assert "acknowledged" in _failed([_trial(0)], {"w1": Acknowledged([0, 0])}, 1)


def test_a_trial_that_no_worker_asked_for_is_a_ghost_unless_a_worker_died_before_it_could_report() -> None:
    trials = [_trial(0), _trial(1, TrialState.FAIL)]
    workers = {"w1": _told(0)}
    assert _failed(trials, workers, 2) == {"acknowledged": "on the server, but given to no worker: 1"}
    assert _failed(trials, workers, 2, silent=1) == {}


@pytest.mark.parametrize("state", [TrialState.RUNNING, TrialState.WAITING])
def test_a_trial_that_is_not_finished_is_seen(state: TrialState) -> None:
    failed = _failed([_trial(0, state)], {"w1": Acknowledged([0])}, 1)
    assert failed == {"finished": f"1 {state.name}; not finished: 0"}


def test_a_result_that_differs_from_what_the_worker_was_told_is_seen() -> None:
    told = Acknowledged([0, 1], {0: (TrialState.COMPLETE, 0.0), 1: (TrialState.COMPLETE, 0.5)})
    failed = _failed([_trial(0), _trial(1)], {"w1": told}, 2)
    assert failed == {"results": "differ from what the worker was told: 1"}


def test_a_finish_that_the_server_holds_for_another_worker_is_seen() -> None:
    assert "results" in _failed([_trial(0, worker="w2")], {"w1": _told(0)}, 1)


def test_zombies_are_the_trials_that_run_for_too_long() -> None:
    now = datetime(2026, 1, 1, 12)
    old, young, finished = _trial(0, TrialState.RUNNING), _trial(1, TrialState.RUNNING), _trial(2)
    old.datetime_start = finished.datetime_start = now - timedelta(seconds=61)
    young.datetime_start = now - timedelta(seconds=59)
    assert zombies([old, young, finished], now, 60.0) == (0,)
