"""The stop flag of a study: nothing begins any more, what runs may finish; and `optuna-dlock stop`."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from optuna_dlock import ClusterGridSampler, RedisLockedStorage, TrialBudget, cli
from optuna_dlock.errors import StudyNotFoundError, StudyStoppedError
from optuna_dlock.limits import StudyLimits
from tests.contention.crew import PROCESSES, wait_until
from tests.limits import COMPLETE, RUNNING, WAITING, Join, count, join, place, storage_of, three
from tests.proxy import CuttingProxy
from tests.servers import Server

__all__ = ["join", "place", "three"]  # fixtures


def stop(study: optuna.Study) -> None:
    """Stop a study for all."""
    storage_of(study).stop_study(study._study_id)


def stopping_at(number: int, study: optuna.Study) -> Callable[[optuna.Trial], float]:
    """An objective that has the study stopped, from elsewhere, while one trial runs."""

    def objective(trial: optuna.Trial) -> float:
        if trial.number == number:
            stop(study)
        return trial.suggest_float("x", 0, 1)

    return objective


def test_nothing_begins_in_a_stopped_study_and_what_runs_may_finish(join: Join) -> None:
    study, other = join(), join()
    running = study.ask()
    other.enqueue_trial({"x": 0.5})
    stop(other)
    for worker in (study, other):
        with pytest.raises(StudyStoppedError) as refusal:
            worker.ask()
        assert refusal.value.study_id == study._study_id
    with pytest.raises(StudyStoppedError):  # the claim of the queue's head is refused, not only a creation
        storage_of(study).set_trial_state_values(other.trials[1]._trial_id, RUNNING)
    with pytest.raises(StudyStoppedError):
        study._storage.create_new_trial(study._study_id)
    other.enqueue_trial({"x": 0.6})
    study.tell(running, 1.0)
    assert [t.state for t in study.trials] == [COMPLETE, WAITING, WAITING]
    storage_of(other).resume_study(other._study_id)
    assert study.ask().suggest_float("x", 0, 1) in (0.5, 0.6)


def test_plain_optimize_finishes_its_trial_and_ends_with_the_error(join: Join) -> None:
    study = join()
    with pytest.raises(StudyStoppedError):
        study.optimize(stopping_at(2, join()), n_trials=10)
    assert [t.state for t in study.trials] == [COMPLETE] * 3


@pytest.mark.parametrize("n_jobs", [1, 3])
def test_a_worker_with_a_budget_or_a_grid_ends_cleanly(join: Join, n_jobs: int) -> None:
    sampler = ClusterGridSampler({"x": [number / 1000 for number in range(1000)]})
    study = join(sampler)
    sampler.optimize(study, stopping_at(2, join()), n_jobs=n_jobs)
    assert 3 <= count(study, COMPLETE) == len(study.trials) <= 3 + n_jobs
    TrialBudget(study, n_trials=1000).optimize(lambda _: 1.0)
    assert len(study.trials) <= 3 + n_jobs


def test_a_worker_that_waits_for_its_turn_ends_too(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    study, other = join(), join()
    budget = TrialBudget(study, n_trials=1)
    other.ask()
    get, looks = StudyLimits.get, []

    def watched(self: StudyLimits) -> object:
        looks.append(self.study_id)
        return get(self)

    monkeypatch.setattr(StudyLimits, "get", watched)
    waiter = threading.Thread(target=budget.optimize, args=(lambda _: 1.0,))
    waiter.start()
    wait_until(lambda: len(looks) >= 2, "it waits")
    stop(other)
    waiter.join(30.0)
    assert not waiter.is_alive()


def test_stopping_twice_is_stopping_and_other_studies_go_on(join: Join) -> None:
    study = join()
    storage = storage_of(study)
    stop(study)
    stop(study)
    assert storage.limits(study._study_id).get().stopped
    optuna.create_study(storage=storage).ask()
    storage.resume_study(study._study_id)
    study.ask()
    with pytest.raises(StudyNotFoundError):
        storage.stop_study(study._study_id + 77)


def test_a_stop_whose_reply_was_lost_does_not_undo_a_later_resume(valkey: Server) -> None:
    url = f"{valkey.url}?prefix=lost-stop"
    with CuttingProxy(valkey.port) as proxy, RedisLockedStorage(f"{proxy.url}?prefix=lost-stop") as storage:
        study_id = storage.create_new_study(optuna.create_study().directions, "s")
        proxy.cut_next_reply(b"EVALSHA")
        storage.stop_study(study_id)
        assert storage.limits(study_id).get().stopped
        sent = storage._node._sequence
        with RedisLockedStorage(url) as other:
            other.resume_study(study_id)
        storage._node._sequence = sent - 1  # the same operation once more, as a retry sends it
        storage.stop_study(study_id)
        assert not storage.limits(study_id).get().stopped


def test_a_deleted_study_takes_its_limits_with_it(join: Join, place: str) -> None:
    study = join(ClusterGridSampler({"x": [1.0, 2.0]}))
    study.ask()
    TrialBudget(study, n_trials=5)
    stop(study)
    limits = storage_of(study).limits(study._study_id)
    storage_of(study).delete_study(study._study_id)
    with pytest.raises(StudyNotFoundError):
        limits.get()
    with pytest.raises(StudyNotFoundError):
        limits.stop()
    join().ask()


# -- several processes, and the command ------------------------------------------------------------------


def _work(url: str, folder: Path) -> None:
    """Body of a worker that runs trials until it is stopped, and says how it ended."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name="s", storage=RedisLockedStorage(url))

    def objective(trial: optuna.Trial) -> float:
        (folder / f"runs{trial.number}").touch()
        return trial.suggest_float("x", 0, 1)

    try:
        study.optimize(objective)
    except StudyStoppedError:
        (folder / f"stopped{threading.get_native_id()}").touch()


def test_all_processes_end_when_somebody_stops_the_study(
    join: Join, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = join()
    workers = [PROCESSES.Process(target=_work, args=(place, tmp_path)) for _ in range(4)]
    for worker in workers:
        worker.start()
    wait_until(lambda: len(list(tmp_path.glob("runs*"))) > 20, "they work")
    assert cli.main(["stop", place, "s"]) == 0
    for worker in workers:
        worker.join(60.0)
        assert worker.exitcode == 0
    assert len(list(tmp_path.glob("stopped*"))) == 4
    assert capsys.readouterr().out.startswith("s: stopped; ")
    trials = study.trials
    assert {t.state for t in trials} == {COMPLETE}
    assert cli.main(["stop", place, "s", "--resume", "--json"]) == 0
    facts = {"study": "s", "stopped": False, "running": 0, "waiting": 0, "remaining": None}
    assert json.loads(capsys.readouterr().out) == facts
    study.optimize(lambda _: 1.0, n_trials=1)


def test_stop_tells_a_study_that_is_not_there(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stop", place, "nobody"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("optuna-dlock: no study named 'nobody'")


def test_stop_does_not_make_an_embedded_storage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["stop", f"embedded:{tmp_path}/none", "s"]) == 2
    assert "no embedded storage" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
