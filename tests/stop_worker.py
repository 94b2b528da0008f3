"""A program that tests of graceful_stop run: `python -m tests.stop_worker JSON`.

It tells on stdout what it does, a line at a time. A trial at a gate ends when it has read a byte from stdin.
"""

from __future__ import annotations

import os


def _is_forked() -> None:
    os.write(1, b"child %d\n" % os.getpid())
    os.read(0, 1)


if __name__ == "__main__":
    # What is registered first runs first: so the child waits before optuna_dlock has seen to its signals.
    os.register_at_fork(after_in_child=_is_forked)

import contextlib
import hashlib
import json
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from optuna_dlock import RedisLockedStorage, graceful_stop, signal_watch

FOR_EVER = 10**9


def open_storage(kind: str, where: Any) -> optuna.storages.BaseStorage:
    """A storage of that kind; `where` is a path or a URL, or several."""
    if kind == "sqlite":
        return optuna.storages.RDBStorage(
            f"sqlite:///{where}", engine_kwargs={"connect_args": {"timeout": 60}}
        )
    if kind == "journal":
        return optuna.storages.JournalStorage(JournalFileBackend(where))
    if kind == "memory":
        return optuna.storages.InMemoryStorage()
    return RedisLockedStorage(where)


def say(*words: Any) -> None:
    """One line in one write: threads do not mix theirs."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def _gate() -> None:
    if not os.read(0, 1):
        raise EOFError("the test is gone")


def _stubborn() -> None:
    while True:
        with contextlib.suppress(BaseException):
            say("goes on")
            time.sleep(FOR_EVER)


def _c_code() -> None:
    """Says so when it is in there: the little Python before does not take 0.1 s of this thread's time."""
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def watch(began: float) -> None:
        while time.clock_gettime(clock) < began + 0.1:
            time.sleep(0.01)
        say("in C code")

    threading.Thread(target=watch, args=(time.clock_gettime(clock),), daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", FOR_EVER)


def _forked() -> None:
    """As a data loader: a child that a Ctrl-C of the whole group reaches, and that is told to end."""
    _ours, theirs = multiprocessing.get_context("fork").Pipe()
    child = multiprocessing.get_context("fork").Process(target=theirs.recv, daemon=True)
    child.start()
    _gate()
    alive = child.is_alive()
    child.terminate()
    child.join()
    say("child was", "alive," if alive else "dead,", "ended by", child.exitcode)


WORK: dict[str, Callable[[], None]] = {
    "gate": _gate,
    "sleep": lambda: time.sleep(FOR_EVER),
    "c code": _c_code,
    "stubborn": _stubborn,
    "forked": _forked,
}


def main() -> None:
    """Do what the JSON says."""
    config = json.loads(sys.argv[1])
    say("pid", os.getpid())
    storage = open_storage(*config["storage"])
    study = optuna.create_study(storage=storage, study_name="s", load_if_exists=True)
    signal_watch.LAST_WORDS = config["last_words"]
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.set_user_attr("mark", trial.number)
        trial.report(x, 0)
        try:
            say("running", trial.number)
            WORK[config["work"]]()
        finally:
            say("left", trial.number)
        return x

    try:
        with graceful_stop(study, **config["options"]) as stop:
            if config["loop"] == "optimize":
                study.optimize(objective, n_jobs=config["n_jobs"])
            else:
                while not stop.requested:
                    trial = study.ask()
                    study.tell(trial, objective(trial))
            say("end of block")
        say("after block", stop.requested, stop.signal and stop.signal.name)
        if config["reraise"]:
            stop.reraise()
    finally:
        restored = handlers == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
        say("handlers restored" if restored else "HANDLERS LEFT BEHIND")
        if config["storage"][0] == "memory":
            say("trials", json.dumps([(t.state.name, t.params, t.user_attrs) for t in study.trials]))


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    main()
