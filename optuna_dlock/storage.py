"""RedisLockedStorage: Optuna's storage contract on one Redis, Valkey or KeyDB server."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import uuid
import warnings
from collections.abc import Callable, Container, Sequence
from copy import deepcopy as copy_deeply
from typing import TYPE_CHECKING, Any, Literal, cast

import optuna
import redis
from optuna.distributions import BaseDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage
from optuna.storages._base import DEFAULT_STUDY_NAME_PREFIX
from optuna.storages._heartbeat import BaseHeartbeat
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.cache import StudyCache, trial_id_of
from optuna_dlock.channel import Connection
from optuna_dlock.claims import ClaimedTrials
from optuna_dlock.distributed_lock import DistributedLock
from optuna_dlock.duplicates import Duplicate
from optuna_dlock.ensemble import AnyNode, Ensemble
from optuna_dlock.ensemble_lock import EnsembleLocks
from optuna_dlock.errors import DLockError, TrialNotFoundError
from optuna_dlock.heartbeats import Heartbeats
from optuna_dlock.limits import StudyLimits
from optuna_dlock.lock import LockManager
from optuna_dlock.node import Node
from optuna_dlock.section import Section
from optuna_dlock.server import Server, server_of_client, server_of_url
from optuna_dlock.spacing import Spacing
from optuna_dlock.studies import Registry
from optuna_dlock.worker import WORKER_VARIABLE, Worker, WorkerProcess, this_worker

if TYPE_CHECKING:
    StaleTrialCallback = Callable[[optuna.Study, FrozenTrial], None]

_logger = logging.getLogger(__name__)
_BACKENDS = ("redlock", "pottery")


def _lock_manager(backend: str) -> type[LockManager]:
    if backend == "redlock":
        return LockManager
    from optuna_dlock.pottery_lock import PotteryLockManager  # needs the extra `pottery`, and only here

    return PotteryLockManager


def _quiet_node(server: Server, timeout: float) -> AnyNode:
    """A second connection, which neither checks what it is connected to nor looks after masters."""
    if server.masters:
        servers = [(m.address, m.connection_factory(timeout)) for m in server.masters]
        return Ensemble(servers, server.prefix, timeout, repair=False)
    return Node(server.connection_factory(timeout), server.address, timeout)


def _masters_backend(
    backend: str, ensemble: Ensemble, make_connections: Sequence[Callable[[], Connection]]
) -> tuple[Spacing, EnsembleLocks]:
    if backend == "redlock":
        return Spacing(), EnsembleLocks(ensemble)
    from optuna_dlock import pottery_masters

    spacing = pottery_masters.PotterySpacing(make_connections, ensemble.address)
    return spacing, pottery_masters.PotteryEnsembleLocks(ensemble, make_connections)


def _locked(method: Any) -> Any:
    """Run a method under the node's lock: one thread of a process at a time, as in InMemoryStorage."""

    @functools.wraps(method)
    def wrapper(self: RedisLockedStorage, *args: Any, **kwargs: Any) -> Any:
        with self._node.lock:
            return method(self, *args, **kwargs)

    return wrapper


