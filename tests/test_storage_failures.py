"""What the storage refuses, and how it fails: errors of callers, strange data, lost data, a server away."""

from __future__ import annotations

import logging
import pickle
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from optuna_dlock import RedisLockedStorage
from optuna_dlock.codec import pack_param, pack_trial
from optuna_dlock.errors import (
    AccessDeniedError,
    CorruptRecordError,
    DataLostError,
    DLockError,
    IncompatibleDistributionError,
    NotSerializableError,
    ServerConfigurationError,
    StorageUnavailableError,
    StudyExistsError,
)
from optuna_dlock.keys import RegistryKeys, StudyKeys
from tests.servers import FLAVOURS, Server, free_port

MINIMIZE = [StudyDirection.MINIMIZE]
X = FloatDistribution(0, 1)
COMPLETE, FAIL, RUNNING, WAITING = (
    *(TrialState.COMPLETE, TrialState.FAIL),
    *(TrialState.RUNNING, TrialState.WAITING),
)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Optuna tells of each study."""
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


def study_keys(storage: RedisLockedStorage, study_id: int) -> StudyKeys:
    return StudyKeys(storage._server.prefix, study_id)


def registry_keys(storage: RedisLockedStorage) -> RegistryKeys:
    return RegistryKeys(storage._server.prefix)


def everything(server: Server, storage: RedisLockedStorage) -> dict[str, bytes | None]:
    """All keys under the prefix of a storage, with their contents."""
    keys = server.command("KEYS", storage._server.prefix + ":*")
    return {key.decode(): server.command("DUMP", key) for key in keys}


# -- errors of callers ---------------------------------------------------------------------------------


def _calls_on_a_study(storage: BaseStorage, study_id: int) -> list[Callable[[], Any]]:
    return [
        lambda: storage.get_study_name_from_id(study_id),
        lambda: storage.get_study_directions(study_id),
        lambda: storage.get_study_user_attrs(study_id),
        lambda: storage.get_study_system_attrs(study_id),
        lambda: storage.set_study_user_attr(study_id, "a", 1),
        lambda: storage.set_study_system_attr(study_id, "a", 1),
        lambda: storage.create_new_trial(study_id),
        lambda: storage.create_new_trial(study_id, create_trial(value=1.0)),
        lambda: storage.get_all_trials(study_id),
        lambda: storage.get_all_trials(study_id, states=(WAITING,)),
        lambda: storage.get_n_trials(study_id),
        lambda: storage.get_best_trial(study_id),
        lambda: storage.get_trial_id_from_study_id_trial_number(study_id, 0),
        lambda: storage.delete_study(study_id),
    ]


def _calls_on_a_trial(storage: BaseStorage, trial_id: int) -> list[Callable[[], Any]]:
    return [
        lambda: storage.get_trial(trial_id),
        lambda: storage.get_trial_params(trial_id),
        lambda: storage.get_trial_param(trial_id, "x"),
        lambda: storage.get_trial_number_from_id(trial_id),
        lambda: storage.get_trial_user_attrs(trial_id),
        lambda: storage.get_trial_system_attrs(trial_id),
        lambda: storage.set_trial_user_attr(trial_id, "a", 1),
        lambda: storage.set_trial_system_attr(trial_id, "a", 1),
        lambda: storage.set_trial_intermediate_value(trial_id, 0, 1.0),
        lambda: storage.set_trial_param(trial_id, "x", 0.5, X),
        *[
            lambda s=s: storage.set_trial_state_values(trial_id, s)
            for s in (RUNNING, WAITING, COMPLETE, FAIL)
        ],
    ]


def test_an_unknown_study_is_a_key_error_for_every_call(
    storage: RedisLockedStorage, other: RedisLockedStorage, valkey: Server
) -> None:
    deleted = storage.create_new_study(MINIMIZE)
    other.create_new_trial(deleted)
    other.get_all_trials(deleted)
    existing = storage.create_new_study(MINIMIZE)
    storage.delete_study(deleted)
    before = everything(valkey, storage)
    for study_id in (existing + 1, 0, -1, 2**60, deleted):
        for at, call in enumerate(_calls_on_a_study(storage, study_id)):
            with pytest.raises(KeyError):
                pytest.fail(f"call {at} on study {study_id} returned {call()!r}")
    for call in _calls_on_a_study(other, deleted)[2:]:  # of which it had trials in memory
        with pytest.raises(KeyError):
            call()
    with pytest.raises(KeyError):
        storage.get_study_id_from_name("nobody")
    assert everything(valkey, storage) == before


def test_an_unknown_trial_is_a_key_error_for_every_call(storage: RedisLockedStorage, valkey: Server) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    known = storage.create_new_trial(study_id)
    before = everything(valkey, storage)
    for trial_id in (known + 1, known + 2**31, (study_id + 1) << 32, 0, -1, 2**70):
        for at, call in enumerate(_calls_on_a_trial(storage, trial_id)):
            with pytest.raises(KeyError, match="no trial"):
                pytest.fail(f"call {at} on trial {trial_id} returned {call()!r}")
    with pytest.raises(KeyError):
        storage.get_trial_id_from_study_id_trial_number(study_id, 1)
    with pytest.raises(KeyError):
        storage.get_trial_id_from_study_id_trial_number(study_id, -1)
    assert everything(valkey, storage) == before


def test_the_name_of_a_study_is_taken_until_it_is_deleted(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    study_id = storage.create_new_study(MINIMIZE, "é")
    with pytest.raises(DuplicatedStudyError, match="'é'") as caught:
        other.create_new_study(MINIMIZE, "é")
    assert isinstance(caught.value, StudyExistsError)
    assert caught.value.study_name == "é"
    other.delete_study(study_id)
    assert storage.create_new_study(MINIMIZE, "é") > study_id


COMPATIBLE: list[tuple[BaseDistribution, BaseDistribution]] = [
    (X, FloatDistribution(-3, 3)),
    (X, FloatDistribution(0, 1, step=0.5)),
    (IntDistribution(0, 3), IntDistribution(0, 9, step=3)),
    (IntDistribution(1, 3, log=True), IntDistribution(1, 9, log=True)),
    (CategoricalDistribution(["a", 1]), CategoricalDistribution(["a", 1])),
    (CategoricalDistribution([1, 0]), CategoricalDistribution([1.0, 0.0])),
    (CategoricalDistribution([True, False]), CategoricalDistribution([1, 0])),
]
INCOMPATIBLE: list[tuple[BaseDistribution, BaseDistribution]] = [
    (X, IntDistribution(0, 1)),
    (X, FloatDistribution(0.1, 1, log=True)),
    (IntDistribution(1, 3), IntDistribution(1, 3, log=True)),
    (CategoricalDistribution(["a", 1]), CategoricalDistribution(["a"])),
    (CategoricalDistribution(["a", 1]), CategoricalDistribution([1, "a"])),
    (CategoricalDistribution([0, 1]), X),
]


def _set(storage: BaseStorage, trial_id: int, distribution: BaseDistribution) -> None:
    value = distribution.choices[0] if isinstance(distribution, CategoricalDistribution) else 1
    storage.set_trial_param(trial_id, "x", distribution.to_internal_repr(value), distribution)


@pytest.mark.parametrize("who", ["the first", "another that has read the study", "a new one"])
def test_a_parameter_keeps_its_kind_in_a_study(
    storage: RedisLockedStorage, other: RedisLockedStorage, valkey_url: str, who: str
) -> None:
    for first, second in COMPATIBLE + INCOMPATIBLE:
        memory = InMemoryStorage()
        in_memory = memory.create_new_trial(memory.create_new_study(MINIMIZE))
        study_id = storage.create_new_study(MINIMIZE)
        trial_id = storage.create_new_trial(study_id)
        _set(memory, in_memory, first)
        _set(storage, trial_id, first)
        storage.remove_session()
        writer = {"the first": storage, "a new one": RedisLockedStorage(valkey_url)}.get(who, other)
        if writer is other:
            other.get_all_trials(study_id)
        trial_id = writer.create_new_trial(study_id)
        before = writer.get_trial(trial_id)
        try:
            _set(memory, in_memory, second)
        except ValueError:
            with pytest.raises(IncompatibleDistributionError, match="'x'") as caught:
                _set(writer, trial_id, second)
            assert isinstance(caught.value, ValueError)
            assert writer.get_trial(trial_id) == before
        else:
            _set(writer, trial_id, second)
            assert writer.get_trial(trial_id).distributions == {"x": second}
        writer.close()


def test_two_who_define_a_parameter_at_once_do_not_both_win(
    storage: RedisLockedStorage, other: RedisLockedStorage
) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    first, second = storage.create_new_trial(study_id), other.create_new_trial(study_id)
    storage.get_all_trials(study_id)
    other.get_all_trials(study_id)  # neither has heard of x
    _set(storage, first, X)
    with pytest.raises(IncompatibleDistributionError):
        _set(other, second, IntDistribution(0, 9))


def _calls_with(storage: BaseStorage, study_id: int, trial_id: int, value: Any) -> list[Callable[[], Any]]:
    template = create_trial(value=1.0)
    template.user_attrs = {"bad": value}
    return [
        lambda: storage.set_trial_user_attr(trial_id, "bad", value),
        lambda: storage.set_trial_system_attr(trial_id, "bad", value),
        lambda: storage.set_study_user_attr(study_id, "bad", value),
        lambda: storage.set_study_system_attr(study_id, "bad", value),
        lambda: storage.create_new_trial(study_id, template),
    ]


def test_what_is_no_json_is_a_type_error_and_nothing_is_written(
    storage: RedisLockedStorage, valkey: Server
) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    trial_id = storage.create_new_trial(study_id)
    storage.set_trial_user_attr(trial_id, "a", 1)
    storage.remove_session()
    before = everything(valkey, storage)
    recursive: list[Any] = []
    recursive.append(recursive)
    for wrong in (object(), {1, 2}, b"bytes", 1j, {"deep": [object()]}, recursive, {(1, 2): 3}):
        for at, call in enumerate(_calls_with(storage, study_id, trial_id, wrong)):
            with pytest.raises(TypeError) as caught:
                pytest.fail(f"call {at} took {wrong!r}: {call()}")
            assert isinstance(caught.value, NotSerializableError)
            assert "'bad'" in str(caught.value) or at == 4
    assert everything(valkey, storage) == before
    storage.set_trial_user_attr(trial_id, "b", 2)
    assert storage.get_trial(trial_id).user_attrs == {"a": 1, "b": 2}


# -- strange data --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "record", [b"", b"garbage", b"\x00" * 100, b"\x02" + bytes(99), b"\x01\x09" + bytes(98)]
)
def test_an_unreadable_finished_trial_is_named_by_its_key(
    storage: RedisLockedStorage, other: RedisLockedStorage, valkey: Server, record: bytes
) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    trial_id = storage.create_new_trial(study_id, create_trial(value=1.0))
    key = study_keys(storage, study_id).finished
    valkey.command("HSET", key, 0, record)
    for read in (
        lambda: other.get_all_trials(study_id),
        lambda: other.get_trial(trial_id),
        lambda: other.get_best_trial(study_id),
        lambda: RedisLockedStorage(f"{valkey.url}?prefix={other._server.prefix}").get_trial(trial_id),
    ):
        with pytest.raises(CorruptRecordError, match="trial 0") as caught:
            read()
        assert caught.value.key == key
        assert key in str(caught.value)
    assert valkey.command("HGET", key, 0) == record


_STRANGE_PARAM = pack_trial(RUNNING, None, [(99, 0.5)], {}, {}, {}, None, None)


@pytest.mark.parametrize(
    "record",
    [
        *(b"", b"garbage", b"\x02" + bytes(99), b"\x01\x09" + bytes(98)),
        *(_STRANGE_PARAM, _STRANGE_PARAM[:-1], _STRANGE_PARAM[:36]),
    ],
)
def test_an_unreadable_unfinished_trial_is_a_corrupt_record(
    storage: RedisLockedStorage, other: RedisLockedStorage, valkey: Server, record: bytes
) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    trial_id = storage.create_new_trial(study_id)
    key = study_keys(storage, study_id).live
    valkey.command("HSET", key, 0, record)
    for read in (lambda: other.get_all_trials(study_id), lambda: other.get_trial(trial_id)):
        with pytest.raises(CorruptRecordError, match="trial 0"):
            read()
    with pytest.raises(CorruptRecordError, match="trial 0"):
        other.set_trial_state_values(trial_id, FAIL)
    assert valkey.command("HGET", key, 0) == record
    assert valkey.command("HLEN", study_keys(storage, study_id).finished) == 0


def _damage_attr(server: Server, keys: StudyKeys) -> str:
    server.command("HSET", keys.user_attrs, "a", b"{")
    return keys.user_attrs


def _damage_trial_attr(server: Server, keys: StudyKeys) -> str:
    server.command("HSET", keys.trial(0), "ua", b"{")
    return ""


def _damage_step(server: Server, keys: StudyKeys) -> str:
    server.command("HSET", keys.trial(0), "i0", b"1.5")
    return ""


def _damage_param(server: Server, keys: StudyKeys) -> str:
    server.command("HSET", keys.trial(0), "px", b"\xff" * 12)
    return ""


def _damage_param_id(server: Server, keys: StudyKeys) -> str:
    server.command("HSET", keys.trial(0), "px", pack_param(2**32 - 1, 0.5, 0))
    return ""


def _damage_distribution(server: Server, keys: StudyKeys) -> str:
    server.command("LSET", keys.dists, 0, b"{")
    return keys.dists


def _lose_finished_trial(server: Server, keys: StudyKeys) -> str:
    server.command("HDEL", keys.finished, 1)
    return keys.finished


def _damage_log(server: Server, keys: StudyKeys) -> str:
    server.command("LSET", keys.log, -1, b"garbage")
    return keys.log


@pytest.mark.parametrize(
    "damage",
    [
        *(_damage_attr, _damage_trial_attr, _damage_step, _damage_param, _damage_param_id),
        *(_damage_distribution, _lose_finished_trial, _damage_log),
    ],
)
def test_damage_elsewhere_is_a_corrupt_record_too(
    storage: RedisLockedStorage,
    other: RedisLockedStorage,
    valkey: Server,
    damage: Callable[[Server, StudyKeys], str],
) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    storage.set_study_user_attr(study_id, "a", 1)
    trial_id = storage.create_new_trial(study_id)
    if damage is _damage_log:
        other.get_all_trials(study_id)
    storage.set_trial_user_attr(trial_id, "a", 1)
    storage.set_trial_param(trial_id, "x", 0.5, X)
    storage.create_new_trial(study_id, create_trial(value=1.0))
    key = damage(valkey, study_keys(storage, study_id))
    with pytest.raises(CorruptRecordError) as caught:
        pytest.fail(repr((other.get_all_trials(study_id), other.get_study_user_attrs(study_id))))
    assert key in str(caught.value)


@pytest.mark.parametrize("name", [n for n in vars(StudyKeys("", 1)) if n not in ("lock", "trial_base")])
def test_foreign_keys_where_a_study_would_stand_are_refused_and_kept(
    storage: RedisLockedStorage, valkey: Server, name: str
) -> None:
    key = getattr(study_keys(storage, 1), name)
    valkey.command("SET", key, "somebody else's")
    with pytest.raises(CorruptRecordError, match="prefix") as caught:
        storage.create_new_study(MINIMIZE, "s")
    assert caught.value.key == key
    assert valkey.command("GET", key) == b"somebody else's"
    assert valkey.command("EXISTS", *vars(registry_keys(storage)).values()) <= 1  # the last id
    assert storage.get_all_studies() == []
    assert storage.create_new_study(MINIMIZE, "s") == 2  # beside it there is room


@pytest.mark.parametrize("name", ["info", "names", "studies", "trash", "members"])
def test_foreign_keys_where_the_registry_would_stand_are_refused_and_kept(
    valkey_url: str, valkey: Server, name: str
) -> None:
    key = getattr(RegistryKeys(valkey_url.rpartition("=")[2]), name)
    valkey.command("RPUSH", key, "somebody", "else's")

    def use() -> None:
        with RedisLockedStorage(valkey_url) as storage:
            storage.create_new_study(MINIMIZE, "s")
            storage.get_all_studies()
            storage.delete_study(1)

    with pytest.raises(CorruptRecordError, match="prefix") as caught:
        use()
    assert caught.value.key == key
    assert valkey.command("LRANGE", key, 0, -1) == [b"somebody", b"else's"]


def test_another_format_is_refused_by_all_calls_that_connect(valkey: Server) -> None:
    url = f"{valkey.url}?prefix=format"
    storage = RedisLockedStorage(url)
    study_id = storage.create_new_study(MINIMIZE)
    info = registry_keys(storage).info
    valkey.command("HSET", info, "format", "2")
    before = everything(valkey, storage)
    with pytest.raises(CorruptRecordError, match="format '2'") as caught:
        RedisLockedStorage(url)
    assert caught.value.key == info
    storage.close()
    with pytest.raises(CorruptRecordError, match="format '2'"):
        storage.create_new_trial(study_id)
    assert everything(valkey, storage) == before


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_keys_is_refused(flavour: str, policy: str) -> None:
    with Server(flavour, extra=("--maxmemory-policy", policy)) as server:
        with pytest.raises(ServerConfigurationError, match=f"{policy}.*noeviction") as caught:
            RedisLockedStorage(server.url)
        assert caught.value.address == f"127.0.0.1:{server.port}"
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        RedisLockedStorage(server.url).close()


def test_a_server_without_info_is_told_what_is_missing_or_used() -> None:
    # An ACL may forbid INFO; then nothing can be said about eviction.
    with Server("valkey") as server:
        server.command("ACL", "SETUSER", "default", "-info")
        with pytest.raises(AccessDeniedError, match=r"(?i)info"):
            RedisLockedStorage(server.url)


# -- lost data -----------------------------------------------------------------------------------------


def _calls_after_the_loss(storage: RedisLockedStorage, study_id: int) -> list[Callable[[], Any]]:
    return [
        lambda: storage.get_all_trials(study_id),
        lambda: storage.get_n_trials(study_id),
        lambda: storage.create_new_trial(study_id),
        lambda: storage.get_all_studies(),
        lambda: storage.create_new_study(MINIMIZE),
        lambda: storage.set_study_user_attr(study_id, "a", 1),
    ]


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("call", range(6))
def test_a_server_that_lost_everything_is_noticed_by_every_call(flavour: str, call: int) -> None:
    with Server(flavour) as server:
        storage = RedisLockedStorage(server.url)
        study_id = storage.create_new_study(MINIMIZE)
        storage.create_new_trial(study_id)
        server.kill()
        server.start()
        for _ in range(2):  # and it stays so
            with pytest.raises(DataLostError, match="appendonly") as caught:
                _calls_after_the_loss(storage, study_id)[call]()
        assert caught.value.address == f"127.0.0.1:{server.port}"
        assert server.command("DBSIZE") == 0
        with RedisLockedStorage(server.url) as anew:
            anew.create_new_study(MINIMIZE)
        with pytest.raises(DataLostError):  # another data set by now
            _calls_after_the_loss(storage, study_id)[call]()


def test_data_that_went_without_a_restart_is_noticed_too() -> None:
    with Server("valkey") as server:
        storage = RedisLockedStorage(server.url)
        study_id = storage.create_new_study(MINIMIZE)
        storage.create_new_trial(study_id)
        server.command("FLUSHALL")
        for call in (0, 1, 2, 5):
            with pytest.raises(DataLostError):
                _calls_after_the_loss(storage, study_id)[call]()


@pytest.mark.parametrize("flavour", FLAVOURS)
@pytest.mark.parametrize("call", range(3))
def test_a_server_that_came_back_with_an_older_state_is_noticed(flavour: str, call: int) -> None:
    with Server(flavour) as server:
        storage = RedisLockedStorage(server.url)
        study_id = storage.create_new_study(MINIMIZE)
        storage.create_new_trial(study_id)
        server.command("SAVE")
        for _ in range(3):
            storage.create_new_trial(study_id, create_trial(value=1.0))
        assert len(storage.get_all_trials(study_id)) == 4
        server.kill()
        server.start()
        assert server.command("DBSIZE") > 0
        with pytest.raises(DataLostError, match="older state") as caught:
            _calls_after_the_loss(storage, study_id)[call]()
        assert caught.value.address == f"127.0.0.1:{server.port}"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_server_with_persistence_loses_nothing_in_a_restart(flavour: str) -> None:
    with Server(flavour, appendonly=True) as server:
        storage, other = RedisLockedStorage(server.url), RedisLockedStorage(server.url)
        study_id = storage.create_new_study(MINIMIZE)
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.5, X)
        other.get_all_trials(study_id)
        server.stop()
        server.start()
        storage.set_trial_user_attr(trial_id, "a", 1)
        assert storage.set_trial_state_values(trial_id, COMPLETE, [2.0])
        [trial] = other.get_all_trials(study_id)
        assert (trial.params, trial.user_attrs, trial.values) == ({"x": 0.5}, {"a": 1}, [2.0])


# -- heartbeats ----------------------------------------------------------------------------------------


def test_a_heartbeat_that_cannot_be_recorded_is_logged_and_not_raised(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with Server("valkey", appendonly=True) as server:
        storage = RedisLockedStorage(server.url, heartbeat_interval=60, timeout=0.2)
        study_id = storage.create_new_study(MINIMIZE)
        trial_id = storage.create_new_trial(study_id)
        for unknown in (trial_id + 1, 0, -1, 2**70):
            storage.record_heartbeat(unknown)
        storage.set_trial_state_values(storage.create_new_trial(study_id), FAIL)
        storage.record_heartbeat(trial_id + 1)  # a finished one by now
        server.stop()
        caplog.clear()
        storage.record_heartbeat(trial_id)
        [record] = [r for r in caplog.records if r.levelno == logging.WARNING]
        assert f"127.0.0.1:{server.port}" in record.getMessage()
        assert str(trial_id) in record.getMessage()
        server.start()
        storage.record_heartbeat(trial_id)
        assert server.command("ZRANGE", study_keys(storage, study_id).heartbeats, 0, -1) == [b"0"]


def test_heartbeats_are_of_running_trials_only(storage: RedisLockedStorage, valkey: Server) -> None:
    study_id = storage.create_new_study(MINIMIZE)
    running, waiting, finished = (
        storage.create_new_trial(study_id),
        storage.create_new_trial(study_id, create_trial(state=WAITING)),
        storage.create_new_trial(study_id, create_trial(value=1.0)),
    )
    heartbeats = study_keys(storage, study_id).heartbeats
    for trial_id in (running, waiting, finished):
        storage.record_heartbeat(trial_id)
    assert valkey.command("ZRANGE", heartbeats, 0, -1) == [b"0"]
    storage.set_trial_state_values(running, WAITING)
    assert valkey.command("EXISTS", heartbeats) == 0
    storage.set_trial_state_values(running, RUNNING)
    storage.record_heartbeat(running)
    storage.set_trial_state_values(running, FAIL)
    assert valkey.command("EXISTS", heartbeats) == 0


def test_staleness_goes_by_the_servers_clock(
    valkey_url: str, valkey: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = RedisLockedStorage(valkey_url, heartbeat_interval=10, grace_period=20)
    study_id = storage.create_new_study(MINIMIZE)
    trial_ids = [storage.create_new_trial(study_id) for _ in range(3)]
    heartbeats = study_keys(storage, study_id).heartbeats
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a worker whose clock stands still
    for trial_id in trial_ids[:2]:
        storage.record_heartbeat(trial_id)
    seconds, microseconds = map(int, valkey.command("TIME"))
    now = seconds * 1000 + microseconds // 1000
    assert abs(int(valkey.command("ZSCORE", heartbeats, 0)) - now) < 10_000
    assert storage._get_stale_trial_ids(study_id) == []
    for ago, expected in ((19_000, []), (21_000, [trial_ids[0]])):
        valkey.command("ZADD", heartbeats, now - ago, 0)
        assert storage._get_stale_trial_ids(study_id) == expected
    assert RedisLockedStorage(valkey_url, heartbeat_interval=11)._get_stale_trial_ids(study_id) == []
    assert RedisLockedStorage(valkey_url, heartbeat_interval=10)._get_stale_trial_ids(study_id) == expected
    assert RedisLockedStorage(valkey_url)._get_stale_trial_ids(study_id) == []


def test_a_heartbeat_costs_the_server_the_same_however_many_trials_there_are(
    valkey_url: str,
) -> None:
    with Server("valkey") as server:
        storage = RedisLockedStorage(server.url, heartbeat_interval=60)
        study_id = storage.create_new_study(MINIMIZE)
        executed = []
        for n in (2, 500):
            trial_ids = [storage.create_new_trial(study_id) for _ in range(n)]
            for trial_id in trial_ids:
                storage.record_heartbeat(trial_id)
            server.command("CONFIG", "RESETSTAT")
            storage.record_heartbeat(trial_ids[0])
            assert storage._get_stale_trial_ids(study_id) == []
            stats = server.command("INFO", "commandstats")
            executed.append({name: each["calls"] for name, each in stats.items()})
        assert executed[0] == executed[1]
        scans = ("hgetall", "hkeys", "hvals", "lrange", "zrange", "smembers", "keys", "scan")
        assert not {f"cmdstat_{name}" for name in scans} & set(executed[0])


# -- secrets -------------------------------------------------------------------------------------------


def test_a_password_is_in_no_representation_log_line_or_error(caplog: pytest.LogCaptureFixture) -> None:
    secret = "hush-hush-7351"  # noqa: S105 of a server of our own
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []

    def fail(call: Callable[[], Any]) -> None:
        try:
            call()
        except DLockError as error:
            shown.extend(traceback.format_exception(error))
            shown.append(repr(pickle.loads(pickle.dumps(error)).__dict__))
            shown.append(repr(error))
        else:
            pytest.fail("no error")

    with Server("valkey", password=secret) as server:
        storage = RedisLockedStorage(server.url, timeout=0.2)
        study = optuna.create_study(storage=storage, study_name="s")
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        shown += [
            repr(storage),
            str(storage),
            f"{storage}",
            repr(storage._server),
            repr(storage.__getstate__()),
        ]
        shown += [repr(storage.lock("a")), repr(storage._node), repr(study)]
        fail(lambda: RedisLockedStorage(server.url.replace(secret, secret + "x"), timeout=0.2))
        fail(lambda: RedisLockedStorage(f"redis://127.0.0.1:{server.port}/0", timeout=0.2))
        fail(lambda: RedisLockedStorage(server.url.replace("/0", "/zero")))
        fail(lambda: RedisLockedStorage(server.url.replace("redis://", "nosuch://")))
        fail(lambda: RedisLockedStorage(f"redis://127.0.0.1:{server.port}/0?password={secret}&unknown=1"))
        server.command("SET", "p:{registry}:info", "foreign")
        fail(lambda: RedisLockedStorage(server.url + "?prefix=p"))
        storage._node.close()
        server.kill()
        fail(lambda: storage.get_all_studies())
        fail(lambda: storage.lock("a").acquire(timeout=0.2))
        storage.record_heartbeat(1)  # logs a warning
    assert len(shown) > 20
    assert not [line for line in shown if secret in line]
    assert caplog.records
    assert secret not in caplog.text
    assert secret.encode() in pickle.dumps(storage)  # which is why a pickled storage is to be kept safe


def test_a_server_that_is_away_is_named_in_the_error() -> None:
    port = free_port()
    start = time.monotonic()
    with pytest.raises(StorageUnavailableError, match=f"127.0.0.1:{port}.*0.3 s") as caught:
        RedisLockedStorage(f"redis://:hush@127.0.0.1:{port}/0", timeout=0.3)
    assert time.monotonic() - start < 5
    assert (caught.value.address, caught.value.timeout) == (f"127.0.0.1:{port}", 0.3)
