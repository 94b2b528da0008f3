"""Masters that have forgotten: copies, the thread that makes them, the start after all were down."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from optuna_dlock.errors import DLockError
from optuna_dlock.keys import RegistryKeys, StudyKeys, on_master
from optuna_dlock.master import Master, Request
from optuna_dlock.node import Argument, type_of_key
from optuna_dlock.quorum import FIRST_BALLOT, Runs, State, needed_for_rebuild
from optuna_dlock.scripts import OK, masters_script

if TYPE_CHECKING:
    from optuna_dlock.ensemble import Ensemble

_logger = logging.getLogger(__name__)
_CHUNK = 1000  # fields or entries copied by one command
_TTL_MS = 3000
_EXTEND = 0.5  # seconds after which the lease of a copy under way is extended
_PATIENCE = 5.0  # seconds that one step of a copy may take
_PAUSE = 0.5  # seconds between two attempts to repair a master


class Copy:
    """A copy of one object from one master to another, fenced by a ballot.

    It grows beside what the target has, and takes its place in one step; a later copy refuses what is left of
    an earlier one.

    Args:
        copy: Name of this copy.
        best: The state to be copied.
        replaced: What the target has now; None for no data.
        known: The runs of all masters, for the target to remember.
    """

    def __init__(
        self,
        ensemble: Ensemble,
        name: str,
        ballot: str,
        copy: str,
        source: int,
        best: State,
        target: int,
        replaced: State | None,
        known: Runs,
    ) -> None:
        self._ensemble = ensemble
        self._ballot = ballot
        self._copy = copy
        self._source = ensemble.masters[source]
        self._best = best
        self._target = ensemble.masters[target]
        self._replaced = replaced
        self._known = known
        self._keys = ensemble.keys_of(name)
        self._extended = time.monotonic()

    def run(self) -> bool:
        """Copy all; whether it is whole."""
        try:
            return self._run()
        except (ConnectionError, TimeoutError) as error:
            _logger.debug("a copy to %s was broken off: %s", self._target.address, error)
            return False

    def _run(self) -> bool:
        keys, target = self._keys, self._target
        first = keys.live if isinstance(keys, StudyKeys) else keys.info
        copied = [first, *(key for key in keys.copied() if key != first)]
        bases = [keys.trial_base] if isinstance(keys, StudyKeys) else []
        trials = target.key(bases[0]) if bases else ""
        staged_trials = target.staged(bases[0]) if bases else ""
        ballots = target.key(keys.ballots)
        staged = [target.staged(key) for key in copied]
        if self._on_target("begin_install", [ballots, *staged], [self._copy, staged_trials])[0] != OK:
            return False
        parts = list(copied)
        if isinstance(keys, StudyKeys):
            numbers = self._from_source("HKEYS", first)
            parts += [keys.trial(int(number)) for number in numbers]
        sent: list[Request] = []
        for key in parts:
            for command, words in self._parts(key):
                part = (self._copy, command, *words)
                sent.append(self._send("install_part", [ballots, target.staged(key)], part))
                if len(sent) >= 8:
                    self._check(sent.pop(0))
                self._extend_lease()
        for request in sent:
            self._check(request)
        # The source stood still only if nobody else got its promise meanwhile.
        promised, seq, last = self._from_source("HMGET", keys.ballots, "p", "s", "i")
        if promised != self._ballot.encode() or (int(seq), last.decode()) != self._best.base:
            return False
        replaced = ("", "") if self._replaced is None else self._replaced.base
        args = (self._copy, self._ballot, seq, last, str(self._known), *replaced, trials, staged_trials)
        real = [target.key(key) for key in copied]
        return bool(self._on_target("end_install", [ballots, *real, *staged], args)[0] == OK)

    def _parts(self, key: str) -> Iterator[tuple[str, Sequence[Argument]]]:
        """The commands that make a key anew."""
        kind = type_of_key(key)
        if kind == "hash" or key.endswith(":lock"):
            cursor: Any = "0"
            while True:
                cursor, flat = self._from_source("HSCAN", key, cursor, "COUNT", _CHUNK)
                for at in range(0, len(flat), 2 * _CHUNK):
                    yield "HSET", flat[at : at + 2 * _CHUNK]
                if cursor == b"0":
                    return
        elif kind == "list":
            start = 0
            while entries := self._from_source("LRANGE", key, start, start + _CHUNK - 1):
                yield "RPUSH", entries
                start += len(entries)
        elif kind == "zset":
            flat = self._from_source("ZRANGE", key, 0, -1, "WITHSCORES")
            for at in range(0, len(flat), 2 * _CHUNK):
                part = flat[at : at + 2 * _CHUNK]
                yield "ZADD", [word for pair in zip(part[1::2], part[::2], strict=True) for word in pair]
        elif members := self._from_source("SMEMBERS", key):
            yield "SADD", members

    def _extend_lease(self) -> None:
        if time.monotonic() - self._extended > _EXTEND:
            self._extended = time.monotonic()
            script = masters_script("acquire_ballot")
            for master in self._ensemble.masters:
                if master is not self._target:
                    master.send_script(script, [self._keys.ballots], [self._ballot, _TTL_MS, 0], Request())

    def _from_source(self, command: str, key: str, *args: Argument) -> Any:
        request = Request()
        self._source.send_plain((command, self._source.key(key), *args), request)
        return self._ensemble.reply_of(self._source, request, _PATIENCE)

    def _on_target(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        return self._ensemble.reply_of(self._target, self._send(name, keys, args), _PATIENCE)

    def _send(self, name: str, keys: Sequence[str], args: Sequence[Argument]) -> Request:
        request = Request()
        self._target.run_script(masters_script(name), keys, args, request)
        return request

    def _check(self, request: Request) -> None:
        if self._ensemble.reply_of(self._target, request, _PATIENCE)[0] != OK:
            raise ConnectionError("another copy has begun")


class Repairs:
    """Looks after masters without data, in a thread of its own over connections of its own.

    Args:
        make_ensemble: Gives another view of the same masters.
    """

    def __init__(self, make_ensemble: Callable[[], Ensemble]) -> None:
        self._make = make_ensemble
        self._ensemble: Ensemble | None = None
        self._wanted: set[int] = set()
        self._thread: threading.Thread | None = None
        self._stopped = False

    def ask_for(self, *indexes: int) -> None:
        """Masters were seen without data that others have."""
        if not indexes:
            return
        self._wanted.update(indexes)
        if self._thread is None or not self._thread.is_alive():
            self._stopped = False
            self._thread = threading.Thread(target=self._work, name="repair masters", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Begin nothing more, and give up what is being tried."""
        self._stopped = True
        if self._ensemble is not None:
            self._ensemble.is_stopped = True

    def _work(self) -> None:
        ensemble = self._ensemble = self._make()
        try:
            while self._wanted and not self._stopped:
                index = next(iter(self._wanted))
                try:
                    whole = ensemble.repair(index)
                except (DLockError, OSError) as error:
                    _logger.debug("master %d was not repaired: %s", index, error)
                    whole = False
                if whole:
                    self._wanted.discard(index)
                else:
                    time.sleep(_PAUSE)
        finally:
            self._ensemble = None
            ensemble.close()


