"""The grid without a server: every point has one position, the order is a permutation, digests tell."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optuna_dlock.grid import Grid, permute

SPACE: dict[str, list[Any]] = {"y": ["a", "b", None], "x": [1, 2], "z": [0.5, True]}


@settings(deadline=None)  # a busy machine
@given(size=st.integers(1, 700), seed=st.integers())
def test_the_order_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(permute(position, size, seed) for position in range(size)) == list(range(size))


def test_another_seed_is_another_order() -> None:
    orders = {tuple(permute(position, 100, seed) for position in range(100)) for seed in range(20)}
    assert len(orders) == 20


def test_neighbours_in_the_order_are_far_apart() -> None:
    size = 10_000
    order = [permute(position, size, 0) for position in range(size)]
    steps = [abs(a - b) for a, b in itertools.pairwise(order)]
    assert 0.9 * size / 3 < sum(steps) / len(steps) < 1.1 * size / 3  # as of independent uniform numbers


@pytest.mark.parametrize("position", [-1, 10])
def test_a_position_outside_of_the_grid_is_refused(position: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.9"):
        permute(position, 10, 0)


@pytest.mark.parametrize("seed", [None, 0, 7])
def test_the_points_are_all_combinations(seed: int | None) -> None:
    grid = Grid(SPACE, seed)
    points = [tuple(grid.point(position).items()) for position in range(grid.size)]
    product = itertools.product(*([(name, v) for v in SPACE[name]] for name in SPACE))
    assert grid.size == 12
    assert {frozenset(point) for point in points} == {frozenset(point) for point in product}
    assert len({repr(sorted(point, key=str)) for point in points}) == 12


def test_without_a_seed_the_last_name_turns_fastest() -> None:
    grid = Grid({"b": [1, 2, 3], "a": ["u", "v"]}, None)
    points = [grid.point(position) for position in range(6)]
    assert [(p["a"], p["b"]) for p in points] == list(itertools.product("uv", [1, 2, 3]))


def test_a_huge_grid_is_made_at_once() -> None:
    grid = Grid({f"x{i:02}": range(1000) for i in range(20)}, 0)
    assert grid.size == 10**60
    points = [grid.point(position) for position in (0, 1, 10**12, grid.size - 1)]
    assert len({tuple(point.values()) for point in points}) == 4


@pytest.mark.parametrize(
    "other",
    [
        {"x": [1, 2], "y": ["a", "b"]},
        {"x": [1, 2.0], "y": ["a"]},
        {"x": [2, 1], "y": ["a"]},
        {"x": [1, 2], "y": [None]},
        {"x": [1, 2], "y": ["None"]},
        {"x": [True, 2], "y": ["a"]},
        {"x": ["1, 2"], "y": ["a"]},
        {"u": [1, 2], "y": ["a"]},
    ],
)
def test_another_grid_has_another_digest(other: dict[str, list[Any]]) -> None:
    digest = Grid({"x": [1, 2], "y": ["a"]}, 0).digest()
    assert Grid({"y": ["a"], "x": (1, 2)}, 0).digest() == digest
    assert Grid(other, 0).digest() != digest


def test_the_seed_and_the_rules_belong_to_the_digest() -> None:
    space = {"x": [1, 2]}
    digests = [Grid(space, seed).digest(*rules) for seed in (None, 0, 1) for rules in [(), (3,), (None,)]]
    assert len(set(digests)) == 9


def test_a_float_of_numpy_is_a_float() -> None:
    assert Grid({"x": list(np.arange(3) * 0.5)}, 0).digest() == Grid({"x": [0.0, 0.5, 1.0]}, 0).digest()


@pytest.mark.parametrize(
    ("space", "words"),
    [
        ({}, "no parameter"),
        ({"x": []}, "no values"),
        ({"x": [1, 2, 1]}, "twice"),
        ({"x": [float("nan"), float("nan")]}, "twice"),
        ({"x": [1, (2, 3)]}, "tuple"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(space: dict[str, Sequence[Any]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Grid(space, 0)
