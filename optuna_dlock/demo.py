"""`optuna-dlock demo`: worker processes tune one model through one shared study, in full view.

The parent hands out the trials, one by one, over a pipe to each worker. A pipe has one writer at each
end: a worker that dies by SIGKILL leaves no lock held, as it would in a shared queue, counter or Event.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

import optuna
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console

from optuna_dlock import RedisLockedStorage
from optuna_dlock.audit import Acknowledged, Check, audit_run
from optuna_dlock.cli_output import to_json
from optuna_dlock.demo_view import Row, View, report
from optuna_dlock.demo_worker import quiet, work
from optuna_dlock.errors import StorageUnavailableError, StudyExistsError
from optuna_dlock.url import parse_url

FAILED = 1
_TIMEOUT = 3.0  # of the parent, in seconds: it must go on drawing; the workers wait longer
_POLL = 0.25  # seconds between two looks at the study
_GRACE = 10.0  # seconds in which workers may finish their trials after Ctrl-C
_ROUNDS = 3  # how often killed workers are replaced


@dataclass
class _Worker:
    """What the parent knows of a worker."""

    name: str
    process: SpawnProcess
    pipe: Connection
    told: Acknowledged = field(default_factory=Acknowledged)
    ready: bool = False
    has_slot: bool = False  # may create a trial, and has not said that it did
    error: str = ""
    end: str = ""  # how it ended; empty while it lives


class _Signals:
    """Remembers SIGINT and SIGTERM while it is entered, so that they end the run and do not tear it."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> _Signals:
        self._before = {
            s: signal.signal(s, lambda n, _: self.received.append(n)) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


def run_demo(workers: int, trials: int, url: str | None, study_name: str | None, as_json: bool) -> int:
    """Run the demo and return its exit code; `as_json`: stdout gets the outcome alone, stderr the rest.

    Raises:
        DLockError: If the URL is bad, the server cannot be used, or the study exists.
    """
    quiet()
    with (
        _Signals() as signals,
        _server(url) as (url, own),
        closing(RedisLockedStorage(url, timeout=_TIMEOUT)) as storage,
    ):
        name = study_name or f"demo-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize")
        except optuna.exceptions.DuplicatedStudyError as error:
            raise StudyExistsError(
                f"the demo needs a new study, and there is one named {name!r}", study_name=name
            ) from error
        where = "a private embedded server" if own else parse_url(url).address
        console = Console(highlight=False, stderr=as_json)
        console.print(
            f"Study {name} on {where}: {trials} trials, {workers} workers", markup=False, soft_wrap=True
        )
        with View(console, trials) as view:
            run = _Run(url, study, trials, view, signals)
            run.run(workers)
        checks = run.audit()
        report(console, run.trials, run.rows(), checks, run.seconds)
        if not own:
            again = f"optuna-dlock audit URL --study {shlex.quote(name)}"
            console.print(f"The study stays on the server; look again: {again}", markup=False, soft_wrap=True)
    ok = all(check.ok for check in checks)
    if as_json:
        outcome = {"study": name, "trials": len(run.trials), "seconds": round(run.seconds, 3), "ok": ok}
        print(to_json({**outcome, "checks": [asdict(check) for check in checks]}))
    if not ok:
        return FAILED
    return 128 + signals.received[0] if signals.received else 0


@contextmanager
def _server(url: str | None) -> Iterator[tuple[str, bool]]:
    """The URL to use, and whether it is a server of our own, in a fresh folder that is removed afterwards."""
    if url is not None:
        yield url, False
        return
    folder = tempfile.mkdtemp(prefix="optuna-dlock-")
    try:
        yield f"embedded:{folder}", True
    finally:
        # The server ends when it finds its folder gone; until then it may write a file into it.
        deadline = time.monotonic() + _TIMEOUT
        while os.path.exists(folder) and time.monotonic() < deadline:
            shutil.rmtree(folder, ignore_errors=True)


