"""Blocks of graceful_stop in this process: what they let through, put back and refuse."""

from __future__ import annotations

import asyncio
import copy
import gc
import os
import pickle
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import InMemoryStorage

from optuna_dlock import graceful_stop
from optuna_dlock.errors import BudgetExhaustedError, StudyStoppedError
from optuna_dlock.graceful_stop import GracefulStop
from optuna_dlock.signal_watch import SAME, Tally, TrialAborted, current_watch
from tests.stop_worker import open_storage

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """No handler, descriptor or thread, however the block was left."""
    handlers = [signal.getsignal(s) for s in _SIGNALS]
    threads = set(threading.enumerate())
    gc.collect()  # connections of earlier tests
    descriptors = len(os.listdir("/dev/fd"))
    yield
    assert [signal.getsignal(s) for s in _SIGNALS] == handlers
    assert set(threading.enumerate()) <= threads
    gc.collect()
    assert len(os.listdir("/dev/fd")) <= descriptors
    fd = signal.set_wakeup_fd(-1)
    assert fd == -1


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study()


def _states(study: optuna.Study) -> list[str]:
    return [trial.state.name for trial in study.trials]


def _interrupt(stop: GracefulStop) -> None:
    """The first SIGINT."""
    signal.raise_signal(signal.SIGINT)
    while not stop.requested:
        time.sleep(0.001)


def _end_at_once() -> None:
    signal.raise_signal(signal.SIGTERM)
    time.sleep(60)
    raise AssertionError("nothing ended this")


def _interrupt_twice() -> None:
    signal.raise_signal(signal.SIGINT)
    while (watch := current_watch()) is None or watch.tally.stopped_by is None:
        time.sleep(0.001)
    time.sleep(SAME * 1.2)
    signal.raise_signal(signal.SIGINT)
    time.sleep(60)


# -- what the signals ask for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signals", "stopped", "aborted"),
    [
        ([], None, None),
        ([("INT", 0)], "INT", None),
        ([("INT", 0), ("INT", SAME)], "INT", None),
        ([("INT", 0), ("INT", 1)], "INT", "INT"),
        # A key that is held down repeats, and comes to its end.
        ([("INT", i * 0.03) for i in range(20)], "INT", "INT"),
        ([("TERM", 0)], "TERM", "TERM"),
        ([("HUP", 0)], "HUP", "HUP"),
        ([("INT", 0), ("TERM", 0)], "INT", "TERM"),
        ([("TERM", 0), ("INT", 1)], "TERM", "TERM"),
        ([("INT", 0), ("INT", 1), ("TERM", 2)], "INT", "INT"),
    ],
)
def test_what_signals_ask_for(
    signals: list[tuple[str, float]], stopped: str | None, aborted: str | None
) -> None:
    tally = Tally()
    for name, at in signals:
        tally.add(signal.Signals[f"SIG{name}"], at + 1000.0)
    for found, wanted in ((tally.stopped_by, stopped), (tally.aborted_by, aborted)):
        assert (found and signal.Signals(found).name) == (wanted and f"SIG{wanted}")


# -- without a signal --------------------------------------------------------------------------------


def test_without_a_signal_a_block_changes_nothing(study: optuna.Study) -> None:
    with graceful_stop(study) as stop:
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=3)
        left = study.ask()
    assert (stop.requested, stop.signal) == (False, None)
    stop.reraise()
    assert _states(study) == ["COMPLETE"] * 3 + ["RUNNING"]  # somebody may tell that one yet
    study.tell(left, 1.0)
    assert "_pop_waiting_trial_id" not in vars(study)


def test_any_error_leaves_no_trial_running_and_passes(study: optuna.Study) -> None:
    with pytest.raises(ZeroDivisionError), graceful_stop(study, on_abort="requeue"):
        study.ask()
        study.tell(study.ask(), 1.0)
        study.ask()
        raise ZeroDivisionError
    # Not in the queue again: what failed by itself would fail again and again.
    assert _states(study) == ["FAIL", "COMPLETE", "FAIL"]


def test_trials_begun_before_the_block_or_by_others_are_not_touched(study: optuna.Study) -> None:
    before = study.ask()
    other = optuna.load_study(study_name=study.study_name, storage=study._storage)
    with pytest.raises(SystemExit), graceful_stop(study):
        study.ask()
        other.ask()
        _end_at_once()
    assert _states(study) == ["RUNNING", "FAIL", "RUNNING"]
    study.tell(before, 0.0)


