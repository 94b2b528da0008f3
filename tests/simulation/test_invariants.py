"""Every guarantee that is checked can be found broken."""

from __future__ import annotations

from datetime import datetime

import pytest
from optuna.trial import FrozenTrial, TrialState, create_trial

from tests.simulation.invariants import Finish, History, Violation

_DONE = datetime(2024, 1, 1)


def trial(
    number: int, state: TrialState = TrialState.RUNNING, value: float = 1.0, **attrs: object
) -> FrozenTrial:
    """One that creation `t<number>` made, unless the attributes say otherwise."""
    values = [value] if state is TrialState.COMPLETE else None
    made = create_trial(state=state, values=values, user_attrs={"tag": f"t{number}", **attrs})
    made.number = number
    if state.is_finished():
        made.datetime_complete = _DONE
    return made


@pytest.fixture
def history() -> History:
    """Two trials were created: 0 runs, 1 was finished; attribute `a` of trial 0 was acknowledged."""
    history = History()
    history.tried |= {"t0", "t1", "t2"}
    history.created("t0", 0)
    history.created("t1", 1)
    history.maybe_finishes[1] = [Finish(TrialState.COMPLETE, 1.0)]
    history.finished(1, Finish(TrialState.COMPLETE, 1.0))
    history.tried_attrs[0, "a"] = 2
    history.kept(0, "a", 1)
    return history


GOOD = [trial(0, a=1), trial(1, TrialState.COMPLETE)]


def test_what_holds_is_no_violation(history: History) -> None:
    known = history.snapshot()
    history.read(GOOD, known)
    history.read([trial(0, a=2), GOOD[1], trial(2)], history.snapshot())


@pytest.mark.parametrize(
    ("read", "what"),
    [
        ([GOOD[0]], "G2: trial 1"),
        ([GOOD[1], GOOD[0]], "G1: a read shows the numbers"),
        ([GOOD[0], GOOD[1], trial(2, tag="t1")], "G6: 2 trials"),
        ([GOOD[0], GOOD[1], trial(2, tag="ghost")], "G6: 1 trials of creation ghost"),
        ([GOOD[0], trial(1, tag="t2")], "G2: trial 1"),
        ([GOOD[0], trial(1)], "G3: trial 1 was finished, and is RUNNING"),
        ([GOOD[0], trial(1, TrialState.COMPLETE, 2.0)], "G3: trial 1 is"),
        ([trial(0, TrialState.COMPLETE, a=1), GOOD[1]], "G3: trial 0 is"),
        ([trial(0), GOOD[1]], "G2: attribute a"),
        ([trial(0, a=3), GOOD[1]], "which nobody wrote"),
    ],
)
def test_a_read_that_breaks_a_guarantee_is_noticed(
    history: History, read: list[FrozenTrial], what: str
) -> None:
    with pytest.raises(Violation, match=what):
        history.read(read, history.snapshot())


def test_what_one_read_has_shown_the_next_one_has_to_show(history: History) -> None:
    history.read([trial(0, a=2), GOOD[1], trial(2)], history.snapshot())
    known = history.snapshot()
    with pytest.raises(Violation, match="G5: a read shows 2 trials, an earlier one 3"):
        history.read([trial(0, a=2), GOOD[1]], known)
    with pytest.raises(Violation, match="G2: attribute a"):
        history.read([trial(0, a=1), GOOD[1], trial(2)], known)
    with pytest.raises(Violation, match="G3: finished trial 1"):
        history.read([trial(0, a=2), trial(1, TrialState.COMPLETE, b=0), trial(2)], known)


def test_a_read_that_began_before_need_not_show_it(history: History) -> None:
    known = history.snapshot()
    history.created("t2", 2)
    history.read(GOOD, known)


def test_what_is_given_twice_is_noticed(history: History) -> None:
    with pytest.raises(Violation, match="G1: number 0 was given to t0 and to t2"):
        history.created("t2", 0)
    with pytest.raises(Violation, match="G3: trial 1 was finished twice"):
        history.finished(1, Finish(TrialState.FAIL, None))
    history.claimed(0, "c0")
    with pytest.raises(Violation, match="G4: trial 0 was claimed by c0 and by c1"):
        history.claimed(0, "c1")


def test_what_a_retry_broke_is_noticed(history: History) -> None:
    """G6: nobody else can have done what the caller is told that somebody else has done."""
    with pytest.raises(Violation, match="G3: trial 0 was said to be finished"):
        history.refused(0)
    history.refused(1)
    history.maybe_claims[0] = ["c0"]
    with pytest.raises(Violation, match="G6: c0 lost trial 0 to nobody"):
        history.lost(0, "c0")
    history.maybe_claims[0] = ["c0", "c1"]
    history.lost(0, "c0")


def test_claims_are_kept_and_nobody_else_claims(history: History) -> None:
    history.waiting.add("t0")
    with pytest.raises(Violation, match="G4: trial 0 is RUNNING, and nobody claimed it"):
        history.read(GOOD, history.snapshot())
    history.claimed(0, "c0")
    history.read(GOOD, history.snapshot())
    with pytest.raises(Violation, match="G4: trial 0 was claimed, and is WAITING"):
        history.read([trial(0, TrialState.WAITING, a=1), GOOD[1]], history.snapshot())


def test_own_deferred_writes_are_seen(history: History) -> None:
    history.check_pending(GOOD[0], "c0", {"a": 1})
    with pytest.raises(Violation, match="G5: c0 wrote"):
        history.check_pending(GOOD[0], "c0", {"a": 2})
