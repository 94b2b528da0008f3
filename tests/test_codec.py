"""Records: what goes in comes out, and damage is seen."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock import codec
from optuna_dlock.distributions import DistributionTable, kind_of, lookup_key, to_text
from optuna_dlock.errors import NotSerializableError

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "float": FloatDistribution(-1e300, 1e300),
    "log": FloatDistribution(1e-9, 1.0, log=True),
    "step": FloatDistribution(0.0, 1.0, step=0.1),
    "int": IntDistribution(-(10**6), 10**6),
    "int step": IntDistribution(0, 100, step=5),
    "choice": CategoricalDistribution((None, True, 1.5, "ä", 2)),
    "": CategoricalDistribution(("", "\0")),
}
NAMES = list(DISTRIBUTIONS)
FLOATS = st.floats(allow_nan=True, allow_infinity=True)
TIMES = st.none() | st.datetimes(datetime(1980, 1, 1), datetime(2300, 1, 1)).map(lambda t: t.replace(hour=12))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
ATTRS = st.dictionaries(st.text(), JSON, max_size=3)


@pytest.fixture(scope="module")
def table() -> DistributionTable:
    table = DistributionTable()
    table.extend([to_text(name, d).encode() for name, d in DISTRIBUTIONS.items()])
    return table


def _internal(name: str, number: int) -> float:
    distribution = DISTRIBUTIONS[name]
    if isinstance(distribution, CategoricalDistribution):
        return float(number % len(distribution.choices))
    return float(number % 100)


def _same(one: Any, other: Any) -> bool:
    """Equality that takes NaN as equal to NaN, and tells -0.0 from 0.0."""
    return repr(one) == repr(other)


@given(
    state=st.sampled_from(TrialState),
    values=st.none() | st.lists(FLOATS, max_size=3),
    names=st.lists(st.sampled_from(NAMES), unique=True),
    number=st.integers(0, 10**6),
    steps=st.dictionaries(st.integers(-(2**80), 2**80), FLOATS, max_size=5),
    user_attrs=ATTRS,
    system_attrs=ATTRS,
    start=TIMES,
    end=TIMES,
)
def test_a_trial_comes_back_as_it_was(
    table: DistributionTable,
    state: TrialState,
    values: list[float] | None,
    names: list[str],
    number: int,
    steps: dict[int, float],
    user_attrs: dict[str, Any],
    system_attrs: dict[str, Any],
    start: datetime | None,
    end: datetime | None,
) -> None:
    params = [(NAMES.index(name), _internal(name, number)) for name in names]
    record = codec.pack_trial(state, values, params, steps, user_attrs, system_attrs, start, end, b"12345678")
    trial = codec.unpack_trial(record, number, 2**32 + number, table)
    assert (trial.number, trial._trial_id, trial.state) == (number, 2**32 + number, state)
    assert _same(trial.values, values)
    assert _same(trial.intermediate_values, steps)
    assert (trial.datetime_start, trial.datetime_complete) == (start, end)
    assert _same(trial.user_attrs, user_attrs)
    assert _same(trial.system_attrs, system_attrs)
    assert list(trial.params) == names
    for name, (_, value) in zip(names, params, strict=True):
        assert _same(trial.params[name], DISTRIBUTIONS[name].to_external_repr(value))
        assert trial.distributions[name] == DISTRIBUTIONS[name]
    assert codec.state_of(record) is state


def _record(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "state": TrialState.COMPLETE,
        "values": [0.5],
        "params": [(0, 1.0), (3, 7.0)],
        "intermediate_values": {},
        "user_attrs": {"key": [1, None]},
        "system_attrs": {},
        "datetime_start": datetime(2026, 11, 23, 18, 0, 0, 1),
        "datetime_complete": datetime(2026, 11, 23, 18, 0, 1, 999_999),
    }
    return codec.pack_trial(**fields | changes)


@pytest.mark.parametrize("steps", [{}, {1: 2.0}], ids=["no steps", "steps"])
def test_a_truncated_record_is_seen_wherever_it_ends(
    table: DistributionTable, steps: dict[int, float]
) -> None:
    record = _record(intermediate_values=steps)
    codec.unpack_trial(record, 0, 0, table)
    attrs = record.index(b"{")
    for length in range(len(record)):
        if length == attrs:
            continue  # a whole record of a trial without attributes
        with pytest.raises(ValueError, match=r"."):
            codec.unpack_trial(record[:length], 0, 0, table)


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"garbage that is long enough to hold a head and more",
        bytes([codec.RECORD_FORMAT + 1]) + _record()[1:],
        _record()[:1] + b"\x09" + _record()[2:],
        _record(params=[(99, 1.0)]),
        _record() + b"}",
    ],
    ids=["empty", "garbage", "format", "state", "unknown distribution", "attributes"],
)
def test_a_record_that_makes_no_sense_is_seen(table: DistributionTable, record: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        codec.unpack_trial(record, 0, 0, table)


def test_the_fast_way_to_a_frozen_trial_gives_what_its_constructor_gives() -> None:
    now = datetime.now()
    arguments: tuple[Any, ...] = (
        *(3, 4, TrialState.COMPLETE, [1.0], now, now + timedelta(seconds=1)),
        *({"x": 1.0}, {"x": FloatDistribution(0, 1)}, {"u": 1}, {"s": 2}, {0: 0.5}),
    )
    fast, slow = codec._make_frozen_directly(*arguments), codec._make_frozen_by_init(*arguments)
    assert type(fast) is FrozenTrial
    assert fast == slow
    assert vars(fast) == vars(slow)
    assert codec.make_frozen is codec._make_frozen_directly  # on every Optuna that CI tries


def test_equal_distributions_of_a_table_are_one_object(table: DistributionTable) -> None:
    one, other = (codec.unpack_trial(_record(), number, number, table) for number in range(2))
    assert one.distributions["float"] is other.distributions["float"]
    assert one.distributions is not other.distributions


def test_every_record_with_a_token_of_its_own_differs() -> None:
    assert _record(token=b"aaaaaaaa") != _record(token=b"bbbbbbbb")


def test_an_attribute_that_is_no_json_is_named() -> None:
    with pytest.raises(NotSerializableError, match="'loss'") as caught:
        codec.dump_json({1, 2}, "loss")
    assert caught.value.key == "loss"


@pytest.mark.parametrize(
    "pair",
    [
        (CategoricalDistribution((1, 2)), CategoricalDistribution((True, 2))),
        (CategoricalDistribution((1, 2)), CategoricalDistribution((1.0, 2))),
        (FloatDistribution(0, 1), FloatDistribution(0, 2)),
        (IntDistribution(0, 1), FloatDistribution(0, 1)),
        (FloatDistribution(1, 2), FloatDistribution(1, 2, log=True)),
    ],
)
def test_distributions_that_differ_have_ids_of_their_own(
    pair: tuple[BaseDistribution, BaseDistribution],
) -> None:
    assert lookup_key("x", pair[0]) != lookup_key("x", pair[1])
    assert to_text("x", pair[0]) != to_text("x", pair[1])


def test_the_kind_of_a_distribution_is_what_optuna_keeps_per_name() -> None:
    assert kind_of(FloatDistribution(0, 1)) == kind_of(FloatDistribution(5, 9, step=2))
    assert kind_of(FloatDistribution(1, 2)) != kind_of(FloatDistribution(1, 2, log=True))
    assert kind_of(FloatDistribution(1, 2)) != kind_of(IntDistribution(1, 2))
    assert kind_of(CategoricalDistribution((1, 2))) != kind_of(CategoricalDistribution((2, 1)))
