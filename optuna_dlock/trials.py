"""Creating, writing and finishing the trials of one study; what reads them is in `trial_reads`.

All methods run under the node's lock.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.cache import StudyCache, trial_id_of
from optuna_dlock.codec import dump_json, pack_param, pack_running, pack_trial, pack_value, with_more
from optuna_dlock.distributions import kind_of, lookup_key, to_text
from optuna_dlock.ensemble import AnyNode
from optuna_dlock.errors import (
    DLockError,
    IncompatibleDistributionError,
    TrialTakenError,
)
from optuna_dlock.keys import StudyKeys
from optuna_dlock.live_trial import PARAM, STEP, SYSTEM_ATTR, USER_ATTR, LiveTrial
from optuna_dlock.node import Post
from optuna_dlock.scripts import (
    BEHIND,
    FINISHED,
    INCOMPATIBLE,
    NO_STUDY,
    NO_TRIAL,
    NOT_WAITING,
    OK,
    TAKEN,
    script,
)
from optuna_dlock.section import Section
from optuna_dlock.trial_reads import TrialReader
from optuna_dlock.worker import WorkerProcess

NOBODY = 0  # in place of a worker's index
_WITH_CREATION = 16  # finished trials that the reply to a creation brings along at most


class StudyTrials(TrialReader):
    """The trials of one study, as one process works with them.

    Args:
        me: This process, whose client name the server remembers with its last operation (G6).
        heartbeats: Whether the trials that this process runs have heartbeats.
        section: The critical sections of the study.
        gone: Makes the error for a study that is not there any more.
        deferred: Whether writes to a trial that this process runs return before the server answered.
    """

    def __init__(
        self,
        node: AnyNode,
        keys: StudyKeys,
        cache: StudyCache,
        me: WorkerProcess,
        heartbeats: bool,
        section: Section,
        gone: Callable[[], DLockError],
        deferred: bool,
    ) -> None:
        super().__init__(node, keys, cache, me.client, gone)
        self._me: bytes | int = me.describe()  # until the study has told its index
        self._heartbeats = int(heartbeats)
        self._section = section
        self._deferred = deferred
        self._lost_race = -1  # after how many round trips a claim last failed
        self._set_field = script("set_trial_field")

    # -- creation ----------------------------------------------------------------------------------

    def create(self, template: FrozenTrial | None) -> int:
        """Create a trial, RUNNING or as the template is; returns its number."""
        if template is None:
            start = datetime.now()
            record = pack_running(start)
            state = TrialState.RUNNING
        else:
            state = template.state
            record = self._pack_template(template)
        keys, cache, waits = self._keys, self._cache, self._node.waits
        reply = self._section.run(
            script("create_trial"),
            [
                *(keys.meta, self._section.key(), keys.ops, keys.live, keys.log),
                *(keys.waiting, keys.finished, keys.order),
                *(keys.ran_by, keys.workers, keys.heartbeats),
            ],
            [
                *(record, self._client, self._node.next_sequence(), cache.order_read, _WITH_CREATION),
                *(self._me if state is TrialState.RUNNING else NOBODY, self._heartbeats),
            ],
        )
        if reply[0] == NO_STUDY:
            raise self._gone()
        _, number, length, numbers, records, worker = reply
        self._me = worker or self._me
        self._saw(number + 1, length)
        if numbers:
            cache.add_records([int(n) for n in numbers], records)
            cache.order_read = length
        if not state.is_finished():
            trial = (
                LiveTrial(number, trial_id_of(cache.study_id, number), state, start)
                if template is None
                else LiveTrial.from_record(
                    record, number, trial_id_of(cache.study_id, number), 0, cache.table
                )
            )
            trial.owned = state is TrialState.RUNNING
            trial.fresh = self._freshness(trial, waits)
            cache.add_live(trial)
        return int(number)

    def _pack_template(self, template: FrozenTrial) -> bytes:
        params = []
        for name, distribution in template.distributions.items():
            identity = self._identify(name, distribution, claim=False)
            params.append((identity, distribution.to_internal_repr(template.params[name])))
        return pack_trial(
            template.state,
            template.values,
            params,
            template.intermediate_values,
            template.user_attrs,
            template.system_attrs,
            template.datetime_start,
            template.datetime_complete,
            os.urandom(8),
        )

    # -- writes to unfinished trials ---------------------------------------------------------------

    def set_param(self, number: int, name: str, value: float, distribution: BaseDistribution) -> None:
        """Set a parameter, in its internal representation."""
        trial = self._writable(number)
        identity = self._cache.table.claimed.get(lookup_key(name, distribution))
        if identity is None:
            identity = self._identify(name, distribution, claim=True)
        trial = self._write(trial, PARAM + name, pack_param(identity, value, trial.position(name)))
        trial.set_param(name, identity, value, distribution)

    def set_intermediate_value(self, number: int, step: int, value: float) -> None:
        """Set an intermediate value."""
        step, value = int(step), float(value)
        trial = self._write(self._writable(number), f"{STEP}{step}", pack_value(value))
        trial.set_step(step, value)

    def set_user_attr(self, number: int, key: str, value: Any) -> None:
        """Set a user attribute."""
        text = dump_json(value, key)
        trial = self._write(self._writable(number), USER_ATTR + key, text.encode())
        trial.set_user_attr(key, _as_stored(value, text))

    def set_system_attr(self, number: int, key: str, value: Any) -> None:
        """Set a system attribute."""
        text = dump_json(value, key)
        trial = self._write(self._writable(number), SYSTEM_ATTR + key, text.encode())
        trial.set_system_attr(key, _as_stored(value, text))

    def _write(self, trial: LiveTrial, field: str, value: bytes) -> LiveTrial:
        """Send one field; returns the trial to note it in."""
        node = self._node
        head = trial.head or self._make_head(trial)
        expected = trial.version = trial.version + 1
        name = field.encode("utf-8", "surrogatepass")
        node.post(Post(head, name, value, node.next_sequence(), expected, trial, self._settle))
        self._cache.note_change(trial)
        if not (trial.owned and self._deferred):
            node.collect()
            self._raise_refusal(trial)
            if trial.stale:
                return self._refetch(trial.number)
        return trial

    def _make_head(self, trial: LiveTrial) -> Any:
        keys, number = self._keys, trial.number
        trial.head = self._node.make_head(
            self._set_field,
            (keys.trial(number), keys.log, keys.meta, keys.live),
            (number, self._client),
        )
        return trial.head

    def _settle(self, trial: LiveTrial, reply: Any) -> None:
        """What the server said to a write, other than what was expected."""
        self._mark_stale(trial)  # somebody else wrote too, or the trial is not unfinished any more
        if isinstance(reply, Exception):
            trial.refusal = reply
        elif reply == TAKEN:
            trial.refusal = self._taken_error(trial)

    def _writable(self, number: int) -> LiveTrial:
        trial = self._cache.live.get(number)
        if trial is None:
            if self._cache.is_finished(number):
                raise self._finished_error(number)
            return self._refetch(number)
        if trial.refusal is not None:
            self._raise_refusal(trial)
        if trial.stale:
            return self._refetch(number)
        trial.load()
        return trial

    def _identify(self, name: str, distribution: BaseDistribution, claim: bool) -> int:
        """Id of a distribution; the first time, one round trip.

        Raises:
            IncompatibleDistributionError: If `claim`, and the name has another kind of distribution.
        """
        table = self._cache.table
        identity = table.find(name, distribution)
        kind = kind_of(distribution) if claim else ""
        if identity is not None and (not claim or table.kinds.get(name) == kind):
            if claim:
                table.claimed[lookup_key(name, distribution)] = identity
            return identity
        if claim and name in table.kinds:
            kind = self._compatible_kind(name, table.kinds[name], distribution)
        for _ in range(2):
            reply = self._node.run(
                script("define_param"),
                [self._keys.meta, self._keys.dists, self._keys.dist_ids, self._keys.claims],
                [
                    name.encode("utf-8", "surrogatepass"),
                    to_text(name, distribution),
                    kind,
                    len(table),
                ],
            )
            if reply[0] != INCOMPATIBLE:
                break
            self._learn(reply[2])
            kind = self._compatible_kind(name, reply[1].decode(), distribution)
        if reply[0] == NO_STUDY:
            raise self._gone()
        _, identity, texts, claims = reply
        self._learn(texts)
        for claimed, claimed_kind in zip(claims[::2], claims[1::2], strict=True):
            table.kinds[claimed.decode("utf-8", "surrogatepass")] = claimed_kind.decode()
        if claim:
            table.claimed[lookup_key(name, distribution)] = int(identity)
        return int(identity)

    def _compatible_kind(self, name: str, kind: str, distribution: BaseDistribution) -> str:
        """The kind a name has, if Optuna finds the distribution compatible with it."""
        if kind == kind_of(distribution):
            return kind
        known = self._cache.table.known_of_kind(name, kind)
        try:
            if known is None:
                raise ValueError(f"it is {kind} in this study.")
            check_distribution_compatibility(known, distribution)
        except ValueError as error:
            raise IncompatibleDistributionError(
                f"parameter {name!r}: {error} (known: {kind}, new: {distribution})", param_name=name
            ) from None
        return kind

    # -- states ------------------------------------------------------------------------------------

    def set_state(self, number: int, state: TrialState, values: Sequence[float] | None) -> bool:
        """Finish, claim or requeue a trial.

        Returns:
            False if it was to be claimed and is not WAITING.
        """
        trial = self._writable(number)
        if state is TrialState.RUNNING and trial.state is not TrialState.WAITING:
            if self._node.waits == self._lost_race:
                return False  # it has just been told what else was taken
            trial = self._refetch(number)
            if trial.state is not TrialState.WAITING:
                return False
        while True:
            now = datetime.now()
            token = os.urandom(8)
            if state.is_finished():
                reply = self._finish(trial, state, values, now, token)
            else:
                reply = self._move(trial, state, values, now, token)
            if reply[0] == OK:
                return True
            if reply[0] == NOT_WAITING:
                self._mark_stale(trial)
                self._lose_race()
                return False
            if reply[0] == TAKEN:
                self._mark_stale(trial)
                trial.refusal = None  # it says the same
                raise self._taken_error(trial)
            if reply[0] == FINISHED:
                self._cache.forget_live(number)
                if state is TrialState.RUNNING:
                    self._lose_race()
                raise self._finished_error(number)
            if reply[0] == NO_TRIAL:
                self._cache.forget_live(number)
                raise self._trial_not_found(number)
            assert reply[0] == BEHIND  # noqa: S101 the only code left
            self._raise_refusal(trial)
            trial = self._refetch(number)

    def _lose_race(self) -> None:
        """See what else of the queue was taken, so that its next trials need not be asked for one by one."""
        self.sync(live=True)
        self._lost_race = self._node.waits

    def _finish(
        self,
        trial: LiveTrial,
        state: TrialState,
        values: Sequence[float] | None,
        now: datetime,
        token: bytes,
    ) -> Any:
        keys, number = self._keys, trial.number
        record = trial.pack(state, values, trial.datetime_start, now, token)
        reply = self._section.run(
            script("finish_trial"),
            [
                *(keys.live, self._section.key(), keys.trial(number), keys.finished, keys.order),
                *(keys.waiting, keys.heartbeats, keys.log, keys.meta),
            ],
            [number, trial.version, record, self._client],
        )
        if reply[0] == OK:
            self._cache.add_finished(trial.finished(state, values, now))
            self._just_finished = number
            if reply[1] == self._cache.order_read + 1:
                self._cache.order_read += 1  # nobody else finished one since we looked
        return reply

    def _move(
        self,
        trial: LiveTrial,
        state: TrialState,
        values: Sequence[float] | None,
        now: datetime,
        token: bytes,
    ) -> Any:
        keys, number, waits = self._keys, trial.number, self._node.waits
        claim = state is TrialState.RUNNING
        start = now if claim else trial.datetime_start
        record = trial.pack(state, values, start, None, token)
        if not claim:
            record = with_more(record)  # only the first write to a trial would tell so
        reply = self._section.run(
            script("move_trial"),
            [
                *(keys.live, self._section.key(), keys.trial(number), keys.log, keys.meta),
                *(keys.waiting, keys.offers, keys.heartbeats, keys.finished, keys.ran_by, keys.workers),
            ],
            [
                *(number, trial.version, record, self._client),
                *(self._me if claim else NOBODY, self._heartbeats),
            ],
        )
        if reply[0] == OK:
            self._me = reply[2] or self._me
            # A retry finds what others wrote after the first try: the record lacks it (G2).
            if reply[1] != trial.version + 1:
                self._mark_stale(trial)
            trial.move(state, trial.new_values(values), start, int(reply[1]))
            trial.owned = claim
            trial.fresh = self._freshness(trial, waits)
            self._cache.add_live(trial)
        return reply

    def _taken_error(self, trial: LiveTrial) -> TrialTakenError:
        trial.owned = False
        return TrialTakenError(
            f"trial {trial.number} of study {self._cache.study_id} was taken over by another worker",
            trial_id=trial.trial_id,
        )


def _as_stored(value: Any, text: str) -> Any:
    """What others will read; a container is copied, as its owner may change it later."""
    return json.loads(text) if isinstance(value, (dict, list, tuple)) else value
