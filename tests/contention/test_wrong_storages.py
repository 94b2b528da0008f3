"""The audit sees what goes wrong: the same crew on storages that break one guarantee each."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.contention.conftest import CrewMaker
from tests.contention.crew import wait_until
from tests.contention.verdict import Problem
from tests.proxy import CuttingProxy
from tests.servers import Server


def _run(make_crew: CrewMaker, url: str, wrong: str | None) -> list[Problem]:
    """What the audit finds after eight workers were busy for a while and two of them died."""
    crew = make_crew(url, 8, pause=0.001)
    if wrong:
        crew.jobs = [replace(job, storage_class=f"tests.contention.wrong:{wrong}") for job in crew.jobs]
    with crew:
        crew.wait_for_more(crew.jobs, 60)
        crew.kill(crew.jobs[:2])
        crew.wait_for_more(crew.jobs[2:], 200)
        crew.finish()
    return crew.problems()


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ("NumbersByCount", "numbers", "given twice"),
        ("NumbersByCount", "lost", "was acknowledged and is not there"),
        ("StaleReads", "stale", "were acknowledged"),
        ("FinishesTwice", "finish", "finished by two"),
        ("ClaimsTwice", "claim", "claimed by two"),
        ("DropsWrites", "content", "was acknowledged"),
        ("ForgetsFinishes", "finish", "told"),
    ],
)
def test_the_audit_sees_a_storage_that(
    wrong: str, kind: str, text: str, make_crew: CrewMaker, valkey_url: str
) -> None:
    """... breaks a guarantee: G1, G2, G3, G4 or G5."""
    problems = _run(make_crew, valkey_url, wrong)
    assert any(p.kind == kind and text in p.text for p in problems), problems


def test_the_audit_finds_nothing_wrong_with_the_right_storage(make_crew: CrewMaker, valkey_url: str) -> None:
    """The control of the test above."""
    assert _run(make_crew, valkey_url, None) == []


@pytest.mark.parametrize(
    ("storage_class", "ghosts"),
    [("tests.contention.wrong:NewOperationAfterCut", True), ("optuna_dlock:RedisLockedStorage", False)],
)
def test_the_audit_sees_ghosts_of_a_storage_that_retries_a_creation_as_another_one(
    storage_class: str, ghosts: bool, make_crew: CrewMaker, valkey: Server, valkey_url: str
) -> None:
    """G6, with its control: connections are cut between the request for a creation and its reply."""
    with CuttingProxy(valkey.port) as proxy:
        url = valkey_url.replace(f":{valkey.port}", f":{proxy.port}")
        crew = make_crew(url, 8, storage_class=storage_class)
        with crew:
            for _ in range(60):
                cuts = proxy.cuts
                proxy.cut_next_reply(b":ops")  # the key of operation ids, which every creation names
                wait_until(lambda cuts=cuts: proxy.cuts > cuts, "somebody creates a trial")  # type: ignore[misc]
            crew.finish()
        problems = crew.problems()
    if ghosts:
        assert any(p.kind == "ghost" and "was created 2 times" in p.text for p in problems), problems
        assert any(p.kind == "ghost" and "nobody asked for" in p.text for p in problems), problems
    else:
        assert problems == []
