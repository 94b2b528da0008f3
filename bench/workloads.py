"""What one process does and measures: W1, W3, W4, W5, W6, fill, latency, memory."""

from __future__ import annotations

import gc
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from statistics import median

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState

from bench import context as common
from bench.context import (
    STUDY,
    WARM_UP_PART,
    Context,
    Figure,
    Ping,
    filled,
    median_ms,
    new_study,
    templates,
    timed,
)
from bench.peers import INMEMORY, ON_REDIS, UNPICKLING, open_storage
from bench.proxy import delaying_proxy

_WARM_UP = 20


def worker_loop(context: Context) -> Figure:
    """W1: `study.optimize`, random sampler, ten floats; trials per second."""
    storage = context.open()
    new_study(storage, "warm-up").optimize(common.objective, n_trials=_WARM_UP)
    trials = context.number("trials")
    rates = []
    for index in range(context.number("rounds")):
        study = new_study(storage, f"{STUDY}{index}")
        rates.append(trials / _optimize(study, trials))
    return Figure(median(rates))


def _optimize(study: optuna.Study, trials: int) -> float:
    return timed(lambda: study.optimize(common.objective, n_trials=trials))


def prepare_finished(context: Context) -> Figure:
    """Fill a study with finished trials of ten floats, for the workloads that read."""
    if context.peer in (INMEMORY, UNPICKLING):
        return Figure(0.0)  # lives in the measuring process only
    trials = context.number("trials")
    return Figure(trials / timed(lambda: filled(context, trials)))


def warm_refresh(context: Context) -> Figure:
    """W3: a reader's `get_all_trials` after one new trial by another storage object; ms.

    A bare round trip is measured in the same way, after another new trial; so is the copy of the
    list, which the contract asks for and which costs time on any storage.
    """
    writer, study_id = filled(context, context.number("trials"))
    reader = writer if context.peer == INMEMORY else context.open()
    reader_id = reader.get_study_id_from_name(STUDY)
    trials = reader.get_all_trials(reader_id, deepcopy=False)
    samples = context.number("samples")
    new = templates(2 * (samples + _WARM_UP), seed=2)
    ping = Ping(context.access.redis_url) if context.peer in ON_REDIS else None
    refreshes, copies, pings = [], [], []
    for _ in range(samples + _WARM_UP):
        writer.create_new_trial(study_id, next(new))
        start = time.perf_counter()
        found = reader.get_all_trials(reader_id, deepcopy=False)
        refreshed = time.perf_counter()
        copied = found.copy()
        copies.append(time.perf_counter() - refreshed)
        refreshes.append(refreshed - start)
        assert len(found) == len(trials) + 1
        trials = found
        del found, copied  # never inside what is timed: freeing a long list takes as long as copying it
        if ping is not None:
            writer.create_new_trial(study_id, next(new))
            pings.append(timed(ping))
            trials = reader.get_all_trials(reader_id, deepcopy=False)
    beyond = [refresh - copy for refresh, copy in zip(refreshes, copies, strict=True)]
    figure = Figure(median_ms(refreshes[_WARM_UP:]), {"copy ms": median_ms(copies[_WARM_UP:])})
    if pings:
        figure.extra["PING ms"] = median_ms(pings[_WARM_UP:])
        figure.extra["round trips"] = median_ms(beyond[_WARM_UP:]) / figure.extra["PING ms"]
    return figure


def cold_load(context: Context) -> Figure:
    """W4: a new storage object's first `get_all_trials` of a study another process filled; seconds."""
    if context.peer == UNPICKLING:
        return _unpickle(context)
    count = context.number("trials")
    warm = context.open_warm_up()
    warm_id = warm.create_new_study([optuna.study.StudyDirection.MINIMIZE], STUDY)
    common.fill(warm, warm_id, templates(50))
    _load(lambda: context.open(WARM_UP_PART))
    del warm
    seconds, trials = _cold(lambda: _load(context.open), context.number("rounds"))
    for wanted, found in zip(templates(count), trials, strict=True):
        assert (wanted.params, wanted.values) == (found.params, found.values)
    return Figure(seconds)


def _load(open_storage: Callable[[], BaseStorage]) -> list[FrozenTrial]:
    storage = open_storage()
    return storage.get_all_trials(storage.get_study_id_from_name(STUDY), deepcopy=False)


def _cold(load: Callable[[], list[FrozenTrial]], rounds: int) -> tuple[float, list[FrozenTrial]]:
    """Median seconds of a load, nothing of the one before being left; and what was loaded."""
    spent = []
    trials: list[FrozenTrial] = []
    for _ in range(rounds):
        trials.clear()
        gc.collect()
        start = time.perf_counter()
        trials = load()
        spent.append(time.perf_counter() - start)
    return median(spent), trials


def _unpickle(context: Context) -> Figure:
    """The floor: the same trials, each pickled on its own, already in this process."""
    pickles = [pickle.dumps(trial) for trial in templates(context.number("trials"))]
    _ = [pickle.loads(data) for data in pickles[:50]]
    return Figure(_cold(lambda: [pickle.loads(data) for data in pickles], context.number("rounds"))[0])


def tpe(context: Context) -> Figure:
    """W5: `study.optimize` with TPE, five floats, 1 000 trials before; trials per second."""
    warm = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    warm.optimize(common.objective_of_five, n_trials=_WARM_UP)
    storage, _ = filled(context, context.number("before"), floats=5)
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler)
    study.optimize(common.objective_of_five, n_trials=3)
    trials = context.number("trials")
    return Figure(trials / timed(lambda: study.optimize(common.objective_of_five, n_trials=trials)))


