"""A trial budget: exactly n trials over workers, threads, restarts; who counts, waits, and is refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState, create_trial

from optuna_dlock import RedisLockedStorage, TrialBudget
from optuna_dlock.errors import BudgetExhaustedError, BudgetMismatchError, UnsupportedStorageError
from optuna_dlock.limits import StudyLimits
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
from tests.proxy import CuttingProxy
from tests.servers import Server

__all__ = ["join", "place", "three"]  # fixtures


class Uneven:
    """An objective that completes, prunes and fails in turn."""

    def __init__(self) -> None:
        self._calls = iter(range(1_000_000))

    def __call__(self, trial: optuna.Trial) -> float:
        number = next(self._calls)
        if number % 3 == 1:
            raise optuna.TrialPruned
        if number % 3 == 2:
            raise ArithmeticError
        return trial.suggest_float("x", 0, 1)


def _ask(study: optuna.Study, n: int) -> list[optuna.Trial]:
    return [study.ask() for _ in range(n)]


# -- how many --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [1, 4])
def test_exactly_n_trials_count_and_failed_ones_are_replaced(join: Join, n_jobs: int) -> None:
    study = join()
    budget = TrialBudget(study, n_trials=20)
    budget.optimize(Uneven(), n_jobs=n_jobs, catch=(ArithmeticError,))
    assert count(study, COMPLETE, PRUNED) == 20
    assert count(study, FAIL) >= 8
    assert count(study, RUNNING) == 0
    assert budget.remaining() == 0


def test_all_states_count_if_all_are_named(join: Join) -> None:
    study = join()
    TrialBudget(study, 20, states=(COMPLETE, PRUNED, FAIL)).optimize(Uneven(), catch=(ArithmeticError,))
    assert len(study.trials) == 20
    assert count(study, FAIL) > 0


def test_running_trials_take_places_and_failed_ones_give_them_back(join: Join) -> None:
    study, other = join(), join()
    budget = TrialBudget(study, n_trials=3)
    study.tell(study.ask(), 1.0)
    first, second = _ask(other, 2)
    assert budget.remaining() == 0
    for worker in (study, other):
        with pytest.raises(BudgetExhaustedError, match="3 trials: 1 count, 2 run") as refusal:
            worker.ask()
    error = refusal.value
    assert (error.n_trials, error.counted, error.running) == (3, 1, 2)
    assert error.study_id == study._study_id
    other.tell(first, state=FAIL)
    assert budget.remaining() == 1
    study.tell(study.ask(), 1.0)
    other.tell(second, state=PRUNED)
    with pytest.raises(BudgetExhaustedError):
        study.ask()
    assert [t.number for t in study.trials] == [0, 1, 2, 3]  # refused ones got no number


def test_trials_of_before_the_budget_count(join: Join) -> None:
    study = join()
    study.optimize(Uneven(), n_trials=9, catch=(ArithmeticError,))
    running = study.ask()
    budget = TrialBudget(join(), n_trials=10)  # 6 count, 1 runs
    assert budget.remaining() == 3
    _ask(study, 3)
    with pytest.raises(BudgetExhaustedError):
        study.ask()
    study.tell(running, state=FAIL)
    study.ask()


def test_a_finished_trial_that_is_added_takes_a_place_if_its_state_counts(join: Join) -> None:
    study = join()
    TrialBudget(study, n_trials=2)
    study.add_trial(create_trial(value=1.0))
    study.add_trial(create_trial(state=FAIL))
    study.ask()
    with pytest.raises(BudgetExhaustedError):
        study.add_trial(create_trial(value=2.0))
    study.add_trial(create_trial(state=FAIL))


def test_an_enqueued_trial_takes_its_place_when_it_is_started(join: Join) -> None:
    study, other = join(), join()
    budget = TrialBudget(study, n_trials=3)
    for x in range(5):
        study.enqueue_trial({"x": float(x)})
    assert budget.remaining() == 3
    held = other.ask()
    budget.optimize(lambda trial: trial.suggest_float("x", 0, 9), wait=False)
    with pytest.raises(BudgetExhaustedError):
        other.ask()
    assert [count(study, state) for state in (COMPLETE, RUNNING, WAITING)] == [2, 1, 2]
    other.tell(held, state=FAIL)
    assert other.ask().suggest_float("x", 0, 9) in (3.0, 4.0)


# -- joining, raising ------------------------------------------------------------------------------------


def test_the_largest_number_that_a_worker_gives_holds_for_all(join: Join) -> None:
    study = join()
    budget = TrialBudget(study, n_trials=2)
    _ask(study, 2)
    TrialBudget(join(), n_trials=3)
    TrialBudget(join(), n_trials=2)
    assert budget.remaining() == 1
    TrialBudget(join(), n_trials=10)  # as text, 10 is less than 3
    assert budget.remaining() == 8


def test_change_sets_a_budget_and_lift_takes_it_away(join: Join) -> None:
    study = join()
    budget = TrialBudget(study, n_trials=4)
    _ask(study, 4)
    budget.change(2)
    assert budget.remaining() == 0
    budget.change(5)
    assert budget.remaining() == 1
    budget.lift()
    _ask(study, 3)
    assert storage_of(study).limits(study._study_id).get().remaining is None


def test_other_states_are_refused_and_the_error_says_which_count(join: Join) -> None:
    TrialBudget(join(), n_trials=4)
    with pytest.raises(BudgetMismatchError, match="4 trials, counts COMPLETE, PRUNED") as refusal:
        TrialBudget(join(), n_trials=4, states=[COMPLETE])
    assert refusal.value.states == (COMPLETE, PRUNED)


def test_a_changed_budget_counts_what_its_own_states_name(join: Join) -> None:
    study = join()
    TrialBudget(study, n_trials=9)
    study.optimize(Uneven(), n_trials=9, catch=(ArithmeticError,))
    storage_of(study).limits(study._study_id).set_budget(9, [COMPLETE])
    limits = storage_of(study).limits(study._study_id).get()
    assert limits.budget is not None
    assert (limits.budget.counted, limits.remaining) == (3, 6)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_a_budget_is_a_number_of_trials(join: Join, wrong: int) -> None:
    with pytest.raises(ValueError, match="n_trials"):
        TrialBudget(join(), n_trials=wrong)


@pytest.mark.parametrize("wrong", [(), (RUNNING,), (COMPLETE, WAITING)])
def test_the_states_that_count_are_final_ones(join: Join, wrong: tuple[TrialState, ...]) -> None:
    with pytest.raises(ValueError, match="states"):
        TrialBudget(join(), n_trials=1, states=wrong)


def test_another_storage_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedStorageError, match=r"RedisLockedStorage.*InMemoryStorage"):
        TrialBudget(optuna.create_study(), n_trials=1)


# -- waiting for the last ones ---------------------------------------------------------------------------


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever somebody who waits has looked at the limits."""
    seen: list[int] = []
    get = StudyLimits.get

    def watched(self: StudyLimits) -> object:
        limits = get(self)
        seen.append(self.study_id)
        return limits

    monkeypatch.setattr(StudyLimits, "get", watched)
    return seen


