"""What a study sees on this storage: Optuna's features, values, queues, and what other objects read."""

from __future__ import annotations

import copy
import itertools
import math
import multiprocessing
import pickle
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

import optuna_dlock.trials
from optuna_dlock import RedisLockedStorage
from optuna_dlock.keys import RegistryKeys, StudyKeys
from optuna_dlock.scripts import Script, script
from optuna_dlock.studies import Registry
from tests.servers import Server

COMPLETE, FAIL, RUNNING, WAITING = (
    *(TrialState.COMPLETE, TrialState.FAIL),
    *(TrialState.RUNNING, TrialState.WAITING),
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Optuna tells of each trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    yield
    optuna.logging.set_verbosity(before)


@pytest.fixture
def storage(valkey_url: str) -> RedisLockedStorage:
    return RedisLockedStorage(valkey_url)


@pytest.fixture
def other(storage: RedisLockedStorage, valkey_url: str) -> RedisLockedStorage:
    """A second object: to the server, another process."""
    return RedisLockedStorage(valkey_url)


def new_study(storage: BaseStorage) -> int:
    return storage.create_new_study([StudyDirection.MINIMIZE])


def keys_of(storage: RedisLockedStorage, study_id: int) -> StudyKeys:
    return StudyKeys(prefix_of(storage), study_id)


def prefix_of(storage: RedisLockedStorage) -> str:
    return storage._server.prefix


def keys_under(server: Server, prefix: str) -> set[str]:
    return {key.decode() for key in server.command("KEYS", f"{prefix}:*")}


def quadratic(trial: Trial) -> float:
    return trial.suggest_float("x", -5, 5) ** 2 + trial.suggest_int("n", 0, 3)


# -- Optuna's own calls ------------------------------------------------------------------------------


def test_create_study_joins_an_existing_one_and_refuses_a_second(url: str) -> None:
    first = optuna.create_study(storage=RedisLockedStorage(url), study_name="mnist", direction="maximize")
    joined = optuna.create_study(
        storage=RedisLockedStorage(url), study_name="mnist", direction="maximize", load_if_exists=True
    )
    loaded = optuna.load_study(storage=RedisLockedStorage(url), study_name="mnist")
    assert first._study_id == joined._study_id == loaded._study_id
    assert loaded.direction is StudyDirection.MAXIMIZE
    with pytest.raises(optuna.exceptions.DuplicatedStudyError):
        optuna.create_study(storage=RedisLockedStorage(url), study_name="mnist")


def test_four_threads_of_optimize_make_contiguous_complete_trials(url: str) -> None:
    study = optuna.create_study(storage=RedisLockedStorage(url))
    study.optimize(quadratic, n_trials=40, n_jobs=4)
    trials = optuna.load_study(storage=RedisLockedStorage(url), study_name=study.study_name).trials
    assert [t.number for t in trials] == list(range(40))
    for trial in trials:
        assert trial.state is COMPLETE
        assert trial.value == trial.params["x"] ** 2 + trial.params["n"]
    assert study.best_value == min(t.value for t in trials if t.value is not None)


def test_ask_and_tell_by_different_objects(storage: RedisLockedStorage, other: RedisLockedStorage) -> None:
    study = optuna.create_study(storage=storage, study_name="s")
    trial = study.ask({"x": FloatDistribution(0, 1), "c": CategoricalDistribution([None, "é", 2.5])})
    optuna.load_study(storage=other, study_name="s").tell(trial.number, 0.5)
    [told] = study.trials
    assert (told.state, told.value, told.params) == (COMPLETE, 0.5, trial.params)


def test_enqueued_trials_run_in_their_order_and_before_others(storage: RedisLockedStorage) -> None:
    study = optuna.create_study(storage=storage)
    for x in (3.0, 1.0, 2.0):
        study.enqueue_trial({"x": x}, user_attrs={"wish": x})
    asked = [study.ask() for _ in range(4)]
    assert [t.number for t in asked] == [0, 1, 2, 3]
    assert [t.suggest_float("x", 0, 9) for t in asked[:3]] == [3.0, 1.0, 2.0]
    assert [t.user_attrs for t in asked] == [{"wish": 3.0}, {"wish": 1.0}, {"wish": 2.0}, {}]


def test_added_trials_are_there_as_they_were(storage: RedisLockedStorage, other: RedisLockedStorage) -> None:
    space = {"x": FloatDistribution(0, 9), "k": IntDistribution(1, 8, log=True)}
    added = [
        create_trial(
            value=float(n),
            params={"x": n / 2, "k": n + 1},
            distributions=space,
            user_attrs={"n": n},
            intermediate_values={0: n, 5: -n},
        )
        for n in range(5)
    ]
    study = optuna.create_study(storage=storage, study_name="s")
    study.add_trials(added)
    found = optuna.load_study(storage=other, study_name="s").trials
    for before, after in zip(added, found, strict=True):
        assert strip(before) == strip(after)


def strip(trial: FrozenTrial) -> dict[str, Any]:
    """All that does not depend on where the trial is."""
    return {name: value for name, value in vars(trial).items() if name not in ("_number", "_trial_id")}


def test_copy_study_from_and_to_memory(valkey_url: str, storage: RedisLockedStorage) -> None:
    study = optuna.create_study(
        storage=InMemoryStorage(), study_name="s", directions=["minimize", "maximize"]
    )
    study.set_user_attr("who", "é")
    study.optimize(lambda t: (t.suggest_float("x", 0, 1), 1.0), n_trials=5)
    optuna.copy_study(from_study_name="s", from_storage=study._storage, to_storage=storage)
    back = InMemoryStorage()
    optuna.copy_study(from_study_name="s", from_storage=RedisLockedStorage(valkey_url), to_storage=back)
    copied = optuna.load_study(study_name="s", storage=back)
    assert [strip(t) for t in copied.trials] == [strip(t) for t in study.trials]
    assert (copied.directions, copied.user_attrs) == (study.directions, study.user_attrs)


def test_a_study_that_is_being_swept_away_gets_no_new_keys(
    any_url: str, connect: Callable[..., RedisLockedStorage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the deletion and the last of its keys, others still have its trials in memory."""
    one, two = connect(any_url), connect(any_url)
    study_id = optuna.create_study(storage=one)._study_id
    running, waiting = (
        two.create_new_trial(study_id, create_trial(state=state))
        for state in (TrialState.RUNNING, TrialState.WAITING)
    )
    monkeypatch.setattr(Registry, "_sweep", lambda *args: None)
    one.delete_study(study_id)
    calls: list[Callable[[], object]] = [
        lambda: two.set_trial_state_values(waiting, TrialState.RUNNING),
        lambda: two.set_trial_state_values(running, TrialState.WAITING),
        lambda: two.set_trial_user_attr(running, "a", 1) or two.get_trial(running),
        lambda: two.create_new_trial(study_id),
    ]
    for call in calls:
        with pytest.raises(KeyError):
            call()
    keys = two._registry.study_keys(study_id)
    assert [two._node.command("HGETALL", keys.trial(number)) for number in range(3)] == [[], [], []]


def test_delete_study_leaves_no_key_but_the_registrys(storage: RedisLockedStorage, valkey: Server) -> None:
    study = optuna.create_study(storage=storage, study_name="s")
    study.set_user_attr("a", 1)
    study.optimize(quadratic, n_trials=3)
    study.enqueue_trial({"x": 1})
    study.enqueue_trial({"x": 2})
    running = study.ask()
    running.suggest_float("x", -5, 5)
    running.report(1.0, 0)
    storage.record_heartbeat(running._trial_id)
    storage.remove_session()
    prefix = prefix_of(storage)
    registry = set(vars(RegistryKeys(prefix)).values())
    assert len(keys_under(valkey, prefix) - registry) > 8
    optuna.delete_study(study_name="s", storage=storage)
    # What the lock remembers of its release, so that it may be asked twice, goes by itself.
    left = keys_under(valkey, prefix) - registry
    assert [key for key in left if not (":lock:wake:" in key and valkey.command("PTTL", key) > 0)] == []
    assert optuna.get_all_study_names(storage) == []


def test_best_trials_of_two_objectives_are_those_of_memory(storage: RedisLockedStorage) -> None:
    fronts = []
    for place in (storage, InMemoryStorage()):
        study = optuna.create_study(storage=place, directions=["minimize", "maximize"])
        for x, y in [(1, 1), (2, 2), (3, 1), (2, math.inf), (0, -math.inf)]:
            study.tell(study.ask(), [x, y])
        fronts.append([(t.number, t.values) for t in study.best_trials])
        with pytest.raises(RuntimeError):
            _ = study.best_trial
    assert fronts[0] == fronts[1]
    assert [number for number, _ in fronts[0]] == [0, 3, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MedianPruner(n_startup_trials=2),
        lambda: HyperbandPruner(min_resource=1, max_resource=9, reduction_factor=3),
    ],
    ids=["median", "hyperband"],
)
def test_a_pruner_decides_as_on_memory(storage: RedisLockedStorage, make: Callable[[], BasePruner]) -> None:
    def objective(trial: Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        for step in range(9):
            trial.report(x * (10 - step), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return x

    outcomes = []
    for place in (storage, InMemoryStorage()):
        sampler = optuna.samplers.RandomSampler(seed=1)
        study = optuna.create_study(storage=place, study_name="p", sampler=sampler, pruner=make())
        study.optimize(objective, n_trials=25)
        outcomes.append([(t.state, t.values, t.intermediate_values) for t in study.trials])
    assert outcomes[0] == outcomes[1]
    assert TrialState.PRUNED in {state for state, _, _ in outcomes[0]}


def _cmaes() -> BaseSampler:
    pytest.importorskip("cmaes")
    return optuna.samplers.CmaEsSampler(seed=1, n_startup_trials=3)


def _gp() -> BaseSampler:
    pytest.importorskip("torch")
    pytest.importorskip("scipy")
    return optuna.samplers.GPSampler(seed=1, n_startup_trials=3)


def _qmc() -> BaseSampler:
    pytest.importorskip("scipy")
    return optuna.samplers.QMCSampler(seed=1, warn_independent_sampling=False)


def _partial() -> BaseSampler:
    return optuna.samplers.PartialFixedSampler({"n": 2}, optuna.samplers.RandomSampler(seed=1))


SAMPLERS: dict[str, Callable[[], BaseSampler]] = {
    "random": lambda: optuna.samplers.RandomSampler(seed=1),
    "tpe": lambda: optuna.samplers.TPESampler(seed=1, n_startup_trials=4),
    "tpe-liar": lambda: optuna.samplers.TPESampler(seed=1, n_startup_trials=4, constant_liar=True),
    "tpe-group": lambda: optuna.samplers.TPESampler(
        seed=1, n_startup_trials=4, multivariate=True, group=True
    ),
    "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=1, population_size=5),
    "nsga3": lambda: optuna.samplers.NSGAIIISampler(seed=1, population_size=5),
    "qmc": _qmc,
    "cmaes": _cmaes,
    "gp": _gp,
    "grid": lambda: optuna.samplers.GridSampler({"x": [-1.0, 0.0, 1.0], "n": [0, 1, 2, 3]}, seed=1),
    "brute": lambda: optuna.samplers.BruteForceSampler(seed=1),
    "partial": _partial,
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_suggests_the_same_as_on_memory(storage: RedisLockedStorage, name: str) -> None:
    def objective(trial: Trial) -> float:
        step = 2.5 if name == "brute" else None
        return trial.suggest_float("x", -5, 5, step=step) ** 2 + trial.suggest_int("n", 0, 3)

    runs = []
    for place in (storage, InMemoryStorage()):
        study = optuna.create_study(storage=place, study_name="s", sampler=SAMPLERS[name]())
        study.optimize(objective, n_trials=14)
        runs.append([(t.params, t.values) for t in study.trials])
    assert runs[0] == runs[1]
    assert len({str(run) for run in runs[0]}) > 5


def _retry_callback() -> Any:
    for name in ("RetryHeartbeatStaleTrialCallback", "RetryFailedTrialCallback"):  # new and old name
        callback = getattr(optuna.storages, name, None)
        if callback is not None:
            return callback(max_retry=1, inherit_intermediate_values=True)
    raise AssertionError("no retry callback in this Optuna")


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
@pytest.mark.parametrize("argument", ["heartbeat_stale_trial_callback", "failed_trial_callback"])
def test_a_stale_trial_fails_and_is_queued_again_as_often_as_the_callback_says(
    valkey_url: str, valkey: Server, argument: str
) -> None:
    callback: dict[str, Any] = {argument: _retry_callback()}
    storage = RedisLockedStorage(valkey_url, heartbeat_interval=60, grace_period=120, **callback)
    study = optuna.create_study(storage=storage)
    heartbeats = keys_of(storage, study._study_id).heartbeats
    for number in (0, 1):
        trial = study.ask()
        if number == 0:
            trial.report(0.5, 3)
        storage.record_heartbeat(trial._trial_id)
        now = int(float(valkey.command("ZSCORE", heartbeats, number)))
        valkey.command("ZADD", heartbeats, now - 60_000, number)
        optuna.storages.fail_stale_trials(study)
        assert study.trials[number].state is RUNNING  # within the grace period
        valkey.command("ZADD", heartbeats, now - 121_000, number)
        optuna.storages.fail_stale_trials(study)
        assert study.trials[number].state is FAIL
    assert len(study.trials) == 2
    assert study.trials[1].system_attrs["failed_trial"] == 0
    assert study.trials[1].intermediate_values == {3: 0.5}


def _work(storage: RedisLockedStorage, name: str, n: int) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    optuna.load_study(storage=storage, study_name=name).optimize(quadratic, n_trials=n)
    storage.close()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")  # fork in a run with threads
@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_storage_is_carried_into_worker_processes(storage: RedisLockedStorage, method: str) -> None:
    study = optuna.create_study(storage=storage, study_name="s")
    context: Any = multiprocessing.get_context(method)
    workers = [context.Process(target=_work, args=(storage, "s", 8)) for _ in range(2)]
    for worker in workers:
        worker.start()
    study.optimize(quadratic, n_trials=4)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [(t.number, t.state) for t in study.trials] == [(n, COMPLETE) for n in range(20)]


def test_a_pickled_storage_keeps_its_settings(valkey_url: str) -> None:
    storage = RedisLockedStorage(valkey_url, heartbeat_interval=7, grace_period=9, timeout=3.5)
    study_id = new_study(storage)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_user_attr(trial_id, "a", 1)
    copied = pickle.loads(pickle.dumps(storage))
    assert (copied.get_heartbeat_interval(), copied.grace_period, copied._timeout) == (7, 9, 3.5)
    assert copied._client != storage._client  # else the server would take its calls for repeats
    assert copied.create_new_trial(study_id) == trial_id + 1
    assert copied.get_trial(trial_id).user_attrs == {"a": 1}


# -- values ------------------------------------------------------------------------------------------

ATTRS: dict[str, Any] = {
    "": "",
    "é \U0001f600 \x00 \n": "ü\U0001f600\x00",
    "nested": {"a": [1, [2.5, {"b": None, "": []}], True, "é"], "{}": {}},
    "big": [2**80, -(2**63) - 1, 10**40],
    "inf": [math.inf, -math.inf],
    "nan": math.nan,
    "tiny": [5e-324, -0.0, 1.7976931348623157e308, 0.1],
    "bool": False,
    "none": None,
    "space and: colon": "a:b:{c}",
    "long": "x" * 1500,
}
STEPS = {0: 1.5, 7: math.nan, 3: math.inf, 2**31 - 1: -math.inf}


def _fill(storage: BaseStorage) -> tuple[int, list[int]]:
    study_id = storage.create_new_study([StudyDirection.MINIMIZE] * 2, "é \U0001f600")
    trial_ids = [storage.create_new_trial(study_id) for _ in range(2)]
    for key, value in ATTRS.items():
        storage.set_study_user_attr(study_id, key, value)
        storage.set_study_system_attr(study_id, key, value)
        for trial_id in trial_ids:
            storage.set_trial_user_attr(trial_id, key, value)
            storage.set_trial_system_attr(trial_id, key, value)
    for trial_id in trial_ids:
        choices = CategoricalDistribution([None, "", "é", True, 1.5, 3])
        storage.set_trial_param(trial_id, "c é", 2, choices)
        storage.set_trial_param(trial_id, "n", 2, IntDistribution(-4, 2**53, step=2))
        storage.set_trial_param(trial_id, "x", 1e-300, FloatDistribution(1e-300, 1, log=True))
        for step, value in STEPS.items():
            storage.set_trial_intermediate_value(trial_id, step, value)
    storage.set_trial_state_values(trial_ids[0], COMPLETE, [math.inf, -0.1])
    return study_id, trial_ids


def _text(trial: FrozenTrial) -> str:
    """All values as text: NaN equals NaN, 0.0 is not -0.0, True is not 1."""
    by_key = (trial.intermediate_values, trial.user_attrs, trial.system_attrs)
    distributions = sorted((name, str(distribution)) for name, distribution in trial.distributions.items())
    head = (trial.number, trial.state, trial.values, sorted(trial.params.items()), distributions)
    return repr((head, [sorted(each.items()) for each in by_key]))


def _seen(storage: BaseStorage, study_id: int) -> str:
    return repr(
        (
            storage.get_study_name_from_id(study_id),
            [_text(trial) for trial in storage.get_all_trials(study_id)],
            sorted(storage.get_study_user_attrs(study_id).items()),
            sorted(storage.get_study_system_attrs(study_id).items()),
        )
    )


def test_values_come_back_as_from_memory_and_from_a_database(url: str) -> None:
    writer, memory, database = RedisLockedStorage(url), InMemoryStorage(), RDBStorage("sqlite:///:memory:")
    study_id, trial_ids = _fill(writer)
    assert _seen(writer, study_id) == _seen(RedisLockedStorage(url), study_id)
    expected = _seen(memory, _fill(memory)[0])
    assert _seen(writer, study_id) == expected
    assert expected == _seen(database, _fill(database)[0])
    database.remove_session()
    database.engine.dispose()
    reader = RedisLockedStorage(url)
    for trial_id in trial_ids:  # one by one, too
        assert _text(reader.get_trial(trial_id)) == _text(writer.get_trial(trial_id))


def test_a_negative_zero_keeps_its_sign(storage: RedisLockedStorage, other: RedisLockedStorage) -> None:
    study_id = new_study(storage)  # as on memory; SQLite loses it
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_intermediate_value(trial_id, 0, -0.0)
    storage.remove_session()
    assert math.copysign(1, other.get_trial(trial_id).intermediate_values[0]) == -1
    storage.set_trial_state_values(trial_id, COMPLETE, [-0.0])
    trial = other.get_trial(trial_id)
    assert repr((trial.values, trial.intermediate_values)) == "([-0.0], {0: -0.0})"


def test_times_have_microseconds_and_are_naive_local(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    study_id = new_study(storage)
    before = datetime.now()
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_state_values(trial_id, COMPLETE, [0.0])
    after = datetime.now()
    ours, theirs = storage.get_trial(trial_id), other.get_trial(trial_id)
    assert ours.datetime_start is not None
    assert ours.datetime_complete is not None
    assert before <= ours.datetime_start <= ours.datetime_complete <= after
    assert (theirs.datetime_start, theirs.datetime_complete) == (ours.datetime_start, ours.datetime_complete)


# -- what other objects read -------------------------------------------------------------------------


def test_a_reader_that_fell_behind_a_trimmed_log_reads_all(
    storage: RedisLockedStorage, other: RedisLockedStorage, valkey: Server
) -> None:
    study_id = new_study(storage)
    first, second = storage.create_new_trial(study_id), storage.create_new_trial(study_id)
    storage.set_trial_intermediate_value(first, 0, 0.0)
    assert other.get_all_trials(study_id)[0].intermediate_values == {0: 0.0}
    for step in range(5000):  # more than twice LOG_CAP of _log_change.lua
        storage.set_trial_intermediate_value(first, step, float(step))
    storage.set_trial_user_attr(second, "last", 1)
    storage.remove_session()
    assert int(valkey.command("HGET", keys_of(storage, study_id).meta, "base")) > 0
    assert valkey.command("LLEN", keys_of(storage, study_id).log) < 4096
    read = other.get_all_trials(study_id)
    assert read[0].intermediate_values == {step: float(step) for step in range(5000)}
    assert read[1].user_attrs == {"last": 1}
    storage.set_trial_user_attr(second, "later", 2)  # and from there on by differences
    storage.remove_session()
    assert other.get_all_trials(study_id)[1].user_attrs == {"last": 1, "later": 2}


@pytest.mark.parametrize("size", [1023, 1024, 1025, 200_000])
def test_a_large_value_on_a_running_trial_is_seen_by_others(
    storage: RedisLockedStorage, other: RedisLockedStorage, valkey: Server, size: int
) -> None:
    study_id = new_study(storage)
    trial_id = storage.create_new_trial(study_id)
    other.get_all_trials(study_id)
    storage.set_trial_user_attr(trial_id, "small", 1)
    storage.set_trial_user_attr(trial_id, "text", "x" * (size - 2))  # and two quotes
    storage.remove_session()
    expected = {"small": 1, "text": "x" * (size - 2)}
    assert other.get_all_trials(study_id)[0].user_attrs == expected
    storage.set_trial_user_attr(trial_id, "after", 2)
    storage.remove_session()
    assert other.get_all_trials(study_id)[0].user_attrs == {**expected, "after": 2}
    log = valkey.command("LRANGE", keys_of(storage, study_id).log, 0, -1)
    assert max(map(len, log)) < 1100  # the capped log is one of small entries


def test_thousands_of_finished_trials_are_loaded_in_chunks(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    study_id = new_study(storage)
    space: dict[str, BaseDistribution] = {"x": FloatDistribution(0, 1)}
    for n in range(3456):
        trial = create_trial(value=float(n), params={"x": n / 3456}, distributions=space)
        storage.create_new_trial(study_id, trial)
    other.get_study_directions(study_id)
    before = other._node.waits
    trials = other.get_all_trials(study_id, deepcopy=False)
    assert other._node.waits - before <= 3456 / 1000 + 3
    assert [(t.number, t.value, t.params["x"]) for t in trials] == [(n, n, n / 3456) for n in range(3456)]
    before = other._node.waits
    assert other.get_best_trial(study_id).number == 0
    assert len(other.get_all_trials(study_id, deepcopy=False)) == 3456
    assert other._node.waits - before == 2


def test_a_snapshot_is_not_changed_by_later_writes(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    study_id = new_study(storage)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_user_attr(trial_id, "a", {"deep": [1]})
    for reader in (storage, other):
        all_before = reader.get_all_trials(study_id, deepcopy=False)
        one_before = reader.get_trial(trial_id)
        kept = copy.deepcopy((all_before, one_before))
        storage.set_trial_user_attr(trial_id, "b", reader is other)
        storage.set_trial_intermediate_value(trial_id, 0 if reader is storage else 1, 1.0)
        storage.set_trial_param(trial_id, "x", 0.25, FloatDistribution(0, 1))
        storage.remove_session()
        assert reader.get_trial(trial_id) != one_before
        assert reader.get_all_trials(study_id) != all_before
        assert (all_before, one_before) == kept
    running = other.get_all_trials(study_id, deepcopy=False)
    kept_running = copy.deepcopy(running)
    storage.set_trial_state_values(trial_id, COMPLETE, [1.0])
    storage.create_new_trial(study_id)
    assert [t.state for t in other.get_all_trials(study_id)] == [COMPLETE, RUNNING]
    assert running == kept_running


def test_an_attribute_is_stored_as_it_was_when_it_was_set(storage: RedisLockedStorage) -> None:
    trial_id = storage.create_new_trial(new_study(storage))
    value = {"list": [1]}
    storage.set_trial_user_attr(trial_id, "a", value)
    value["list"].append(2)
    assert storage.get_trial(trial_id).user_attrs == {"a": {"list": [1]}}
    storage.set_trial_state_values(trial_id, COMPLETE, [0.0])
    assert storage.get_trial(trial_id).user_attrs == {"a": {"list": [1]}}


# -- the queue ---------------------------------------------------------------------------------------


def _enqueue(storage: BaseStorage, study_id: int, n: int) -> list[int]:
    return [storage.create_new_trial(study_id, create_trial(state=WAITING)) for _ in range(n)]


def _queue(storage: BaseStorage, study_id: int) -> list[int]:
    return [t._trial_id for t in storage.get_all_trials(study_id, deepcopy=False, states=(WAITING,))]


def test_one_worker_pops_the_queue_in_order(storage: RedisLockedStorage) -> None:
    study_id = new_study(storage)
    queued = _enqueue(storage, study_id, 12)
    popped = []
    while waiting := _queue(storage, study_id):
        assert storage.set_trial_state_values(waiting[0], RUNNING)
        popped.append(waiting[0])
    assert popped == queued


def test_each_object_is_shown_another_head_of_the_queue_and_the_whole_queue(valkey_url: str) -> None:
    workers = [RedisLockedStorage(valkey_url) for _ in range(4)]
    study_id = new_study(workers[0])
    queued = _enqueue(workers[0], study_id, 6)
    # An offer lasts 500 ms: on a machine that was paused meanwhile, a later round shows it.
    for _ in range(20):
        shown = [_queue(worker, study_id) for worker in workers]
        assert all(sorted(each) == queued for each in shown)
        if len({each[0] for each in shown}) == 4:
            return
    raise AssertionError(f"the same head for several: {[each[0] & 0xFF for each in shown]}")


def test_a_loser_of_the_race_does_not_wait_once_per_stale_entry(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    study_id = new_study(storage)
    _enqueue(storage, study_id, 30)
    stale = _queue(storage, study_id)
    for trial_id in stale[:29]:
        assert other.set_trial_state_values(trial_id, RUNNING)
    before = storage._node.waits
    assert [storage.set_trial_state_values(trial_id, RUNNING) for trial_id in stale] == [False] * 29 + [True]
    assert storage._node.waits - before <= 4


def test_the_server_forgets_operations_of_the_oldest_clients_only(
    valkey: Server, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = script("create_trial").source
    assert "OPS_CAP = 20000" in source
    small = Script("create_trial", source.replace("OPS_CAP = 20000", "OPS_CAP = 6"))
    valkey.command("SCRIPT", "LOAD", small.source)
    monkeypatch.setattr(
        optuna_dlock.trials, "script", lambda name: small if name == small.name else script(name)
    )
    workers = [RedisLockedStorage(valkey_url) for _ in range(20)]
    study_id = new_study(workers[0])
    ops = keys_of(workers[0], study_id).ops
    numbers = itertools.count()
    for worker in workers:
        assert worker.create_new_trial(study_id) & 0xFFFFFFFF == next(numbers)
        assert valkey.command("HEXISTS", ops, worker._client) == 1  # G6 holds for the latest
        assert valkey.command("HLEN", ops) <= 6
    assert workers[0].create_new_trial(study_id) & 0xFFFFFFFF == 20  # one that was forgotten goes on


@pytest.mark.parametrize("many", [1, 600], ids=["large value", "many fields"])
def test_parameters_keep_the_order_in_which_they_were_suggested(url: str, many: int) -> None:
    """A large hash on the server has no order."""
    owner, second, reader = (RedisLockedStorage(url) for _ in range(3))
    study_id = new_study(owner)
    trial_ids = [owner.create_new_trial(study_id) for _ in range(2)]
    for trial_id, names in zip(trial_ids, ("hgfedcba", "badcfehg"), strict=True):
        owner.set_trial_user_attr(trial_id, "long", "x" * 100)
        for step in range(many):
            owner.set_trial_intermediate_value(trial_id, step, 0.0)
        for name in names[:7]:
            owner.set_trial_param(trial_id, name, 0.5, FloatDistribution(0, 1))
        second.set_trial_param(trial_id, names[7], 0.5, FloatDistribution(0, 1))
        second.set_trial_param(trial_id, names[3], 0.25, FloatDistribution(0, 1))  # keeps its place
        assert list(reader.get_trial(trial_id).params) == list(names)
        assert list(owner.get_trial(trial_id).params) == list(names)
        owner.set_trial_state_values(trial_id, COMPLETE, [1.0])
        for storage in (owner, second, reader, RedisLockedStorage(url)):
            assert list(storage.get_trial(trial_id).params) == list(names)
            assert list(storage.get_trial(trial_id).distributions) == list(names)


# -- several writers of one trial --------------------------------------------------------------------


def test_a_deferred_write_that_a_reaper_forestalled_is_raised_by_the_next_call_on_the_trial(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    finished = getattr(optuna.exceptions, "UpdateFinishedTrialError", RuntimeError)
    study_id = new_study(storage)
    calls: list[Callable[[int], Any]] = [
        lambda trial_id: storage.set_trial_user_attr(trial_id, "b", 1),
        lambda trial_id: storage.set_trial_intermediate_value(trial_id, 0, 1.0),
        lambda trial_id: storage.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1)),
        lambda trial_id: storage.set_trial_state_values(trial_id, COMPLETE, [1.0]),
    ]
    for call in calls:
        trial_id = storage.create_new_trial(study_id)
        assert other.set_trial_state_values(trial_id, FAIL)
        storage.set_trial_user_attr(trial_id, "a", 1)  # sent, not answered yet
        storage.get_n_trials(study_id)  # reads the refusal, and is not about this trial
        with pytest.raises(finished):
            call(trial_id)
        trial = storage.get_trial(trial_id)
        assert (trial.state, trial.user_attrs) == (FAIL, {})
    trial_id = storage.create_new_trial(study_id)
    assert other.set_trial_state_values(trial_id, FAIL)
    storage.set_trial_user_attr(trial_id, "a", 1)
    with pytest.raises(finished):  # without a call in between
        storage.set_trial_state_values(trial_id, COMPLETE, [1.0])


def test_the_owners_finish_keeps_what_a_second_writer_wrote(url: str) -> None:
    owner, second, reader = (RedisLockedStorage(url) for _ in range(3))
    study_id = new_study(owner)
    trial_id = owner.create_new_trial(study_id)
    owner.set_trial_user_attr(trial_id, "owner", 1)
    second.set_trial_user_attr(trial_id, "second", {"big": "x" * 2000})
    second.set_trial_param(trial_id, "y", 0.5, FloatDistribution(0, 1))
    owner.set_trial_intermediate_value(trial_id, 0, 0.5)
    assert owner.set_trial_state_values(trial_id, COMPLETE, [1.0])
    for storage in (owner, second, reader):
        trial = storage.get_trial(trial_id)
        assert (trial.state, trial.values) == (COMPLETE, [1.0])
        assert trial.user_attrs == {"owner": 1, "second": {"big": "x" * 2000}}
        assert (trial.params, trial.intermediate_values) == ({"y": 0.5}, {0: 0.5})
