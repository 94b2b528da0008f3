"""What several processes do at once: W2, W7, and the contention benchmark."""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import optuna
import redis

from bench.context import STUDY, Context, Figure, new_study
from bench.peers import INMEMORY, OURS

_PATIENCE = 300.0


class Barrier(Protocol):
    """Where all processes meet; the first meeting also waits for the parent."""

    def wait(self) -> Any:
        """Return when all are there."""


class Share:
    """What one process did: when, and which numbers it got."""

    def __init__(self, start: float, end: float, numbers: list[int]) -> None:
        self.start = start
        self.end = end
        self.numbers = numbers


Work = Callable[[Context, int, Barrier], Share]


def run_processes(
    context: Context, count: int, work: Work, prepare: Callable[[], None]
) -> tuple[list[Share], float]:
    """Run `work` in `count` processes and return what each did, and the seconds they took together.

    The processes start first, with all modules loaded; then `prepare` runs here; then they open
    their storages and warm up; then a barrier lets all go at once. Only what follows is timed.
    """
    start_method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    processes: Any = multiprocessing.get_context(start_method)
    results: Any = processes.Queue()
    prepared = processes.Event()
    barrier = processes.Barrier(count, timeout=_PATIENCE)
    children = [
        processes.Process(target=_child, args=(context, index, work, prepared, barrier, results))
        for index in range(count)
    ]
    for child in children:
        child.start()
    try:
        prepare()
        prepared.set()
        shares = [_result(results) for _ in children]
    except BaseException:
        for child in children:
            child.kill()
        raise
    for child in children:
        child.join()
    return shares, max(s.end for s in shares) - min(s.start for s in shares)


def _child(context: Context, index: int, work: Work, prepared: Any, barrier: Any, results: Any) -> None:
    try:
        if not prepared.wait(_PATIENCE):
            raise TimeoutError("nothing was prepared")
        results.put(work(context, index, barrier))
    except BaseException:
        barrier.abort()
        results.put(traceback.format_exc())


def _result(results: Any) -> Share:
    try:
        found = results.get(timeout=_PATIENCE)
    except queue.Empty:
        raise TimeoutError(f"no result in {_PATIENCE:g} s") from None
    if isinstance(found, Share):
        return found
    raise RuntimeError(str(found).strip().splitlines()[-1])


def audit(shares: Sequence[Share], stored: Sequence[int] | None, of: Sequence[int] | None = None) -> str:
    """Say "ok", or which numbers were given twice, lost, or are not stored.

    Args:
        shares: What the processes got.
        stored: What a new storage object reads afterwards; None where there is nothing to read.
        of: The numbers that had to be given; default: all that are stored.
    """
    given = [number for share in shares for number in share.numbers]
    if not given:
        return "no number given at all"
    twice = sorted(number for number, times in Counter(given).items() if times > 1)
    if twice:
        return f"{len(twice)} numbers given twice, first {twice[0]}"
    if stored is not None and list(stored) != list(range(len(stored))):
        return "stored numbers are not 0..n-1"
    if of is None:
        of = range(len(given)) if stored is None else stored
    lost = sorted(set(of) - set(given))
    if lost:
        return f"{len(lost)} numbers lost, first {lost[0]}"
    unknown = sorted(set(given) - set(of))
    if unknown:
        return f"{len(unknown)} numbers from nowhere, first {unknown[0]}"
    return "ok"


def _stored(context: Context) -> list[int]:
    storage = context.open()
    trials = storage.get_all_trials(storage.get_study_id_from_name(STUDY), deepcopy=False)
    return [trial.number for trial in trials]


def _load(context: Context) -> optuna.Study:
    storage = context.open()
    sampler = optuna.samplers.RandomSampler()
    warm = optuna.load_study(study_name="warm-up", storage=storage, sampler=sampler)
    for _ in range(3):
        _ask_and_tell(warm)
    study = optuna.load_study(study_name=STUDY, storage=storage, sampler=sampler)
    study.get_trials(deepcopy=False)
    return study


def _ask_and_tell(study: optuna.Study) -> int:
    trial = study.ask()
    value = trial.suggest_float("x", -1.0, 1.0) + trial.suggest_float("y", -1.0, 1.0)
    study.tell(trial, value)
    return trial.number


# -- W2 ------------------------------------------------------------------------------------------


def ask_and_tell(context: Context) -> Figure:
    """W2: processes x trials on one study, two floats each; trials per second in all."""
    if context.peer == INMEMORY:
        study = new_study(context.open())
        numbers: list[int] = []
        count = context.number("trials") * context.number("processes")
        start = time.monotonic()
        numbers += [_ask_and_tell(study) for _ in range(count)]
        return Figure(count / (time.monotonic() - start), audit=_audit_one(numbers))
    shares, seconds = run_processes(
        context, context.number("processes"), _share_of_asks, lambda: _create(context)
    )
    done = sum(len(share.numbers) for share in shares)
    return Figure(done / seconds, audit=audit(shares, _stored(context)))


