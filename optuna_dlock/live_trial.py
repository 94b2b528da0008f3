"""An unfinished trial as this process knows it: what was written so far, and which version that is."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.codec import RawTrial, make_frozen, pack_trial, state_of, unpack_param, unpack_value
from optuna_dlock.codec import load_json as load_json_of
from optuna_dlock.distributions import DistributionTable
from optuna_dlock.errors import CorruptRecordError

# Fields of a trial's hash: a kind, then the name or step. Those with a dot are the server's own.
BASE = ".b"
PARAM, STEP, USER_ATTR, SYSTEM_ATTR = "p", "i", "u", "s"


class LiveTrial:
    """An unfinished trial; snapshots of it are immutable, it itself changes with every write.

    Attributes:
        version: Number of writes since creation, by all processes; the server counts the same.
        owned: Whether this process created or claimed it: then writes need not wait.
        fresh: The round trip that created or claimed it; `get_trial` asks nobody until the next one.
        stale: Whether a reply told that the server has more than this: it has to be fetched again.
        head: The first part of the command that writes to it, once made.
        refusal: What the server said to a deferred write, to be raised by the next call on the trial.
    """

    __slots__ = (
        *("datetime_start", "distributions", "fresh", "internal", "intermediate_values", "number"),
        *("owned", "params", "refusal", "stale", "state", "system_attrs", "trial_id", "user_attrs"),
        *("_frozen", "_undecoded", "head", "values", "version"),
    )

    def __init__(
        self, number: int, trial_id: int, state: TrialState, datetime_start: datetime | None
    ) -> None:
        self.number = number
        self.trial_id = trial_id
        self.state = state
        self.datetime_start = datetime_start
        self.values: list[float] | None = None
        self.params: dict[str, Any] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        self.internal: dict[str, tuple[int, float]] = {}
        self.intermediate_values: dict[int, float] = {}
        self.user_attrs: dict[str, Any] = {}
        self.system_attrs: dict[str, Any] = {}
        self.version = 0
        self.head: Any = None
        self.owned = False
        self.fresh = 0
        self.stale = False
        self.refusal: Exception | None = None
        self._frozen: FrozenTrial | None = None
        self._undecoded: tuple[bytes, DistributionTable] | None = None

    @classmethod
    def from_record(
        cls, record: bytes, number: int, trial_id: int, version: int, table: DistributionTable
    ) -> LiveTrial:
        """The trial that a record of an unfinished trial describes; decoded when somebody asks for more
        than its state."""
        try:
            state = state_of(record)
        except ValueError as error:
            raise _unreadable(number, error) from error
        trial = cls(number, trial_id, state, None)
        trial._undecoded = record, table
        trial.version = version
        return trial

    def load(self) -> None:
        """Decode the record, if that was not done yet."""
        if self._undecoded is None:
            return
        (record, table), self._undecoded = self._undecoded, None
        try:
            raw = RawTrial(record)
            for identity, x in zip(raw.ids, raw.numbers, strict=True):
                self._set_param(identity, x, table)
        except (ValueError, IndexError, struct.error) as error:
            self._undecoded = record, table
            raise _unreadable(self.number, error) from error
        self.datetime_start = raw.start
        self.values = raw.values
        self.intermediate_values = raw.steps
        self.user_attrs = raw.rest.get("u", {})
        self.system_attrs = raw.rest.get("s", {})

    def move(
        self, state: TrialState, values: list[float] | None, start: datetime | None, version: int
    ) -> None:
        """Note that the trial was claimed or put back in the queue."""
        self.state = state
        self.values = values
        self.datetime_start = start
        self.version = version
        self._frozen = None

    def set_param(self, name: str, identity: int, value: float, distribution: BaseDistribution) -> None:
        """Note a parameter, in its internal representation."""
        self.internal[name] = (identity, value)
        self.params[name] = distribution.to_external_repr(value)
        self.distributions[name] = distribution
        self._frozen = None

    def position(self, name: str) -> int:
        """The place of a parameter, known or next, in the order in which they were suggested."""
        return list(self.internal).index(name) if name in self.internal else len(self.internal)

    def _set_param(self, identity: int, value: float, table: DistributionTable) -> None:
        name, distribution = table.entry(identity)
        self.set_param(name, identity, value, distribution)

    def set_step(self, step: int, value: float) -> None:
        """Note an intermediate value."""
        self.intermediate_values[step] = value
        self._frozen = None

    def set_user_attr(self, key: str, value: Any) -> None:
        """Note a user attribute."""
        self.user_attrs[key] = value
        self._frozen = None

    def set_system_attr(self, key: str, value: Any) -> None:
        """Note a system attribute."""
        self.system_attrs[key] = value
        self._frozen = None

    def apply(self, field: str, data: bytes, table: DistributionTable) -> None:
        """Note a field as it stands in the log or in the trial's hash; others than ours are passed over."""
        self.load()
        kind, rest = field[0], field[1:]
        try:
            if kind == PARAM:
                self._set_param(*unpack_param(data)[:2], table)
            elif kind == STEP:
                self.set_step(int(rest), unpack_value(data))
            elif kind == USER_ATTR:
                self.set_user_attr(rest, load_json_of(data, rest))
            elif kind == SYSTEM_ATTR:
                self.set_system_attr(rest, load_json_of(data, rest))
        except (ValueError, IndexError, struct.error) as error:
            raise _unreadable(self.number, error) from error

    def apply_all(self, fields: Sequence[bytes], table: DistributionTable) -> None:
        """Note a whole hash: field, value, field, value, ... in whatever order the server keeps them."""
        params: list[tuple[int, str, bytes]] = []
        for field, data in zip(fields[::2], fields[1::2], strict=True):
            if field == b".v":
                self.version = int(data)
            elif not field.startswith(b"."):
                name = field.decode("utf-8", "surrogatepass")
                if name[0] == PARAM:
                    try:
                        params.append((unpack_param(data)[2], name, data))
                    except struct.error as error:
                        raise _unreadable(self.number, error) from error
                else:
                    self.apply(name, data, table)
        for _, name, data in sorted(params):
            self.apply(name, data, table)

    def freeze(self) -> FrozenTrial:
        """The trial as it is now; later writes do not change what is returned."""
        if self._frozen is None:
            self.load()
            self._frozen = make_frozen(
                self.number,
                self.trial_id,
                self.state,
                self.values,
                self.datetime_start,
                None,
                self.params.copy(),
                self.distributions.copy(),
                self.user_attrs.copy(),
                self.system_attrs.copy(),
                self.intermediate_values.copy(),
            )
        return self._frozen

    def finished(
        self, state: TrialState, values: Sequence[float] | None, end: datetime | None
    ) -> FrozenTrial:
        """The trial as it is once it ended; from then on it owns what was written."""
        return make_frozen(
            self.number,
            self.trial_id,
            state,
            self.new_values(values),
            self.datetime_start,
            end,
            self.params,
            self.distributions,
            self.user_attrs,
            self.system_attrs,
            self.intermediate_values,
        )

    def pack(
        self,
        state: TrialState,
        values: Sequence[float] | None,
        start: datetime | None,
        end: datetime | None,
        token: bytes,
    ) -> bytes:
        """The record of the trial in another state."""
        return pack_trial(
            state,
            self.new_values(values),
            self.internal.values(),
            self.intermediate_values,
            self.user_attrs,
            self.system_attrs,
            start,
            end,
            token,
        )

    def new_values(self, values: Sequence[float] | None) -> list[float] | None:
        """The objective values once these were set; None leaves them."""
        return self.values if values is None else [float(value) for value in values]


def _unreadable(number: int, error: Exception) -> CorruptRecordError:
    return CorruptRecordError(f"unfinished trial {number} is unreadable: {error}", key=f"live[{number}]")
