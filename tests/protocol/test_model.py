"""The replicated section log, checked in every reachable state; and every mistake in it that we know, caught.

`PROTOCOL_SLOW=1` adds the setups that take minutes.  `pytest -s` prints the figures and the counterexamples.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from functools import cache

import pytest

from .model import Result, Setup, check

C, F, R = "create", "finish", "read"
slow = pytest.mark.skipif(not os.environ.get("PROTOCOL_SLOW"), reason="takes minutes: PROTOCOL_SLOW=1")

CORRECT = {
    "two creators with two ballots each": Setup(((C,), (C,)), ((1, 3), (2, 4))),
    "a holder keeps its ballot for two operations": Setup(((C, C), (C,)), ((1, 3), (2,))),
    "a holder keeps its ballot after a contender gave up": Setup(((C, C), (C,)), ((2,), (1, 3))),
    "a creation and a read after a finish": Setup(((C,), (F, R)), ((1, 3), (2, 4))),
    "two finishers, then a read": Setup(((C, F), (F, R)), ((1, 3), (2,))),
    "three creators": Setup(((C,), (C,), (C,)), ((1,), (2,), (3,))),
    "two writers and a reader, one restart": Setup(((C,), (F,), (R,)), ((1,), (2,), ()), restarts=1),
    "two finishers and a creator, one restart": Setup(((F,), (F,), (C,)), ((1,), (2,), (3,)), restarts=1),
    "a kept ballot and a contender, one restart": Setup(((C, C), (C,)), ((1, 3), (2,)), restarts=1),
    "a reader that confirms, one restart": Setup(((C,), (R,)), ((1, 3), (2,)), restarts=1),
    "two masters, one restart": Setup(((C, F), (F, R)), ((1, 3), (2, 4)), masters=2, restarts=1),
    "four masters, one restart": Setup(((C,), (C,)), ((1,), (2,)), masters=4, restarts=1),
    "five masters, one restart": Setup(((C,), (C,)), ((1,), (2,)), masters=5, restarts=1),
}

ONE, TWO_OPEN, BOTH = frozenset({1}), frozenset({2}), frozenset({1, 3})
"""Ballots that are opened.  A client without ballots can only have its operations sequenced."""

OPENED = {
    "an open ballot and who uses it, each asking twice": Setup(
        ((C,), (C,)), ((1,), ()), opens=ONE, requests=2
    ),
    "an open ballot, who uses it, a later holder": Setup(((C,), (C,), (C,)), ((1,), (), (2,)), opens=ONE),
    "an open ballot, who uses it, an earlier holder": Setup(
        ((C,), (C,), (C,)), ((2,), (), (1,)), opens=TWO_OPEN
    ),
    "two open ballots": Setup(((C,), (C,)), ((1,), (2,)), opens=frozenset({1, 2})),
    "an open ballot, a holder, the opener as a holder": Setup(((C,), (C,)), ((1, 3), (2,)), opens=ONE),
    "a holder, an open ballot, the holder again": Setup(((C,), (C,)), ((1, 3), (2,)), opens=TWO_OPEN),
    "a reader, an open ballot, the opener as a holder": Setup(((C,), (R,)), ((1, 2), ()), opens=ONE),
    "two operations under an open ballot, and a holder": Setup(((C, C), (C,)), ((1,), (2,)), opens=ONE),
    "an open ballot, who uses it, a holder, one restart": Setup(
        ((C,), (F,), (C,)), ((1,), (), (2,)), restarts=1, opens=ONE
    ),
    "an open ballot and another after one restart": Setup(((C,), (C,)), ((1, 3), ()), restarts=1, opens=BOTH),
    "an open ballot, a reader, one restart": Setup(((C,), (R,), (F,)), ((1,), (), ()), restarts=1, opens=ONE),
    "an open ballot, a holder, two masters, one restart": Setup(
        ((C,), (C,)), ((1, 3), (2,)), masters=2, restarts=1, opens=ONE
    ),
    "an open ballot, a holder, four masters, one restart": Setup(
        ((C,), (C,)), ((1,), (2,)), masters=4, restarts=1, opens=ONE
    ),
    "an open ballot and who uses it, five masters, one restart": Setup(
        ((C,), (C,)), ((1,), ()), masters=5, restarts=1, opens=ONE
    ),
}

FIGURE_8 = Setup(((C,), (C,), (R,)), ((1, 3), (2,), ()))
TWO_BASES = Setup(((C,), (C,), (C,)), ((2, 4), (1, 5), (3,)))

SLOW = {
    "a writer comes back after another, and a reader": FIGURE_8,
    "two creators with two ballots each, one restart": Setup(((C,), (C,)), ((1, 3), (2, 4)), restarts=1),
    "a finish and a read, two ballots each, one restart": Setup(((C,), (F, R)), ((1, 3), (2, 4)), restarts=1),
    "an open ballot, a holder, another open ballot": Setup(((C,), (C,)), ((1, 3), (2,)), opens=BOTH),
    "an open ballot, who finishes and reads, the opener as a holder": Setup(
        ((C,), (F, R)), ((1, 2), ()), opens=ONE
    ),
    "an open ballot, a reader, a holder": Setup(((C,), (R,), (C,)), ((1,), (), (2,)), opens=ONE),
    "an open ballot, a holder, each asking twice, one restart": Setup(
        ((C,), (C,)), ((1,), (2,)), restarts=1, opens=ONE, requests=2
    ),
    "an open ballot, who uses it, an earlier holder, one restart": Setup(
        ((C,), (F,), (C,)), ((2,), (), (1,)), restarts=1, opens=TWO_OPEN
    ),
    "an open ballot, a holder, five masters, one restart": Setup(
        ((C,), (C,)), ((1,), (2,)), masters=5, restarts=1, opens=ONE
    ),
}

TWO = Setup(((C,), (C,)), ((1,), (2,)))
READER = Setup(((C,), (C,), (R,)), ((1,), (2,), ()))
RESTART = TWO._replace(restarts=1)
OPEN_FIRST = TWO._replace(opens=ONE)
OPEN_SECOND = TWO._replace(opens=TWO_OPEN)
OPEN_BETWEEN = Setup(((C,), (C,)), ((1, 3), (2,)), opens=TWO_OPEN)
OPEN_READER = Setup(((C,), (R,)), ((1, 2), ()), opens=ONE)
OPEN_RESTART = RESTART._replace(opens=ONE)

MISTAKES = [
    ("commit ignores the promise", TWO, "kept"),
    ("commit ignores the promise", TWO, "unique"),
    ("reader takes the highest", Setup(((C,), (R,)), ((1,), ())), "kept"),
    ("reader takes the highest", Setup(((F,), (F,), (R,)), ((1,), (2,), ())), "final"),
    ("reader takes what is not chosen", READER, "kept"),
    ("reader takes what may be old", Setup(((C, C), (R,)), ((1,), ())), "fresh"),
    ("synchronised with the old ballot", FIGURE_8, "kept"),
    ("shared key names", TWO, "kept"),
    ("shared key names", TWO, "unique"),
    ("a restarted master votes", RESTART, "kept"),
    ("rebuild over data", RESTART, "kept"),
    ("a dead run's grant counts", RESTART, "kept"),
    ("a dead run's grant counts", RESTART, "unique"),
    ("install goes back", Setup(((C,), (C,)), ((2,), (1,))), "kept"),
    ("install goes back", Setup(((C,), (C,)), ((2,), (1, 3))), "unique"),
    pytest.param("an identity per operation", TWO_BASES, "kept", marks=slow),
    ("the opener goes on", OPEN_FIRST, "kept"),
    ("the opener goes on", OPEN_FIRST, "unique"),
    ("opened too early", OPEN_SECOND, "kept"),
    ("opened too early", OPEN_BETWEEN, "unique"),
    ("opened at two masters", OPEN_FIRST, "kept"),
    ("opened at two masters", OPEN_FIRST, "unique"),
    ("sequenced under a ballot that is over", OPEN_FIRST, "kept"),
    ("sequenced under a ballot that is over", OPEN_FIRST, "unique"),
    ("sequenced under the old ballot", OPEN_FIRST, "kept"),
    ("further under another ballot", OPEN_SECOND, "kept"),
    ("further under another ballot", OPEN_BETWEEN, "unique"),
    ("forward ignores the promise", OPEN_FIRST, "kept"),
    ("forward ignores the promise", OPEN_FIRST, "unique"),
    ("what is forwarded need not follow", OPEN_SECOND, "kept"),
    ("what is forwarded need not follow", OPEN_BETWEEN, "unique"),
    ("forwarded under the old ballot", OPEN_SECOND, "kept"),
    ("forwarded under the old ballot", OPEN_BETWEEN, "unique"),
    ("the sequencer is enough", OPEN_FIRST, "kept"),
    ("the sequencer is enough", OPEN_FIRST, "unique"),
    ("the sequencer is enough", OPEN_READER, "fresh"),
    ("a restarted master votes", OPEN_RESTART, "kept"),
    ("a dead run's grant counts", OPEN_RESTART, "kept"),
]


@pytest.fixture(autouse=True)
def _no_collector() -> Iterator[None]:
    """Spare the collector: states hold no cycles, and looking through them takes a third of the time."""
    gc.disable()
    yield
    gc.enable()


def timed(setup: Setup, watched: frozenset[str] | None = None) -> Result:
    """Check `setup` and print the figures."""
    start = time.perf_counter()
    result = check(setup, watched)
    print(f"\n{result.states} states in {time.perf_counter() - start:.1f} s")
    if result.violation is not None:
        print(f"{result.violation.invariant}: {result.violation.detail}")
        print("".join(f"  {step}\n" for step in result.violation.trace), end="")
    return result


@cache
def _is_clean(setup: Setup, watched: frozenset[str]) -> bool:
    return timed(setup, watched).violation is None


@pytest.mark.parametrize(
    "setup",
    [
        *(pytest.param(setup, id=name) for name, setup in (CORRECT | OPENED).items()),
        *(pytest.param(setup, id=name, marks=slow) for name, setup in SLOW.items()),
    ],
)
def test_no_reachable_state_of_the_protocol_breaks_an_invariant(setup: Setup) -> None:
    """It does not hold for want of states: every operation succeeds somewhere, as its client is told."""
    result = timed(setup)
    assert result.violation is None
    created = {operation for what, _, operation in result.told if what == "trial"}
    programs = [(c, i, kind) for c, program in enumerate(setup.programs) for i, kind in enumerate(program)]
    assert created == {10 * (c + 1) + i for c, i, kind in programs if kind == C}
    finishers = {operation for what, _, operation in result.told if what == "finished"}
    assert finishers == {10 * (c + 1) + i for c, i, kind in programs if kind == F}


@pytest.mark.parametrize(("mistake", "setup", "invariant"), MISTAKES)
def test_each_mistake_breaks_an_invariant_that_holds_without_it(
    mistake: str, setup: Setup, invariant: str
) -> None:
    """The same setup without the mistake is clean, so that it is the mistake that is caught."""
    watched = frozenset({invariant})
    result = timed(setup._replace(mistakes=frozenset({mistake})), watched)
    assert result.violation is not None
    assert result.violation.invariant == invariant
    assert result.violation.trace
    if setup not in (FIGURE_8, TWO_BASES):  # the one is visited above, the other is too large
        assert _is_clean(setup, watched)
