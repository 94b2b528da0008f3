"""Signals, seen at once: a thread counts them, so that a main thread that is busy in C code delays nothing.

Python runs a signal's handler in the main thread, between two bytecodes. Its C part runs at once, and writes
the signal's number to a file descriptor (`signal.set_wakeup_fd`): a thread reads it there, decides, and tells
the main thread.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Collection
from types import CodeType, FrameType
from typing import Any

# GNU timeout, and wrappers that forward what the terminal sent to all anyway, let one Ctrl-C arrive twice.
SAME = 0.25  # seconds
LAST_WORDS = 3.0  # seconds, at most, to record trials once the process has to go
_QUIT = b"\0"
_logger = logging.getLogger(__name__)


class TrialAborted(BaseException):
    """Raised in the main thread to end the running trial at once.

    No `Exception`: neither an objective's `except Exception` nor `optimize(catch=...)` may hold it up.
    """


def ending(signum: int) -> BaseException:
    """What a program raises to end as if by this signal: 130 to a shell for SIGINT, 143 for SIGTERM."""
    return KeyboardInterrupt() if signum == signal.SIGINT else SystemExit(128 + signum)


class Tally:
    """What the signals so far ask for.

    Attributes:
        stopped_by: The signal that asked to finish what runs, if any.
        aborted_by: The signal that asked to end it at once: the second SIGINT, or any other.
    """

    def __init__(self) -> None:
        self.stopped_by: int | None = None
        self.aborted_by: int | None = None
        self._first = 0.0

    def add(self, signum: int, now: float) -> None:
        """Count a signal that came at `now` (seconds). Two SIGINTs within `SAME` count as one."""
        if signum != signal.SIGINT or (self.stopped_by is not None and now - self._first > SAME):
            self.aborted_by = self.aborted_by or signum
        if self.stopped_by is None:
            self.stopped_by, self._first = signum, now


class SignalWatch:
    """Handlers of SIGINT, SIGTERM and SIGHUP, from `start` to `close`, both called by the main thread.

    SIGHUP is left alone where it is ignored, as under nohup. A forked child gets the handlers of before back,
    but ignores SIGINT: a terminal sends it to the whole group, and the parent decides what it means.

    A subclass says what is to be done: `stopping`, `aborting`, `overdue`, `abort_after`.

    Args:
        keep_out: Functions in which TrialAborted is not raised.

    Attributes:
        tally: What the signals ask for.
        holding: As long as it is not 0, TrialAborted is not raised. The main thread's.
    """

    def __init__(self, keep_out: Collection[CodeType]) -> None:
        self.tally = Tally()
        self.holding = 0
        self._keep_out = keep_out
        self._raised = False
        self._closed = threading.Event()
        self._telling = threading.Lock()
        self._before: dict[int, Any] = {}
        self._asides: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._watch, name="optuna-dlock-signals", daemon=True)

    def stopping(self) -> None:
        """Let what runs finish, and begin nothing. Called at the first signal, by the watching thread."""

    def aborting(self) -> None:
        """Called, in a thread of its own, when what runs is to end at once."""

    def overdue(self) -> None:
        """Called, in a thread of its own, when it did not end in time. The process exits afterwards."""

    def abort_after(self) -> float | None:
        """In time means: within that many seconds. None: there is no limit."""

    def start(self) -> None:
        """Install the handlers."""
        global _watching
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread.start()
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        _watching = self
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signum != signal.SIGHUP or signal.getsignal(signum) != signal.SIG_IGN:
                # None: a handler that Python did not install and cannot put back
                self._before[signum] = signal.getsignal(signum) or signal.SIG_DFL
                signal.signal(signum, self._handle)

    def close(self) -> None:
        """Put back the handlers of before."""
        global _watching
        with self._telling:
            self._closed.set()
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        current = signal.set_wakeup_fd(self._fd_before)
        if current != self._write:
            signal.set_wakeup_fd(current)
        _watching = None
        os.write(self._write, _QUIT)
        self._thread.join()
        # A thread that still writes to stderr while the interpreter ends would crash it.
        for thread in self._asides:
            thread.join(1.0)
        os.close(self._read)
        os.close(self._write)

    def raise_if_aborted(self) -> None:
        """Raise TrialAborted, once, if what runs in the main thread is to end. Called by the main thread."""
        if self.tally.aborted_by is not None and not self.holding and not self._raised:
            self._raised = True
            raise TrialAborted(signal.Signals(self.tally.aborted_by).name)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # An event loop that the objective runs may have put its own descriptor in the place of ours.
        current = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        if current != self._write:
            signal.set_wakeup_fd(current)
            os.write(self._write, bytes([signum]))
        if frame is None or frame.f_code not in self._keep_out:
            self.raise_if_aborted()

    @property
    def signals(self) -> list[int]:
        """Those that have our handler."""
        return list(self._before)

    def leave_to_parent(self) -> None:
        """In a forked child: put back the handlers of before, and ignore SIGINT."""
        signal.set_wakeup_fd(-1)
        os.close(self._read)
        os.close(self._write)
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_IGN if signum == signal.SIGINT else handler)

    # -- the thread ------------------------------------------------------------------------------

    def _watch(self) -> None:
        stopped = False
        while self.tally.aborted_by is None:
            for signum in os.read(self._read, 64):
                if not signum:
                    return
                self._forward(signum)
                if signum in self._before:
                    self.tally.add(signum, time.monotonic())
            if not stopped and self.tally.stopped_by is not None:
                stopped = True
                self.stopping()
                if self.tally.aborted_by is None:
                    self._aside(self._say_stopping)
        self._aside(self.aborting)
        with self._telling:
            if self._closed.is_set():
                return
            # The handler may have run before there was a decision. It runs once more.
            signal.pthread_kill(threading.main_thread().ident or 0, self.tally.aborted_by)
        if not self._closed.wait(self.abort_after()):
            self._aside(self.overdue).join(LAST_WORDS)
            if not self._closed.is_set():
                os._exit(128 + self.tally.aborted_by)

    def _forward(self, signum: int) -> None:
        """To whom the descriptor belonged before us."""
        if self._fd_before != -1:
            try:
                os.write(self._fd_before, bytes([signum]))
            except OSError:
                _logger.debug("nobody reads signals from descriptor %d", self._fd_before)

    def _say_stopping(self) -> None:
        _logger.warning("SIGINT: finishing the running trials, beginning no other. Again: they end at once.")

    def _aside(self, function: Callable[[], None]) -> threading.Thread:
        """Run what may block, a storage or a log that nobody reads, where it holds up nothing."""
        thread = threading.Thread(target=function, daemon=True)
        self._asides.append(thread)
        thread.start()
        return thread


_watching: SignalWatch | None = None


def current_watch() -> SignalWatch | None:
    """The one that is started and not closed, in this process."""
    return _watching


class _Masked(threading.local):
    """What the forking thread blocked before it forked."""

    signals: set[int | signal.Signals] | None = None


_masked = _Masked()


def _before_fork() -> None:
    # Until the child has let go of the descriptor, a signal that reaches it would be told to the parent.
    if _watching is not None:
        _masked.signals = signal.pthread_sigmask(signal.SIG_BLOCK, _watching.signals)


def _after_fork() -> None:
    if _masked.signals is not None:
        signal.pthread_sigmask(signal.SIG_SETMASK, _masked.signals)
        _masked.signals = None


def _after_fork_in_child() -> None:
    global _watching
    watch, _watching = _watching, None
    if watch is not None:
        watch.leave_to_parent()
    _after_fork()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