def test_who_waits_takes_over_when_the_last_trial_fails_elsewhere(join: Join, looks: list[int]) -> None:
    study, other = join(), join()
    budget = TrialBudget(study, n_trials=2)
    study.tell(study.ask(), 1.0)
    held = other.ask()
    waiter = threading.Thread(target=budget.optimize, args=(lambda _: 2.0,))
    waiter.start()
    wait_until(lambda: len(looks) >= 2, "it waits")
    assert len(other.trials) == 2
    other.tell(held, state=FAIL)
    waiter.join(30.0)
    assert not waiter.is_alive()
    assert [t.state for t in other.trials] == [COMPLETE, FAIL, COMPLETE]


def test_who_waits_leaves_when_the_last_trial_counts(join: Join, looks: list[int]) -> None:
    study, other = join(), join()
    budget = TrialBudget(study, n_trials=1)
    held = other.ask()
    waiter = threading.Thread(target=budget.optimize, args=(lambda _: 2.0,))
    waiter.start()
    wait_until(lambda: len(looks) >= 2, "it waits")
    other.tell(held, 1.0)
    waiter.join(30.0)
    assert not waiter.is_alive()
    assert len(other.trials) == 1


def test_who_waits_fails_trials_of_dead_workers_and_takes_over(join: Join) -> None:
    study, dead = join(heartbeat_interval=1), join()
    budget = TrialBudget(study, n_trials=1)
    storage_of(dead).record_heartbeat(dead.ask()._trial_id)  # its last one
    budget.optimize(lambda _: 2.0)
    assert [t.state for t in study.trials] == [FAIL, COMPLETE]


