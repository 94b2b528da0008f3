"""What a caller meets when somebody holds the study, presses Ctrl-C, or names a server that is none."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from optuna.distributions import FloatDistribution
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import DLockError, LockNotAcquiredError, StorageUnavailableError
from tests.servers import Server

COMPLETE, RUNNING, WAITING = TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING


@pytest.fixture
def study(valkey_url: str) -> tuple[RedisLockedStorage, int]:
    """A storage and the id of a study on it."""
    storage = RedisLockedStorage(valkey_url)
    return storage, storage.create_new_study([StudyDirection.MINIMIZE])


# -- while somebody holds the lock of the study ------------------------------------------------------

Section = Callable[[RedisLockedStorage, int], Any]
# Each gets the id of a study whose trial 0 runs and whose trial 1 waits.
SECTIONS: dict[str, Section] = {
    "create": lambda s, study_id: s.create_new_trial(study_id),
    "claim": lambda s, study_id: s.set_trial_state_values(study_id << 32 | 1, RUNNING),
    "finish": lambda s, study_id: s.set_trial_state_values(study_id << 32, COMPLETE, [1.0]),
    "attribute": lambda s, study_id: s.set_study_user_attr(study_id, "a", 1),
    "delete": lambda s, study_id: s.delete_study(study_id),
}


def _prepare(storage: RedisLockedStorage, study_id: int) -> None:
    storage.create_new_trial(study_id)
    storage.create_new_trial(study_id, create_trial(state=WAITING))


def _state(storage: RedisLockedStorage, study_id: int) -> Any:
    trials = [(t.state, t.values) for t in storage.get_all_trials(study_id)]
    return trials, storage.get_study_user_attrs(study_id)


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_gives_up_after_the_timeout_and_names_the_holder(
    study: tuple[RedisLockedStorage, int], valkey_url: str, name: str
) -> None:
    holder, study_id = study
    _prepare(holder, study_id)
    before = _state(holder, study_id)
    storage = RedisLockedStorage(valkey_url, timeout=0.3)
    with holder.lock(f"study:{study_id}"):
        start = time.monotonic()
        with pytest.raises(LockNotAcquiredError) as caught:
            SECTIONS[name](storage, study_id)
        assert 0.25 < time.monotonic() - start < 30
        error = caught.value
        assert error.__dict__["name"] == f"study:{study_id}"
        assert f"{socket.gethostname()}:{os.getpid()}:" in str(error.__dict__["holder"])
        assert str(error.__dict__["holder"]) in str(error)
        assert error.__dict__["held_for"] >= 0.2
        assert _state(storage, study_id) == before  # reads do not wait, and nothing was written
    SECTIONS[name](storage, study_id)  # and now it goes


@pytest.mark.parametrize("name", SECTIONS)
def test_a_section_waits_while_the_holders_own_calls_go_on(
    study: tuple[RedisLockedStorage, int], valkey_url: str, name: str
) -> None:
    holder, study_id = study
    _prepare(holder, study_id)
    storage = RedisLockedStorage(valkey_url)
    failures: list[BaseException] = []

    def call() -> None:
        try:
            SECTIONS[name](storage, study_id)
        except BaseException as error:
            failures.append(error)

    other = threading.Thread(target=call)
    with holder.lock(f"study:{study_id}"):
        other.start()
        first = holder.create_new_trial(study_id)
        assert holder.set_trial_state_values(first, COMPLETE, [2.0])
        holder.set_study_user_attr(study_id, "holder", True)
        other.join(0.2)
        assert other.is_alive(), "it did not wait"
        trials, attrs = _state(holder, study_id)
        assert [state for state, _ in trials] == [RUNNING, WAITING, COMPLETE]
        assert attrs == {"holder": True}
    other.join(30)
    assert not other.is_alive()
    assert failures == []
    if name == "create":
        assert [t.number for t in holder.get_all_trials(study_id)] == [0, 1, 2, 3]
    elif name == "delete":
        with pytest.raises(KeyError):
            holder.get_all_trials(study_id)
    else:
        assert _state(holder, study_id) != (trials, attrs)


def test_a_holder_may_delete_the_study_it_holds(study: tuple[RedisLockedStorage, int]) -> None:
    holder, study_id = study
    with holder.lock(f"study:{study_id}"):
        holder.delete_study(study_id)
    assert holder.get_all_studies() == []


def test_writes_to_a_running_trial_do_not_wait_for_the_holder(
    study: tuple[RedisLockedStorage, int], valkey_url: str
) -> None:
    holder, study_id = study
    worker = RedisLockedStorage(valkey_url, timeout=0.3)
    trial_id = worker.create_new_trial(study_id)
    with holder.lock(f"study:{study_id}"):
        worker.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1))
        worker.set_trial_intermediate_value(trial_id, 0, 0.5)
        worker.record_heartbeat(trial_id)
        assert worker.get_n_trials(study_id) == 1
        assert holder.get_trial(trial_id).params == {"x": 0.5}


# -- Ctrl-C ------------------------------------------------------------------------------------------


def _interrupt_next_read(storage: RedisLockedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C comes after the request was sent and before its reply was read."""
    channel: Any = storage._node._channel
    pressed = iter([KeyboardInterrupt])

    class Interrupted:
        send = staticmethod(channel.send)
        close = staticmethod(channel.close)

        @staticmethod
        def read() -> Any:
            for interrupt in pressed:
                raise interrupt
            return channel.read()

    monkeypatch.setattr(storage._node, "_channel", Interrupted())