@pytest.mark.parametrize("error", [StudyStoppedError, BudgetExhaustedError])
def test_a_study_that_is_over_ends_the_block(study: optuna.Study, error: type[Any]) -> None:
    with graceful_stop(study, on_abort="requeue") as stop:
        study.ask()
        raise error("it is over", study_id=study._study_id)
    assert (stop.requested, stop.signal) == (True, None)
    assert _states(study) == ["FAIL", "WAITING"]


def test_the_end_of_another_study_is_an_error_here(study: optuna.Study) -> None:
    with pytest.raises(StudyStoppedError), graceful_stop(study):
        raise StudyStoppedError("it is over", study_id=study._study_id + 1)


def test_other_threads_are_told_that_they_cannot(study: optuna.Study) -> None:
    caught: list[BaseException] = []

    def enter() -> None:
        try:
            with graceful_stop(study):
                pass
        except RuntimeError as error:
            caught.append(error)

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert "works in the main thread only" in str(caught[0])


def test_a_block_is_entered_once(study: optuna.Study) -> None:
    stop = graceful_stop(study)
    with stop:
        pass
    with pytest.raises(RuntimeError, match="entered before"):
        stop.__enter__()


@pytest.mark.parametrize(
    "options", [{"on_abort": "retry"}, {"abort_after": -1}, {"abort_after": float("nan")}]
)
def test_bad_options_are_refused(study: optuna.Study, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        graceful_stop(study, **options)


def test_copies_of_the_study_are_optunas_own() -> None:
    study = optuna.create_study()
    with graceful_stop(study):
        for other in (copy.copy(study), copy.deepcopy(study), pickle.loads(pickle.dumps(study))):
            if other._storage is not study._storage:
                other.ask()
                assert len(other.trials) == 1
    assert study.trials == []


# -- SIGINT ------------------------------------------------------------------------------------------


def test_a_signal_before_the_first_trial_begins_none(study: optuna.Study) -> None:
    with graceful_stop(study) as stop:
        _interrupt(stop)
        study.optimize(lambda _: 0.0, n_trials=3)
        raise AssertionError("the block was left")
    assert stop.signal == signal.SIGINT
    assert study.trials == []


def test_optimize_returns_after_the_running_trial(study: optuna.Study) -> None:
    def objective(trial: optuna.Trial) -> float:
        if trial.number == 1:
            _interrupt(stop)
        return 0.0

    returned = False
    with graceful_stop(study) as stop:
        study.optimize(objective)
        returned = True
    assert returned
    assert _states(study) == ["COMPLETE", "COMPLETE"]


def test_an_ask_after_the_signal_ends_the_block_and_what_it_began(study: optuna.Study) -> None:
    with graceful_stop(study, on_abort="requeue") as stop:
        study.ask().suggest_float("x", 0, 1)
        _interrupt(stop)
        study.ask()
        raise AssertionError("the block was left")
    assert _states(study) == ["FAIL", "WAITING"]
    assert study.trials[0].params == study.trials[1].params


def test_reraise_is_for_the_end_of_the_program(study: optuna.Study) -> None:
    with graceful_stop(study) as stop:
        _interrupt(stop)
    with pytest.raises(KeyboardInterrupt):
        stop.reraise()


# -- at once -----------------------------------------------------------------------------------------


def test_an_objective_cannot_swallow_it_by_accident(study: optuna.Study) -> None:
    def objective(_: optuna.Trial) -> float:
        try:
            _end_at_once()
        except Exception:
            return 0.0
        return 1.0

    with pytest.raises(SystemExit) as caught, graceful_stop(study):
        study.optimize(objective, catch=(Exception,))
    assert caught.value.code == 128 + signal.SIGTERM
    assert _states(study) == ["FAIL"]


def test_an_error_while_the_trial_cleans_up_does_not_hide_the_signal(study: optuna.Study) -> None:
    def objective(_: optuna.Trial) -> float:
        try:
            _end_at_once()
        finally:
            raise ZeroDivisionError

    with pytest.raises(SystemExit), graceful_stop(study):
        study.optimize(objective)
    assert _states(study) == ["FAIL"]


def test_a_trial_is_known_from_its_first_moment_on() -> None:
    """The signal comes after the storage created the trial and before `ask` knows of it."""

    class Storage(InMemoryStorage):
        def create_new_trial(self, *args: Any, **kwargs: Any) -> int:
            trial_id = super().create_new_trial(*args, **kwargs)
            signal.raise_signal(signal.SIGTERM)
            while stop._watch.tally.aborted_by is None:
                time.sleep(0.001)
            time.sleep(0.05)  # its handler runs in here
            return trial_id

    study = optuna.create_study(storage=Storage())
    with pytest.raises(SystemExit), graceful_stop(study) as stop:
        study.ask()
    assert _states(study) == ["FAIL"]


def test_a_sampler_that_takes_long_is_ended_and_its_trial_recorded() -> None:
    class Sampler(optuna.samplers.RandomSampler):
        def before_trial(self, *_: Any) -> None:
            _end_at_once()

    study = optuna.create_study(sampler=Sampler())
    with pytest.raises(SystemExit), graceful_stop(study):
        study.optimize(lambda _: 0.0)
    assert _states(study) == ["FAIL"]


def test_a_thread_that_begins_a_trial_meanwhile_records_it_itself() -> None:
    """Its creation was under way when all that ran was recorded."""
    under_way, go_on = threading.Event(), threading.Event()

    class Storage(InMemoryStorage):
        def create_new_trial(self, *args: Any, **kwargs: Any) -> int:
            under_way.set()
            go_on.wait()
            return super().create_new_trial(*args, **kwargs)

    study = optuna.create_study(storage=Storage())

    def ask() -> None:
        with pytest.raises(StudyStoppedError):
            study.ask()

    thread = threading.Thread(target=ask)
    with pytest.raises(SystemExit), graceful_stop(study):
        thread.start()
        under_way.wait()
        try:
            _end_at_once()
        finally:
            go_on.set()
            thread.join()
            states = _states(study)  # before the block is left
    assert states == ["FAIL"]


def test_a_trial_that_a_reaper_fails_meanwhile_is_put_back_by_the_reaper_only() -> None:
    class Storage(InMemoryStorage):
        def set_trial_state_values(self, *args: Any, **kwargs: Any) -> bool:
            super().set_trial_state_values(*args, **kwargs)  # the reaper is a moment earlier
            return super().set_trial_state_values(*args, **kwargs)

    study = optuna.create_study(storage=Storage())
    with pytest.raises(SystemExit), graceful_stop(study, on_abort="requeue"):
        study.ask()
        _end_at_once()
    assert _states(study) == ["FAIL"]


def test_a_storage_that_fails_does_not_hide_the_signal(caplog: pytest.LogCaptureFixture) -> None:
    class Storage(InMemoryStorage):
        def set_trial_state_values(self, trial_id: int, *args: Any, **kwargs: Any) -> bool:
            if self.get_trial(trial_id).number == 0:
                raise OSError("disk full")
            return super().set_trial_state_values(trial_id, *args, **kwargs)

    study = optuna.create_study(storage=Storage())
    with pytest.raises(SystemExit), graceful_stop(study):
        study.ask()
        study.ask()
        _end_at_once()
    assert "The end of trial 0 was not recorded" in caplog.text
    assert "disk full" in caplog.text
    assert _states(study) == ["RUNNING", "FAIL"]


def test_a_storage_that_is_gone_does_not_hide_the_signal(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def gone(*_: Any, **__: Any) -> None:
        raise OSError("host unreachable")

    with pytest.raises(SystemExit), graceful_stop(study):
        study.ask()
        monkeypatch.setattr(study._storage, "get_all_trials", gone)
        _end_at_once()
    assert "may be left RUNNING" in caplog.text
    assert "host unreachable" in caplog.text


def test_a_retried_trial_keeps_its_history(study: optuna.Study) -> None:
    for _ in range(2):
        with pytest.raises(SystemExit), graceful_stop(study, on_abort="requeue"):
            study.ask()
            _end_at_once()
    assert _states(study) == ["FAIL", "FAIL", "WAITING"]
    assert study.trials[2].system_attrs == {"failed_trial": 0, "retry_history": [0, 1]}


# -- nested, forked, and with other users of signals -------------------------------------------------


def test_a_signal_stops_all_that_are_entered(study: optuna.Study) -> None:
    inner_study = optuna.create_study()

    def inner_objective(_: optuna.Trial) -> float:
        if len(inner_study.trials) == 2:
            _interrupt(outer)
        return 0.0

    def objective(_: optuna.Trial) -> float:
        with graceful_stop(inner_study) as inner:
            inner_study.optimize(inner_objective)
        assert inner.requested
        return 0.0

    with graceful_stop(study) as outer:
        study.optimize(objective)
    assert outer.signal == signal.SIGINT
    assert (_states(study), _states(inner_study)) == (["COMPLETE"], ["COMPLETE", "COMPLETE"])


@pytest.mark.parametrize(
    ("end", "error"), [(_end_at_once, SystemExit), (_interrupt_twice, KeyboardInterrupt)]
)
def test_a_signal_ends_all_that_are_entered_each_in_its_way(
    study: optuna.Study, end: Callable[[], None], error: type[BaseException]
) -> None:
    inner_study = optuna.create_study()

    def objective(_: optuna.Trial) -> float:
        with graceful_stop(inner_study):
            inner_study.optimize(lambda _: end() or 0.0)  # type: ignore[func-returns-value]
        return 0.0

    with pytest.raises(error), graceful_stop(study, on_abort="requeue"):
        study.optimize(objective)
    assert (_states(study), _states(inner_study)) == (["FAIL", "WAITING"], ["FAIL"])


def test_after_the_inner_block_the_outer_one_goes_on(study: optuna.Study) -> None:
    with pytest.raises(SystemExit), graceful_stop(study):
        trial = study.ask()
        with graceful_stop(study):
            study.tell(study.ask(), 0.0)
        study.tell(trial, 0.0)
        study.ask()
        _end_at_once()
    assert _states(study) == ["COMPLETE", "COMPLETE", "FAIL"]


def test_a_forked_child_that_leaves_the_block_ends_no_trial_of_its_parent(tmp_path: Path) -> None:
    study = optuna.create_study(storage=open_storage("journal", str(tmp_path / "journal")))
    before = signal.getsignal(signal.SIGTERM)
    with graceful_stop(study) as stop:
        trial = study.ask()
        with warnings.catch_warnings():  # Python 3.12 warns of forks of processes with threads
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            ok = (
                signal.getsignal(signal.SIGTERM) == before
                and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
                and signal.set_wakeup_fd(-1) == -1
                and stop.__exit__(SystemExit, SystemExit(), None) is False
            )
            os._exit(not ok)
        assert os.waitpid(pid, 0)[1] == 0
        assert _states(study) == ["RUNNING"]
        study.tell(trial, 0.0)


def test_an_event_loop_in_the_objective_does_not_hide_a_signal(study: optuna.Study) -> None:
    """asyncio puts a descriptor of its own in the place of ours."""

    async def work() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: None)
        _end_at_once()

    with pytest.raises(SystemExit), graceful_stop(study):
        study.optimize(lambda _: asyncio.run(work()) or 0.0)
    assert _states(study) == ["FAIL"]


def test_who_was_told_of_signals_before_is_told_still(study: optuna.Study) -> None:
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.setblocking(False)
        signal.set_wakeup_fd(writer.fileno())
        try:
            with graceful_stop(study) as stop:
                _interrupt(stop)
                assert reader.recv(9) == bytes([signal.SIGINT])
            assert signal.set_wakeup_fd(-1) == writer.fileno()
        finally:
            signal.set_wakeup_fd(-1)


def test_nohup_is_respected(study: optuna.Study) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with graceful_stop(study) as stop:
            signal.raise_signal(signal.SIGHUP)
            study.tell(study.ask(), 0.0)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_it_is_not_raised_while_a_block_is_entered_or_left(
    study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal comes while the block is left for another reason."""
    stop = graceful_stop(study)
    record = stop.record
    seen: list[list[str]] = []

    def signal_meanwhile(*args: Any, **kwargs: Any) -> None:
        if not seen:
            signal.raise_signal(signal.SIGTERM)
            while stop._watch.tally.aborted_by is None:
                time.sleep(0.001)
            time.sleep(0.05)  # its handler runs in here
        seen.append(_states(study))
        record(*args, **kwargs)

    monkeypatch.setattr(stop, "record", signal_meanwhile)
    with pytest.raises(SystemExit), stop:
        study.ask()
        raise ZeroDivisionError
    assert seen[0] == ["RUNNING"]
    assert _states(study) == ["FAIL"]


def test_the_exception_says_which_signal(study: optuna.Study) -> None:
    with pytest.raises(SystemExit), graceful_stop(study), pytest.raises(TrialAborted, match="SIGTERM"):
        _end_at_once()
