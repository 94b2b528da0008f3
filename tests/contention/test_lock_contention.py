"""`storage.lock` around a read and a write, and the deletion of a study, by many processes."""

from __future__ import annotations

import time
from typing import Literal

import pytest

from optuna_dlock import RedisLockedStorage
from tests.contention.conftest import CrewMaker
from tests.contention.crew import Crew, wait_until
from tests.contention.holder import TTL
from tests.contention.places import Place
from tests.servers import Server

Lock = Literal["redlock", "pottery"]
HOLDER = "tests.contention.holder:Holder"


def _ticks(crew: Crew) -> list[int]:
    return sorted(fact["value"] for record in crew.records().values() for fact in record.of("ticked"))


def _wait_for_ticks(crew: Crew, more: int) -> None:
    goal = len(_ticks(crew)) + more
    wait_until(lambda: len(_ticks(crew)) >= goal, f"{more} more ticks")


@pytest.mark.parametrize("lock", ["redlock", "pottery"])
def test_no_two_processes_are_in_a_locked_section_and_no_update_is_lost_while_holders_die(
    lock: Lock, make_crew: CrewMaker, place: Place
) -> None:
    """Two detectors: who enters finds nobody there, and the counter counts every entry."""
    crew = make_crew(place.url, 10, lock=lock, worker_class=HOLDER, mix={"tick": 1}, pause=0.001)
    with crew:
        for victim in crew.jobs[:3]:
            _wait_for_ticks(crew, 20)
            crew.kill([victim])
        _wait_for_ticks(crew, 20)
        crew.finish()
    assert crew.problems() == []
    ticks = _ticks(crew)
    assert len(ticks) == len(set(ticks)), "an update was lost"
    final = int((crew.folder / "counter").read_text())
    assert set(range(1, final + 1)) >= set(ticks)
    assert final - len(ticks) <= len(crew.killed), "each victim may have died before it noted its last one"


@pytest.mark.parametrize("lock", ["redlock", "pottery"])
def test_fencing_tokens_keep_a_holder_out_that_slept_through_its_lease(
    lock: Lock, make_crew: CrewMaker, place: Place
) -> None:
    """A paused holder overlaps with the next one; a resource that looks at tokens loses nothing (G7)."""
    crew = make_crew(place.url, 6, lock=lock, worker_class=HOLDER, mix={"fenced_tick": 1}, pause=0.0)
    with crew:
        for _ in range(3):
            _wait_for_ticks(crew, 10)
            crew.pause(crew.jobs[:3])
            time.sleep(TTL * 2)
            crew.resume(crew.jobs[:3])
        _wait_for_ticks(crew, 10)
        crew.finish()
    assert crew.problems() == []
    ticks = _ticks(crew)
    assert ticks == list(range(1, len(ticks) + 1))


def _staying(server: Server, pattern: str) -> set[str]:
    """The keys that have no time to live."""
    return {key.decode() for key in server.command("KEYS", pattern) if server.command("PTTL", key) == -1}


@pytest.mark.parametrize("lock", ["redlock", "pottery"])
def test_a_study_that_is_deleted_while_many_work_on_it_leaves_nothing_behind(
    lock: Lock, make_crew: CrewMaker, place: Place
) -> None:
    """Each worker is told that the study is gone, in every call; a study of the same name starts from 0."""
    crew = make_crew(place.url, 10, lock=lock, pause=0.0)
    with RedisLockedStorage(place.url, lock=lock) as storage, crew:
        name = crew.jobs[0].study_name
        study_id = storage.get_study_id_from_name(name)
        crew.wait_for_more(crew.jobs, 30)
        storage.delete_study(study_id)
        with pytest.raises(KeyError):
            storage.get_n_trials(study_id)
        wait_until(lambda: all(len(r.of("error")) > 5 for r in crew.records().values()), "everybody was told")
        again = storage.create_new_study([], name)
        assert again != study_id
        crew.finish()
        errors = [fact["traceback"] for r in crew.records().values() for fact in r.of("error")]
        # Optuna's tell makes a ValueError of it.
        strange = [text for text in errors if "NotFoundError" not in text]
        assert strange == []
        wait_until(
            lambda: (
                not any(_staying(server, f"{place.prefix}*:{{{study_id}}}:*") for server in place.servers)
            ),
            "what has no time to live was swept, on all masters and where copies of their writes come later",
            5.0,
        )
        assert storage.get_n_trials(again) == 0
