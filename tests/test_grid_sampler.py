"""A grid for clusters: each point once, failed ones again, none in excess; refusals as Optuna's."""

from __future__ import annotations

import os
import pickle
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import Trial

from optuna_dlock import ClusterGridSampler, RedisLockedStorage, TrialBudget
from optuna_dlock.errors import BudgetExhaustedError, GridMismatchError, UnsupportedStorageError
from tests.contention.crew import PROCESSES, wait_until
from tests.limits import (
    COMPLETE,
    FAIL,
    PRUNED,
    RUNNING,
    WAITING,
    Join,
    count,
    join,
    place,
    storage_of,
    three,
)
from tests.masters import Masters
from tests.proxy import CuttingProxy
from tests.servers import Server

__all__ = ["join", "place", "three"]  # fixtures

SPACE: dict[str, list[Any]] = {"x": [1.0, 2.0, 3.0], "kind": ["a", "b", None], "n": [1, 2]}
SIX: dict[str, list[Any]] = {"x": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}


def objective(trial: optuna.Trial) -> float:
    """Of the space SPACE."""
    trial.suggest_categorical("kind", ["a", "b", None])
    return trial.suggest_float("x", 0.0, 5.0) * trial.suggest_int("n", 1, 2)


def x_of(trial: optuna.Trial) -> float:
    """Of a space with one parameter."""
    return trial.suggest_float("x", 0.0, 1e9)


def failing(at: float, error: type[Exception] = ArithmeticError) -> Callable[[optuna.Trial], float]:
    """An objective that fails at one x."""

    def run(trial: optuna.Trial) -> float:
        x = x_of(trial)
        if x == at:
            raise error
        return x

    return run


def points(study: optuna.Study, *states: Any) -> Counter[tuple[Any, ...]]:
    """How often each point was evaluated."""
    trials = study.get_trials(deepcopy=False, states=states or None)
    return Counter(tuple(sorted(trial.params.items())) for trial in trials)


def assert_once(study: optuna.Study, size: int, *states: Any) -> None:
    """Each point once, and nothing unfinished."""
    found = points(study, *(states or (COMPLETE,)))
    assert len(found) == size
    assert set(found.values()) == {1}
    assert count(study, RUNNING, WAITING) == 0


# -- each point once -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [1, 4])
def test_each_point_is_evaluated_once(join: Join, n_jobs: int) -> None:
    sampler = ClusterGridSampler(SPACE)
    study = join(sampler)
    sampler.optimize(study, objective, n_jobs=n_jobs)
    assert_once(study, 18)
    assert len(study.trials) == sampler.size == 18
    assert sampler.progress(study) == (18, 18, 0, 0)
    assert sampler.is_exhausted(study)
    sampler.optimize(study, objective)  # a worker that comes late
    assert len(study.trials) == 18


def test_a_trial_stores_nothing_of_the_grid(join: Join) -> None:
    study = join(ClusterGridSampler(SPACE))
    study.optimize(objective, n_trials=3)
    assert all(t.system_attrs == t.user_attrs == {} for t in study.trials)
    assert storage_of(study).get_study_system_attrs(study._study_id) == study.user_attrs == {}


def test_plain_optimize_ends_with_the_grid(join: Join) -> None:
    study = join(ClusterGridSampler(SPACE))
    study.optimize(objective)
    assert_once(study, 18)
    assert len(study.trials) == 18


def test_plain_optimize_ends_when_the_last_points_are_held_elsewhere(join: Join) -> None:
    study, other = join(ClusterGridSampler(SIX)), join(ClusterGridSampler(SIX))
    study.tell(study.ask(), 1.0)
    held = other.ask()
    study.optimize(x_of)
    assert len(study.trials) == 6
    with pytest.raises(BudgetExhaustedError, match="6 trials: 5 count, 1 run"):
        study.optimize(x_of)
    other.tell(held, x_of(held))
    assert other._storage.get_n_trials(other._study_id) == 6


def test_a_worker_that_waits_takes_over_a_point_that_fails_elsewhere(join: Join) -> None:
    sampler = ClusterGridSampler(SIX)
    study, other = join(sampler), join(ClusterGridSampler(SIX))
    held = other.ask()
    x = x_of(held)

    def last(trial: optuna.Trial) -> float:
        if trial.number == 5:
            other.tell(held, state=FAIL)
        return x_of(trial)

    sampler.optimize(study, last)
    assert_once(study, 6)
    assert study.trials[-1].params == {"x": x}