CALLS: dict[str, Section] = {
    **SECTIONS,
    "get": lambda s, study_id: s.get_trial(study_id << 32 | 1),
    "get all": lambda s, study_id: s.get_all_trials(study_id),
    "best": lambda s, study_id: s.get_best_trial(study_id),
    "attributes": lambda s, study_id: s.get_study_user_attrs(study_id),
    "studies": lambda s, _: s.get_all_studies(),
    "heartbeat": lambda s, study_id: s.record_heartbeat(study_id << 32),
}


@pytest.mark.parametrize("outstanding", [0, 3])
@pytest.mark.parametrize("name", CALLS)
def test_after_ctrl_c_every_reply_is_the_one_to_its_own_call(
    study: tuple[RedisLockedStorage, int],
    valkey_url: str,
    name: str,
    outstanding: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage, study_id = study
    _prepare(storage, study_id)
    storage.get_all_trials(study_id)
    for step in range(outstanding):
        storage.set_trial_intermediate_value(study_id << 32, step, float(step))
    _interrupt_next_read(storage, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        CALLS[name](storage, study_id)
    checker = RedisLockedStorage(valkey_url)
    if name == "delete" and study_id not in [s._study_id for s in checker.get_all_studies()]:
        return
    assert storage.get_study_id_from_name(storage.get_study_name_from_id(study_id)) == study_id
    assert storage.get_study_user_attrs(study_id) == checker.get_study_user_attrs(study_id)
    assert storage.get_all_trials(study_id) == checker.get_all_trials(study_id)
    for number in range(storage.get_n_trials(study_id)):
        assert storage.get_trial(study_id << 32 | number) == checker.get_trial(study_id << 32 | number)
    running = storage.get_trial(study_id << 32)
    if name != "finish":
        assert running.intermediate_values == {step: float(step) for step in range(outstanding)}
    new = storage.create_new_trial(study_id)
    assert new == checker.get_all_trials(study_id)[-1]._trial_id


# -- servers that are none ---------------------------------------------------------------------------


@pytest.fixture(params=[b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"\x00\xff\x00"])
def stranger(request: pytest.FixtureRequest) -> Iterator[int]:
    """Port of a server of another kind."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    try:
                        connection.recv(1000)
                        connection.sendall(request.param)
                        connection.recv(1000000)
                    except OSError:
                        pass

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(10)


def test_a_server_of_another_kind_is_named_at_once(stranger: int) -> None:
    start = time.monotonic()
    with pytest.raises(DLockError, match=f"127.0.0.1:{stranger}.* is no Redis"):
        RedisLockedStorage(f"redis://127.0.0.1:{stranger}/0", timeout=30)
    assert time.monotonic() - start < 10


# -- a server that is away ---------------------------------------------------------------------------


def test_deferred_writes_survive_a_time_without_the_server() -> None:
    with Server("valkey", appendonly=True, extra=("--appendfsync", "always")) as server:
        storage = RedisLockedStorage(server.url, timeout=0.3)
        study_id = storage.create_new_study([StudyDirection.MINIMIZE])
        trial_id = storage.create_new_trial(study_id)
        storage.set_trial_param(trial_id, "x", 0.25, FloatDistribution(0, 1))
        server.kill()
        storage.set_trial_intermediate_value(trial_id, 0, 0.5)
        with pytest.raises(StorageUnavailableError):
            storage.set_trial_state_values(trial_id, COMPLETE, [1.0])
        server.start()
        assert storage.get_trial(trial_id).state is RUNNING
        assert storage.set_trial_state_values(trial_id, COMPLETE, [1.0])
        trial = RedisLockedStorage(server.url).get_trial(trial_id)
        assert (trial.params, trial.intermediate_values, trial.values) == ({"x": 0.25}, {0: 0.5}, [1.0])
