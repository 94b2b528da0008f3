"""`with graceful_stop(study)`: Ctrl-C finishes the running trials, SIGTERM ends them, none stays RUNNING."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from signal import Signals
from types import TracebackType
from typing import Any, Literal

import optuna
from optuna.trial import FrozenTrial, TrialState

from optuna_dlock.errors import BudgetExhaustedError, StudyStoppedError, UpdateFinishedTrialError
from optuna_dlock.signal_watch import SignalWatch, TrialAborted, current_watch, ending

_BEGIN = "_pop_waiting_trial_id"  # the first thing that `study.ask` calls, from Optuna 4.0 to 5.0
_logger = logging.getLogger(__name__)


def graceful_stop(
    study: optuna.Study,
    *,
    on_abort: Literal["fail", "requeue"] = "fail",
    abort_after: float | None = 3.0,
) -> GracefulStop:
    """Stop the work on a study as signals ask for it, and leave no trial of this process RUNNING.

    The first SIGINT (Ctrl-C) lets the running trials finish; no other is begun, and the block is left as if
    the work were done. A second SIGINT, or the first SIGTERM or SIGHUP, ends the running trials at once,
    records them, and ends the program as convention has it: by KeyboardInterrupt (130 to a shell),
    SystemExit(143) or SystemExit(129). `StudyStoppedError` and `BudgetExhaustedError` of this study end the
    block too, and are no errors then. If the block is left by any other error, the trials that it leaves
    RUNNING become FAIL.

    It works with every storage, with `study.optimize` and its `n_jobs`, and with loops of `ask` and `tell`
    that look at `requested`; an `ask` after a signal ends the block. In the main thread a trial is ended by
    an exception that `finally` and `except BaseException` see, and `except Exception` does not. Nothing can
    interrupt other threads, or code in C: their trials are recorded, and if they do not come to an end within
    `abort_after`, the process exits by `os._exit`. SIGKILL, and SIGTERM while C code holds the interpreter's
    lock, leave trials RUNNING: heartbeats are for these.

    It may be nested: a signal is meant for all that are entered. Processes that an objective starts get the
    terminal's Ctrl-C too. Those it forks ignore it; the others need `start_new_session=True`, or they end.

    Example:
        >>> with graceful_stop(study):
        ...     study.optimize(objective)
        >>> print(study.best_params)  # after Ctrl-C, too

    Args:
        study: The study. Copies of it, such as another process has, are not watched.
        on_abort: What becomes of a trial that a signal ends: "fail", or "requeue", where a new WAITING trial
            with its parameters and attributes is put into the queue as well. For a sampler that hands out the
            points of failed trials again by itself, it is "fail".
        abort_after: Seconds that running trials have to come to their end when they are ended. Three seconds
            more may go by until the process exits; a supervisor should wait longer before it sends SIGKILL
            (Docker: 10 s). None: no limit, which a notebook may prefer.

    Returns:
        What `with` enters: `requested`, `signal` and `reraise()`.

    Raises:
        RuntimeError: On entering, in another thread than the main thread.
    """
    return GracefulStop(study, on_abort, abort_after)


class GracefulStop:
    """What `graceful_stop` returns.

    Attributes:
        study: The study.
        on_abort: "fail" or "requeue".
        abort_after: Seconds, or None.
    """

    _watch: _Watch  # from __enter__ on

    def __init__(
        self, study: optuna.Study, on_abort: Literal["fail", "requeue"], abort_after: float | None
    ) -> None:
        if on_abort not in ("fail", "requeue"):
            raise ValueError(f"on_abort is 'fail' or 'requeue', not {on_abort!r}")
        if abort_after is not None and not abort_after >= 0:
            raise ValueError(f"abort_after is a number of seconds or None, not {abort_after!r}")
        self.study = study
        self.on_abort = on_abort
        self.abort_after = abort_after
        self._begun: dict[int, int] = {}  # id of a trial begun here -> thread that began it
        self._was_stopped = False  # not by a signal
        self._recording = threading.Lock()

    @property
    def requested(self) -> bool:
        """Whether to begin no other trial: a signal came, the study is stopped, or its budget is used up."""
        return self._was_stopped or self.signal is not None

    @property
    def signal(self) -> Signals | None:
        """The first signal that came, if any."""
        number = self._watch.tally.stopped_by if hasattr(self, "_watch") else None
        return None if number is None else Signals(number)

    def reraise(self) -> None:
        """End the program, after the block, as one that was ended by the signal; do nothing if none came.

        A shell's loop over programs is left by Ctrl-C only if the program that it stopped ends so.

        Raises:
            KeyboardInterrupt: After a SIGINT.
        """
        if self.signal is not None:
            raise ending(self.signal)

    def __enter__(self) -> GracefulStop:
        if not _on_main_thread():
            raise RuntimeError(
                "graceful_stop works in the main thread only, where Python handles signals: enter it there, "
                "around what starts the other threads"
            )
        if hasattr(self, "_watch"):
            raise RuntimeError("this graceful_stop was entered before: make another one")
        outer = current_watch()
        watch = self._watch = outer if isinstance(outer, _Watch) else _Watch()
        watch.holding += 1
        self._pid = os.getpid()
        self._begin_before = getattr(self.study, _BEGIN)
        setattr(self.study, _BEGIN, _Begin(self, self._begin_before))
        watch.stops.append(self)
        if watch is not outer:
            watch.start()
        watch.holding -= 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        watch = self._watch
        if os.getpid() != self._pid:
            return False  # a forked child leaves the block; the trials are its parent's
        watch.holding += 1
        stopped = (
            isinstance(error, StudyStoppedError | BudgetExhaustedError)
            and error.study_id == self.study._study_id
        )
        self._was_stopped |= stopped
        aborted = watch.tally.aborted_by is not None
        if error is not None or aborted:
            self.record(requeue=aborted or stopped)
        outermost = watch.stops[0] is self
        if outermost:
            watch.close()
        watch.stops.remove(self)
        if isinstance(self._begin_before, _Begin):  # of an outer one
            setattr(self.study, _BEGIN, self._begin_before)
        else:
            delattr(self.study, _BEGIN)
        watch.holding -= 1
        if watch.tally.aborted_by is None:
            return stopped
        if not aborted:  # the signal came meanwhile
            self.record()
        if outermost:
            raise ending(watch.tally.aborted_by) from None
        if isinstance(error, TrialAborted):
            return False
        raise TrialAborted(Signals(watch.tally.aborted_by).name)

    def begin(self, next_trial: Callable[[], int | None]) -> int:
        """Begin a trial, and know it from its first moment on. Returns its id."""
        watch = self._watch
        if self.signal is not None:
            raise self._stopped_error()
        on_main = _on_main_thread()
        watch.holding += on_main
        try:
            trial_id = next_trial()
            if trial_id is None:
                trial_id = self.study._storage.create_new_trial(self.study._study_id)
            self._begun[trial_id] = threading.get_ident()
        finally:
            watch.holding -= on_main
        if on_main:
            watch.raise_if_aborted()
        elif watch.tally.aborted_by is not None:  # those begun before are recorded already
            self.record({trial_id})
            raise self._stopped_error()
        return trial_id

    def _stopped_error(self) -> StudyStoppedError:
        return StudyStoppedError(
            f"no trial of study {self.study.study_name!r} is begun after {self.signal and self.signal.name}",
            study_id=self.study._study_id,
        )

    def begun_elsewhere(self) -> set[int]:
        """Ids of the trials that other threads than the main thread began."""
        main = threading.main_thread().ident
        return {trial_id for trial_id, thread in list(self._begun.items()) if thread != main}

    def record(self, among: set[int] | None = None, requeue: bool = True) -> None:
        """End those trials that were begun here and are RUNNING, in the storage."""
        among = set(self._begun) if among is None else among
        if not among:
            return
        with self._recording:
            try:
                running = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            except Exception:
                _logger.exception("Trials may be left RUNNING: the storage does not tell which are.")
                return
            for trial in running:
                if trial._trial_id in among:
                    try:
                        self._end(trial, requeue and self.on_abort == "requeue")
                    except Exception:  # the others still have to be recorded
                        _logger.exception(
                            "The end of trial %d was not recorded as it should be.", trial.number
                        )

    def _end(self, trial: FrozenTrial, requeue: bool) -> None:
        try:
            # First this, as only one can do it: whoever did puts the parameters back.
            if not self.study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL):
                return
        except UpdateFinishedTrialError:
            return
        what = "FAIL"
        if requeue:
            # The attributes by which Optuna's own retries are known: RetryFailedTrialCallback.
            history = [*trial.system_attrs.get("retry_history", []), trial.number]
            system_attrs = {"failed_trial": trial.number, **trial.system_attrs, "retry_history": history}
            self.study.add_trial(
                optuna.trial.create_trial(
                    state=TrialState.WAITING,
                    params=trial.params,
                    distributions=trial.distributions,
                    user_attrs=trial.user_attrs,
                    system_attrs=system_attrs,
                )
            )
            what += ", and in the queue again"
        _logger.warning("Trial %d was ended: it is %s.", trial.number, what)


class _Begin:
    """Stands for the method of a study by which `ask` begins a trial."""

    def __init__(self, stop: GracefulStop, next_trial: Callable[[], int | None]) -> None:
        self._stop = stop
        self._next_trial = next_trial

    def __call__(self) -> int:
        return self._stop.begin(self._next_trial)

    def __reduce__(self) -> tuple[Any, ...]:  # a copy of the study has Optuna's own method
        return getattr, (self._stop.study, _BEGIN)


class _Watch(SignalWatch):
    """What signals do to all that are entered."""

    def __init__(self) -> None:
        super().__init__(keep_out=(GracefulStop.__enter__.__code__, GracefulStop.__exit__.__code__))
        self.stops: list[GracefulStop] = []  # the outermost first

    def abort_after(self) -> float | None:
        return min((s.abort_after for s in self.stops if s.abort_after is not None), default=None)

    def stopping(self) -> None:
        for stop in list(self.stops):
            stop.study._stop_flag = True  # study.stop() refuses to be called from here

    def aborting(self) -> None:
        # The main thread's own trial is recorded when it has come to its end.
        for stop in list(self.stops):
            stop.record(stop.begun_elsewhere())
            stop.study._storage.remove_session()

    def overdue(self) -> None:
        _logger.warning("The running trials do not end: this process exits without them.")
        for stop in list(self.stops):
            stop.record()
        sys.stdout.flush()
        sys.stderr.flush()


def _on_main_thread() -> bool:
    return threading.get_ident() == threading.main_thread().ident
