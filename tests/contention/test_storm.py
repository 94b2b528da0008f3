"""The storm: 40 processes on one study, and every fault at once."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from typing import Any, Literal

import pytest

from optuna_dlock.scripts import script
from tests.contention.conftest import CrewMaker
from tests.contention.crew import wait_until
from tests.contention.facts import Record
from tests.contention.places import Place
from tests.contention.routes import OWN_ROUTE
from tests.contention.worker import MIX
from tests.proxy import CuttingProxy
from tests.servers import FLAVOURS, Server

SECTIONS = ("create_trial", "move_trial", "finish_trial", "set_trial_field", "set_study_attr")
HOLDER = "tests.contention.holder:Holder"
STORM = {**MIX, "fenced_tick": 3}
TIMEOUT = 5.0  # seconds for which a worker's call goes on trying


@pytest.mark.parametrize("lock", ["redlock", "pottery"])
def test_forty_workers_lose_nothing_while_workers_die_pause_are_cut_off_and_the_server_restarts(
    lock: Literal["redlock", "pottery"], make_crew: CrewMaker
) -> None:
    """G1-G6 on Valkey."""
    with _kept("valkey") as server, CuttingProxy(server.port) as proxy:
        crew = make_crew(server.url, 40, timeout=TIMEOUT, lock=lock, worker_class=HOLDER, mix=STORM)
        crew.jobs[36:] = [replace(job, mix={**STORM, "freeze_study": 3}) for job in crew.jobs[36:]]
        crew.jobs[24:32] = [replace(job, url=proxy.url) for job in crew.jobs[24:32]]
        mortal, sleepy, cut = crew.jobs[:8], crew.jobs[8:16], crew.jobs[24:32]
        with crew:
            crew.wait_for_more(crew.jobs)
            proxy.cut_randomly(0.01, seed=1)
            crew.pause(sleepy)
            paused_at = time.monotonic()
            crew.kill(mortal[:4])
            crew.wait_for_more(crew.jobs[16:])
            server.command("SCRIPT", "FLUSH")
            _cut_replies_to(proxy, *SECTIONS, times=5)
            crew.kill(mortal[4:6])
            server.kill()
            server.start()
            crew.wait_for_more(crew.jobs[16:], 20)
            crew.kill(mortal[6:])
            time.sleep(max(0.0, paused_at + TIMEOUT + 1.0 - time.monotonic()))
            crew.resume(sleepy)
            crew.wait_for_more([*sleepy, *crew.jobs[16:]], 60)
            _cut_replies_to(proxy, *SECTIONS, times=5)
            crew.finish()
        assert crew.problems() == []
        records = crew.records()
        _assert_that_much_happened(records)
        for job in [*crew.jobs[16:24], *crew.jobs[32:]]:
            assert not records[job.name].of("unavailable"), "a server that restarts is waited for"
        assert sum(len(records[job.name].of("froze")) for job in crew.jobs[36:]) > 0
        ticks = [fact["value"] for record in records.values() for fact in record.of("ticked")]
        assert len(ticks) == len(set(ticks)) > 10, "an update under a lock was lost"
        for job in cut:
            assert not records[job.name].open, "a cut between request and reply leaves no doubt"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_twelve_workers_lose_nothing_on_any_server(flavour: str, make_crew: CrewMaker) -> None:
    """The same, smaller: a death, a pause, cuts, a flush and a restart on every flavour."""
    with _kept(flavour) as server, CuttingProxy(server.port) as proxy:
        crew = make_crew(server.url, 12, timeout=TIMEOUT)
        crew.jobs[8:] = [replace(job, url=proxy.url) for job in crew.jobs[8:]]
        with crew:
            crew.wait_for_more(crew.jobs)
            proxy.cut_randomly(0.02, seed=2)
            crew.kill(crew.jobs[:2])
            crew.pause(crew.jobs[2:4])
            server.command("SCRIPT", "FLUSH")
            _cut_replies_to(proxy, *SECTIONS, times=8)
            server.kill()
            server.start()
            crew.resume(crew.jobs[2:4])
            crew.wait_for_more(crew.jobs[2:], 100)
            crew.finish()
        assert crew.problems() == []
        _assert_that_much_happened(crew.records(), least=10)


@pytest.mark.parametrize("lock", ["redlock", "pottery"])
def test_sixteen_workers_drain_a_queue_and_each_trial_is_claimed_once(
    lock: Literal["redlock", "pottery"], make_crew: CrewMaker, place: Place
) -> None:
    """G4, with four that fill the queue, some that die, and cuts between request and reply."""
    with contextlib.ExitStack() as stack:
        proxies = [stack.enter_context(CuttingProxy(server.port)) for server in place.servers]
        crew = make_crew(place.url, 20, lock=lock, mix={"drain": 1}, pause=0.0)
        detour = {server.port: proxy.port for server, proxy in zip(place.servers, proxies, strict=True)}
        far: dict[str, Any] = {"storage_class": OWN_ROUTE, "options": {"detour": detour}}
        crew.jobs[8:16] = [replace(job, **far) for job in crew.jobs[8:16]]
        fill: dict[str, Any] = {"mix": {"enqueue": 2, "add_waiting": 1}, "pause": 0.01}
        crew.jobs[16:] = [replace(job, **fill) for job in crew.jobs[16:]]
        with crew:
            for seed, proxy in enumerate(proxies):
                proxy.cut_randomly(0.02, seed=4 + seed)
            for victim in crew.jobs[:4]:
                crew.wait_for_more(crew.jobs[16:], 30 if len(proxies) == 1 else 10)
                crew.kill([victim])
            for proxy in proxies:
                _cut_replies_to(
                    proxy, "move_trial", "finish_trial", times=15 // len(proxies), masters=len(proxies) > 1
                )
            crew.finish()
    assert crew.problems() == []
    popped = [record.of("popped") for record in crew.records().values()]
    assert sum(map(len, popped)) > 100
    assert sum(map(bool, popped)) > 12, "the queue is shared"


def _cut_replies_to(proxy: CuttingProxy, *scripts: str, times: int, masters: bool = False) -> None:
    """Drop the connection of whoever runs one of these scripts next, after the server has executed it.

    Args:
        masters: Whether it is one of several masters, which are told a section's name.
    """
    for name in scripts * times:
        before = proxy.cuts
        proxy.cut_next_reply(name.encode() if masters else script(name).sha.encode())
        wait_until(lambda before=before: proxy.cuts > before, f"somebody runs {name} through the proxy")  # type: ignore[misc]


def _assert_that_much_happened(records: dict[str, Record], least: int = 30) -> None:
    """Else the audit had nothing to compare."""
    for kind in ("created", "popped", "told", "refused", "wrote", "study attr"):
        assert sum(len(record.of(kind)) for record in records.values()) >= least, kind


def _kept(flavour: str) -> Server:
    """A server that its test kills: with everysec it puts writes off while a slow disk is busy."""
    return Server(flavour, appendonly=True, extra=("--appendfsync", "always"))