def test_who_does_not_want_to_wait_leaves(join: Join, looks: list[int]) -> None:
    study = join()
    budget = TrialBudget(study, n_trials=2)
    join().ask()
    budget.optimize(lambda _: 1.0, wait=False)
    assert [t.state for t in study.trials] == [RUNNING, COMPLETE]
    assert not looks


def test_waiting_ends_with_the_timeout(join: Join, looks: list[int]) -> None:
    study = join()
    budget = TrialBudget(study, n_trials=1)
    join().ask()
    budget.optimize(lambda _: 1.0, timeout=0.1)
    assert looks
    assert [t.state for t in study.trials] == [RUNNING]


def test_the_trials_of_a_worker_are_bounded_too(join: Join) -> None:
    study = join()
    numbers: list[int] = []
    budget = TrialBudget(study, n_trials=10)
    budget.optimize(lambda _: 1.0, n_trials=3, callbacks=[lambda _, trial: numbers.append(trial.number)])
    assert numbers == [0, 1, 2]
    assert budget.remaining() == 7


def test_an_error_of_the_objective_is_not_swallowed(join: Join) -> None:
    study = join()
    budget = TrialBudget(study, n_trials=2)

    def objective(_: optuna.Trial) -> float:
        raise BudgetExhaustedError("of another study", study_id=study._study_id + 1)

    with pytest.raises(BudgetExhaustedError, match="another study"):
        budget.optimize(objective)


# -- faults ----------------------------------------------------------------------------------------------


def test_a_creator_whose_reply_was_lost_keeps_the_last_place(valkey: Server) -> None:
    with (
        CuttingProxy(valkey.port) as proxy,
        RedisLockedStorage(f"{proxy.url}?prefix=lost-creation") as storage,
    ):
        study = optuna.create_study(storage=storage)
        TrialBudget(study, n_trials=1)
        proxy.cut_next_reply(b"EVALSHA")
        storage.create_new_trial(study._study_id)
        assert len(study.trials) == 1
        with pytest.raises(BudgetExhaustedError):
            storage.create_new_trial(study._study_id)


def test_a_claimer_whose_reply_was_lost_keeps_the_last_place(valkey: Server) -> None:
    with CuttingProxy(valkey.port) as proxy, RedisLockedStorage(f"{proxy.url}?prefix=lost-claim") as storage:
        study = optuna.create_study(storage=storage)
        TrialBudget(study, n_trials=1)
        study.enqueue_trial({"x": 1.0})
        trial_id = study.trials[0]._trial_id
        proxy.cut_next_reply(b"EVALSHA")
        assert storage.set_trial_state_values(trial_id, RUNNING)
        assert count(study, RUNNING) == 1


def test_a_change_whose_reply_was_lost_does_not_undo_a_later_one(valkey: Server) -> None:
    with CuttingProxy(valkey.port) as proxy, RedisLockedStorage(f"{proxy.url}?prefix=lost-change") as storage:
        study = optuna.create_study(storage=storage)
        budget = TrialBudget(study, n_trials=1)
        other = storage_of(study).limits(study._study_id)
        sequence = storage._node.next_sequence
        budget.change(5)
        other.set_budget(9, [COMPLETE, PRUNED])
        storage._node.next_sequence = lambda: sequence() - 2  # type: ignore[method-assign] # the first once more
        budget.change(5)
        assert budget.remaining() == 9


