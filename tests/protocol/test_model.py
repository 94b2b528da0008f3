"""The replicated section log, checked in every reachable state; and every mistake in it that we know, caught.

`PROTOCOL_SLOW=1` adds the setups that take minutes.  `pytest -s` prints the figures and the counterexamples.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

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

FIGURE_8 = Setup(((C,), (C,), (R,)), ((1, 3), (2,), ()))
TWO_BASES = Setup(((C,), (C,), (C,)), ((2, 4), (1, 5), (3,)))

SLOW = {
    "a writer comes back after another, and a reader": FIGURE_8,
    "two creators with two ballots each, one restart": Setup(((C,), (C,)), ((1, 3), (2, 4)), restarts=1),
    "a finish and a read, two ballots each, one restart": Setup(((C,), (F, R)), ((1, 3), (2, 4)), restarts=1),
}

TWO = Setup(((C,), (C,)), ((1,), (2,)))
READER = Setup(((C,), (C,), (R,)), ((1,), (2,), ()))
RESTART = TWO._replace(restarts=1)

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


@pytest.mark.parametrize(
    "setup",
    [
        *(pytest.param(setup, id=name) for name, setup in CORRECT.items()),
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
        assert timed(setup, watched).violation is None
