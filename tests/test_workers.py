"""Who runs which trial, as the storage records it by itself; and the heartbeats of what this process runs."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from optuna_dlock import CorruptRecordError, RedisLockedStorage, StudyNotFoundError, Worker, runners
from optuna_dlock.codec import pack_running
from optuna_dlock.keys import StudyKeys
from optuna_dlock.scripts import script
from optuna_dlock.worker import WorkerProcess, this_worker
from tests.servers import Server

MINIMIZE = [StudyDirection.MINIMIZE]
WAITING, RUNNING, COMPLETE = TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE
PROCESSES = multiprocessing.get_context("forkserver")
FORKS: Any = multiprocessing.get_context("fork")

pytestmark = pytest.mark.filterwarnings(
    "ignore:Heartbeat of storage is supposed to be used with Study.optimize",
    "ignore:.*multi-threaded.*:DeprecationWarning",
)
Connect = Callable[..., RedisLockedStorage]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another thread or process does."""
    deadline = time.monotonic() + 60.0
    while not condition():
        assert time.monotonic() < deadline, f"not within a minute: {what}"
        time.sleep(0.005)


def _keys(storage: RedisLockedStorage, study_id: int) -> StudyKeys:
    return storage._registry.study_keys(study_id)


# -- hosts -----------------------------------------------------------------------------------------------


def test_a_trial_is_of_whoever_created_it_running_or_claimed_it(any_url: str, connect: Connect) -> None:
    one, two = connect(any_url, worker_name="one"), connect(any_url, worker_name="two")
    study_id = one.create_new_study(MINIMIZE)
    one.create_new_trial(study_id)
    claimed = one.create_new_trial(study_id, create_trial(state=WAITING))
    one.create_new_trial(study_id, create_trial(state=WAITING))
    one.create_new_trial(study_id, create_trial(value=1.0))
    two.create_new_trial(study_id)
    assert two.set_trial_state_values(claimed, RUNNING)
    two.set_trial_state_values(claimed, COMPLETE, [1.0])
    for storage in (one, two, connect(any_url)):
        found = storage.get_trial_workers(study_id)
        assert {number: worker.name for number, worker in found.items()} == {0: "one", 1: "two", 4: "two"}
        assert set(found.values()) == {one.worker, two.worker}
    assert one.worker == Worker(socket.gethostname(), os.getpid(), "one")
    # Put back in the queue, it is nobody's; the next one that claims it has it.
    two.set_trial_state_values(study_id << 32 | 4, WAITING)
    assert 4 not in one.get_trial_workers(study_id)
    one.set_trial_state_values(study_id << 32 | 4, RUNNING)
    assert two.get_trial_workers(study_id, first=2) == {4: one.worker}


