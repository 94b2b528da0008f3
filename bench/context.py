"""What every workload is given and gives back, and the trials that are there before it starts."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, cast

import optuna
import redis
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial

from bench.peers import Access, create_namespace, open_storage
from bench.rdb_fill import fill_database

STUDY = "bench"
FLOATS = 10
WARM_UP_PART = "w"  # the second name space of a measurement, see Context.open_warm_up


@dataclass
class Figure:
    """One measurement: the value the table shows, what else was seen, and what was wrong."""

    value: float
    extra: dict[str, float] = field(default_factory=dict)
    audit: str | None = None  # None: nothing to audit; "ok"; else what was lost or doubled

    def as_json(self) -> dict[str, Any]:
        """Plain data for the result line."""
        return asdict(self)


@dataclass
class Context:
    """One measurement in one fresh process: a peer, its empty name space, and the workload's numbers."""

    peer: str
    access: Access
    namespace: str
    params: dict[str, Any]

    def open(self, part: str = "") -> BaseStorage:
        """A new storage object; `part` names the second name space beside the main one."""
        return open_storage(self.peer, self.access, self.namespace + part)

    def open_warm_up(self) -> BaseStorage:
        """A storage on the second, still empty name space."""
        create_namespace(self.peer, self.access, self.namespace + WARM_UP_PART)
        return self.open(WARM_UP_PART)

    def number(self, name: str) -> int:
        """An integer parameter of the workload."""
        return int(self.params[name])


def quiet() -> None:
    """The same logging for all peers: warnings only."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)


def new_study(storage: BaseStorage, name: str = STUDY, **options: Any) -> optuna.Study:
    """A study that minimises; random sampling with a fixed seed unless told otherwise."""
    options.setdefault("sampler", optuna.samplers.RandomSampler(seed=0))
    return optuna.create_study(storage=storage, study_name=name, **options)


def objective(trial: optuna.Trial) -> float:
    """Ten floats, no work: what is left is Optuna and the storage."""
    return sum(trial.suggest_float(f"x{i}", -1.0, 1.0) for i in range(FLOATS))


def objective_of_five(trial: optuna.Trial) -> float:
    """Five floats, for TPE."""
    return sum(trial.suggest_float(f"x{i}", -1.0, 1.0) ** 2 for i in range(5))


def templates(count: int, floats: int = FLOATS, steps: int = 0, seed: int = 1) -> Iterator[FrozenTrial]:
    """Finished trials with float params that differ, and `steps` reports each.

    All params have one distribution object: pickled, such a trial is at its smallest, which makes the
    floor of W4 the lowest there is.
    """
    draw = random.Random(seed).uniform
    one = FloatDistribution(-1.0, 1.0)
    distributions: dict[str, BaseDistribution] = {f"x{i}": one for i in range(floats)}
    for _ in range(count):
        params = {name: draw(-1.0, 1.0) for name in distributions}
        yield create_trial(
            params=params,
            distributions=distributions,
            value=sum(params.values()),
            intermediate_values={step: draw(0.0, 1.0) for step in range(steps)},
        )


def fill(storage: BaseStorage, study_id: int, trials: Iterator[FrozenTrial]) -> None:
    """Store finished templates, one call each."""
    for trial in trials:
        storage.create_new_trial(study_id, trial)


def filled(context: Context, count: int, **shape: Any) -> tuple[BaseStorage, int]:
    """A storage on a study of finished trials: found when prepared before, else made here."""
    storage = context.open()
    try:
        return storage, storage.get_study_id_from_name(STUDY)
    except KeyError:
        pass
    study_id = storage.create_new_study([StudyDirection.MINIMIZE], STUDY)
    database = getattr(storage, "_backend", None)  # optuna wraps a database in a cache
    if isinstance(database, RDBStorage):
        fill_database(database, study_id, templates(count, **shape))
        storage = context.open()
    else:
        fill(storage, study_id, templates(count, **shape))
    return storage, study_id


class Ping:
    """The bare round trip: PING over one redis-py connection, nothing around it."""

    def __init__(self, redis_url: str) -> None:
        pool = redis.ConnectionPool.from_url(redis_url, protocol=2)
        self._connection = cast(Any, pool.make_connection())
        self._connection.connect()

    def __call__(self) -> None:
        """There and back."""
        self._connection.send_command("PING", check_health=False)
        self._connection.read_response()


def timed(call: Callable[[], Any]) -> float:
    """Seconds one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median_ms(seconds: list[float]) -> float:
    """Median in milliseconds."""
    return median(seconds) * 1000


def used_memory(redis_url: str) -> int:
    """Bytes the server has allocated."""
    with redis.Redis.from_url(redis_url) as client:
        return int(client.info("memory")["used_memory"])
