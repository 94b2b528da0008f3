"""A worker process of the demo: what it tunes, and how it takes trials from the parent."""

from __future__ import annotations

import signal
import statistics
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection

import optuna
from optuna.trial import TrialState

from optuna_dlock import RedisLockedStorage
from optuna_dlock.errors import DLockError


def work(name: str, url: str, study_name: str, pipe: Connection) -> None:
    """Run trials of the study as long as the parent at the other end of `pipe` says so."""
    # The terminal sends Ctrl-C to the whole group. The parent decides; a trial is not torn in the middle.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    leaving: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, _: leaving.append(signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        _work(name, url, study_name, pipe, leaving)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone, and with it the demo
    except Exception as error:
        pipe.send(("failed", str(error) if isinstance(error, DLockError) else repr(error)))
        raise SystemExit(1) from None


def _work(name: str, url: str, study_name: str, pipe: Connection, leaving: list[int]) -> None:
    quiet()
    objective = _objective(name)
    storage = RedisLockedStorage(url)
    # constant_liar: the sampler counts trials that others are running, so that workers spread out.
    sampler = optuna.samplers.TPESampler(constant_liar=True)
    study = optuna.load_study(study_name=study_name, storage=storage, sampler=sampler)
    pipe.send(("ready",))
    while pipe.recv():
        if leaving:
            pipe.send(("leaving",))
            return
        trial = study.ask()
        try:
            pipe.send(("started", trial.number))
            value = objective(trial)
        except BaseException:
            study.tell(trial, state=TrialState.FAIL)
            raise
        told = study.tell(trial, value)
        pipe.send(("finished", trial.number, told.state, told.value))


def _objective(name: str) -> Callable[[optuna.Trial], float]:
    """A support vector machine that reads handwritten digits: its accuracy, cross-validated."""
    import threadpoolctl  # type: ignore[import-untyped]  # it has no stubs; scikit-learn brings it
    from sklearn.datasets import load_digits
    from sklearn.decomposition import PCA
    from sklearn.model_selection import StratifiedKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    threadpoolctl.threadpool_limits(1)  # the workers are the parallelism
    images, digits = load_digits(return_X_y=True)
    images, digits = images[:900] / 16, digits[:900]
    folds = list(StratifiedKFold(3).split(images, digits))

    def objective(trial: optuna.Trial) -> float:
        trial.set_user_attr("worker", name)
        scaling = trial.suggest_categorical("scaling", ["none", "standard"])
        model = make_pipeline(
            StandardScaler() if scaling == "standard" else "passthrough",
            PCA(trial.suggest_int("components", 2, 48), random_state=0),
            SVC(
                C=trial.suggest_float("C", 1e-2, 1e3, log=True),
                gamma=trial.suggest_float("gamma", 1e-4, 10, log=True),
            ),
        )
        scores: list[float] = []
        for step, (train, test) in enumerate(folds):
            model.fit(images[train], digits[train])
            scores.append(float(model.score(images[test], digits[test])))
            trial.report(statistics.mean(scores), step)
        return statistics.mean(scores)

    return objective


def quiet() -> None:
    """Keep Optuna's own log lines off the display."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