def test_the_order_is_that_of_the_seed(join: Join) -> None:
    study = join(ClusterGridSampler(SIX, shuffle=False))
    study.optimize(x_of)
    assert [t.params["x"] for t in study.trials] == SIX["x"]
    storage_of(study).delete_study(study._study_id)
    study = join(ClusterGridSampler(SIX, seed=3))
    study.optimize(x_of)
    first = [t.params["x"] for t in study.trials]
    assert sorted(first) == SIX["x"] != first
    storage_of(study).delete_study(study._study_id)
    study = join(ClusterGridSampler(SIX, seed=3))
    study.optimize(x_of)
    assert [t.params["x"] for t in study.trials] == first


def test_a_grid_of_10_to_the_12_points_costs_nothing_and_may_have_a_budget(join: Join) -> None:
    sampler = ClusterGridSampler({f"x{i}": range(1000) for i in range(4)})
    study = join(sampler)
    budget = TrialBudget(study, n_trials=20)
    budget.optimize(lambda trial: sum(trial.suggest_int(f"x{i}", 0, 999) for i in range(4)))
    assert_once(study, 20)
    assert len(study.trials) == 20
    assert sampler.progress(study) == (10**12, 20, 0, 0)


# -- points that come back -------------------------------------------------------------------------------


def test_a_failed_point_is_handed_out_again_after_all_others(join: Join) -> None:
    sampler = ClusterGridSampler(SIX, shuffle=False)
    study = join(sampler)
    fails = iter([True])

    def once(trial: optuna.Trial) -> float:
        x = x_of(trial)
        if x == 2.0 and next(fails, False):
            raise ArithmeticError
        return x

    sampler.optimize(study, once, catch=(ArithmeticError,))
    assert [t.params["x"] for t in study.trials] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 2.0]
    assert_once(study, 6)


def test_plain_optimize_goes_on_with_a_point_that_failed_until_it_is_given_up(join: Join) -> None:
    study = join(ClusterGridSampler(SIX, shuffle=False, max_retry=1))
    study.optimize(failing(6.0), catch=(ArithmeticError,))
    assert [t.params["x"] for t in study.trials][5:] == [6.0, 6.0]


def test_a_point_that_always_fails_is_given_up(join: Join) -> None:
    sampler = ClusterGridSampler(SIX, max_retry=2)
    study = join(sampler)
    sampler.optimize(study, failing(3.0), catch=(ArithmeticError,))
    assert points(study, FAIL) == {(("x", 3.0),): 3}
    assert_once(study, 5)
    assert sampler.progress(study) == (6, 5, 0, 1)
    assert sampler.is_exhausted(study)


def test_a_pruned_point_is_done_unless_only_complete_ones_are(join: Join) -> None:
    sampler = ClusterGridSampler(SIX)
    study = join(sampler)
    sampler.optimize(study, failing(3.0, optuna.TrialPruned))
    assert len(study.trials) == 6
    storage_of(study).delete_study(study._study_id)
    sampler = ClusterGridSampler(SIX, states=[COMPLETE], max_retry=1)
    study = join(sampler)
    sampler.optimize(study, failing(3.0, optuna.TrialPruned))
    assert points(study, PRUNED) == {(("x", 3.0),): 2}


def test_no_point_comes_back_if_failed_ones_are_done(join: Join) -> None:
    sampler = ClusterGridSampler(SIX, states=[COMPLETE, PRUNED, FAIL])
    study = join(sampler)
    sampler.optimize(study, failing(3.0), catch=(ArithmeticError,))
    assert len(study.trials) == 6


def test_a_trial_that_goes_back_to_the_queue_keeps_its_point(join: Join) -> None:
    study = join(ClusterGridSampler(SIX))
    trial = study.ask()
    x = x_of(trial)
    storage = storage_of(study)
    storage.set_trial_state_values(trial._trial_id, WAITING)
    again = join(ClusterGridSampler(SIX)).ask()
    assert again.number == trial.number
    assert x_of(again) == x
    study.tell(again.number, x)
    study.optimize(x_of)
    assert_once(study, 6)


def test_another_process_that_goes_on_with_a_trial_sees_the_same_point(join: Join) -> None:
    study, other = join(ClusterGridSampler(SPACE)), join(ClusterGridSampler(SPACE))
    trials = [study.ask() for _ in range(3)]
    for trial in trials:
        same = Trial(other, trial._trial_id)
        n = same.suggest_int("n", 1, 2)
        objective(trial)
        objective(same)
        assert trial.params["n"] == n
        assert trial.params == same.params


