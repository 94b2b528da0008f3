"""`lock="pottery"` on several masters: a Redlock spaces contenders, and safety does not hang on it."""

from __future__ import annotations

import itertools
import os
import pickle
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, cast

import optuna
import pytest

from optuna_dlock import RedisLockedStorage
from optuna_dlock.ensemble import Ensemble
from optuna_dlock.errors import LockNotAcquiredError, QuorumError, ServerConfigurationError
from optuna_dlock.keys import StudyKeys, object_of, turn_key
from tests.masters import Masters

pytest.importorskip("pottery")
_numbers = itertools.count()
Open = Callable[[], RedisLockedStorage]


@pytest.fixture(scope="module")
def three() -> Iterator[Masters]:
    """Three plain masters that no test stops."""
    with Masters("valkey", 3) as masters:
        yield masters


@pytest.fixture
def prefix() -> str:
    """A key space of its own."""
    return f"p{next(_numbers)}"


@pytest.fixture
def make(three: Masters, prefix: str) -> Iterator[Open]:
    """Opens another storage on the same data; all are closed with the test."""
    opened: list[RedisLockedStorage] = []

    def open_storage() -> RedisLockedStorage:
        opened.append(_open(three, prefix=prefix))
        return opened[-1]

    yield open_storage
    for storage in opened:
        storage.close()


def _open(masters: Masters, **options: Any) -> RedisLockedStorage:
    return RedisLockedStorage(masters.url, lock="pottery", **options)


def _create(storage: RedisLockedStorage) -> int:
    return optuna.create_study(storage=storage)._study_id


def _redlock(masters: Masters, key: str) -> Any:
    """What a majority of the masters has under the key of a Redlock; pottery does not wait for the rest."""
    found = [server.command("GET", "redlock:" + key) for server in masters.servers]
    value, count = Counter(found).most_common(1)[0]
    assert count >= 2, found
    return value


def _block(masters: Masters, key: str, ttl_ms: int = 60_000) -> None:
    """Somebody else holds this Redlock, or left it behind."""
    for server in masters.servers:
        server.command("SET", "redlock:" + key, "another", "PX", ttl_ms)


def _turn(prefix: str, study_id: int) -> str:
    return turn_key(object_of(StudyKeys(prefix, study_id).meta))


# -- sections --------------------------------------------------------------------------------------


