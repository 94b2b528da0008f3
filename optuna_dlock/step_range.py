"""`step_range`: the values of a grid from a start, a stop and a step, without drift."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, SupportsFloat, SupportsIndex, overload

MOST_VALUES = 1_000_000


@overload
def step_range(start: SupportsIndex, stop: SupportsIndex, step: SupportsIndex) -> list[int]: ...
@overload
def step_range(start: SupportsFloat, stop: SupportsFloat, step: SupportsFloat) -> list[float]: ...
def step_range(start: Any, stop: Any, step: Any) -> list[int] | list[float]:
    """List `start`, `start + step`, ... up to `stop`, which is included.

    Each value is computed on its own, in exact arithmetic on the numbers as they are written: `0.1` means one
    tenth, so that `step_range(0, 1, 0.1)` has 0.3 and not 0.30000000000000004. Three ints give ints; with a
    float among them, all values are floats. A stop that is not hit exactly is not in the list: the last value
    is the last one before it. A negative step counts down.

    Example:
        >>> step_range(0.1, 0.5, 0.1)
        [0.1, 0.2, 0.3, 0.4, 0.5]
        >>> optuna.samplers.GridSampler({"depth": step_range(2, 10, 2), "rate": step_range(0.01, 0.1, 0.01)})

    Args:
        start: First value.
        stop: Bound of the values: the last one does not go past it.
        step: Distance between two values; below 0 if `stop` is below `start`.

    Returns:
        The values, in order, all different, at least one. Numpy's scalars go in, Python's numbers come out.

    Raises:
        TypeError: If an argument is no int or float, or is a bool.
        ValueError: If an argument is infinite or NaN, the step is 0, leads away from `stop` or is too small
            to tell two floats apart, or there would be more than 1 000 000 values.
    """
    first, last, distance = (
        _exact(name, number) for name, number in (("start", start), ("stop", stop), ("step", step))
    )
    if distance == 0:
        raise ValueError("step is 0: the stop would never be reached")
    if (last - first) * distance < 0:
        raise ValueError(f"a step of {step} leads away from the stop: from {start} to {stop}")
    count = (last - first) // distance + 1
    if count > MOST_VALUES:
        raise ValueError(f"{count} values from {start} to {stop} by {step}: the most is {MOST_VALUES}")
    values = [first + i * distance for i in range(count)]
    if all(isinstance(number, Integral) for number in (start, stop, step)):
        return [int(value) for value in values]
    try:
        floats = [float(value) for value in values]
    except OverflowError:
        raise ValueError(f"values from {start} to {stop} are too large for a float") from None
    # Rounding keeps the order, so values that are equal stand side by side.
    if any(one == two for one, two in pairwise(floats)):
        raise ValueError(f"a step of {step} is too small: some floats from {start} to {stop} would be equal")
    return floats


def _exact(name: str, number: Any) -> Fraction:
    """The number as it is written: the shortest decimal that reads back as this float."""
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"{name} is an int or a float, not {number!r}")
    if isinstance(number, Integral):
        return Fraction(int(number))
    if not math.isfinite(number):
        raise ValueError(f"{name} is a finite number, not {number!r}")
    # A numpy float32 of 0.1 means one tenth, too: its own `str` says so, that of float(number) does not.
    return Fraction(str(number))
