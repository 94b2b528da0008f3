"""A grid whose points are computed from their index, in an order that is never written down. Pure."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Union

GridValue = Union[str, float, int, bool, None]  # noqa: UP007 evaluated at run time, as Optuna's GridValueType

_ROUNDS = 4  # enough for a pseudo-random permutation: Luby and Rackoff, SIAM J. Comput. 17 (1988)


class Grid:
    """All combinations of some values of some parameters, in an order that a seed decides.

    Position -> index is a permutation, index -> values is a number in mixed radix: a grid of 10^12 points
    costs as little as one of ten.

    Args:
        search_space: Parameter -> its values.
        seed: Of the order; None for the order of an odometer, the last name (alphabetically) turning fastest.

    Raises:
        ValueError: If there is no parameter, one has no values or the same one twice, or a value is no
            str, float, int, bool or None.
    """

    def __init__(self, search_space: Mapping[str, Sequence[GridValue]], seed: int | None) -> None:
        if not search_space:
            raise ValueError("the search space has no parameter")
        self.search_space = {name: _checked(name, search_space[name]) for name in sorted(search_space)}
        self.size = math.prod(len(values) for values in self.search_space.values())
        self.seed = seed

    def digest(self, *rules: object) -> str:
        """What two grids, and what else they have to agree on, have in common only if they are the same."""
        text = json.dumps(
            [
                [[name, [_canonical(v) for v in values]] for name, values in self.search_space.items()],
                self.seed,
                *rules,
            ]
        )
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def point(self, position: int) -> dict[str, GridValue]:
        """The values of the parameters at a position 0..size-1 of the order."""
        index = position if self.seed is None else permute(position, self.size, self.seed)
        point = {}
        for name, values in reversed(self.search_space.items()):
            index, digit = divmod(index, len(values))
            point[name] = values[digit]
        return point


def permute(position: int, size: int, seed: int) -> int:
    """A pseudo-random permutation of 0..size-1, one element at a time.

    A balanced Feistel network on the smallest even number of bits, walked until it is back below `size`
    ("cycle walking": Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).

    Raises:
        ValueError: If the position is none of 0..size-1.
    """
    if not 0 <= position < size:
        raise ValueError(f"the grid has positions 0..{size - 1}, not {position}")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, width = (1 << half) - 1, (half + 7) // 8
    key = str(seed).encode()
    while True:
        left, right = position >> half, position & mask
        for number in range(_ROUNDS):
            word = b"%d:%s:%s" % (number, key, right.to_bytes(width, "big"))
            mixed = int.from_bytes(hashlib.blake2b(word, digest_size=width).digest(), "big")
            left, right = right, left ^ (mixed & mask)
        position = left << half | right
        if position < size:
            return position


def _checked(name: str, values: Sequence[GridValue]) -> list[GridValue]:
    for value in values:
        if value is not None and not isinstance(value, (str, int, float, bool)):
            raise ValueError(
                f"{name} contains {value!r} of type {type(value).__name__}; "
                "a value is a str, float, int, bool or None"
            )
    texts = [_canonical(value) for value in values]
    if not values or len(set(texts)) != len(texts):
        raise ValueError(f"{name} has {'the same value twice' if values else 'no values'}: {list(values)!r}")
    return list(values)


def _canonical(value: GridValue) -> str:
    """One text for one value: numpy's floats are floats, 1 and 1.0 and True are three values."""
    if isinstance(value, float):
        return f"float {float(value)!r}"
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return f"{type(value).__name__} {value}"
    return f"int {int(value)}"