def test_a_contended_section_holds_a_redlock_from_before_its_ballot_until_it_was_run(
    three: Masters, make: Open, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = make(), make()
    study_id = _create(one)
    ensemble, seen = cast("Ensemble", one._node), []
    real_acquire, real_send = ensemble._acquire, ensemble._send_section

    def note(real: Any) -> Any:
        def noting(*args: Any, **options: Any) -> Any:
            seen.append(_redlock(three, _turn(prefix, study_id)))
            return real(*args, **options)

        return noting

    two.create_new_trial(study_id)
    monkeypatch.setattr(ensemble, "_acquire", note(real_acquire))
    one.create_new_trial(study_id)
    monkeypatch.setattr(ensemble, "_send_section", note(real_send))
    two.create_new_trial(study_id)
    del seen[:]
    one.create_new_trial(study_id)  # with the ballot of before, then for another one, then with that
    before, acquiring, committing = seen
    assert before is None
    assert acquiring == committing
    assert acquiring is not None
    assert _redlock(three, _turn(prefix, study_id)) is None
    one.create_new_trial(study_id)
    assert seen[3:] == [None], "whoever has the ballot needs no Redlock"


def test_a_redlock_that_nobody_gives_up_delays_a_section_and_does_not_stop_it(
    three: Masters, make: Open, prefix: str
) -> None:
    one, two = make(), make()
    study_id = _create(one)
    _block(three, _turn(prefix, study_id))
    start = time.monotonic()
    assert two.create_new_trial(study_id) & 0xFFFF == 0
    assert time.monotonic() - start > 1.5
    assert _redlock(three, _turn(prefix, study_id)) == b"another", "it is not ours to release"


def test_sections_go_on_while_one_master_is_paused_or_down() -> None:
    with Masters("valkey", 3) as masters, _open(masters) as one, _open(masters) as two:
        study_id = _create(one)
        made = 0
        for one_is_down in (False, True):
            if one_is_down:
                masters.resume(1)
                masters.kill(2)
            else:
                masters.pause(1)
            for storage in (one, two) * 3:
                assert storage.create_new_trial(study_id) & 0xFFFF == made
                made += 1
        with one.lock("data") as token:
            assert token == 1
        assert [trial.number for trial in two.get_all_trials(study_id)] == list(range(made))


def test_without_a_majority_a_call_and_a_lock_wait_and_then_name_each_master() -> None:
    with Masters("valkey", 3) as masters:
        one, two = _open(masters, timeout=1.0), _open(masters, timeout=1.0)
        study_id = _create(one)
        two.create_new_trial(study_id)
        masters.kill(0)
        masters.kill(1)
        with pytest.raises(QuorumError) as caught:
            one.create_new_trial(study_id)
        assert len(caught.value.nodes) == 3
        with pytest.raises(QuorumError):
            one.lock("data").acquire()


# -- users' locks ----------------------------------------------------------------------------------


def test_the_lock_excludes_says_who_holds_it_and_its_tokens_rise(three: Masters, make: Open) -> None:
    one, two = make(), make()
    key = one.lock("data").keys.holder
    with one.lock("data") as first:
        assert _redlock(three, key) is not None
        with pytest.raises(LockNotAcquiredError, match=f":{os.getpid()}:"):
            two.lock("data").acquire(timeout=0)
        with pytest.raises(LockNotAcquiredError, match=r"in 0\.3 s"):
            two.lock("data").acquire(timeout=0.3)
    assert _redlock(three, key) is None
    with two.lock("data") as second:
        assert second == first + 1


def test_a_holder_whose_redlock_is_gone_still_excludes_others(three: Masters, make: Open) -> None:
    """As after a full resync of KeyDB, or on masters that came back empty."""
    one, two = make(), make()
    lock = one.lock("data")
    lock.acquire()
    for server in three.servers:
        server.command("DEL", "redlock:" + lock.keys.holder)
    with pytest.raises(LockNotAcquiredError):
        two.lock("data").acquire(timeout=0.3)
    lock.release()
    assert two.lock("data").acquire(timeout=5) == 2


def test_a_redlock_that_outlived_its_holder_keeps_a_free_lock_for_two_seconds_at_most(
    three: Masters, make: Open
) -> None:
    """KeyDB's replication brings released ones back."""
    lock = make().lock("data")
    _block(three, lock.keys.holder)
    with pytest.raises(LockNotAcquiredError):
        lock.acquire(timeout=0.5)
    assert lock.acquire(timeout=20) == 1
    lock.release()
    assert _redlock(three, lock.keys.holder) == b"another"


def test_a_long_hold_is_renewed_on_all_masters_and_a_dead_one_is_free_after_its_ttl(
    three: Masters, make: Open
) -> None:
    dead, alive = make(), make()
    lock = dead.lock("data", ttl=0.4)
    token = lock.acquire()
    time.sleep(1.0)
    lock.check()
    assert _redlock(three, lock.keys.holder) is not None
    dead._locks._renewal.stop()
    assert alive.lock("data").acquire(timeout=10) == token + 1


def test_while_a_study_is_locked_others_wait_and_the_holder_goes_on(three: Masters, prefix: str) -> None:
    with _open(three, prefix=prefix) as holder, _open(three, prefix=prefix, timeout=0.5) as other:
        study_id = _create(holder)
        with holder.lock(f"study:{study_id}"):
            holder.create_new_trial(study_id)
            with pytest.raises(LockNotAcquiredError):
                other.create_new_trial(study_id)
        assert other.create_new_trial(study_id) & 0xFFFF == 1
        holder.delete_study(study_id)
        with pytest.raises(KeyError):
            other.get_n_trials(study_id)


# -- processes -------------------------------------------------------------------------------------


def test_a_forked_child_takes_turns_of_its_own(make: Open) -> None:
    storage = make()
    study_id = _create(storage)
    lock = storage.lock("data")
    lock.acquire()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            created = storage.create_new_trial(study_id) & 0xFFFF in (0, 1)
            status = 0 if created and not lock.held else 1
        finally:
            os._exit(status)
    storage.create_new_trial(study_id)
    assert os.waitpid(child, 0)[1] == 0
    assert storage.get_n_trials(study_id) == 2
    lock.check()
    lock.release()


def test_pickling_keeps_the_kind_of_lock(make: Open) -> None:
    again = pickle.loads(pickle.dumps(make()))
    assert type(again._locks).__name__ == "PotteryEnsembleLocks"
    again.close()


def test_pottery_that_is_not_installed_is_asked_for(three: Masters, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pottery", None)
    with pytest.raises(ServerConfigurationError, match=r'pip install "optuna-dlock\[pottery\]"'):
        _open(three)