def revive(ensemble: Ensemble, name: str, alive: Collection[int]) -> None:
    """Let masters that restarted go on with what they kept of an object: too few others have it to copy from.

    What was acknowledged stood on a majority. So of N - q + 1 masters, be they `alive` or restarted with
    their data, the latest has all of it. Only as many as lack to that number go on, the latest first; the
    others get copies. Their ballot begins a new epoch: nothing promised before can be decided any more.

    Raises:
        ConnectionError: If a master stops answering.
    """
    keys = ensemble.keys_of(name)
    seen, texts, latest = [FIRST_BALLOT], [], 0
    kept: list[tuple[State, Master, str]] = []
    for master in ensemble.masters:
        if not master.connected:
            continue
        states = []
        for run in [master.run] if master.index in alive else master.earlier_runs:
            ballots = _of_run(ensemble, master, run, keys.ballots)
            promised, *state, known = _ask(ensemble, master, "HMGET", ballots, "p", "a", "s", "i", "k")
            if None not in state:
                seen.append(promised.decode())
                texts.append(known or b"")
                latest = max(latest, int(state[1]))
                states.append((State.of(*state), master, run))
        if states and master.index not in alive:
            kept.append(max(states, key=lambda item: item[0].order))
    missing = needed_for_rebuild(len(ensemble.masters)) - len(alive)
    known_runs = Runs(texts)
    for _, master, _ in kept:
        known_runs.begin(master.index, master.run)
    ballot = ensemble.ballots.next_epoch(max(seen))
    if len(kept) < missing:
        everybody_told = all(master.connected for master in ensemble.masters)
        if everybody_told and latest == 0 and isinstance(keys, StudyKeys):
            # The registry was copied to masters that have not run the section that made this study.
            for master in ensemble.masters:
                if master.index not in alive:
                    request = Request()
                    script, names = masters_script("found_object"), [keys.ballots, keys.meta]
                    master.send_script(script, names, [ballot, str(known_runs)], request)
                    ensemble.reply_of(master, request, _PATIENCE)
        return
    for _, master, run in sorted(kept, key=lambda item: item[0].order, reverse=True)[:missing]:
        _revive_on(ensemble, master, run, keys, ballot, known_runs)


