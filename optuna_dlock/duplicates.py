"""Equal parameters: their fingerprint, and what is known of a trial that repeats another. No I/O."""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.errors import NotSerializableError

_DIGEST_SIZE = 16  # bytes: two of 10**9 sets have the same digest with a probability of 10**-21
_DOUBLE = struct.Struct("<d")
_NOTED_STATES = ("COMPLETE", "RUNNING")


@dataclass(frozen=True)
class Duplicate:
    """A trial that has the parameters of another one, and left the training to it.

    Attributes:
        owner: Number of the other one.
        state: COMPLETE: its values were taken over. RUNNING: it was in training.
        values: The values that are taken over; only in the answer to a claim.
        host: Where the other one ran, as far as that was written beside the duplicate.
    """

    owner: int
    state: TrialState
    values: tuple[float, ...] | None = None
    host: str | None = None

    @property
    def value(self) -> float | list[float] | None:
        """What the objective has to return: the other trial's value or values, None if there are none yet."""
        if self.values is None:
            return None
        return self.values[0] if len(self.values) == 1 else list(self.values)


def fingerprint(params: Iterable[tuple[str, BaseDistribution, float]], extra: Any = None) -> bytes:
    """A digest that two sets of parameters share if and only if they are the same.

    Of each parameter it takes the name, the kind of distribution, of a categorical one the choices too, and
    all 8 bytes of the internal representation. So 1 and 1.0 and True differ, an absent parameter differs from
    any present one, and the bounds of a range do not matter. 0.0 and -0.0 are one value, as they are for
    Python and Optuna. NaN cannot be suggested; should one get here, it equals itself, or it would be trained
    again each time.

    Args:
        params: Name, distribution and internal representation, in any order.
        extra: Anything else that the result depends on and JSON can express; None is nothing.

    Raises:
        NotSerializableError: If `extra` is not JSON.
    """
    chosen = sorted(params, key=lambda param: param[0])
    digest = hashlib.blake2b(struct.pack("<I", len(chosen)), digest_size=_DIGEST_SIZE)
    for name, distribution, value in chosen:
        for text in (name, _kind(distribution)):
            encoded = text.encode("utf-8", "surrogatepass")
            digest.update(struct.pack("<I", len(encoded)) + encoded)
        digest.update(_DOUBLE.pack(_one_of_equals(value)))
    if extra is not None:
        digest.update(_sorted_json(extra).encode())
    return digest.digest()


def _kind(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return json.dumps(distribution.choices)
    return type(distribution).__name__


def _one_of_equals(value: float) -> float:
    if math.isnan(value):
        return math.nan
    return value + 0.0  # -0.0 becomes 0.0


def _sorted_json(extra: Any) -> str:
    try:
        return json.dumps(extra, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise NotSerializableError(
            f"extra={extra!r} is not JSON serializable: {error}", key="extra"
        ) from error


# -- what is written down --------------------------------------------------------------------------------


def read_duplicates(fields: Iterable[tuple[bytes, bytes]]) -> dict[int, Duplicate]:
    """What `claim_params.lua` has noted, by number of the duplicate.

    Raises:
        ValueError: If it is something else.
    """
    found = {}
    for number, noted in fields:
        owner, _, state = noted.decode().partition(" ")
        found[int(number)] = Duplicate(int(owner), TrialState[state])
    return found


def duplicate_of(trial: FrozenTrial, recorded: Mapping[int, Duplicate]) -> Duplicate | None:
    """Whom a trial duplicates, None if it was trained itself.

    Data from before this package is understood too, where objectives wrote by hand the user attribute `HOST`:
    `{"host": own host, "msg": "COMPLETE" | "RUNNING" | None, "number": of the other trial, "HOST_s": its
    host}`.

    Args:
        trial: A trial of any storage.
        recorded: What `RedisLockedStorage.get_duplicates` gives for its study; else an empty dict.
    """
    found = recorded.get(trial.number)
    if found is not None:
        return found
    noted = trial.user_attrs.get("HOST")
    if not isinstance(noted, Mapping):
        return None
    state, owner, host = noted.get("msg"), noted.get("number"), noted.get("HOST_s")
    if state not in _NOTED_STATES or type(owner) is not int:
        return None
    return Duplicate(owner, TrialState[state], host=host if isinstance(host, str) and host else None)
