"""Distributions of a study: stored once, referred to by small integers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from optuna_dlock.errors import NotSerializableError


class Schema:
    """Names and distributions that many trials share.

    Attributes:
        plain: True if the internal representation of every value is the value itself.
    """

    __slots__ = ("distributions", "names", "plain", "to_external")

    def __init__(self, entries: Sequence[tuple[str, BaseDistribution]]) -> None:
        self.names = tuple(name for name, _ in entries)
        self.distributions = dict(entries)
        self.plain = all(type(distribution) is FloatDistribution for _, distribution in entries)
        self.to_external: tuple[Callable[[float], Any], ...] = tuple(
            int if type(distribution) is IntDistribution else distribution.to_external_repr
            for _, distribution in entries
        )


class DistributionTable:
    """The distributions of one study, by id, as far as this process knows them. No I/O."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, BaseDistribution]] = []
        self._ids: dict[Hashable, int] = {}
        self.schemas: dict[bytes, Schema] = {}
        # Ids by lookup_key, of distributions that are known to be of the kind their name must keep.
        self.claimed: dict[Hashable, int] = {}
        self.kinds: dict[str, str] = {}  # parameter name -> kind it must keep, as far as known

    def __len__(self) -> int:
        return len(self._entries)

    def extend(self, texts: Sequence[bytes]) -> None:
        """Add the distributions that follow those known, as the server stores them."""
        for text in texts:
            name, distribution_json = json.loads(text)
            distribution = json_to_distribution(distribution_json)
            self._ids[lookup_key(name, distribution)] = len(self._entries)
            self._entries.append((name, distribution))

    def entry(self, identity: int) -> tuple[str, BaseDistribution]:
        """Name and distribution of an id; IndexError if it is not known."""
        return self._entries[identity]

    def find(self, name: str, distribution: BaseDistribution) -> int | None:
        """Id of a distribution of a parameter, None if it is not known yet."""
        return self._ids.get(lookup_key(name, distribution))

    def schema(self, ids: bytes) -> Schema:
        """The schema of trials whose packed ids are these."""
        identities = struct.unpack(f"<{len(ids) // 4}I", ids)
        schema = self.schemas[ids] = Schema([self._entries[identity] for identity in identities])
        return schema

    def known_of_kind(self, name: str, kind: str) -> BaseDistribution | None:
        """Some known distribution of this name and kind."""
        for known, distribution in self._entries:
            if known == name and kind_of(distribution) == kind:
                return distribution
        return None


def lookup_key(name: str, distribution: BaseDistribution) -> Hashable:
    """A key that tells distributions apart as their JSON does (1, 1.0 and True are different choices)."""
    d: Any = distribution
    kind = type(d)
    if kind is FloatDistribution or kind is IntDistribution:
        return name, kind, d.low, d.high, d.log, d.step
    if kind is CategoricalDistribution:
        return name, kind, d.choices, tuple(map(type, d.choices))
    return name, distribution_to_json(distribution)


def to_text(name: str, distribution: BaseDistribution) -> str:
    """A parameter's distribution as the server stores it.

    Raises:
        NotSerializableError: If a choice is not JSON.
    """
    try:
        return json.dumps([name, distribution_to_json(distribution)])
    except TypeError as error:
        raise NotSerializableError(
            f"parameter {name!r} has a choice that is not JSON serializable: {error}", key=name
        ) from error


def kind_of(distribution: BaseDistribution) -> str:
    """What must not change between the distributions of one name in a study.

    The same rule as `optuna.distributions.check_distribution_compatibility`, as a text that the server
    can compare.
    """
    kind = type(distribution).__name__
    if isinstance(distribution, CategoricalDistribution):
        return kind + json.dumps(distribution.choices)
    if isinstance(distribution, (FloatDistribution, IntDistribution)) and distribution.log:
        return kind + "(log)"
    return kind
