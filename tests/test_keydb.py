"""KeyDB masters that replicate: their streams carry nothing of ours, and a full resync changes nothing."""

from __future__ import annotations

import time
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

import optuna_dlock.master
from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import UpdateFinishedTrialError
from optuna_dlock.scripts import NO_TRIAL, script
from tests.contention.crew import wait_until
from tests.masters import Masters
from tests.servers import Server, find_binary

NO_KEYDB = pytest.mark.skipif(not find_binary("keydb"), reason="no keydb server here")
# The scripts as KeyDB gets them run on Valkey as well, so that some of this is tested without a KeyDB.
SERVERS = ["valkey", pytest.param("keydb", marks=NO_KEYDB)]
Copies = list[tuple[Server, dict[bytes, Any]]]
AT_WORK = {b"live", b"waiting", b"heartbeats", b"t:0", b"leases"}  # keys that are gone once the work is done


@pytest.fixture
def as_keydb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every server is taken for a KeyDB."""
    fields = optuna_dlock.master._fields
    monkeypatch.setattr(optuna_dlock.master, "_fields", lambda info: {**fields(info), "mvcc_depth": "0"})


def copies_of(masters: Masters) -> Copies:
    """What the peers of each master would hold of it after a full resync now."""
    return [
        (server, {key: server.command(b"DUMP", key) for key in server.command("KEYS", "*")})
        for server in masters.servers
    ]


def names_on(server: Server) -> set[bytes]:
    """The last parts of the key names on a server."""
    return {key.rpartition(b"}:")[2] for key in server.command("KEYS", "*")}


def bring_back(copies: Copies) -> list[bytes]:
    """What a full resync does with them: keys that exist are newer and stay, deleted ones return."""
    returned = []
    for server, records in copies:
        for key, record in records.items():
            if not server.command("EXISTS", key):
                server.command(b"RESTORE", key, 0, record)
                returned.append(key)
    return returned


def at_work(storage: RedisLockedStorage) -> tuple[optuna.Study, Any]:
    """A study with a queue, a running trial that was written to, a log and heartbeats."""
    study = optuna.create_study(storage=storage, study_name="s")
    study.enqueue_trial({"x": 1.0})
    study.enqueue_trial({"x": 2.0})
    trial = study.ask()
    trial.suggest_float("x", 0, 5)
    trial.set_user_attr("note", "from before")
    storage.record_heartbeat(trial._trial_id)
    return study, trial


@pytest.mark.parametrize("kind", SERVERS)
def test_deleted_keys_that_come_back_mean_nothing(kind: str, as_keydb: None) -> None:
    """Keydb-facts.md 4."""
    with Masters(kind, 3) as masters:
        storage = RedisLockedStorage(masters.url)
        study, trial = at_work(storage)
        lock = storage.lock("mine")
        lock.acquire()
        wait_until(lambda: names_on(masters.servers[0]) >= AT_WORK, "the first master has run it all", 5.0)
        copies = copies_of(masters)
        study.tell(trial, 1.0)
        study.tell(study.ask(), 2.0)
        lock.release()
        wait_until(lambda: states(masters, "live", "order") == 1, "all masters have run it", 5.0)
        wait_until(lambda: not masters.servers[0].command("KEYS", "*:leases"), "the lock is free there", 5.0)
        returned = bring_back(copies[:1])  # one master; what it says and what the others say must not differ
        returned.sort(key=lambda key: b":t:" not in key)
        assert {key.rpartition(b"}:")[2] for key in returned} == AT_WORK

        other = RedisLockedStorage(masters.url)
        seen = optuna.load_study(storage=other, study_name="s")
        assert [t.state for t in seen.trials] == [TrialState.COMPLETE] * 2
        with pytest.raises(UpdateFinishedTrialError):
            other.set_trial_user_attr(trial._trial_id, "late", 1)
        node, keys = storage._node, storage._registry.study_keys(study._study_id)
        late = node.run(
            script("set_trial_field"),
            [keys.trial(0), keys.log, keys.meta, keys.live],
            [0, "another", "Ulate", "1", 1],
        )
        assert late == NO_TRIAL
        assert returned[0] not in masters.servers[0].command("KEYS", "*:t:*")
        time.sleep(1.1)
        assert (
            RedisLockedStorage(masters.url, heartbeat_interval=1, grace_period=1)._get_stale_trial_ids(
                study._study_id
            )
            == []
        )
        assert seen.ask().number == 2
        assert seen.ask().number == 3  # and none of the queue
        again = optuna.create_study(storage=other, study_name="s2")
        other.delete_study(again._study_id)
        assert [s.study_name for s in other.get_all_studies()] == ["s"]
        assert other.lock("mine").acquire(timeout=5.0)
        assert states(masters, "meta", "live", "order", "log", "waiting") == 1


@pytest.mark.parametrize("kind", SERVERS)
def test_a_deleted_study_that_comes_back_stays_deleted(kind: str, as_keydb: None) -> None:
    with Masters(kind, 3) as masters:
        storage = RedisLockedStorage(masters.url)
        study, _ = at_work(storage)
        copies = copies_of(masters)
        storage.delete_study(study._study_id)
        bring_back(copies)
        other = RedisLockedStorage(masters.url)
        assert other.get_all_studies() == []
        assert optuna.create_study(storage=other, study_name="s")._study_id == study._study_id + 1


@NO_KEYDB
def test_nothing_of_ours_is_on_the_stream_of_active_replicas() -> None:
    with Masters("keydb", 2) as masters:
        storage = RedisLockedStorage(masters.url)
        study, trial = at_work(storage)
        study.tell(trial, 1.0)
        time.sleep(0.5)  # a stream carries what it does within milliseconds
        for server, other in zip(masters.servers, reversed(masters.servers), strict=True):
            foreign = [k for k in server.command("KEYS", f"*@127.0.0.1:{other.port}.*") if b".{" not in k]
            assert foreign == []
            assert server.command("KEYS", f"*@127.0.0.1:{server.port}.*")


@NO_KEYDB
def test_a_full_resync_between_masters_in_use_changes_nothing() -> None:
    """The peers hold copies from when one was started anew; a long cut makes both of them send all of it."""
    with Masters("keydb", 2, extra=("--repl-backlog-size", "16kb")) as masters:
        storage = RedisLockedStorage(masters.url)
        study, trial = at_work(storage)
        masters.restart_empty(1)
        masters.wait_until_linked()
        study.tell(trial, 1.0)
        study.tell(study.ask(), 2.0)
        served = _full_syncs(masters)
        masters.cut(0, 1)
        for number in range(100):
            for server in masters.servers:
                server.command("SET", f"others:{number}", "v" * 1000)
        masters.mend(0, 1)
        masters.wait_until_linked()
        wait_until(
            lambda: all(now > before for now, before in zip(_full_syncs(masters), served, strict=True)),
            "both have sent all",
            20.0,
        )
        other = RedisLockedStorage(masters.url)
        seen = optuna.load_study(storage=other, study_name="s")
        assert [t.state for t in seen.trials] == [TrialState.COMPLETE] * 2
        assert seen.ask().number == 2
        with pytest.raises(UpdateFinishedTrialError):
            other.set_trial_user_attr(trial._trial_id, "late", 1)
        assert states(masters, "meta", "live", "order", "waiting") == 1


def states(masters: Masters, *names: str) -> int:
    """How many different things the masters hold under these names."""
    found = set()
    for server in masters.servers:
        run = server.command("INFO", "server")["run_id"][:8]
        base = f"optuna@127.0.0.1:{server.port}.{run}:{{1}}:"
        found.add(tuple(_content(server, base + name) for name in names))
    return len(found)


def _content(server: Server, key: str) -> Any:
    reads = {"hash": ("HGETALL",), "list": ("LRANGE", 0, -1), "zset": ("ZRANGE", 0, -1), "none": ("GET",)}
    command, *args = reads[server.command("TYPE", key).decode()]
    found = server.command(command, key, *args)
    return str(sorted(found.items()) if isinstance(found, dict) else found)


def _full_syncs(masters: Masters) -> list[int]:
    return [server.command("INFO", "stats")["sync_full"] for server in masters.servers]
