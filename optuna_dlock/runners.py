"""Who runs the trials of one study: hosts of the past, heartbeats of the present, trials of dead workers.

All methods but `heartbeat_call` run under the node's lock.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from optuna.trial import TrialState

from optuna_dlock.codec import pack_trial, with_more
from optuna_dlock.live_trial import LiveTrial
from optuna_dlock.node import Argument
from optuna_dlock.scripts import BEHIND, NO_STUDY, OK, script
from optuna_dlock.trials import NOBODY, StudyTrials
from optuna_dlock.worker import WorkerProcess

_CHUNK = 10_000  # entries read by one script call


class Runners(StudyTrials):
    """The trials of one study, with who runs them; arguments as of `StudyTrials`."""

    # Workers of this study, by index; they never change.
    _known: dict[int, WorkerProcess] | None = None

    def workers(self, first: int = 0) -> dict[int, WorkerProcess]:
        """Who runs or ran each trial from a number on; those that nobody has run are left out."""
        indexes = self._read_chunks([first])
        rest = range(first + _CHUNK, self._length, _CHUNK)
        if rest:
            indexes += self._read_chunks(rest)
        known = self._known or {}
        return {number: known[index] for number, index in enumerate(indexes, first) if index in known}

    def _read_chunks(self, starts: Sequence[int]) -> list[int]:
        keys = self._keys
        known = self._known = {} if self._known is None else self._known
        calls = [
            ((keys.meta, keys.workers, keys.ran_by), (start, start + _CHUNK - 1, len(known)))
            for start in starts
        ]
        indexes: list[int] = []
        for reply in self._node.run_many(script("get_workers"), calls):
            if reply[0] == NO_STUDY:
                raise self._gone()
            _, self._length, entries, described = reply
            indexes.extend(map(int, entries))
            for text, index in zip(described[::2], described[1::2], strict=True):
                if int(index) not in known:
                    known[int(index)] = WorkerProcess.read(text, keys.workers)
        return indexes

    # -- heartbeats --------------------------------------------------------------------------------

    def record_heartbeat(self, number: int) -> None:
        """Tell the server that the worker of a trial lives."""
        trial = self._cache.live.get(number)
        ours = trial is not None and trial.owned and isinstance(self._me, int)
        self._node.run(script("record_heartbeat"), *self._heartbeat([number], self._me if ours else NOBODY))

    def heartbeat_call(self) -> tuple[Sequence[str], Sequence[Argument]] | None:
        """What tells the server that all trials that this process runs are alive; None if it runs none.

        Any thread may ask at any time.
        """
        trials = list(self._cache.live.values())
        numbers = [t.number for t in trials if t.owned and t.state is TrialState.RUNNING]
        return self._heartbeat(numbers, self._me) if numbers else None

    def _heartbeat(self, numbers: list[int], worker: Argument) -> tuple[Sequence[str], Sequence[Argument]]:
        keys = self._keys
        return (keys.live, keys.heartbeats, keys.ran_by), (worker, *numbers)

    # -- trials of dead workers --------------------------------------------------------------------

    def lost(self, name: str, is_gone: Callable[[int, WorkerProcess], bool]) -> dict[int, WorkerProcess]:
        """RUNNING trials of other processes under a name of which is_gone says that they are gone."""
        self.sync(live=True)
        running = [t.number for t in self._cache.live.values() if t.state is TrialState.RUNNING]
        if not running:
            return {}
        found = self.workers(min(running))
        ran_by = {number: found[number] for number in sorted(running) if number in found}
        return {
            number: process
            for number, process in ran_by.items()
            if process.worker.name == name and process.client != self._client and is_gone(number, process)
        }

    def take_back(self, number: int, former: WorkerProcess, requeue: bool) -> bool:
        """Take a RUNNING trial from a process, which is refused from then on should it still live.

        Args:
            requeue: Put it in the queue, without its intermediate values; else this process runs it.

        Returns:
            Whether it was still that process which ran it.
        """
        keys, known = self._keys, self._known or {}
        index = next(i for i, process in known.items() if process == former)
        while True:
            if number not in self._cache.live:
                return False
            trial = self._refetch(number)
            record = self._pack_again(trial, requeue)
            reply = self._section.run(
                script("take_back_trial"),
                [
                    *(keys.live, self._section.key(), keys.trial(number), keys.log, keys.meta),
                    *(keys.waiting, keys.heartbeats, keys.ran_by, keys.workers),
                ],
                [
                    *(number, trial.version, record, index, former.client),
                    *(NOBODY if requeue else self._me, self._heartbeats, self._client),
                ],
            )
            self._mark_stale(trial)
            if reply[0] == OK:
                self._me = reply[2] or self._me
                trial.owned = not requeue
                self._refetch(number)
                return True
            if reply[0] != BEHIND:
                return False

    def _pack_again(self, trial: LiveTrial, requeue: bool) -> bytes:
        state = TrialState.WAITING if requeue else TrialState.RUNNING
        record = pack_trial(
            state,
            trial.values,
            trial.internal.values(),
            {} if requeue else trial.intermediate_values,
            trial.user_attrs,
            trial.system_attrs,
            trial.datetime_start,
            None,
            os.urandom(8),
        )
        return with_more(record) if requeue else record
