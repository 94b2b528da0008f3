"""Reading the trials of one study: what changed since the last look, one trial, the queue.

All methods run under the node's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.cache import StudyCache, concerns_unfinished, trial_id_of
from optuna_dlock.ensemble import AnyNode
from optuna_dlock.errors import (
    CorruptRecordError,
    DataLostError,
    DLockError,
    FinishedTrialError,
    TrialNotFoundError,
)
from optuna_dlock.keys import StudyKeys
from optuna_dlock.live_trial import LiveTrial
from optuna_dlock.node import Argument
from optuna_dlock.scripts import NO_STUDY, NO_TRIAL, OK, script

CHUNK = 1000  # finished trials read by one script call
_WINDOW = 8  # such calls under way at once


class TrialReader:
    """The trials of one study, as one process reads them.

    Args:
        client: Names this process to the server, which shows each client another head of the queue.
        gone: Makes the error for a study that is not there any more.
    """

    def __init__(
        self,
        node: AnyNode,
        keys: StudyKeys,
        cache: StudyCache,
        client: str,
        gone: Callable[[], DLockError],
    ) -> None:
        self._node = node
        self._keys = keys
        self._cache = cache
        self._client = client
        self._gone = gone
        self._just_finished = -1
        self._stale: set[int] = set()
        self._get_trial = script("get_trial")

    def get(self, number: int) -> FrozenTrial:
        """One trial as it is now; without asking if this process has just created, claimed or finished it."""
        cache = self._cache
        if number == self._just_finished:
            self._just_finished = -1
            finished = cache.finished(number)
            if finished is not None:
                return finished
        trial = cache.live.get(number)
        if trial is not None and trial.fresh == self._node.waits and trial.refusal is None:
            trial.fresh = 0
            return trial.freeze()
        known = len(cache.table)
        reply = self._node.run(self._get_trial, *self._get_call(number, known))
        return self._take(number, reply, known)

    def _freshness(self, trial: LiveTrial, waits: int) -> int:
        """Until when the trial may be read from here: up to the next round trip; never after a retry (G5)."""
        ours = trial.state is TrialState.RUNNING and not trial.stale
        return self._node.waits if ours and self._node.waits == waits + 1 else 0

    def _refetch(self, number: int) -> LiveTrial:
        """An unfinished trial as the server has it.

        Raises:
            FinishedTrialError, TrialNotFoundError: If it is finished or there is none.
        """
        self._fetch([number])
        trial = self._cache.live.get(number)
        if trial is None:
            raise self._finished_error(number)
        self._raise_refusal(trial)
        trial.load()
        return trial

    def _fetch(self, numbers: Sequence[int]) -> None:
        """Bring these trials up to date, in one round trip."""
        known = len(self._cache.table)
        calls = [self._get_call(number, known) for number in numbers]
        replies = self._node.run_many(self._get_trial, calls)
        for number, reply in zip(numbers, replies, strict=True):
            self._take(number, reply, known)

    def _get_call(self, number: int, known: int) -> tuple[Sequence[str], Sequence[Argument]]:
        cache, keys = self._cache, self._keys
        trial = cache.live.get(number)
        if trial is not None:
            version = "" if trial.stale else str(trial.version)
        else:
            version = "F" if cache.is_decoded(number) else ""
        return (
            (keys.meta, keys.live, keys.trial(number), keys.finished, keys.dists),
            (number, version, known),
        )

    def _take(self, number: int, reply: Any, known: int) -> FrozenTrial:
        """Take in a reply of get_trial."""
        cache, code = self._cache, reply[0]
        if code == NO_STUDY:
            raise self._gone()
        if code == NO_TRIAL:
            cache.forget_live(number)
            raise self._trial_not_found(number)
        if code != OK:
            self._learn(reply[2][len(cache.table) - known :])
        if code == 1:
            cache.add_records([number], [reply[1]])
        elif code == 2:
            trial = LiveTrial.from_record(
                reply[1], number, trial_id_of(cache.study_id, number), 0, cache.table
            )
            trial.apply_all(reply[3], cache.table)
            cache.add_live(trial)
        live = cache.live.get(number)
        if live is not None:
            return live.freeze()
        finished = cache.finished(number)
        assert finished is not None  # noqa: S101 it is one or the other
        return finished

    def get_all(self, states: Container[TrialState] | None) -> list[FrozenTrial]:
        """A new list of the trials in these states, by number."""
        if states == (TrialState.WAITING,):
            return self._get_waiting()
        self.sync(live=concerns_unfinished(states))
        return self._cache.trials(states)

    def best(self) -> FrozenTrial | None:
        """The best COMPLETE trial of a study with one objective, None if there is none."""
        self.sync(live=False)
        return self._cache.best()

    def count(self) -> int:
        """How many trials the study has."""
        self.sync(live=False, most=0)
        return self._cache.n_seen

    def _get_waiting(self) -> list[FrozenTrial]:
        head = self.sync(live=True, queue=True)
        return [] if head is None else self._cache.waiting(head)

    def sync(self, live: bool, queue: bool = False, most: int = CHUNK) -> list[int] | None:
        """Take in what changed; one round trip unless more than 1 000 trials finished meanwhile.

        Args:
            live: Whether unfinished trials are wanted.
            queue: Whether only the WAITING ones are: then nothing is read if there are none.
            most: Finished trials to read with the first reply; 0 only counts.

        Returns:
            With `queue`, what to try first; None if no trial is WAITING.
        """
        cache = self._cache
        cursor = -1
        if live:
            cursor = -2 if cache.revision is None else cache.revision
        known = len(cache.table)
        reply = self._node.run(*self._changes_call(cursor, queue, cache.order_read, most))
        if reply[0] == NO_STUDY:
            raise self._gone()
        if len(reply) == 2:
            self._saw(reply[1], cache.order_read)
            return None
        _, n, length, numbers, records, revision, entries, unfinished, texts, head = reply
        self._saw(n, length)
        self._learn(texts[len(cache.table) - known :])
        if most == 0:
            return None
        if live:
            if entries is None:
                missed = cache.replace_live([int(n) for n in unfinished[::2]], unfinished[1::2])
            else:
                missed = self._apply_log(entries)
        cache.add_records([int(number) for number in numbers], records)
        cache.order_read += len(numbers)
        if length > cache.order_read:
            self._read_rest(length)
        if live:
            missed |= {n for n in self._stale if n in cache.live}
            self._stale.clear()
            self._fetch_many(sorted(n for n in missed if not cache.is_finished(n)))
            cache.revision = revision
        return list(head)

    def _apply_log(self, entries: Sequence[bytes]) -> set[int]:
        try:
            return self._cache.apply_log(entries)
        except CorruptRecordError:
            raise
        except ValueError as error:
            key = self._keys.log
            raise CorruptRecordError(f"key {key!r} holds an unreadable entry: {error}", key=key) from error

    def _changes_call(self, cursor: int, queue: bool, read: int, most: int) -> tuple[Any, Any, Any]:
        keys = self._keys
        return (
            script("get_changes"),
            (
                *(keys.meta, keys.order, keys.finished, keys.log),
                *(keys.live, keys.dists, keys.waiting, keys.offers),
            ),
            (read, most, cursor, len(self._cache.table), self._client if queue else ""),
        )

    def _read_rest(self, length: int) -> None:
        """Read all finished trials up to an entry of order, a few chunks at a time."""
        cache = self._cache
        while cache.order_read < length:
            starts = range(cache.order_read, length, CHUNK)[:_WINDOW]
            calls = [self._changes_call(-1, False, s, min(CHUNK, length - s)) for s in starts]
            for reply in self._node.run_many(calls[0][0], [call[1:] for call in calls]):
                if reply[0] == NO_STUDY:
                    raise self._gone()
                cache.add_records([int(number) for number in reply[3]], reply[4])
                cache.order_read += len(reply[3])

    def _fetch_many(self, numbers: Sequence[int]) -> None:
        for start in range(0, len(numbers), CHUNK):
            self._fetch(numbers[start : start + CHUNK])

    def _learn(self, texts: Sequence[bytes]) -> None:
        """Take in the distributions that follow those known."""
        try:
            self._cache.table.extend(texts)
        except (ValueError, KeyError, TypeError) as error:
            key = self._keys.dists
            raise CorruptRecordError(
                f"key {key!r} holds an unreadable distribution: {error}", key=key
            ) from error

    def _saw(self, n: int, length: int) -> None:
        """Notice a server that went back in time: it restarted from an older state."""
        cache = self._cache
        if n < cache.n_seen or length < cache.order_read:
            raise DataLostError(
                f"{self._node.address} has {n} trials of study {cache.study_id} and had {cache.n_seen} "
                "before: it restarted from an older state; turn on appendonly, and restart the workers",
                address=self._node.address,
            )
        cache.n_seen = n

    def stale(self, grace_period: float) -> list[int]:
        """Numbers of trials without a heartbeat for so many seconds."""
        reply = self._node.run(
            script("get_stale_trials"),
            [self._keys.meta, self._keys.heartbeats],
            [round(grace_period * 1000)],
        )
        if reply[0] == NO_STUDY:
            raise self._gone()
        return [int(number) for number in reply[1]]

    def _mark_stale(self, trial: LiveTrial) -> None:
        trial.stale = True
        self._stale.add(trial.number)

    def _raise_refusal(self, trial: LiveTrial) -> None:
        refusal, trial.refusal = trial.refusal, None
        if refusal is not None:
            raise refusal

    def _finished_error(self, number: int) -> FinishedTrialError:
        return FinishedTrialError(
            f"trial {number} of study {self._cache.study_id} has finished and cannot be changed",
            trial_id=trial_id_of(self._cache.study_id, number),
        )

    def _trial_not_found(self, number: int) -> TrialNotFoundError:
        trial_id = trial_id_of(self._cache.study_id, number)
        return TrialNotFoundError(f"no trial with trial_id {trial_id} exists", trial_id=trial_id)