# -- refusals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"shuffle": False}, {"max_retry": None}, {"states": [COMPLETE]}],
)
def test_a_worker_with_other_rules_is_refused(join: Join, options: dict[str, Any]) -> None:
    join(ClusterGridSampler(SIX)).optimize(x_of, n_trials=1)
    sampler = ClusterGridSampler(SIX, **options)
    study = join(sampler)
    with pytest.raises(GridMismatchError, match="another grid, of 6 points"):
        sampler.optimize(study, x_of)
    assert len(study.trials) == 1


def test_a_worker_with_another_grid_is_refused_and_leaves_no_running_trial(join: Join) -> None:
    join(ClusterGridSampler(SIX)).optimize(x_of, n_trials=1)
    study = join(ClusterGridSampler({"x": [1.0]}))
    with pytest.raises(GridMismatchError) as refusal:
        study.optimize(x_of)
    assert refusal.value.size == 6
    assert [t.state for t in study.trials] == [COMPLETE, FAIL]
    join(ClusterGridSampler(SIX)).optimize(x_of)
    assert_once(study, 6)


def test_what_began_before_the_grid_was_known_and_finds_no_point_is_failed(join: Join) -> None:
    study, other = join(), join(ClusterGridSampler({"x": [1.0]}))
    before = study.ask()  # no grid yet: nothing is refused
    mine = other.ask()
    with pytest.raises(BudgetExhaustedError, match="1 trials: 0 count, 1 run"):
        Trial(join(ClusterGridSampler({"x": [1.0]})), before._trial_id)
    assert study.trials[before.number].state is FAIL
    assert x_of(mine) == 1.0


def test_trials_of_others_in_the_study_are_no_points(join: Join) -> None:
    study = join()
    study.optimize(x_of, n_trials=3)  # random ones
    sampler = ClusterGridSampler(SIX)
    grid = join(sampler)
    sampler.optimize(grid, x_of, n_trials=2)
    study.optimize(x_of, n_trials=1)  # takes a place while it runs, and gives it back
    grid.enqueue_trial({"x": 77.0})
    sampler.optimize(grid, x_of)
    assert {t.params["x"] for t in grid.trials} > set(SIX["x"])
    assert len(grid.trials) == 3 + 6 + 1 + 1
    assert sampler.progress(grid) == (6, 6, 0, 0)


def test_all_parameters_of_an_enqueued_trial_have_to_be_fixed(join: Join) -> None:
    study = join(ClusterGridSampler(SPACE))
    study.enqueue_trial({"x": 1.0})
    with pytest.raises(ValueError, match="All parameters must be specified"):
        study.optimize(objective, n_trials=1)


def test_a_parameter_that_is_not_in_the_grid_is_refused(join: Join) -> None:
    study = join(ClusterGridSampler({"y": [1.0]}))
    with pytest.raises(ValueError, match="x, is not found in the given grid"):
        study.optimize(x_of, n_trials=1)


def test_a_value_out_of_the_range_of_its_parameter_is_used_with_a_warning(join: Join) -> None:
    study = join(ClusterGridSampler({"x": [-1.0, 7.0]}))
    with pytest.warns(UserWarning, match="out of range of the parameter `x`"):
        study.optimize(lambda trial: trial.suggest_float("x", 0.0, 5.0))
    assert {t.value for t in study.trials} == {-1.0, 7.0}


def test_a_value_that_is_none_of_the_choices_is_refused(join: Join) -> None:
    study = join(ClusterGridSampler({"kind": ["c"]}))
    with pytest.raises(ValueError, match="not in"):
        study.optimize(lambda trial: float(len(trial.suggest_categorical("kind", ["a", "b"]))))


def test_another_storage_and_another_sampler_are_refused() -> None:
    sampler = ClusterGridSampler(SIX)
    study = optuna.create_study(sampler=sampler)
    with pytest.raises(UnsupportedStorageError, match=r"ClusterGridSampler needs a RedisLockedStorage"):
        sampler.optimize(study, x_of)
    with pytest.raises(UnsupportedStorageError, match="InMemoryStorage"):
        study.optimize(x_of)
    with pytest.raises(ValueError, match="another sampler"):
        ClusterGridSampler(SIX).optimize(study, x_of)
    with pytest.raises(ValueError, match="max_retry"):
        ClusterGridSampler(SIX, max_retry=-1)


# -- faults ----------------------------------------------------------------------------------------------