class RedisLockedStorage(BaseStorage, BaseHeartbeat):
    """A storage for many processes on many hosts: each critical section is one step on the server.

    It does not protect against the loss of a server that has no persistence.

    Example:
        >>> storage = RedisLockedStorage("redis://localhost:6379/0")
        >>> study = optuna.create_study(storage=storage, study_name="mnist", load_if_exists=True)

    Args:
        url: `redis://`, `rediss://`, `valkey://`, `valkeys://`, `keydb://`, `keydbs://`, `unix://` or
            `embedded:PATH`; or a `redis.Redis` client. Several masters are `keydb://m1:6373,m2:6374,m3:6375/0`
            or a list of URLs. None takes `$OPTUNA_DLOCK_URL`, else
            `embedded:optuna.valkey`.
        heartbeat_interval: Seconds between two heartbeats of a running trial; None for no heartbeats.
        grace_period: Seconds without a heartbeat after which a trial counts as stale; None for twice the
            interval.
        heartbeat_stale_trial_callback: Called with the study and each trial failed for that reason.
        failed_trial_callback: The name of the same before Optuna 4.9.
        prefix: First part of all key names; "optuna" if neither this nor `?prefix=` is given.
        timeout: Seconds for which a call goes on trying while the server is away.
        lock: Which lock guards sections of several steps and `lock()`: "redlock" is this package's own,
            "pottery" is `pottery.Redlock`. On several masters it also keeps contenders for any section apart.
        worker_name: Name of this worker in `get_trial_workers`; None takes `$OPTUNA_DLOCK_WORKER`, else a
            unique one. Under a name of its own, a worker that was restarted can take its trials back.
        deferred_writes: Whether parameters, reports and attributes of a trial that this process runs are
            sent at once but confirmed by the next call that waits. A trial is told finished only after all of
            them were. A refusal is raised by the next call on that trial.

    Raises:
        InvalidURLError: If the URL cannot be understood.
        StorageUnavailableError: If the server does not answer within `timeout`.
        AccessDeniedError: If it refuses the password or the user.
        ServerConfigurationError: If it evicts keys.
    """

    def __init__(
        self,
        url: str | Sequence[str] | redis.Redis | None = None,
        *,
        heartbeat_interval: int | None = None,
        grace_period: int | None = None,
        heartbeat_stale_trial_callback: StaleTrialCallback | None = None,
        failed_trial_callback: StaleTrialCallback | None = None,
        prefix: str | None = None,
        timeout: float = 60.0,
        lock: Literal["redlock", "pottery"] = "redlock",
        deferred_writes: bool = True,
        worker_name: str | None = None,
    ) -> None:
        for name, number in (("heartbeat_interval", heartbeat_interval), ("grace_period", grace_period)):
            if number is not None and number <= 0:
                raise ValueError(f"{name} is a positive number of seconds, not {number!r}")
        if heartbeat_stale_trial_callback is not None and failed_trial_callback is not None:
            raise ValueError(
                "failed_trial_callback is the old name of heartbeat_stale_trial_callback: give one"
            )
        if lock not in _BACKENDS:
            raise ValueError(f"lock is one of {', '.join(map(repr, _BACKENDS))}, not {lock!r}")
        if timeout <= 0:
            raise ValueError(f"timeout is a positive number of seconds, not {timeout!r}")
        if worker_name is not None and (not isinstance(worker_name, str) or not worker_name):
            raise ValueError(f"worker_name is a string that is not empty, not {worker_name!r}")
        self.heartbeat_interval = heartbeat_interval
        self.grace_period = grace_period
        self.heartbeat_stale_trial_callback = heartbeat_stale_trial_callback or failed_trial_callback
        self._timeout = timeout
        self._lock_backend = lock
        self._deferred_writes = deferred_writes
        self._worker_name = worker_name
        self._server = (
            server_of_client(url, prefix) if isinstance(url, redis.Redis) else server_of_url(url, prefix)
        )
        self._connect()
        self._node.command("PING")

    def _connect(self) -> None:
        """Everything that belongs to this process: connections, caches, the name it goes by."""
        self._registry = Registry(
            self._server.prefix,
            client=lambda: self._client,
            section=lambda study_id: Section(self._node, self._locks, study_id),
        )
        if self._server.masters:
            self._connect_to_masters()
            return
        make_connection = self._server.connection_factory(self._timeout)
        self._node = Node(
            make_connection,
            self._server.address,
            self._timeout,
            on_connect=self._registry.check_server,
            on_fork=functools.partial(self._start_anew, forked=True),
        )
        self._locks = _lock_manager(self._lock_backend)(
            make_connection, self._server.address, self._timeout, self._server.prefix
        )
        self._start_anew()

    def _connect_to_masters(self) -> None:
        servers = [(m.address, m.connection_factory(self._timeout)) for m in self._server.masters]
        prefix = self._server.prefix
        spacing, locks = _masters_backend(
            self._lock_backend, Ensemble(servers, prefix, self._timeout), [make for _, make in servers]
        )
        on_fork = functools.partial(self._start_anew, forked=True)
        ensemble = Ensemble(servers, prefix, self._timeout, on_fork=on_fork, spacing=spacing)
        # The same faces: what is used of them here is what both have.
        self._node, self._locks = cast("Node", ensemble), cast("LockManager", locks)
        self._start_anew()

    def _start_anew(self, forked: bool = False) -> None:
        self._client = secrets.token_urlsafe(9)
        self._process = this_worker(self._worker_name, self._client, forked)
        self._studies: dict[int, ClaimedTrials] = {}
        self._registry.forget()
        self._heartbeats: Heartbeats | None = None
        if self.heartbeat_interval is not None:
            timeout = min(self._timeout, float(self.heartbeat_interval))
            make_node = functools.partial(_quiet_node, self._server, timeout)
            self._heartbeats = Heartbeats(self.heartbeat_interval, self._studies, make_node)

    def __getstate__(self) -> dict[str, Any]:
        kept = (
            *("heartbeat_interval", "grace_period", "heartbeat_stale_trial_callback"),
            *("_timeout", "_lock_backend", "_deferred_writes", "_server", "_worker_name"),
        )
        return {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._connect()

    def __repr__(self) -> str:
        return f"RedisLockedStorage({self._server.address!r}, prefix={self._server.prefix!r})"

    def close(self) -> None:
        """Wait for outstanding writes, then close the connections. A later call opens them again.

        Heartbeats end; they begin again with the next trial that this process creates or claims.
        """
        if self._heartbeats is not None:
            self._heartbeats.stop()
        with self._node.lock:
            self._node.collect()
            self._node.close()
        self._locks.close()

    def __enter__(self) -> RedisLockedStorage:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def lock(self, name: str, ttl: float = 30.0) -> DistributedLock:
        """A lock for a critical section of your own, held by one process of the whole cluster.

        `study:<id>` is the lock of that study: while it is held, no other process creates or finishes trials.

        Args:
            name: Any text.
            ttl: Seconds after which the lock is free again if its holder died; renewed automatically.

        Returns:
            A lock for `with`, or with `acquire(timeout=...)` and `release()`.
        """
        return self._locks.lock(name, ttl=ttl)

    # -- studies -----------------------------------------------------------------------------------

    @_locked
    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> int:
        """See `BaseStorage`."""
        if study_name is None:
            study_name = DEFAULT_STUDY_NAME_PREFIX + str(uuid.uuid4())
        study_id = self._registry.create(self._node, study_name, directions)
        _logger.info("A new study created in %s with name: %s", self._server.address, study_name)
        return study_id

    @_locked
    def delete_study(self, study_id: int) -> None:
        """See `BaseStorage`."""
        self._registry.delete(self._node, study_id)
        self._studies.pop(study_id, None)

    @_locked
    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        self._registry.set_attr(self._node, study_id, False, key, value)

    @_locked
    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        self._registry.set_attr(self._node, study_id, True, key, value)

    @_locked
    def get_study_id_from_name(self, study_name: str) -> int:
        """See `BaseStorage`."""
        return self._registry.id_of(self._node, study_name)

    @_locked
    def get_study_name_from_id(self, study_id: int) -> str:
        """See `BaseStorage`."""
        return self._registry.info(self._node, study_id).name

    @_locked
    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """See `BaseStorage`."""
        return list(self._registry.info(self._node, study_id).directions)

    @_locked
    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        return self._registry.attrs(self._node, study_id, False)

    @_locked
    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """See `BaseStorage`."""
        return self._registry.attrs(self._node, study_id, True)

    @_locked
    def get_all_studies(self) -> list[FrozenStudy]:
        """See `BaseStorage`."""
        return [
            FrozenStudy(
                study_name=info.name,
                direction=None,
                directions=list(info.directions),
                user_attrs=user_attrs,
                system_attrs=system_attrs,
                study_id=study_id,
            )
            for study_id, info, user_attrs, system_attrs in self._registry.all(self._node)
        ]

    def stop_study(self, study_id: int) -> None:
        """Let no trial of a study begin any more: its workers finish the running ones and end.

        `study.ask` and `study.optimize` end with a `StudyStoppedError`, until `resume_study`.
        """
        self.limits(study_id).stop()

    def resume_study(self, study_id: int) -> None:
        """Let trials of a stopped study begin again."""
        self.limits(study_id).resume()

    def limits(self, study_id: int) -> StudyLimits:
        """What bounds a study: its stop flag, its trial budget, its grid.

        Raises:
            StudyNotFoundError: If there is no such study.
        """
        with self._node.lock:
            self._registry.info(self._node, study_id)
            return StudyLimits(
                self._node,
                self._registry.study_keys(study_id),
                self._client,
                Section(self._node, self._locks, study_id),
                functools.partial(self._gone, study_id),
                study_id,
            )

    # -- trials ------------------------------------------------------------------------------------

    def _trials(self, study_id: int) -> ClaimedTrials:
        trials = self._studies.get(study_id)
        if trials is None:
            info = self._registry.info(self._node, study_id)
            keys = self._registry.study_keys(study_id)
            trials = self._studies[study_id] = ClaimedTrials(
                self._node,
                keys,
                StudyCache(study_id, info.directions, keys.finished),
                self._process,
                self.heartbeat_interval is not None,
                Section(self._node, self._locks, study_id),
                functools.partial(self._gone, study_id),
                self._deferred_writes,
            )
        return trials

    def _gone(self, study_id: int) -> DLockError:
        self._studies.pop(study_id, None)
        return self._registry.gone(self._node, study_id)

    def _of(self, trial_id: int) -> tuple[ClaimedTrials, int]:
        study_id, number = trial_id >> 32, trial_id & 0xFFFFFFFF  # see trial_id_of
        trials = self._studies.get(study_id)
        if trials is not None:
            return trials, number
        try:
            return self._trials(study_id), number
        except KeyError:
            raise TrialNotFoundError(f"no trial with trial_id {trial_id} exists", trial_id=trial_id) from None

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """See `BaseStorage`."""
        with self._node.lock:
            trial_id = trial_id_of(study_id, self._trials(study_id).create(template_trial))
        if self._heartbeats is not None:
            self._heartbeats.wake()
        return trial_id

    def set_trial_param(
        self,
        trial_id: int,
        param_name: str,
        param_value_internal: float,
        distribution: BaseDistribution,
    ) -> None:
        """See `BaseStorage`."""
        with self._node.lock:
            trials, number = self._of(trial_id)
            trials.set_param(number, param_name, float(param_value_internal), distribution)

    def set_trial_state_values(
        self, trial_id: int, state: TrialState, values: Sequence[float] | None = None
    ) -> bool:
        """See `BaseStorage`."""
        with self._node.lock:
            trials, number = self._of(trial_id)
            done = trials.set_state(number, state, values)
        if self._heartbeats is not None and state is TrialState.RUNNING:
            self._heartbeats.wake()
        return done

    @_locked
    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """See `BaseStorage`."""
        trials, number = self._of(trial_id)
        trials.set_intermediate_value(number, step, intermediate_value)

    @_locked
    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        trials, number = self._of(trial_id)
        trials.set_user_attr(number, key, value)

    @_locked
    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """See `BaseStorage`."""
        trials, number = self._of(trial_id)
        trials.set_system_attr(number, key, value)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        with self._node.lock:
            trials, number = self._of(trial_id)
            return trials.get(number)

    @_locked
    def get_trial_id_from_study_id_trial_number(self, study_id: int, trial_number: int) -> int:
        """See `BaseStorage`."""
        if not 0 <= trial_number < self._trials(study_id).count():
            raise TrialNotFoundError(
                f"no trial with trial number {trial_number} exists in study with study_id {study_id}"
            )
        return trial_id_of(study_id, trial_number)

    @_locked
    def get_trial_number_from_id(self, trial_id: int) -> int:
        """See `BaseStorage`."""
        trials, number = self._of(trial_id)
        if number >= trials.count():
            raise TrialNotFoundError(f"no trial with trial_id {trial_id} exists", trial_id=trial_id)
        return number

    def get_all_trials(
        self,
        study_id: int,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
    ) -> list[FrozenTrial]:
        """See `BaseStorage`."""
        with self._node.lock:
            trials = self._trials(study_id).get_all(states)
        return copy_deeply(trials) if deepcopy else trials

    @_locked
    def get_n_trials(self, study_id: int, state: tuple[TrialState, ...] | TrialState | None = None) -> int:
        """See `BaseStorage`."""
        if state is None:
            return self._trials(study_id).count()
        states = (state,) if isinstance(state, TrialState) else state
        return len(self._trials(study_id).get_all(states))

    @_locked
    def get_best_trial(self, study_id: int) -> FrozenTrial:
        """See `BaseStorage`."""
        directions = self._registry.info(self._node, study_id).directions
        best = self._trials(study_id).best()
        if len(directions) > 1:
            raise RuntimeError("Best trial can be obtained only for single-objective optimization.")
        if best is None:
            raise ValueError("No trials are completed yet.")
        return best

    def remove_session(self) -> None:
        """See `BaseStorage`. Waits for outstanding writes, as nobody may call again."""
        with self._node.lock:
            self._node.collect()

    # -- duplicates --------------------------------------------------------------------------------

    @_locked
    def claim_params(self, trial_id: int, extra: Any = None) -> Duplicate | None:
        """Claim the parameters that a RUNNING trial has now; `optuna_dlock.claim_params` also waits.

        Args:
            trial_id: Of a trial that has all its parameters.
            extra: What else the result depends on; anything that JSON can express.

        Returns:
            None if the trial is to train them, else who has or trains them.

        Raises:
            ClaimError: If the trial has no parameters, or is not RUNNING.
            FinishedTrialError, TrialNotFoundError: If it is finished or there is none.
        """
        trials, number = self._of(trial_id)
        return trials.claim_params(number, extra)

    @_locked
    def claim_finished(self, study_id: int, extra: Any = None) -> int:
        """Let COMPLETE trials that never claimed their parameters own them: `optuna_dlock.claim_finished`."""
        return self._trials(study_id).claim_finished(extra)

    @_locked
    def get_duplicates(self, study_id: int) -> dict[int, Duplicate]:
        """The trials of a study that found their parameters claimed, by number, and whom they duplicate."""
        return self._trials(study_id).duplicates()

    @_locked
    def is_trial_running(self, trial_id: int) -> bool:
        """Whether a trial is RUNNING now; cheaper than `get_trial`, for those who wait for its end."""
        trials, number = self._of(trial_id)
        return trials.is_running(number)

    # -- workers -----------------------------------------------------------------------------------

    @property
    def worker(self) -> Worker:
        """This process, as others see it in `get_trial_workers`."""
        return self._process.worker

    @_locked
    def get_trial_workers(self, study_id: int, first: int = 0) -> dict[int, Worker]:
        """Which worker runs or ran each trial: the one that created it RUNNING, or that claimed it last.

        A few milliseconds per 10 000 trials. An entry may still change as long as its trial is unfinished.

        Args:
            study_id: Id of the study.
            first: Number of the first trial that is asked for.

        Returns:
            Worker by trial number. WAITING trials, those that were added as finished ones, and those of a
            version that did not record workers are left out.
        """
        return {n: process.worker for n, process in self._trials(study_id).workers(first).items()}

    def take_back_trials(self, study: optuna.Study, *, force: bool = False) -> list[optuna.Trial]:
        """Go on with the trials that this worker, under the same `worker_name`, ran before it was restarted.

        These are the RUNNING trials of a former process of this name that is gone: it ran on this host and is
        not there any more, or its heartbeats ended. Of two processes that take one back, one gets it. The
        former one is fenced: should it still live, its next write to the trial raises TrialTakenError.

        Args:
            study: The study, loaded with this storage.
            force: Do not ask whether the former process is gone. Only for names that are given to one process
                at a time, as a StatefulSet does.

        Returns:
            The trials, RUNNING and with all that was written to them, as `study.ask()` would give them.

        Raises:
            ValueError: If this storage has no name of its own.
        """
        numbers = self._take_back(study._study_id, False, force)
        return [optuna.Trial(study, trial_id_of(study._study_id, number)) for number in numbers]

    def requeue_trials(self, study: optuna.Study, *, force: bool = False) -> list[int]:
        """Put the trials that this worker ran before it was restarted back in the queue.

        Which ones, and what is promised: see `take_back_trials`. They keep number, parameters and
        attributes, and lose their intermediate values. Whoever asks for a trial next, in `optimize` too,
        runs them.

        Args:
            study: The study, loaded with this storage.
            force: As for `take_back_trials`.

        Returns:
            Their numbers.

        Raises:
            ValueError: If this storage has no name of its own.
        """
        return self._take_back(study._study_id, True, force)

    def _take_back(self, study_id: int, requeue: bool, force: bool) -> list[int]:
        if self._worker_name is None and not os.environ.get(WORKER_VARIABLE):
            raise ValueError(
                f"a worker without a name has no past: give worker_name or set ${WORKER_VARIABLE}"
            )
        with self._node.lock:
            trials, stale = self._trials(study_id), set(self._get_stale_trial_ids(study_id))

            def is_gone(number: int, process: WorkerProcess) -> bool:
                return force or trial_id_of(study_id, number) in stale or process.is_dead()

            lost = trials.lost(self._process.worker.name, is_gone)
            taken = [n for n, former in lost.items() if trials.take_back(n, former, requeue)]
        if taken and self._heartbeats is not None:
            self._heartbeats.wake()
        return taken

    # -- heartbeats --------------------------------------------------------------------------------

    def record_heartbeat(self, trial_id: int) -> None:
        """See `BaseHeartbeat`. Logs what goes wrong: an exception would end Optuna's heartbeat thread."""
        try:
            with self._node.lock:
                trials, number = self._of(trial_id)
                trials.record_heartbeat(number)
        except Exception as error:
            _logger.warning("heartbeat of trial %d was not recorded: %s", trial_id, error)

    @_locked
    def _get_stale_trial_ids(self, study_id: int) -> list[int]:
        if self.heartbeat_interval is None:
            return []
        grace = self.grace_period if self.grace_period is not None else 2 * self.heartbeat_interval
        return [trial_id_of(study_id, n) for n in self._trials(study_id).stale(grace)]

    def get_heartbeat_interval(self) -> int | None:
        """See `BaseHeartbeat`."""
        return self.heartbeat_interval

    def get_heartbeat_stale_trial_callback(self) -> StaleTrialCallback | None:
        """See `BaseHeartbeat`."""
        return self.heartbeat_stale_trial_callback

    def get_failed_trial_callback(self) -> StaleTrialCallback | None:
        """The name of the same before Optuna 4.9."""
        return self.heartbeat_stale_trial_callback


def fail_stale_trials(study: optuna.Study) -> None:
    """Fail trials whose worker died, as `study.optimize` does before each trial, and as quietly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
