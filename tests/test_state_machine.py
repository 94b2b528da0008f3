"""Two of our storages on one server against Optuna's InMemoryStorage: the same calls, the same answers."""

from __future__ import annotations

import itertools
import math
import pickle
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any, cast

import fakeredis
import optuna
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import UpdateFinishedTrialError
from tests.servers import Server

MINIMIZE, MAXIMIZE = StudyDirection.MINIMIZE, StudyDirection.MAXIMIZE
_NEAR = timedelta(seconds=30)
_prefixes = (f"m{n}" for n in itertools.count())

# -- what is drawn ---------------------------------------------------------------------------------

_DISTRIBUTIONS: list[BaseDistribution] = [
    FloatDistribution(-1.0, 2.0),
    FloatDistribution(-1.0, 3.0),
    FloatDistribution(1e-5, 1.0, log=True),
    FloatDistribution(0.0, 1.0, step=0.25),
    IntDistribution(0, 10),
    IntDistribution(0, 10, step=5),
    IntDistribution(1, 2**40, log=True),
    IntDistribution(3, 3),
    CategoricalDistribution((None, True, "a", 2.5, 7)),
    CategoricalDistribution((True, False)),
    CategoricalDistribution((1, 0)),
    CategoricalDistribution(("", "ünïcode 🎉", "x" * 100)),
    CategoricalDistribution((math.nan, math.inf, 0.0)),
]
_names = st.sampled_from(["x", "y", "", "ünï🎉", "a:b{c}\n", "\ud800"])
_text = st.text(max_size=5)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(2**100) | st.floats() | _text | st.just("x" * 2000),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_text, inner, max_size=3),
    max_leaves=5,
)
_steps = st.sampled_from([0, 1, 2, 100, -1, 2**70])
_reports = st.floats(width=64)
_objectives = st.sampled_from([0.0, 1.0, -1.5, 2.0]) | st.floats(allow_nan=False)
_states = st.sampled_from(list(TrialState))
_times = st.datetimes(datetime(1971, 1, 1), datetime(2500, 1, 1))
_picks = st.integers(0, 50)
_directions = st.sampled_from([[MINIMIZE], [MINIMIZE], [MAXIMIZE], [MINIMIZE, MAXIMIZE]])
_who = st.sampled_from([0, 0, 1])