def _audit_one(numbers: list[int]) -> str:
    return audit([Share(0.0, 0.0, numbers)], None)


def _create(context: Context) -> None:
    storage = context.open()
    new_study(storage, "warm-up")
    new_study(storage)


def _share_of_asks(context: Context, _: int, barrier: Barrier) -> Share:
    study = _load(context)
    barrier.wait()
    start = time.monotonic()
    if "seconds" in context.params:
        end = start + float(context.params["seconds"])
        numbers = []
        while time.monotonic() < end:
            numbers.append(_ask_and_tell(study))
    else:
        numbers = [_ask_and_tell(study) for _ in range(context.number("trials"))]
    return Share(start, time.monotonic(), numbers)


# -- W7 ------------------------------------------------------------------------------------------


def drain(context: Context) -> Figure:
    """W7: enqueued trials drained by several processes, each exactly once; trials per second."""
    count = context.number("trials")
    if context.peer == INMEMORY:
        study = new_study(context.open())
        _enqueue(study, count)
        start = time.monotonic()
        numbers = _drain(study)
        return Figure(count / (time.monotonic() - start), audit=_audit_one(numbers))

    def prepare() -> None:
        storage = context.open()
        new_study(storage, "warm-up")
        _enqueue(new_study(storage), count)

    shares, seconds = run_processes(context, context.number("processes"), _share_of_queue, prepare)
    return Figure(count / seconds, audit=audit(shares, _stored(context), range(count)))


def _enqueue(study: optuna.Study, count: int) -> None:
    for index in range(count):
        study.enqueue_trial({"x": index / count, "y": 0.5}, user_attrs={"queued": True})


def _share_of_queue(context: Context, _: int, barrier: Barrier) -> Share:
    study = _load(context)
    barrier.wait()
    start = time.monotonic()
    numbers = _drain(study)
    return Share(start, time.monotonic(), numbers)


def _drain(study: optuna.Study) -> list[int]:
    """Take from the queue until a trial comes that nobody had enqueued."""
    numbers: list[int] = []
    while True:
        trial = study.ask()
        if "queued" not in trial.user_attrs:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
            return numbers
        numbers.append(trial.number)
        # A trial that was popped twice may be finished by the other one: that is for the audit to say.
        with contextlib.suppress(optuna.exceptions.UpdateFinishedTrialError):
            value = trial.suggest_float("x", 0.0, 1.0) + trial.suggest_float("y", 0.0, 1.0)
            study.tell(trial, value, skip_if_finished=True)


# -- creation only -------------------------------------------------------------------------------


def create_trials(context: Context) -> Figure:
    """Creation alone, several processes, for a number of seconds; trials per second in all."""
    shares, seconds = run_processes(
        context, context.number("processes"), _share_of_creations, lambda: _create(context)
    )
    done = sum(len(share.numbers) for share in shares)
    return Figure(done / seconds, audit=audit(shares, _stored(context)))


def _share_of_creations(context: Context, _: int, barrier: Barrier) -> Share:
    study = _load(context)
    storage, study_id = study._storage, study._study_id
    barrier.wait()
    start = time.monotonic()
    end = start + float(context.params["seconds"])
    numbers = []
    while time.monotonic() < end:
        trial_id = storage.create_new_trial(study_id)
        numbers.append(storage.get_trial_number_from_id(trial_id))
    return Share(start, time.monotonic(), numbers)


def naive_redlock(context: Context) -> Figure:
    """The obvious fix: `pottery.Redlock` around reading and writing a counter; numbers per second."""
    assert context.peer == OURS, "no storage: measured once, beside ours"
    shares, seconds = run_processes(context, context.number("processes"), _share_of_counter, lambda: None)
    done = sum(len(share.numbers) for share in shares)
    return Figure(done / seconds, audit=audit(shares, None))


def _share_of_counter(context: Context, _: int, barrier: Barrier) -> Share:
    from pottery import Redlock, ReleaseUnlockedLock

    client = redis.Redis.from_url(context.access.redis_url)
    key = f"{context.namespace}:counter"
    lock = Redlock(key=f"{context.namespace}:lock", masters={client}, auto_release_time=10.0)
    client.ping()
    barrier.wait()
    start = time.monotonic()
    end = start + float(context.params["seconds"])
    numbers = []
    while time.monotonic() < end:
        lock.acquire()
        number = int(client.get(key) or 0)
        client.set(key, number + 1)
        numbers.append(number)
        with contextlib.suppress(ReleaseUnlockedLock):
            lock.release()
    return Share(start, time.monotonic(), numbers)