def test_a_claim_whose_reply_was_lost_gets_the_same_point(valkey: Server) -> None:
    with CuttingProxy(valkey.port) as proxy, RedisLockedStorage(f"{proxy.url}?prefix=lost-point") as storage:
        study = optuna.create_study(storage=storage, sampler=ClusterGridSampler(SIX, shuffle=False))
        limits = storage.limits(study._study_id)
        limits.define_grid("d", 6, [COMPLETE], None)
        trial_id = storage.create_new_trial(study._study_id)
        proxy.cut_next_reply(b"EVALSHA")
        assert limits.claim_point(storage.get_trial(trial_id).number, "d") == (0, 0)
        assert limits.claim_point(storage.get_trial(trial_id).number, "d") == (0, 0)
        storage.create_new_trial(study._study_id)
        assert limits.claim_point(1, "d") == (1, 0)


def test_a_master_that_lost_its_data_gets_points_reissues_and_budget_back() -> None:
    with Masters("valkey", 3) as masters, RedisLockedStorage(masters.urls) as storage:
        study = optuna.create_study(storage=storage, study_name="s", sampler=ClusterGridSampler(SIX))
        TrialBudget(study, n_trials=6)
        held = study.ask()
        study.optimize(failing(x_of(study.ask())), n_trials=1, catch=(ArithmeticError,))
        study.tell(1, state=FAIL)
        study.tell(study.ask(), 1.0)  # puts the failed point in line
        masters.restart_empty(0)
        wait_until(lambda: _asks_until_copied(study, masters, b":reissues"), "a copy of all")
        masters.kill(1)
        with RedisLockedStorage(masters.urls) as other:
            sampler = ClusterGridSampler(SIX)
            late = optuna.load_study(study_name="s", storage=other, sampler=sampler)
            for running in late.get_trials(states=(RUNNING,)):
                late.tell(running.number, state=FAIL)
            sampler.optimize(late, x_of)
            assert sampler.progress(late) == (6, 6, 0, 0)
            assert count(late, COMPLETE) == 6
    assert held.number == 0


def _asks_until_copied(study: optuna.Study, masters: Masters, name: bytes) -> bool:
    study.set_user_attr("a section", 1)  # so that somebody notices who is behind
    return any(key.endswith(name) for key in masters.servers[0].command("KEYS", "*"))


def test_a_sampler_may_be_pickled(join: Join) -> None:
    sampler = ClusterGridSampler(SIX)
    study = join(sampler)
    trial = study.ask()
    study.sampler = pickle.loads(pickle.dumps(sampler))
    study.optimize(x_of)
    study.tell(trial, x_of(trial))
    assert_once(study, 6)


# -- many processes --------------------------------------------------------------------------------------


def _work(url: str, folder: Path, size: int, hangs: bool) -> None:
    """Body of a worker; one that hangs says so, and never ends its trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = ClusterGridSampler({"x": range(size // 10), "y": range(10)})
    study = optuna.load_study(study_name="s", storage=RedisLockedStorage(url), sampler=sampler)

    def run(trial: optuna.Trial) -> float:
        value = 10 * trial.suggest_int("x", 0, size) + trial.suggest_int("y", 0, 9)
        if hangs:
            (folder / f"hangs{trial.number}").touch()
            time.sleep(600.0)
        if random.random() < 0.01:
            raise ArithmeticError
        return float(value)

    if not hangs:
        wait_until((folder / "go").exists, "all may begin")
    sampler.optimize(study, run, catch=(ArithmeticError,))


# OPTUNA_DLOCK_GRID=10000 is the run that the README tells of.
SIZE = int(os.environ.get("OPTUNA_DLOCK_GRID", "640"))


def test_32_processes_evaluate_each_point_once_though_some_are_killed(
    join: Join, place: str, tmp_path: Path
) -> None:
    study = join()
    several = "," in place
    n_workers, size = (8, max(200, SIZE // 10)) if several else (28, SIZE)
    jobs = [(place, tmp_path, size, hangs) for hangs in [True] * 4 + [False] * n_workers]
    workers = [PROCESSES.Process(target=_work, args=job) for job in jobs]
    for worker in workers:
        worker.start()
    try:
        wait_until(lambda: len(list(tmp_path.glob("hangs*"))) == 4, "four hang")
        (tmp_path / "go").touch()
        for worker in workers[:4]:
            worker.kill()
        for path in tmp_path.glob("hangs*"):  # as a reaper does
            study.tell(int(path.name.removeprefix("hangs")), state=FAIL)
        for worker in workers[4:]:
            worker.join(120.0 + SIZE / 10)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert_once(study, size)
    assert {t.value for t in study.get_trials(states=(COMPLETE,))} == set(map(float, range(size)))
    assert count(study, FAIL) >= 4
    assert len(study.trials) == size + count(study, FAIL)