def pruning(context: Context) -> Figure:
    """W6: `report` + `should_prune` of one trial with 100 trials x 100 steps before; calls per second.

    "flat" is the median call of the last 100 steps over that of the first 100. The pruner itself has
    less to do past the others' last step, so the two storage calls it makes are measured bare as well.
    """
    storage, study_id = filled(context, context.number("before"), floats=1, steps=100)
    pruner = optuna.pruners.MedianPruner()
    study = optuna.load_study(study_name=STUDY, storage=storage, pruner=pruner)
    steps = context.number("steps")
    _report(study, _WARM_UP)
    rounds = [_report(study, steps) for _ in range(context.number("rounds"))]
    bare, bare_id = [], study.ask()._trial_id
    for step in range(steps):
        start = time.perf_counter()
        storage.set_trial_intermediate_value(bare_id, step, 0.5)
        storage.get_all_trials(study_id, deepcopy=False, states=(TrialState.COMPLETE,))
        bare.append(time.perf_counter() - start)
    assert len(storage.get_trial(bare_id).intermediate_values) == steps
    extra = {
        "flat": median([_flatness(calls) for calls in rounds]),
        "flat, storage calls": _flatness(bare),
    }
    return Figure(median([steps / sum(calls) for calls in rounds]), extra)


def _report(study: optuna.Study, steps: int) -> list[float]:
    """Seconds of each `report` + `should_prune` of one new trial."""
    trial = study.ask()
    calls = []
    for step in range(steps):
        start = time.perf_counter()
        trial.report(0.5, step)
        trial.should_prune()
        calls.append(time.perf_counter() - start)
    return calls


def _flatness(calls: list[float]) -> float:
    return median(calls[-100:]) / median(calls[:100])


def add_trials(context: Context) -> Figure:
    """Fill: `study.add_trials` with finished templates; trials per second, within a time budget."""
    new_study(context.open(), "warm-up").add_trials(templates(_WARM_UP))
    study = new_study(context.open())
    new = list(templates(context.number("trials")))
    trials: Iterator[FrozenTrial] = iter(new)
    done, start = 0, time.perf_counter()
    while chunk := list(islice(trials, 100)):
        study.add_trials(chunk)
        done += len(chunk)
        if time.perf_counter() - start > context.number("seconds"):
            break
    seconds = time.perf_counter() - start
    assert len(study.get_trials(deepcopy=False)) == done
    return Figure(done / seconds, {"trials": done})


def copy_study(context: Context) -> Figure:
    """Fill: `optuna.copy_study` from memory; trials per second."""
    source = new_study(optuna.storages.InMemoryStorage())
    trials = context.number("trials")
    source.add_trials(list(templates(trials)))
    storage = context.open()
    new_study(storage, "warm-up").add_trials(templates(_WARM_UP))
    seconds = timed(
        lambda: optuna.copy_study(
            from_study_name=STUDY, from_storage=source._storage, to_storage=storage, to_study_name="copy"
        )
    )
    assert storage.get_n_trials(storage.get_study_id_from_name("copy")) == trials
    return Figure(trials / seconds)


def latency(context: Context) -> Figure:
    """Time per trial of ten floats when each round trip takes 1 ms more; ms.

    "round trips" is what the delay added, in delays; "waits" is what our own node counted.
    """
    delay_ms = 1.0
    trials = context.number("trials")
    spent, waits = [], None
    for delay in (0.0, delay_ms):
        with delaying_proxy(context.access.redis_url, delay) as url:
            storage = open_storage(context.peer, replace(context.access, redis_url=url), context.namespace)
            new_study(storage, f"warm-up {delay}").optimize(common.objective, n_trials=5)
            study = new_study(storage, f"{STUDY} {delay}")
            before = _waits(storage)
            spent.append(_optimize(study, trials))
            if before is not None:
                waits = (_waits(storage) or 0) - before
    per_trial = [seconds * 1000 / trials for seconds in spent]
    figure = Figure(per_trial[1], {"ms without": per_trial[0]})
    figure.extra["round trips"] = (per_trial[1] - per_trial[0]) / delay_ms
    if waits is not None:
        figure.extra["waits"] = waits / trials
    return figure


def _waits(storage: BaseStorage) -> int | None:
    node = getattr(storage, "_node", None)
    waits = getattr(node, "waits", None)
    return waits if isinstance(waits, int) else None


def memory_per_trial(context: Context) -> Figure:
    """Memory: server bytes for each finished trial of ten floats, run through `optimize`."""
    storage = context.open()
    new_study(storage, "warm-up").optimize(common.objective, n_trials=_WARM_UP)
    study = new_study(storage)
    trials = context.number("trials")
    before = common.used_memory(context.access.redis_url)
    study.optimize(common.objective, n_trials=trials)
    return Figure((common.used_memory(context.access.redis_url) - before) / trials)


def memory_per_call(context: Context) -> Figure:
    """Memory: server bytes that one call leaves behind: one attribute overwritten, trial then finished.

    The same number of calls goes before, so that a log that is capped has reached its cap.
    """
    study = new_study(context.open())
    calls = context.number("calls")
    _overwrite(study, calls)
    before = common.used_memory(context.access.redis_url)
    _overwrite(study, calls)
    return Figure((common.used_memory(context.access.redis_url) - before) / calls)


def _overwrite(study: optuna.Study, calls: int) -> None:
    trial = study.ask()
    for value in range(calls):
        trial.set_user_attr("progress", value)
    study.tell(trial, 0.0)