@st.composite
def _params(draw: st.DrawFn) -> tuple[BaseDistribution, Any]:
    """A distribution and a value it contains."""
    d = draw(st.sampled_from(_DISTRIBUTIONS))
    if isinstance(d, CategoricalDistribution):
        return d, draw(st.sampled_from(d.choices))
    assert isinstance(d, (FloatDistribution, IntDistribution))
    if d.step is not None and isinstance(d, FloatDistribution):
        return d, d.low + d.step * draw(st.integers(0, round((d.high - d.low) / d.step)))
    if isinstance(d, IntDistribution):
        return d, d.low + d.step * draw(st.integers(0, (d.high - d.low) // d.step))
    return d, draw(st.floats(d.low, d.high))


@st.composite
def _templates(draw: st.DrawFn, n_objectives: int) -> FrozenTrial:
    """A trial of any state, with anything in it."""
    state = draw(_states)
    values = draw(st.lists(_objectives, min_size=n_objectives, max_size=n_objectives))
    drawn = draw(st.dictionaries(_names, _params(), max_size=3))
    trial = create_trial(
        state=state,
        values=values if state is TrialState.COMPLETE else None,
        params={name: value for name, (_, value) in drawn.items()},
        distributions={name: distribution for name, (distribution, _) in drawn.items()},
        user_attrs=draw(st.dictionaries(_names, _json, max_size=2)),
        system_attrs=draw(st.dictionaries(_names, _json, max_size=2)),
        intermediate_values=draw(st.dictionaries(_steps, _reports, max_size=3)),
    )
    trial.datetime_start = None if state is TrialState.WAITING else draw(_times)
    trial.datetime_complete = draw(_times) if state.is_finished() else None
    return trial


# -- how answers are compared ----------------------------------------------------------------------


def _typed(value: Any) -> Any:
    """A form in which 1, 1.0 and True differ and NaN equals itself."""
    if isinstance(value, dict):
        return {key: _typed(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_typed(item) for item in value]
    return type(value).__name__, repr(value)


class _Answer:
    """What a call returned or raised."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.error: type[Exception] | None = None
        self.value: Any = None
        try:
            self.value = call()
        except Exception as error:
            kinds = (UpdateFinishedTrialError, DuplicatedStudyError, KeyError, ValueError, RuntimeError)
            self.error = next((kind for kind in kinds if isinstance(error, kind)), type(error))
            self.raised = error


class _Study:
    def __init__(self, model_id: int, real_id: int, n_objectives: int) -> None:
        self.model_id = model_id
        self.real_id = real_id
        self.n_objectives = n_objectives
        self.trials: list[tuple[int, int]] = []  # ids in the model and for real, by number
        self.deleted = False


def _known_finished(expected: _Answer, found: _Answer) -> bool:
    """An object that knows a trial to be finished says so at once, even if the study was deleted since."""
    return expected.error is KeyError and found.error is UpdateFinishedTrialError


class StorageMachine(RuleBasedStateMachine):
    """Calls go to the model and to either of two storages; all three must agree."""

    def __init__(self, make: Callable[[str], RedisLockedStorage], count_keys: Callable[[str], int]) -> None:
        super().__init__()
        self.prefix = next(_prefixes)
        self.model = InMemoryStorage()
        self.make = make
        self.count_keys = count_keys
        self.storages = [make(self.prefix), make(self.prefix)]
        self.studies: list[_Study] = []
        self.times: set[datetime] = set()
        self.agree_each_step = False

    def teardown(self) -> None:
        try:
            self.compare_all()
            for study in self.studies:
                if not study.deleted:
                    self.storages[0].delete_study(study.real_id)
            assert self.count_keys(self.prefix) <= 1, "deleted studies leave keys behind"
        finally:
            for storage in self.storages:
                storage.close()

    # -- comparing ---------------------------------------------------------------------------------

    def both(self, model: Callable[[], Any], real: Callable[[], Any]) -> tuple[_Answer, _Answer]:
        expected, found = _Answer(model), _Answer(real)
        if expected.error is not found.error and not _known_finished(expected, found):
            problem = getattr(found, "raised", None)
            message = f"expected {expected.error}, got {problem!r} ({found.value!r})"
            raise AssertionError(message) from problem
        return expected, found

    def same(self, model: Callable[[], Any], real: Callable[[], Any]) -> None:
        expected, found = self.both(model, real)
        assert _typed(found.value) == _typed(expected.value)

    def assert_same_trial(self, expected: FrozenTrial, found: FrozenTrial, real_id: int) -> None:
        assert found._trial_id == real_id
        assert found.number == expected.number
        assert found.state is expected.state
        for name in ("values", "params", "intermediate_values", "user_attrs", "system_attrs"):
            assert _typed(getattr(found, name)) == _typed(getattr(expected, name)), name
        assert found.distributions == expected.distributions
        assert list(found.params) == list(found.distributions)
        for name in ("datetime_start", "datetime_complete"):
            then, now = getattr(expected, name), getattr(found, name)
            if then is None or then in self.times:
                assert now == then, name
            else:
                assert abs(now - then) < _NEAR, name

    def assert_same_trials(
        self, study: _Study, expected: list[FrozenTrial], found: list[FrozenTrial]
    ) -> None:
        assert [t.number for t in found] == [t.number for t in expected]
        for one, other in zip(expected, found, strict=True):
            self.assert_same_trial(one, other, study.trials[one.number][1])

    def compare_trials(
        self, storage: RedisLockedStorage, study: _Study, deepcopy: bool, states: Any = None
    ) -> None:
        # As a list, as InMemoryStorage overlooks RUNNING trials that became WAITING if asked for a tuple.
        asked = None if states is None else list(states)
        expected, found = self.both(
            lambda: self.model.get_all_trials(study.model_id, deepcopy, asked),
            lambda: storage.get_all_trials(study.real_id, deepcopy, states),
        )
        if expected.error is None:
            if states == (TrialState.WAITING,):  # by number, but the one offered to this object first
                found.value = sorted(found.value, key=lambda t: int(t.number))
            self.assert_same_trials(study, expected.value, found.value)

    def compare_trial(self, who: int, ids: tuple[int, int]) -> None:
        """Read a trial; also right after its creation or claim, as `Study.ask` does.

        That one read is answered from memory until the object waits for the server again: what others write
        in between it does not see.
        """
        model_id, real_id = ids
        expected, found = self.both(
            lambda: self.model.get_trial(model_id), lambda: self.storages[who].get_trial(real_id)
        )
        if expected.error is None:
            self.assert_same_trial(expected.value, found.value, real_id)

    def compare_best(self, storage: RedisLockedStorage, study: _Study) -> None:
        expected = _Answer(lambda: self.model.get_best_trial(study.model_id))
        found = _Answer(lambda: storage.get_best_trial(study.real_id))
        if study.n_objectives > 1 and expected.error in (ValueError, RuntimeError):
            assert found.error is RuntimeError  # as RDBStorage; InMemoryStorage looks for trials first
            return
        assert found.error is expected.error
        if found.error is None:
            assert found.value.value == expected.value.value
            number = found.value.number
            model_id, real_id = study.trials[number]
            self.assert_same_trial(self.model.get_trial(model_id), found.value, real_id)

    def compare_study(self, storage: RedisLockedStorage, study: _Study) -> None:
        model, m, r = self.model, study.model_id, study.real_id
        self.same(lambda: model.get_study_user_attrs(m), lambda: storage.get_study_user_attrs(r))
        self.same(lambda: model.get_study_system_attrs(m), lambda: storage.get_study_system_attrs(r))
        self.same(lambda: model.get_n_trials(m), lambda: storage.get_n_trials(r))
        if not study.deleted:  # what never changes may come from memory
            self.same(lambda: model.get_study_directions(m), lambda: storage.get_study_directions(r))
            self.same(lambda: model.get_study_name_from_id(m), lambda: storage.get_study_name_from_id(r))

    def compare_all(self) -> None:
        for storage in self.storages:
            expected = {s.study_name: s for s in self.model.get_all_studies()}
            found = storage.get_all_studies()
            assert sorted(s.study_name for s in found) == sorted(expected)
            for one in found:
                other = expected[one.study_name]
                assert one.directions == other.directions
                assert _typed(one.user_attrs) == _typed(other.user_attrs)
                assert _typed(one.system_attrs) == _typed(other.system_attrs)
            for study in self.studies:
                self.compare_study(storage, study)
                self.compare_best(storage, study)
                self.compare_trials(storage, study, deepcopy=False)
                self.compare_trials(storage, study, deepcopy=False, states=(TrialState.WAITING,))

    @initialize(each_step=st.booleans(), directions=_directions)
    def start(self, each_step: bool, directions: list[StudyDirection]) -> None:
        """Half of the runs look at everything after each step; in the others, caches fall behind."""
        self.agree_each_step = each_step
        self.create_study(0, directions, "s")

    @invariant()
    def agree(self) -> None:
        if self.agree_each_step:
            self.compare_all()

    # -- studies -----------------------------------------------------------------------------------

    def study(self, pick: int) -> _Study:
        return self.studies[pick % len(self.studies)]

    @rule(
        who=_who,
        directions=_directions,
        name=st.sampled_from([None, "", "s", "ünï🎉", "\ud800", "a:b{c}\n"]),
    )
    def create_study(self, who: int, directions: list[StudyDirection], name: str | None) -> None:
        storage = self.storages[who]
        if name is None:
            real_id = storage.create_new_study(directions)
            model_id = self.model.create_new_study(directions, storage.get_study_name_from_id(real_id))
        else:
            expected, found = self.both(
                lambda: self.model.create_new_study(directions, name),
                lambda: storage.create_new_study(directions, name),
            )
            if expected.error is not None:
                return
            model_id, real_id = expected.value, found.value
        self.studies.append(_Study(model_id, real_id, len(directions)))

    @precondition(lambda self: len(self.studies) > 1)
    @rule(who=_who, pick=_picks)
    def delete_study(self, who: int, pick: int) -> None:
        study = self.study(pick)
        self.both(
            lambda: self.model.delete_study(study.model_id),
            lambda: self.storages[who].delete_study(study.real_id),
        )
        study.deleted = True

    @rule(who=_who, pick=_picks, system=st.booleans(), name=_names, value=_json)
    def set_study_attr(self, who: int, pick: int, system: bool, name: str, value: Any) -> None:
        study = self.study(pick)
        method = "set_study_system_attr" if system else "set_study_user_attr"
        self.both(
            lambda: getattr(self.model, method)(study.model_id, name, value),
            lambda: getattr(self.storages[who], method)(study.real_id, name, value),
        )

    # -- creating trials ---------------------------------------------------------------------------

    @rule(who=_who, pick=_picks)
    def create_trial(self, who: int, pick: int) -> None:
        self.create(who, self.study(pick), None)

    @rule(who=_who, pick=_picks, data=st.data())
    def create_trial_from_template(self, who: int, pick: int, data: st.DataObject) -> None:
        study = self.study(pick)
        template = data.draw(_templates(study.n_objectives), "template")
        self.times.update(t for t in (template.datetime_start, template.datetime_complete) if t)
        self.create(who, study, template)

    def create(self, who: int, study: _Study, template: FrozenTrial | None) -> None:
        expected, found = self.both(
            lambda: self.model.create_new_trial(study.model_id, template),
            lambda: self.storages[who].create_new_trial(study.real_id, template),
        )
        if expected.error is None:
            study.trials.append((expected.value, found.value))
            self.compare_trial(who, (expected.value, found.value))

    # -- changing trials ---------------------------------------------------------------------------

    def has_trials(self) -> bool:
        return any(study.trials for study in self.studies)

    def trial(self, pick: int) -> tuple[int, int]:
        """Ids of some trial, with later ones more often."""
        trials = [ids for study in self.studies for ids in study.trials]
        return trials[-1 - pick % len(trials)]

    def write(self, who: int, pick: int, method: str, *args: Any) -> None:
        model_id, real_id = self.trial(pick)
        storage = self.storages[who]
        expected = _Answer(lambda: getattr(self.model, method)(model_id, *args))
        found = _Answer(lambda: getattr(storage, method)(real_id, *args))
        if _known_finished(expected, found):
            return
        if expected.error is not found.error:
            # A write to a trial that this object runs may have been sent without waiting. Then the next
            # call on the trial tells what became of it, if not already the next one that waits.
            refused = expected.error in (UpdateFinishedTrialError, KeyError)
            sent = found.error is None and storage._deferred_writes
            sent |= found.error is ValueError and method == "set_trial_param"
            assert refused, f"expected {expected.error}, got {found.error}"
            assert sent, f"expected {expected.error}, got {found.error}"
            storage.remove_session()
            later = _Answer(lambda: storage.set_trial_user_attr(real_id, "x", 1))
            assert later.error is expected.error
        assert found.value is None

    @precondition(has_trials)
    @rule(who=_who, pick=_picks, name=_names, param=_params())
    def set_param(self, who: int, pick: int, name: str, param: tuple[BaseDistribution, Any]) -> None:
        distribution, value = param
        self.write(who, pick, "set_trial_param", name, distribution.to_internal_repr(value), distribution)

    @precondition(has_trials)
    @rule(who=_who, pick=_picks, step=_steps, value=_reports)
    def report(self, who: int, pick: int, step: int, value: float) -> None:
        self.write(who, pick, "set_trial_intermediate_value", step, value)

    @precondition(has_trials)
    @rule(who=_who, pick=_picks, system=st.booleans(), name=_names, value=_json)
    def set_attr(self, who: int, pick: int, system: bool, name: str, value: Any) -> None:
        self.write(who, pick, "set_trial_system_attr" if system else "set_trial_user_attr", name, value)

    @precondition(has_trials)
    @rule(who=_who, pick=_picks, state=_states, data=st.data())
    def set_state(self, who: int, pick: int, state: TrialState, data: st.DataObject) -> None:
        model_id, real_id = self.trial(pick)
        study = next(s for s in self.studies if (model_id, real_id) in s.trials)
        values = data.draw(
            st.lists(_objectives, min_size=study.n_objectives, max_size=study.n_objectives), "values"
        )
        given = values if state is TrialState.COMPLETE or data.draw(st.booleans(), "with values") else None
        self.same(
            lambda: self.model.set_trial_state_values(model_id, state, given),
            lambda: self.storages[who].set_trial_state_values(real_id, state, given),
        )
        self.compare_trial(who, (model_id, real_id))

    @precondition(has_trials)
    @rule(who=_who, pick=_picks)
    def claim(self, who: int, pick: int) -> None:
        model_id, real_id = self.trial(pick)
        self.same(
            lambda: self.model.set_trial_state_values(model_id, TrialState.RUNNING),
            lambda: self.storages[who].set_trial_state_values(real_id, TrialState.RUNNING),
        )
        self.compare_trial(who, (model_id, real_id))

    # -- reading -----------------------------------------------------------------------------------

    @rule(
        who=_who,
        pick=_picks,
        what=st.sampled_from(["study", "best", "waiting", "all", "all"]),
        states=st.none() | st.lists(_states, max_size=3).map(tuple),
        deepcopy=st.booleans(),
    )
    def read_study(
        self, who: int, pick: int, what: str, states: tuple[TrialState, ...] | None, deepcopy: bool
    ) -> None:
        storage, study = self.storages[who], self.study(pick)
        if what == "study":
            self.compare_study(storage, study)
        elif what == "best":
            self.compare_best(storage, study)
        else:
            asked: Any = (TrialState.WAITING,) if what == "waiting" else states
            self.compare_trials(storage, study, deepcopy, asked)
            listed: Any = None if asked is None else list(asked)  # see compare_trials
            self.same(
                lambda: self.model.get_n_trials(study.model_id, listed),
                lambda: storage.get_n_trials(study.real_id, asked),
            )

    @precondition(has_trials)
    @rule(who=_who, pick=_picks)
    def read_trial(self, who: int, pick: int) -> None:
        self.compare_trial(who, self.trial(pick))

    @precondition(has_trials)
    @rule(
        who=_who,
        pick=_picks,
        method=st.sampled_from(
            ["get_trial_params", "get_trial_user_attrs", "get_trial_system_attrs", "get_trial_number_from_id"]
        ),
        name=_names,
    )
    def read_part(self, who: int, pick: int, method: str, name: str) -> None:
        model_id, real_id = self.trial(pick)
        storage = self.storages[who]
        self.same(lambda: getattr(self.model, method)(model_id), lambda: getattr(storage, method)(real_id))
        self.same(
            lambda: float(self.model.get_trial_param(model_id, name)),
            lambda: float(storage.get_trial_param(real_id, name)),
        )

    @rule(
        who=_who,
        pick=_picks,
        number=st.integers(0, 10),
        name=st.sampled_from(["", "s", "ünï🎉", "\ud800", "unknown"]),
    )
    def find(self, who: int, pick: int, number: int, name: str) -> None:
        storage, study = self.storages[who], self.study(pick)
        expected, found = self.both(
            lambda: self.model.get_study_id_from_name(name), lambda: storage.get_study_id_from_name(name)
        )
        if expected.error is None:
            known = [s.real_id for s in self.studies if s.model_id == expected.value]
            assert [found.value] == known
        expected, found = self.both(
            lambda: self.model.get_trial_id_from_study_id_trial_number(study.model_id, number),
            lambda: storage.get_trial_id_from_study_id_trial_number(study.real_id, number),
        )
        if expected.error is None:
            assert found.value == study.trials[number][1]

    # -- what nobody should notice -------------------------------------------------------------------

    @rule(who=_who)
    def lose_the_connection(self, who: int) -> None:
        """Writes whose replies are outstanding are sent again with the next call that waits."""
        self.storages[who]._node.close()
        self.storages[who]._node.command("PING")

    @rule(who=_who)
    def start_anew(self, who: int) -> None:
        old = self.storages[who]
        self.storages[who] = pickle.loads(pickle.dumps(old))
        old.close()


def _settings(examples: int, steps: int) -> settings:
    return settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(verbosity)


@pytest.mark.parametrize("deferred", [True, False], ids=["deferred writes", "waiting for each write"])
def test_two_storages_on_a_server_answer_as_one_in_memory(valkey: Server, deferred: bool) -> None:
    def make(prefix: str) -> RedisLockedStorage:
        return RedisLockedStorage(valkey.url, prefix=prefix, timeout=5.0, deferred_writes=deferred)

    def count_keys(prefix: str) -> int:
        keys = valkey.command("KEYS", prefix + ":*")
        return sum(valkey.command("TTL", key) == -1 for key in keys)

    run_state_machine_as_test(
        cast(Any, lambda: StorageMachine(make, count_keys)), settings=_settings(150 if deferred else 60, 40)
    )


def test_two_storages_on_fakeredis_answer_as_one_in_memory() -> None:
    host = uuid.uuid4().hex
    client = fakeredis.FakeRedis(host=host)

    def make(prefix: str) -> RedisLockedStorage:
        return RedisLockedStorage(fakeredis.FakeRedis(host=host), prefix=prefix, timeout=5.0)

    def count_keys(prefix: str) -> int:
        return sum(client.ttl(key) == -1 for key in client.keys(prefix + ":*"))

    run_state_machine_as_test(cast(Any, lambda: StorageMachine(make, count_keys)), settings=_settings(15, 30))