class _Run:
    """Starts workers, hands out trials, notices deaths."""

    def __init__(self, url: str, study: optuna.Study, trials: int, view: View, signals: _Signals) -> None:
        self.workers: list[_Worker] = []
        self.study = study
        self.trials: list[FrozenTrial] = []
        self.began = time.monotonic()
        self.seconds = 0.0
        self._url = url
        self._wanted = trials
        self._left = trials
        self._view = view
        self._signals = signals
        self._away = False  # the server, when last asked

    def rows(self) -> list[Row]:
        """The workers, as shown."""
        return [Row(w.name, w.process.pid, w.end or ("" if w.ready else "starting")) for w in self.workers]

    @property
    def killed(self) -> int:
        """How many workers were ended by a signal."""
        return sum((w.process.exitcode or 0) < 0 for w in self.workers)

    def run(self, count: int) -> None:
        """Run all trials, or as many as there are before a signal."""
        for _ in range(_ROUNDS):
            killed_before = self.killed
            count = min(count, self._left)
            try:
                for _ in range(count):
                    self._start_worker()
                self._view.started(self.rows()[-count:])
                self._serve()
            finally:
                for worker in self.workers:
                    worker.process.kill()  # no effect on one that has ended
            try:
                self._fail_leftovers()
            except StorageUnavailableError as error:
                raise StorageUnavailableError(
                    f"{error} There is no audit, and trials may be left RUNNING.",
                    address=parse_url(self._url).address,
                    timeout=_TIMEOUT,
                ) from error
            # A worker that was killed between being sent for a trial and reporting its number may or may
            # not have created it. With all workers gone the server's count is the answer.
            self._left = self._wanted - len(self.trials)
            if self._left <= 0 or self._signals.received or self.killed == killed_before:
                break
            self._view.note(f"{self._left} trials are left: starting workers in place of those killed")
        self.seconds = time.monotonic() - self.began

    def audit(self) -> list[Check]:
        """Compare the server with what the workers reported."""
        expected = None if self._signals.received else self._wanted
        silent = sum(w.has_slot for w in self.workers)
        return audit_run(self.trials, {w.name: w.told for w in self.workers}, expected, silent)

    def _start_worker(self) -> None:
        name = f"w{len(self.workers) + 1}"
        ours, theirs = get_context("spawn").Pipe()
        process = get_context("spawn").Process(
            target=work, args=(name, self._url, self.study.study_name, theirs), name=name, daemon=True
        )
        # Blocked signals are inherited: no Ctrl-C hits a worker before it has its own handlers. The
        # resource tracker comes first because starting it unblocks them.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.workers.append(_Worker(name, process, ours))

    def _serve(self) -> None:
        next_look = 0.0
        deadline = None
        while live := [w for w in self.workers if not w.end]:
            ready = wait([w.pipe for w in live], timeout=0.05)
            for worker in live:
                if worker.pipe in ready:
                    self._receive(worker)
            now = time.monotonic()
            if self._signals.received:
                if deadline is None:
                    deadline = now + _GRACE
                    self._view.note("stopping: workers finish the trials they run (again: at once)")
                for worker in live:
                    # One that has not come up yet holds nothing; it need not be waited for.
                    if not worker.ready or now > deadline or len(self._signals.received) > 1:
                        worker.process.kill()
            if now >= next_look:
                self._look()
                next_look = time.monotonic() + _POLL

    def _receive(self, worker: _Worker) -> None:
        try:
            kind, *rest = worker.pipe.recv()
        except (EOFError, OSError):
            self._ended(worker)
            return
        if kind == "started":
            worker.has_slot = False
            worker.told.numbers.append(rest[0])
        elif kind == "failed":
            worker.error = rest[0]
        elif kind == "leaving":
            worker.has_slot = False
            self._left += 1
        else:  # ready or finished: wants to know whether there is more to do
            worker.ready = True
            if kind == "finished":
                worker.told.finished[rest[0]] = (rest[1], rest[2])
            go = self._left > 0 and not self._signals.received
            try:
                worker.pipe.send(go)
            except OSError:
                return  # it died; the next recv says so
            worker.has_slot = go
            self._left -= go

    def _ended(self, worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.join(_GRACE)
        if worker.process.exitcode is None:
            worker.process.kill()
            worker.process.join()
        code = worker.process.exitcode or 0
        worker.end = "done"
        if code < 0:
            worker.end = "stopped" if self._signals.received else signal.Signals(-code).name
        elif code > 0:
            worker.end = "failed"
        if code and not self._signals.received:
            why = worker.error or (f"killed by {worker.end}" if code < 0 else f"exit code {code}")
            self._view.note(f"worker {worker.name} (pid {worker.process.pid}) is gone: {why}")

    def _look(self) -> None:
        try:
            self.trials = self.study.get_trials(deepcopy=False)  # moves only what changed since
            self._away = False
        except StorageUnavailableError as error:
            if not self._away:
                self._view.note(f"{error} Workers wait for it.")
            self._away = True
        self._view.show(self.trials, self.rows(), time.monotonic() - self.began)

    def _fail_leftovers(self) -> None:
        """Tell FAIL for what dead workers left RUNNING: without a heartbeat nobody else would."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
            self._view.note(f"trial {trial.number} was left RUNNING by a killed worker: now FAIL")
        self.trials = self.study.get_trials(deepcopy=False)
        self._view.show(self.trials, self.rows(), time.monotonic() - self.began)