def _revive_on(
    ensemble: Ensemble, master: Master, run: str, keys: RegistryKeys | StudyKeys, ballot: str, known: Runs
) -> None:
    _ask(ensemble, master, "HSET", master.run_key, master.run, int(time.time() * 1e6))
    names = [keys.ballots, *keys.copied()]
    if isinstance(keys, StudyKeys):
        live = _ask(ensemble, master, "HKEYS", _of_run(ensemble, master, run, keys.live))
        names += [keys.trial(int(number)) for number in live]
    old = [_of_run(ensemble, master, run, key) for key in names]
    new = [master.key(key) for key in names]
    request = Request()
    master.run_script(masters_script("revive_object"), [*old, *new], [ballot, str(known)], request)
    ensemble.reply_of(master, request, _PATIENCE)


def _of_run(ensemble: Ensemble, master: Master, run: str, key: str) -> str:
    """A key's name in a run of a master."""
    return on_master(ensemble.prefix, master.address, run) + key[len(ensemble.prefix) :]


def _ask(ensemble: Ensemble, master: Master, *words: Argument) -> Any:
    request = Request()
    master.send_plain(words, request)
    return ensemble.reply_of(master, request, _PATIENCE)


def throw_away(ensemble: Ensemble, name: str, master: Master) -> None:
    """Delete all that this run of a master has of a deleted study, and what is left of a copy of it."""
    keys = ensemble.keys_of(name)
    if not isinstance(keys, StudyKeys):
        raise TypeError(f"{name} is no study")
    for here in (master.key, master.staged):
        live = _ask(ensemble, master, "HKEYS", here(keys.live))
        names = [keys.lock, *keys.everything_but_trials(), *(keys.trial(int(number)) for number in live)]
        _ask(ensemble, master, "UNLINK", *map(here, names))


def sweep_earlier_runs(ensemble: Ensemble, master: Master) -> None:
    """Throw away what earlier runs of a master have left on it, now that this run has everything."""
    name = master.key_prefix[: -len(master.run)]
    pattern = "".join(f"[{c}]" if c in "*?[]\\" else c for c in name) + "*"
    cursor: Any = "0"
    while True:
        cursor, keys = _ask(ensemble, master, "SCAN", cursor, "MATCH", pattern, "COUNT", _CHUNK)
        old = [key for key in keys if not key.startswith(master.key_prefix.encode())]
        if old:
            _ask(ensemble, master, "UNLINK", *old)
        if cursor == b"0":
            break
    for run in set(runs_of(ensemble, master)) - {master.run.encode()}:
        master.send_plain(("HDEL", master.run_key, run), Request())
    master.earlier_runs = []


def runs_of(ensemble: Ensemble, master: Master) -> list[bytes]:
    """The runs in which a master had data."""
    runs: list[bytes] = _ask(ensemble, master, "HKEYS", master.run_key)
    return runs
