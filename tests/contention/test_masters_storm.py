"""The storm on several masters: workers and masters die, pause and are cut off, and nothing is lost."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from tests.contention.conftest import CrewMaker
from tests.contention.crew import Crew, wait_until
from tests.contention.facts import Record
from tests.contention.places import QUICK, SEVERAL, Place, groups, slow
from tests.contention.routes import OWN_ROUTE
from tests.contention.worker import MIX
from tests.masters import KINDS, Masters
from tests.proxy import CuttingProxy

# Only a real KeyDB knows which of two keys is the newer one; `tests/test_keydb.py` imitates the rest for CI.
KEYDB_GROUPS = groups(("keydb", 2), ("keydb", 3))
LOCKS = ["redlock", pytest.param("pottery", marks=slow)]
HOLDER = "tests.contention.holder:Holder"
STORM = {**MIX, "fenced_tick": 3}
TIMEOUT = 10.0


@pytest.mark.parametrize("lock", ["redlock", "pottery"])
@pytest.mark.parametrize("wanted", groups(*SEVERAL))
def test_workers_lose_nothing_while_some_die_and_pause(
    wanted: tuple[str, int], lock: str, make_crew: CrewMaker
) -> None:
    """G1-G6 while all masters are up."""
    with Masters(*wanted) as masters:
        crew = _crew(make_crew, masters, 12, lock=lock)
        with crew:
            crew.wait_for_more(crew.jobs)
            crew.kill(crew.jobs[:2])
            crew.pause(crew.jobs[2:4])
            crew.wait_for_more(crew.jobs[4:], 30)
            crew.resume(crew.jobs[2:4])
            crew.kill(crew.jobs[4:6])
            crew.wait_for_more([*crew.jobs[2:4], *crew.jobs[6:]], 30)
            _finish(crew)
        _assert_sound(crew)


@pytest.mark.parametrize("group", groups(*QUICK), indirect=True)
def test_workers_whose_clocks_are_wrong_by_five_seconds_lose_nothing(
    place: Place, make_crew: CrewMaker
) -> None:
    """G7: some are ahead and some behind, so that nearly every ballot is the wrong one at first."""
    crew = make_crew(place.url, 12, timeout=TIMEOUT, worker_class=HOLDER, mix=STORM)
    for at, skew in enumerate((5.0, 5.0, 5.0, -5.0, -5.0, -5.0)):
        crew.jobs[at] = replace(crew.jobs[at], storage_class=OWN_ROUTE, options={"skew": skew})
    with crew:
        crew.wait_for_more(crew.jobs, 20)
        crew.kill([crew.jobs[0], crew.jobs[3]])
        crew.pause([crew.jobs[1], crew.jobs[4]])
        crew.wait_for_more(crew.jobs[6:], 30)
        crew.resume([crew.jobs[1], crew.jobs[4]])
        crew.wait_for_more([*crew.jobs[1:3], *crew.jobs[4:]], 30)
        _finish(crew)
    _assert_sound(crew)


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_masters_that_die_pause_and_come_back_empty_are_not_noticed_by_workers(
    kind: str, lock: str, make_crew: CrewMaker
) -> None:
    """One of three at a time: killed and started empty, paused, killed and started with its RDB."""
    with Masters(kind, 3) as masters:
        crew = _crew(make_crew, masters, 10, lock=lock)
        with crew:
            crew.wait_for_more(crew.jobs)
            masters.kill(0)
            crew.wait_for_more(crew.jobs, 20)
            masters.start(0)
            _wait_until_whole(masters, crew)
            masters.pause(1)
            crew.wait_for_more(crew.jobs, 20)
            crew.kill(crew.jobs[:1])
            masters.resume(1)
            _wait_until_whole(masters, crew)
            masters.restart_with_rdb(2)
            crew.wait_for_more(crew.jobs[1:], 20)
            _wait_until_whole(masters, crew)
            masters.restart_empty(1)
            crew.wait_for_more(crew.jobs[1:], 20)
            _wait_until_whole(masters, crew)
            _finish(crew)
        _assert_sound(crew)
        assert not [f for r in crew.records().values() for f in r.of("unavailable")]


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("group", groups(*QUICK), indirect=True)
def test_a_worker_that_is_cut_off_from_one_master_loses_nothing_and_keeps_nobody_up(
    place: Place, lock: str, make_crew: CrewMaker
) -> None:
    """Only this one: the others reach all masters, and believe that all are well."""
    with CuttingProxy(place.servers[0].port) as proxy:
        crew = make_crew(place.url, 8, timeout=TIMEOUT, lock=lock, worker_class=HOLDER, mix=STORM)
        options = {"detour": {place.servers[0].port: proxy.port}}
        crew.jobs[0] = replace(crew.jobs[0], storage_class=OWN_ROUTE, options=options)
        reached = crew.jobs if len(place.servers) > 2 else crew.jobs[1:]  # two masters: it needs both
        with crew:
            proxy.cut_randomly(0.01, seed=1)  # to connect takes some seventy replies
            crew.wait_for_more(crew.jobs, 20)
            proxy.black_hole()
            crew.wait_for_more(reached, 15)
            proxy.restore()
            crew.wait_for_more(crew.jobs, 15)
            proxy.refuse()
            proxy.cut_all()
            crew.wait_for_more(reached, 15)
            proxy.restore()
            crew.wait_for_more(crew.jobs, 15)
            _finish(crew)
        _assert_sound(crew)
        unavailable = [name for name, record in crew.records().items() if record.of("unavailable")]
        assert not set(unavailable) - ({crew.jobs[0].name} if len(place.servers) == 2 else set())


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("wanted", groups(("replicated", 2), ("replicated", 3), ("keydb", 2), ("keydb", 3)))
def test_workers_do_not_notice_when_replication_between_masters_breaks(
    wanted: tuple[str, int], lock: str, make_crew: CrewMaker
) -> None:
    """A cut link loses writes, or delivers them late, one way or both: none of it is what decides."""
    with Masters(*wanted) as masters:
        crew = _crew(make_crew, masters, 10, lock=lock)
        with crew:
            crew.wait_for_more(crew.jobs)
            masters.cut(0, 1)
            crew.wait_for_more(crew.jobs, 20)
            crew.kill(crew.jobs[:1])
            masters.mend(0, 1)
            masters.wait_until_linked()
            crew.wait_for_more(crew.jobs[1:], 20)
            masters.cut(1, 0, both=False, backlog=True)
            crew.pause(crew.jobs[1:3])
            crew.wait_for_more(crew.jobs[3:], 20)
            masters.mend(1, 0, both=False)
            masters.set_delay(0.05)
            crew.resume(crew.jobs[1:3])
            crew.wait_for_more(crew.jobs[1:], 20)
            _finish(crew)
        _assert_sound(crew)
        assert not [f for r in crew.records().values() for f in r.of("unavailable")]


@pytest.mark.parametrize("wanted", KEYDB_GROUPS)
def test_full_resyncs_between_masters_take_nothing_back(
    wanted: tuple[str, int], make_crew: CrewMaker
) -> None:
    """The masters hold copies of each other since one began anew; long cuts make them send all (fact 4)."""
    with Masters(*wanted, extra=("--repl-backlog-size", "16kb")) as masters:
        crew = _crew(make_crew, masters, 10)
        with crew:
            crew.wait_for_more(crew.jobs)
            masters.restart_empty(1)
            masters.wait_until_linked()
            _wait_until_whole(masters, crew)
            for _ in range(2):
                crew.wait_for_more(crew.jobs, 20)
                for pair in masters.pairs:
                    masters.cut(*pair, both=False)
                for number in range(100):
                    for server in masters.servers:
                        server.command("SET", f"others:{number}", "v" * 1000)
                crew.wait_for_more(crew.jobs, 20)
                for pair in masters.pairs:
                    masters.mend(*pair, both=False)
                masters.wait_until_linked()
            crew.wait_for_more(crew.jobs, 20)
            _finish(crew)
        _assert_sound(crew)
        assert all(server.command("INFO", "stats")["sync_full"] >= 3 for server in masters.servers)


@pytest.mark.parametrize("lock", LOCKS)
@pytest.mark.parametrize("kind", KINDS)
def test_all_masters_may_go_down_and_come_back_with_what_they_kept(
    kind: str, lock: str, make_crew: CrewMaker
) -> None:
    """A cold start: no run is left to copy from, so each goes on with what it kept."""
    with Masters(kind, 3, appendonly=kind != "keydb", extra=("--appendfsync", "always")) as masters:
        crew = _crew(make_crew, masters, 6, pause=0.01, lock=lock)
        with crew:
            crew.wait_for_more(crew.jobs, 20)
            crew.pause(crew.jobs)
            time.sleep(0.3)
            for index in range(3):
                if kind == "keydb":
                    masters.servers[index].command("SAVE")
                masters.kill(index)
            for index in range(3):
                masters.start(index)
            crew.resume(crew.jobs)
            crew.wait_for_more(crew.jobs, 30)
            _finish(crew, least=2)
        _assert_sound(crew, least=2)


def _crew(make_crew: CrewMaker, masters: Masters, size: int, **options: Any) -> Crew:
    crew = make_crew(masters.url, size, timeout=TIMEOUT, worker_class=HOLDER, mix=STORM, **options)
    crew.jobs[-2:] = [replace(job, mix={**STORM, "freeze_study": 2}) for job in crew.jobs[-2:]]
    return crew


def _wait_until_whole(masters: Masters, crew: Crew) -> None:
    """All masters have the study again: each votes."""
    wait_until(
        lambda: all(_votes(masters, index) for index in range(len(masters.servers))),
        "all masters have data",
        30.0,
    )


def _votes(masters: Masters, index: int) -> bool:
    server = masters.servers[index]
    run = server.command("INFO", "server")["run_id"][:8]
    pattern = f"optuna@127.0.0.1:{server.port}.{run}:*ballots"
    keys = server.command("KEYS", pattern)
    return len(keys) >= 2 and all(server.command("HEXISTS", key, "s") for key in keys)


def _finish(crew: Crew, least: int = 10) -> None:
    """Send all home, once so much has happened that the audit has something to compare."""
    wait_until(lambda: not _missing(crew, least), f"{least} facts of each kind")
    crew.finish()


def _missing(crew: Crew, least: int) -> list[str]:
    records = crew.records().values()
    kinds = ("created", "popped", "told", "wrote", "study attr", "ticked")
    return [kind for kind in kinds if sum(len(record.of(kind)) for record in records) < least]


def _assert_sound(crew: Crew, least: int = 10) -> None:
    problems = crew.problems()
    for problem in problems[:3]:
        print(problem.text)
    assert problems == []
    assert _missing(crew, least) == []
    records: dict[str, Record] = crew.records()
    # Who loses a race for a trial; a short run of few workers may have none.
    refused = sum(len(record.of("refused")) for record in records.values())
    assert refused > 0 or least < 10
    ticks = [fact["value"] for record in records.values() for fact in record.of("ticked")]
    assert len(ticks) == len(set(ticks)), "an update under a lock was lost"
