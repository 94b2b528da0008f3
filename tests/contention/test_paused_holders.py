"""SIGSTOP in the middle of a section, for three times its lease: what comes late is refused, and tried again.

`MASTERS_SLOW=1` does 200 rounds on each group of masters; `pytest -s` prints the figures.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import optuna
import pytest

from optuna_dlock import RedisLockedStorage, ensemble
from optuna_dlock.ensemble import Ensemble
from tests.contention.crew import PROCESSES, wait_until
from tests.contention.places import QUICK, SEVERAL, Place, groups, slow
from tests.masters import Masters

LEASE = ensemble._TTL_MS / 1000
PAUSE = 3 * LEASE


class _Sleeper:
    """Stops this process in the middle of a section, when its turn is granted.

    Args:
        sent: How many masters get the section before the process stops.
    """

    def __init__(self, ensemble: Ensemble, sent: int) -> None:
        self._ensemble, self._sent = ensemble, sent
        self._acquire, self._send_section = ensemble._acquire, ensemble._send_section
        self._mark: Path | None = None
        self._is_granted = False
        self.request: Any = None
        ensemble._acquire = self._note_grant  # type: ignore[method-assign]
        ensemble._send_section = self._send_half  # type: ignore[assignment, method-assign]

    def arm(self, mark: Path) -> None:
        """Stop in the next section that needed an acquire, after making this file."""
        self._mark, self._is_granted = mark, False

    def _note_grant(self, *args: Any, **options: Any) -> bool:
        self._is_granted = self._acquire(*args, **options)
        return self._is_granted

    def _send_half(self, *args: Any) -> Any:
        if self._mark is None or not self._is_granted:
            return self._send_section(*args)
        mark, self._mark = self._mark, None
        master: Any = self._ensemble.masters[self._sent]

        def stop_and_send(*words: Any) -> None:
            del master.send_script  # from here on the class's own
            mark.touch()
            os.kill(os.getpid(), signal.SIGSTOP)
            master.send_script(*words)

        master.send_script = stop_and_send
        self.request = self._send_section(*args)
        return self.request


def _hold(url: str, name: str, folder: Path, rounds: int, sent: int) -> None:
    """Body of a holder: one creation per round, in the middle of which it is paused."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = RedisLockedStorage(url)
    study_id = storage.get_study_id_from_name(name)
    masters = cast("Ensemble", storage._node)
    masters._spacing.opens = False  # who shares a ballot holds no turn
    sleeper = _Sleeper(masters, sent)
    for at in range(rounds):
        wait_until((folder / f"go{at}").exists, "told to begin", 300.0)
        sleeper.arm(folder / f"asleep{at}")
        number = storage.create_new_trial(study_id) & 0xFFFFFFFF
        outcome = {"number": number, "was accepted": masters.accepted(sleeper.request)}
        new = folder / "new"
        new.write_text(json.dumps(outcome))
        new.rename(folder / f"woke{at}")


class _Holder:
    """One study, and the process that is paused while it creates trials there."""

    def __init__(self, place: Place, folder: Path, rounds: int, sent: int) -> None:
        folder.mkdir()
        self.folder, self.name = folder, folder.name
        self.numbers: list[int] = []
        self.accepted = 0
        self.process = PROCESSES.Process(target=_hold, args=(place.url, self.name, folder, rounds, sent))
        self.process.start()

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def woke(self, at: int) -> None:
        """Take over what it was told."""
        outcome = json.loads((self.folder / f"woke{at}").read_text())
        self.numbers.append(outcome["number"])
        self.accepted += outcome["was accepted"]


@contextmanager
def _holders(place: Place, folder: Path, count: int, rounds: int) -> Iterator[list[_Holder]]:
    holders = [_Holder(place, folder / f"study{i}", rounds, i % 2) for i in range(count)]
    try:
        yield holders
    finally:
        for holder in holders:
            holder.process.kill()
            holder.process.join()
            holder.process.close()


def _run(place: Place, folder: Path, count: int, rounds: int) -> None:
    """All holders are paused at the same time, each in a section of its own study.

    Half of them between acquire and commit, the others when one master has the commit.
    """
    with RedisLockedStorage(place.url) as rival:
        ids = [optuna.create_study(storage=rival, study_name=f"study{i}")._study_id for i in range(count)]
        with _holders(place, folder, count, rounds) as holders:
            for at in range(rounds):
                for study_id, holder in zip(ids, holders, strict=True):
                    holder.numbers.append(rival.create_new_trial(study_id) & 0xFFFFFFFF)  # takes the turn
                    (holder.folder / f"go{at}").touch()
                _wait(holders, f"asleep{at}")
                end = time.monotonic() + PAUSE
                for study_id, holder in zip(ids, holders, strict=True):
                    holder.numbers.append(rival.create_new_trial(study_id) & 0xFFFFFFFF)
                assert not any((holder.folder / f"woke{at}").exists() for holder in holders)
                time.sleep(max(0.0, end - time.monotonic()))  # the pause is the fault
                for holder in holders:
                    holder.signal(signal.SIGCONT)
                _wait(holders, f"woke{at}")
                for holder in holders:
                    holder.woke(at)
        for study_id, holder in zip(ids, holders, strict=True):
            assert sorted(holder.numbers) == list(range(3 * rounds)), holder.name
            assert [t.number for t in rival.get_all_trials(study_id)] == list(range(3 * rounds))
    accepted = sum(holder.accepted for holder in holders)
    print(f"\n{count * rounds} holders paused for {PAUSE:g} s; {accepted} of their commits were accepted")
    assert accepted == 0, "a section is run under a ballot that is the promised one, or not at all"


def _wait(holders: list[_Holder], mark: str) -> None:
    wait_until(
        lambda: all((holder.folder / mark).exists() for holder in holders), f"all holders: {mark}", 120.0
    )


@pytest.mark.parametrize("group", groups(*QUICK), indirect=True)
def test_a_holder_that_is_stopped_for_three_leases_is_refused_and_tries_again(
    group: Masters, place: Place, tmp_path: Path
) -> None:
    """G1, G7: its number is given to nobody else, and to it once."""
    _run(place, tmp_path, 8, 1)


@slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("group", groups(*SEVERAL), indirect=True)
def test_two_hundred_holders_that_are_stopped_for_three_leases_are_refused_and_try_again(
    group: Masters, place: Place, tmp_path: Path
) -> None:
    """The same, 25 at a time."""
    _run(place, tmp_path, 25, 8)
