"""Which of several masters' states may be believed, in what order ballots come, whose grants count."""

from __future__ import annotations

import itertools

import pytest

from optuna_dlock.quorum import Ballots, Runs, State, decided, majority, needed_for_rebuild


def states(*entries: tuple[str, int] | None) -> dict[int, State]:
    """The state of each master by index; None for one that did not answer."""
    return {i: State(e[0], e[1], f"{e[0]}.{e[1]}") for i, e in enumerate(entries) if e is not None}


@pytest.mark.parametrize("n", range(1, 8))
def test_any_two_majorities_share_a_master_and_rebuilders_meet_every_majority(n: int) -> None:
    masters = range(n)
    majorities = [set(m) for m in itertools.combinations(masters, majority(n))]
    assert all(a & b for a in majorities for b in majorities)
    for forgotten in masters:
        others = [m for m in masters if m != forgotten]
        for asked in itertools.combinations(others, min(needed_for_rebuild(n), len(others))):
            assert all(set(asked) & m for m in majorities if forgotten in m and n > 1)


@pytest.mark.parametrize(
    ("n", "found", "believed"),
    [
        (3, states(("b1", 5), ("b1", 5), ("b1", 5)), 5),
        (3, states(("b1", 5), ("b1", 5), None), 5),
        (3, states(("b1", 5), ("b1", 5), ("b1", 6)), 5),
        (3, states(("b1", 5), ("b1", 6), ("b1", 6)), 6),
        (3, states(("b1", 5), ("b1", 5), ("b2", 6)), 5),
        (3, states(("b1", 5), ("b1", 6), None), None),
        (3, states(("b1", 5), ("b2", 5), None), None),
        (3, states(("b0", 4), ("b1", 5), ("b2", 6)), None),
        (3, states(("b1", 5), ("b1", 4), ("b2", 6)), None),
        (3, states(("b1", 5), None, None), None),
        (2, states(("b1", 5), ("b1", 5)), 5),
        (2, states(("b1", 5), ("b1", 6)), 5),
        (2, states(("b1", 5), ("b2", 6)), None),
        (5, states(("b1", 5), ("b1", 5), ("b1", 5), None, None), 5),
        (5, states(("b1", 5), ("b1", 5), ("b1", 6), None, None), None),
        (5, states(("b1", 5), ("b1", 5), ("b1", 5), ("b2", 6), None), 5),
        (5, states(("b1", 5), ("b1", 5), ("b2", 6), ("b2", 6), None), None),
        (1, states(("b1", 5)), 5),
    ],
)
def test_a_state_is_believed_if_a_majority_has_it_and_nothing_later_can_have_been_acknowledged(
    n: int, found: dict[int, State], believed: int | None
) -> None:
    for order in itertools.permutations(found):
        index = decided({i: found[i] for i in order}, n)
        assert (None if index is None else found[index].seq) == believed


def test_ballots_rise_though_the_clock_goes_back_and_pass_what_others_had() -> None:
    times = iter([100.0, 50.0, 50.0, 50.0])
    ballots = Ballots(lambda: next(times))
    first, second = ballots.next(), ballots.next()
    foreign = "00008" + "9" * 15 + "0" * 12
    third = ballots.next(foreign)
    assert first < second
    assert third > foreign[:20]
    assert ballots.next() > third


def test_a_ballot_of_a_new_epoch_is_above_whatever_clocks_can_make() -> None:
    fast, slow = Ballots(lambda: 9e9), Ballots(lambda: 1.0)
    before = fast.next()
    new = slow.next_epoch(before)
    assert new > fast.next()
    assert slow.next() > new
    assert fast.next(new) > new


def test_ballots_of_two_clients_differ_at_the_same_microsecond() -> None:
    assert Ballots(lambda: 1.0).next() != Ballots(lambda: 1.0).next()


def test_a_grant_of_an_earlier_run_does_not_count_once_anybody_was_told_of_a_later_one() -> None:
    runs = Runs([b"", b"1=1:bbbb"])
    assert runs.is_current(0, "aaaa"), "nobody was told anything of it"
    assert not runs.is_current(1, "aaaa")
    assert runs.is_current(1, "bbbb")


def test_of_two_things_told_the_later_one_counts() -> None:
    runs = Runs([b"1=2:cccc 0=1:aaaa", b"1=1:bbbb"])
    assert runs.is_current(1, "cccc")
    runs.begin(1, "dddd")
    assert Runs([str(runs).encode(), b"1=2:cccc"]).is_current(1, "dddd")
    runs.begin(1, "dddd")
    assert "1=3:dddd" in str(runs), "the same run twice is one generation"