# -- what it costs ---------------------------------------------------------------------------------------


def _calls(server: Server) -> dict[str, int]:
    stats = server.command("INFO", "commandstats")
    return {name.removeprefix("cmdstat_"): int(fields["calls"]) for name, fields in stats.items()}


def _calls_of_a_creation(server: Server, study: optuna.Study) -> dict[str, int]:
    server.command("CONFIG", "RESETSTAT")
    study._storage.create_new_trial(study._study_id)
    return {
        name: n for name, n in _calls(server).items() if not name.startswith(("client", "config", "info"))
    }


def test_a_study_without_limits_pays_nothing(valkey: Server) -> None:
    with RedisLockedStorage(f"{valkey.url}?prefix=free") as storage:
        study = optuna.create_study(storage=storage)
        study.ask()
        calls = {"evalsha": 1, "hmget": 1, "exists": 1, "hget": 1, "hset": 3, "rpush": 1, "llen": 1}
        assert _calls_of_a_creation(valkey, study) == calls


def test_a_budget_costs_one_round_trip_and_reads_each_finished_trial_once(valkey: Server) -> None:
    with RedisLockedStorage(f"{valkey.url}?prefix=once") as storage:
        study = optuna.create_study(storage=storage)
        study.add_trials([create_trial(value=1.0)] * 1500)
        TrialBudget(study, n_trials=3000)
        assert "lrange" not in _calls_of_a_creation(valkey, study)
        study.tell(0 + 1500, 1.0)
        waits = storage._node.waits
        assert _calls_of_a_creation(valkey, study)["lrange"] == 1
        assert storage._node.waits == waits + 1
        assert "lrange" not in _calls_of_a_creation(valkey, study)


# -- many processes --------------------------------------------------------------------------------------


def _work(url: str, folder: Path, n_trials: int, n_jobs: int, hangs: bool) -> None:
    """Body of a worker; one that hangs begins a trial, says so, and never ends it."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(study_name="s", storage=RedisLockedStorage(url))
    objective = Uneven()

    def hang(trial: optuna.Trial) -> float:
        (folder / f"hangs{trial.number}").touch()
        time.sleep(600.0)
        return 0.0

    budget = TrialBudget(study, n_trials)
    if not hangs:
        wait_until((folder / "go").exists, "all may begin")
    budget.optimize(hang if hangs else objective, n_jobs=n_jobs, catch=(ArithmeticError,))


@pytest.mark.parametrize(("n_workers", "n_jobs", "n_trials"), [(12, 2, 120)])
def test_exactly_n_trials_count_over_many_workers_of_which_some_are_killed(
    join: Join, place: str, tmp_path: Path, n_workers: int, n_jobs: int, n_trials: int
) -> None:
    study = join()
    jobs = [(place, tmp_path, n_trials, n_jobs, False)] * n_workers
    jobs += [(place, tmp_path, n_trials, 1, True)] * 2
    workers = [PROCESSES.Process(target=_work, args=job) for job in jobs]
    for worker in workers:
        worker.start()
    try:
        wait_until(lambda: len(list(tmp_path.glob("hangs*"))) == 2, "both hang")
        (tmp_path / "go").touch()
        for worker in workers[n_workers:]:
            worker.kill()
        for path in tmp_path.glob("hangs*"):  # as a reaper does
            study.tell(int(path.name.removeprefix("hangs")), state=FAIL)
        for worker in workers[:n_workers]:
            worker.join(120.0)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    assert count(study, COMPLETE, PRUNED) == n_trials
    assert count(study, RUNNING, WAITING) == 0
    assert [t.number for t in study.trials] == list(range(len(study.trials)))