def _work(url: str, folder: Path, name: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with RedisLockedStorage(url, worker_name=name) as storage:
        study = optuna.load_study(study_name="s", storage=storage, sampler=optuna.samplers.RandomSampler())
        for _ in range(8):
            trial = study.ask()
            (folder / f"{trial.number}").write_text(f"{os.getpid()} {name}")
            study.tell(trial, trial.suggest_float("x", 0, 1))


def test_each_trial_of_several_processes_is_of_the_process_that_ran_it(
    any_url: str, connect: Connect, tmp_path: Path
) -> None:
    study = optuna.create_study(study_name="s", storage=connect(any_url))
    for x in range(12):
        study.enqueue_trial({"x": x / 12})
    workers = [PROCESSES.Process(target=_work, args=(any_url, tmp_path, f"w{i}")) for i in range(3)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(60)
        assert process.exitcode == 0
    ran = {}
    for path in tmp_path.iterdir():
        pid, name = path.read_text().split()
        ran[int(path.name)] = Worker(socket.gethostname(), int(pid), name)
    assert len(ran) == 24
    assert study._storage.get_trial_workers(study._study_id) == ran  # type: ignore[attr-defined]
    assert len(set(ran.values())) == 3
    for trial in study.trials:
        assert trial.user_attrs == {}
        assert set(trial.system_attrs) <= {"fixed_params"}


def test_the_environment_names_host_and_worker(
    valkey_url: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPTUNA_DLOCK_HOST", "m8")
    assert connect(valkey_url).worker.host == "m8"
    assert connect(valkey_url).worker.name.startswith(f"m8:{os.getpid()}:")
    monkeypatch.setenv("OPTUNA_DLOCK_WORKER", "trainer-3")
    assert connect(valkey_url).worker == Worker("m8", os.getpid(), "trainer-3")
    assert connect(valkey_url, worker_name="given").worker.name == "given"


def test_the_default_name_is_unique_and_a_name_is_not_empty(valkey_url: str, connect: Connect) -> None:
    assert len({connect(valkey_url).worker.name for _ in range(5)}) == 5
    with pytest.raises(ValueError, match="worker_name"):
        RedisLockedStorage(valkey_url, worker_name="")


@pytest.mark.parametrize("name", ["given", None])
def test_a_forked_child_has_a_pid_and_a_name_of_its_own(
    any_url: str, connect: Connect, name: str | None
) -> None:
    storage = connect(any_url, worker_name=name)
    study_id = storage.create_new_study(MINIMIZE)
    storage.create_new_trial(study_id)
    child = FORKS.Process(target=storage.create_new_trial, args=(study_id,))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    storage.create_new_trial(study_id)
    found = storage.get_trial_workers(study_id)
    assert found[0] == found[2] == storage.worker
    assert found[1].pid == child.pid
    assert found[1].name != storage.worker.name
    if name:
        assert found[1].name == f"given:{child.pid}"


def test_strange_names_come_back_as_they_were(any_url: str, connect: Connect) -> None:
    name = 'a "b" \\ \n 工作 \udc80 1 [2]'
    storage = connect(any_url, worker_name=name)
    study_id = storage.create_new_study(MINIMIZE)
    storage.create_new_trial(study_id)
    assert connect(any_url).get_trial_workers(study_id)[0].name == name


def test_a_worker_describes_itself_once_per_study(any_url: str, connect: Connect) -> None:
    storage = connect(any_url)
    for first in (None, create_trial(state=WAITING)):
        study_id = storage.create_new_study(MINIMIZE)
        trial_id = storage.create_new_trial(study_id, first)
        if first is not None:
            assert isinstance(storage._studies[study_id]._me, bytes)
            storage.set_trial_state_values(trial_id, RUNNING)
        assert storage._studies[study_id]._me == 1
        storage.create_new_trial(study_id)
        assert storage._node.command("HGETALL", _keys(storage, study_id).workers)[1] == b"1"


def test_a_creation_that_is_sent_twice_is_noted_once(valkey_url: str, connect: Connect) -> None:
    """G6: also the first one, which describes the worker."""
    storage = connect(valkey_url)
    study_id = storage.create_new_study(MINIMIZE)
    k = _keys(storage, study_id)
    keys = [k.meta, k.lock, k.ops, k.live, k.log, k.waiting, k.finished, k.order, k.points, k.reissues]
    me = storage._process.describe()
    args = (pack_running(datetime.now()), "client", 1, 0, 16, me, 0)
    replies = [
        storage._node.run(script("create_trial"), [*keys, k.ran_by, k.workers, k.heartbeats], args)
        for _ in range(2)
    ]
    assert replies[0] == replies[1]
    assert replies[0][5] == 1
    assert storage._node.command("LRANGE", k.ran_by, 0, -1) == [b"1"]
    assert storage._node.command("HLEN", k.workers) == 1


def test_trials_of_an_earlier_version_have_no_worker_and_later_ones_have_theirs(
    valkey_url: str, valkey: Server, connect: Connect
) -> None:
    old = connect(valkey_url)
    study = optuna.create_study(storage=old)
    study.add_trials([create_trial(value=1.0) for _ in range(2500)])
    old.create_new_trial(study._study_id)
    study.enqueue_trial({})
    study.enqueue_trial({})
    keys = _keys(old, study._study_id)
    valkey.command("DEL", keys.ran_by, keys.workers)
    storage = connect(valkey_url)
    assert storage.get_trial_workers(study._study_id) == {}
    assert storage.set_trial_state_values(study._study_id << 32 | 2501, RUNNING)
    storage.create_new_trial(study._study_id)
    assert storage.get_trial_workers(study._study_id) == dict.fromkeys((2501, 2503), storage.worker)
    assert valkey.command("LLEN", keys.ran_by) == 2504


def test_many_trials_are_read_in_chunks_and_two_round_trips(
    any_url: str, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "_CHUNK", 10)
    one, two = connect(any_url), connect(any_url)
    study_id = one.create_new_study(MINIMIZE)
    wanted = {one.create_new_trial(study_id) & 0xFFFF: one.worker for _ in range(25)}
    one.get_trial_workers(study_id)
    wanted |= {two.create_new_trial(study_id) & 0xFFFF: two.worker for _ in range(25)}
    for first in (0, 7, 30, 49, 50, 1000):
        before = one._node.waits
        found = one.get_trial_workers(study_id, first)
        assert found == {number: worker for number, worker in wanted.items() if number >= first}
        assert one._node.waits - before <= 2


def test_who_ran_it_takes_few_bytes_of_the_server(valkey_url: str, valkey: Server, connect: Connect) -> None:
    storages = [connect(valkey_url) for _ in range(30)]
    study_id = storages[0].create_new_study(MINIMIZE)
    for number in range(3000):
        storages[number % 30].create_new_trial(study_id)
    keys = _keys(storages[0], study_id)
    assert valkey.command("MEMORY", "USAGE", keys.ran_by, "SAMPLES", 0) / 3000 <= 6
    assert valkey.command("MEMORY", "USAGE", keys.workers, "SAMPLES", 0) / 30 <= 250


def test_a_study_that_is_not_there_and_a_damaged_entry_are_errors(
    valkey_url: str, valkey: Server, connect: Connect
) -> None:
    storage = connect(valkey_url)
    study_id = storage.create_new_study(MINIMIZE)
    storage.create_new_trial(study_id)
    with pytest.raises(StudyNotFoundError):
        storage.get_trial_workers(study_id + 1)
    valkey.command("HSET", _keys(storage, study_id).workers, "[1]", 2)
    with pytest.raises(CorruptRecordError, match=":workers"):
        storage.get_trial_workers(study_id)


# -- which process is gone -------------------------------------------------------------------------------


def _process_of(pid: int) -> WorkerProcess:
    here = this_worker("w", "client")
    started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return WorkerProcess(Worker("h", pid, "w"), "client", here.place, started)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
def test_a_process_is_dead_if_it_is_gone_a_zombie_or_another_one_has_its_pid() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    process = _process_of(child.pid)
    assert not process.is_dead()
    assert WorkerProcess(process.worker, "c", process.place, "12").is_dead(), "its pid is in use again"
    assert not WorkerProcess(process.worker, "c", process.place, "").is_dead(), "nobody knows when it began"
    child.kill()
    wait_until(lambda: ") Z " in Path(f"/proc/{child.pid}/stat").read_text(), "it is a zombie")
    assert process.is_dead()
    child.communicate()
    assert process.is_dead()
    elsewhere = WorkerProcess(process.worker, "c", "another machine", process.started)
    assert not elsewhere.is_dead(), "which processes there are elsewhere cannot be seen from here"


# -- heartbeats ------------------------------------------------------------------------------------------


def _brisk(storage: RedisLockedStorage) -> RedisLockedStorage:
    """Heartbeats in quick succession, so that tests need not wait."""
    assert storage._heartbeats is not None
    storage._heartbeats.interval = 0.02
    return storage


def _scores(storage: RedisLockedStorage, study_id: int) -> dict[int, int]:
    """When the heartbeat of each trial was, by the server's clock; on several masters, by some master's."""
    flat = storage._node.command("ZRANGE", _keys(storage, study_id).heartbeats, 0, -1, "WITHSCORES")
    return {int(n): int(score) for n, score in zip(flat[::2], flat[1::2], strict=True)}


def _wait_for_beats(storage: RedisLockedStorage, study_id: int, *numbers: int) -> None:
    """Wait for two heartbeats of each of these trials."""
    for _ in range(2):
        before = _scores(storage, study_id)
        wait_until(
            lambda before=before: all(  # type: ignore[misc]
                _scores(storage, study_id).get(n, 0) > before.get(n, 0) for n in numbers
            ),
            f"{numbers} have heartbeats",
        )


def _is_quiet(storage: RedisLockedStorage) -> bool:
    assert storage._heartbeats is not None
    return storage._heartbeats._stop is None


def test_trials_have_heartbeats_without_optimize_until_the_last_one_ends(
    any_url: str, connect: Connect
) -> None:
    storage, looker = _brisk(connect(any_url, heartbeat_interval=1)), connect(any_url)
    study = optuna.create_study(storage=storage)
    study_id = study._study_id
    first, second = study.ask(), study.ask()
    _wait_for_beats(looker, study_id, 0, 1)
    study.tell(first, 1.0)
    _wait_for_beats(looker, study_id, 1)
    assert 0 not in _scores(looker, study_id)
    study.tell(second, 1.0)
    wait_until(lambda: _is_quiet(storage), "the thread ends")
    # A claimed one too; and the thread begins again.
    study.enqueue_trial({})
    study.ask()
    _wait_for_beats(looker, study_id, 2)


def test_who_sends_no_heartbeats_is_never_stale(any_url: str, connect: Connect) -> None:
    silent = connect(any_url)
    study_id = silent.create_new_study(MINIMIZE)
    silent.create_new_trial(study_id)
    waiting = silent.create_new_trial(study_id, create_trial(state=WAITING))
    silent.set_trial_state_values(waiting, RUNNING)
    assert _scores(silent, study_id) == {}
    assert silent._heartbeats is None


def test_one_call_tells_of_all_trials(valkey_url: str, connect: Connect) -> None:
    storage = connect(valkey_url, heartbeat_interval=60)
    study_id = storage.create_new_study(MINIMIZE)
    for _ in range(100):
        storage.create_new_trial(study_id)
    assert set(_scores(storage, study_id).values()) == {0}, "none so far"
    heartbeats = storage._heartbeats
    assert heartbeats is not None
    stop = heartbeats._stop
    assert stop is not None
    heartbeats.beat(stop)
    before = heartbeats._node.waits  # type: ignore[union-attr]
    assert heartbeats.beat(stop)
    assert heartbeats._node.waits - before == 1  # type: ignore[union-attr]
    scores = _scores(storage, study_id)
    assert len(scores) == 100
    assert min(scores.values()) > 0


def test_the_thread_survives_a_server_that_is_away_and_any_other_error(
    connect: Connect, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server("valkey", appendonly=True) as server:
        storage = _brisk(connect(server.url, heartbeat_interval=1, timeout=0.3))
        study_id = storage.create_new_study(MINIMIZE)
        storage.create_new_trial(study_id)
        looker = connect(server.url)
        _wait_for_beats(looker, study_id, 0)

        def warned(word: str) -> bool:
            return any(r.levelno == logging.WARNING and word in r.getMessage() for r in caplog.records)

        server.stop()
        wait_until(lambda: warned(f"127.0.0.1:{server.port}"), "it is logged")
        server.start()
        _wait_for_beats(looker, study_id, 0)
        assert storage._heartbeats is not None
        with monkeypatch.context() as patch:
            patch.setattr(storage._heartbeats, "_send", lambda: 1 / 0)
            wait_until(lambda: warned("division by zero"), "it is logged")
        _wait_for_beats(looker, study_id, 0)


def test_a_worker_that_waits_for_a_lock_lives(any_url: str, connect: Connect) -> None:
    storage, looker = _brisk(connect(any_url, heartbeat_interval=1)), connect(any_url)
    study_id = storage.create_new_study(MINIMIZE)
    storage.create_new_trial(study_id)
    thread = threading.Thread(target=storage.create_new_trial, args=(study_id,))
    with looker.lock(f"study:{study_id}"):
        thread.start()
        time.sleep(0.05)
        _wait_for_beats(looker, study_id, 0)
        assert looker.get_n_trials(study_id) == 1, "it waits"
    thread.join(60)
    assert looker.get_n_trials(study_id) == 2


def _ask_and_wait(storage: RedisLockedStorage, study_id: int, end: Path) -> None:
    _brisk(storage).create_new_trial(study_id)
    wait_until(end.exists, "told to end")


def test_a_forked_child_keeps_its_own_trials_alive_and_not_its_parents(
    any_url: str, connect: Connect, tmp_path: Path
) -> None:
    storage, looker = _brisk(connect(any_url, heartbeat_interval=1)), connect(any_url)
    study_id = storage.create_new_study(MINIMIZE)
    storage.create_new_trial(study_id)
    _wait_for_beats(looker, study_id, 0)
    child = FORKS.Process(target=_ask_and_wait, args=(storage, study_id, tmp_path / "end"))
    child.start()
    try:
        wait_until(lambda: looker.get_n_trials(study_id) == 2, "the child has a trial")
        _wait_for_beats(looker, study_id, 0, 1)
        storage.close()
        before = _scores(looker, study_id)[0]
        _wait_for_beats(looker, study_id, 1)
        assert _scores(looker, study_id)[0] == before
    finally:
        (tmp_path / "end").touch()
        child.join(60)
    assert child.exitcode == 0


def test_a_storage_that_nobody_has_any_more_sends_none(valkey_url: str, connect: Connect) -> None:
    storage, looker = _brisk(RedisLockedStorage(valkey_url, heartbeat_interval=1)), connect(valkey_url)
    study_id = storage.create_new_study(MINIMIZE)
    storage.create_new_trial(study_id)
    _wait_for_beats(looker, study_id, 0)
    assert storage._heartbeats is not None
    stop = storage._heartbeats._stop
    assert stop is not None
    storage.close()
    assert stop.is_set()
    storage.create_new_trial(study_id)
    stop = storage._heartbeats._stop
    assert stop is not None
    storage._node.close()
    del storage
    import gc

    gc.collect()
    assert stop.is_set()


def test_a_trial_without_any_heartbeat_is_stale_a_grace_period_after_it_was_first_seen(
    any_url: str, connect: Connect
) -> None:
    """Its worker was killed before the first one; or is about to send it, and must not be taken for dead."""
    storage = connect(any_url, heartbeat_interval=60)
    study_id = storage.create_new_study(MINIMIZE)
    trial_id = storage.create_new_trial(study_id)
    looker = connect(any_url, heartbeat_interval=1, grace_period=1)
    time.sleep(1.1)
    seen = time.monotonic()
    assert looker._get_stale_trial_ids(study_id) == []
    wait_until(lambda: looker._get_stale_trial_ids(study_id) == [trial_id], "it is stale")
    assert time.monotonic() - seen > 0.9
