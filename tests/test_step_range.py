"""step_range: exact values, everything refused that would not be a grid, and Optuna's GridSampler over it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import optuna
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from optuna_dlock import step_range
from optuna_dlock.step_range import MOST_VALUES

# Decimals as people write them in a search space: up to 6 digits, with up to 6 of them behind the point.
_literals = st.builds(
    lambda digits, places: float(f"{digits}e-{places}"), st.integers(-999_999, 999_999), st.integers(0, 6)
)
_finite = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize(
    ("arguments", "values"),
    [
        ((0.1, 0.5, 0.1), [0.1, 0.2, 0.3, 0.4, 0.5]),
        ((0, 1, 0.1), [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]),
        ((1e-5, 5e-5, 1e-5), [1e-5, 2e-5, 3e-5, 4e-5, 5e-5]),
        ((2, 10, 2), [2, 4, 6, 8, 10]),
        ((2, 9, 3), [2, 5, 8]),
        ((0.0, 1.0, 0.3), [0.0, 0.3, 0.6, 0.9]),
        ((10, 1, -3), [10, 7, 4, 1]),
        ((0.3, -0.3, -0.1), [0.3, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3]),
        ((5, 5, 1), [5]),
        ((5, 5, -0.5), [5.0]),
        ((1, 2, 7), [1]),
        ((-1.7e308, 1.7e308, 1.7e308), [-1.7e308, 0.0, 1.7e308]),
        ((2**70, 2**70 + 2, 1), [2**70, 2**70 + 1, 2**70 + 2]),
    ],
)
def test_the_values_are_those_one_would_write_down(arguments: Any, values: list[float]) -> None:
    given_back = step_range(*arguments)
    assert given_back == values
    assert [type(value) for value in given_back] == [type(value) for value in values]


def test_a_sum_of_floats_would_drift_and_this_does_not() -> None:
    total, summed = 0.0, []
    while total <= 100:
        summed.append(total)
        total += 0.1
    assert len(summed) != 1001 or summed[-1] != 100  # what the notes' function gives
    assert step_range(0, 100, 0.1) == [float(f"{i // 10}.{i % 10}") for i in range(1001)]


@given(start=_literals, step=_literals, count=st.integers(1, 200))
def test_each_value_is_the_float_nearest_to_the_exact_decimal(start: float, step: float, count: int) -> None:
    assume(step != 0)
    exact = [Decimal(repr(start)) + i * Decimal(repr(step)) for i in range(count)]
    assert step_range(start, float(exact[-1]), step) == [float(value) for value in exact]


@given(start=_finite, stop=_finite, parts=st.integers(1, 1000), down=st.booleans())
def test_it_starts_at_the_start_and_ends_within_a_step_of_the_stop(
    start: float, stop: float, parts: int, down: bool
) -> None:
    start, stop = sorted((start, stop), reverse=down)
    step = (stop / parts) - (start / parts)
    # A step that two neighbouring floats are larger than is refused; see below.
    assume(abs(step) > 4 * max(math.ulp(start), math.ulp(stop)))
    values = step_range(start, stop, step)
    assert values[0] == start
    assert all((one < two) != down for one, two in pairwise(values))
    assert values[-1] >= stop if down else values[-1] <= stop
    beyond = Fraction(repr(start)) + len(values) * Fraction(repr(step))
    assert beyond < Fraction(repr(stop)) if down else beyond > Fraction(repr(stop))


@given(
    start=st.integers(-(10**30), 10**30),
    count=st.integers(0, 300),
    step=st.integers(-(10**20), 10**20).filter(bool),
    rest=st.integers(0, 10**20),
)
def test_ints_are_those_of_range(start: int, count: int, step: int, rest: int) -> None:
    stop = start + count * step + (rest % abs(step)) * (1 if step > 0 else -1)
    values = step_range(start, stop, step)
    assert values == [start + i * step for i in range(count + 1)]
    assert {type(value) for value in values} == {int}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_a_numpy_float_means_what_it_shows(kind: Any) -> None:
    values = step_range(kind(0.1), kind(0.5), kind(0.1))
    assert values == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int64, np.uint64])
def test_numpy_ints_give_ints_and_do_not_wrap_around(kind: Any) -> None:
    values = step_range(kind(100), kind(120), kind(10))
    assert values == [100, 110, 120]
    assert {type(value) for value in values} == {int}
    assert step_range(np.uint8(2), np.uint8(0), -1) == [2, 1, 0]


@pytest.mark.parametrize("step", [0, 0.0, -0.0])
def test_a_step_of_zero_is_refused(step: float) -> None:
    with pytest.raises(ValueError, match="step is 0"):
        step_range(1, 2, step)


@pytest.mark.parametrize("arguments", [(0, 1, -0.1), (1, 0, 0.1), (5, 4, 1)])
def test_a_step_the_wrong_way_is_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match=r"leads away from the stop: from \d to \d"):
        step_range(*arguments)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, np.float32("nan")])
def test_what_is_not_finite_is_refused(bad: float, place: int) -> None:
    arguments = [1.0, 2.0, 0.5]
    arguments[place] = bad
    with pytest.raises(ValueError, match=f"{('start', 'stop', 'step')[place]} is a finite number"):
        step_range(*arguments)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [True, np.True_, "1", None, 1j, Decimal(1), [1]])
def test_what_is_no_number_is_refused(bad: Any, place: int) -> None:
    arguments: list[Any] = [1, 2, 1]
    arguments[place] = bad
    with pytest.raises(TypeError, match=f"{('start', 'stop', 'step')[place]} is an int or a float"):
        step_range(*arguments)


def test_too_many_values_are_refused_before_they_are_made() -> None:
    with pytest.raises(ValueError, match=f"the most is {MOST_VALUES}"):
        step_range(0, 1e300, 1e-300)
    with pytest.raises(ValueError, match=f"^{MOST_VALUES + 1} values"):
        step_range(0, MOST_VALUES, 1)


@pytest.mark.parametrize("arguments", [(1e16, 1e16 + 20, 0.5), (2**53, 2**53 + 4, 1.0)])
def test_a_step_that_floats_cannot_show_is_refused(arguments: Any) -> None:
    with pytest.raises(ValueError, match="too small"):
        step_range(*arguments)


def test_ints_beyond_all_floats_are_refused_as_floats() -> None:
    assert step_range(10**400, 10**400 + 1, 1) == [10**400, 10**400 + 1]
    with pytest.raises(ValueError, match="too large for a float"):
        step_range(10**400, 10**400 + 1, 1.0)


def test_optunas_grid_sampler_visits_each_point_once() -> None:
    space: dict[str, Sequence[float]] = {"depth": step_range(2, 6, 2), "rate": step_range(0.1, 0.3, 0.1)}

    def objective(trial: optuna.Trial) -> float:
        return trial.suggest_int("depth", 2, 6) + trial.suggest_float("rate", 0.1, 0.3)

    study = optuna.create_study(sampler=optuna.samplers.GridSampler(space))
    study.optimize(objective)
    points = sorted((trial.params["depth"], trial.params["rate"]) for trial in study.trials)
    assert points == [(depth, rate) for depth in (2, 4, 6) for rate in (0.1, 0.2, 0.3)]
