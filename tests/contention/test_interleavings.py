"""The smallest interleavings of two storages that once went wrong, or nearly."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState, create_trial

from optuna_dlock import RedisLockedStorage
from optuna_dlock.ensemble import Ensemble
from optuna_dlock.scripts import script
from tests.contention.places import Place
from tests.contention.routes import OwnRoute
from tests.proxy import CuttingProxy


class Cutter:
    """Proxies in front of all servers of a place, through which `far` reaches them."""

    def __init__(self, place: Place, stack: contextlib.ExitStack) -> None:
        self._proxies = [stack.enter_context(CuttingProxy(server.port)) for server in place.servers]
        self.detour = {s.port: p.port for s, p in zip(place.servers, self._proxies, strict=True)}

    def cut_replies_to(self, name: str) -> None:
        """Let all servers execute this script when `far` next runs it, and drop the connections then."""
        single = len(self._proxies) == 1
        for proxy in self._proxies:
            # Several masters are told the name of each section; a read of theirs has none.
            proxy.cut_next_reply(script(name).sha.encode() if single else name.encode())


@pytest.fixture
def cutter(place: Place) -> Iterator[Cutter]:
    with contextlib.ExitStack() as stack:
        yield Cutter(place, stack)


@pytest.fixture
def near(place: Place) -> RedisLockedStorage:
    """A storage straight to the server, or to several masters."""
    return RedisLockedStorage(place.url)


@pytest.fixture
def far(place: Place, cutter: Cutter) -> RedisLockedStorage:
    """A storage on the same data, through the proxies."""
    return OwnRoute(place.url, detour=cutter.detour)


@pytest.fixture
def study_id(near: RedisLockedStorage) -> int:
    study_id: int = near.create_new_study([optuna.study.StudyDirection.MINIMIZE])
    return study_id


def _before_reconnecting(storage: RedisLockedStorage, act: Callable[[], object]) -> None:
    """Do something once the storage has lost its connection, and before it opens the next one."""
    node: Any = storage._node
    ends = node.masters if isinstance(node, Ensemble) else [node]
    once = threading.Lock()
    acted: list[object] = []

    def hooked(end: Any, connect: Callable[[], object]) -> Callable[[], object]:
        def act_and_connect() -> object:
            end._make_connection = connect
            with once:  # connections to several masters are made at the same time
                if not acted:
                    acted.append(act())
            return connect()

        return act_and_connect

    for end in ends:
        end._make_connection = hooked(end, end._make_connection)


def _forget_scripts(place: Place) -> None:
    for server in place.servers:
        server.command("SCRIPT", "FLUSH")


def _waiting() -> optuna.trial.FrozenTrial:
    return create_trial(state=TrialState.WAITING)


def test_a_trial_that_another_has_finished_is_read_finished_by_the_one_who_queued_it(
    near: RedisLockedStorage, far: RedisLockedStorage, study_id: int
) -> None:
    """G5: what a storage knows of a trial it has just created holds for nobody else's WAITING trial."""
    trial_id = far.create_new_trial(study_id, _waiting())
    near.set_trial_state_values(trial_id, TrialState.RUNNING)
    near.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert far.get_trial(trial_id).state is TrialState.COMPLETE


def test_a_running_trial_that_another_has_finished_is_read_finished_by_its_creator_later_on(
    near: RedisLockedStorage, far: RedisLockedStorage, study_id: int
) -> None:
    """G5: what is known without asking is known right after the creation only."""
    trial_id = far.create_new_trial(study_id)
    far.get_n_trials(study_id)
    near.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert far.get_trial(trial_id).state is TrialState.COMPLETE


def test_a_creation_whose_reply_came_late_is_not_taken_for_news(
    near: RedisLockedStorage, far: RedisLockedStorage, study_id: int, cutter: Cutter
) -> None:
    """G5: between the creation and the retry that asks for its number, others go on."""
    far.get_n_trials(study_id)
    _before_reconnecting(far, lambda: near.set_trial_state_values(study_id << 32, TrialState.COMPLETE, [1.0]))
    cutter.cut_replies_to("create_trial")
    trial_id = far.create_new_trial(study_id)
    assert far.get_trial(trial_id).state is TrialState.COMPLETE
    assert near.get_n_trials(study_id) == 1


def test_an_attribute_written_between_a_claim_and_its_retry_is_kept(
    near: RedisLockedStorage, far: RedisLockedStorage, study_id: int, cutter: Cutter
) -> None:
    """G2: who claims a trial knows only of writes from before, and must not finish it without the others."""
    trial_id = near.create_new_trial(study_id, _waiting())
    assert far.get_trial(trial_id).state is TrialState.WAITING
    _before_reconnecting(far, lambda: near.set_trial_user_attr(trial_id, "by", "another"))
    cutter.cut_replies_to("move_trial")
    assert far.set_trial_state_values(trial_id, TrialState.RUNNING)
    assert far.get_trial(trial_id).user_attrs == {"by": "another"}
    far.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    assert near.get_trial(trial_id).user_attrs == {"by": "another"}


def test_a_trial_that_came_along_with_a_creation_is_read_with_distributions_never_heard_of(
    near: RedisLockedStorage, far: RedisLockedStorage, study_id: int
) -> None:
    """A creation brings records of finished trials, and not the distributions they name."""
    far.create_new_trial(study_id)
    trial_id = near.create_new_trial(study_id)
    near.set_trial_param(trial_id, "x", 0.5, FloatDistribution(0, 1))
    near.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    far.create_new_trial(study_id)
    assert far.get_trial(trial_id).params == {"x": 0.5}


def test_every_kind_of_call_survives_that_the_server_forgets_its_scripts(
    near: RedisLockedStorage, study_id: int, place: Place
) -> None:
    """A call, a deferred write, and what waits after it; nobody else is there to load the scripts again."""
    _forget_scripts(place)
    trial_id = near.create_new_trial(study_id)
    _forget_scripts(place)
    near.set_trial_user_attr(trial_id, "a", 1)
    near.set_trial_user_attr(trial_id, "b", 2)
    assert near.get_trial(trial_id).user_attrs == {"a": 1, "b": 2}
    _forget_scripts(place)
    near.set_trial_user_attr(trial_id, "a", 3)
    near.set_trial_state_values(trial_id, TrialState.COMPLETE, [1.0])
    _forget_scripts(place)
    assert near.get_best_trial(study_id).user_attrs == {"a": 3, "b": 2}


def test_an_attribute_that_is_sent_again_does_not_undo_what_another_wrote_meanwhile(
    near: RedisLockedStorage, far: RedisLockedStorage, study_id: int, cutter: Cutter
) -> None:
    """G6: the server has executed it once already, of a trial and of a study."""
    trial_id = far.create_new_trial(study_id)
    far.get_n_trials(study_id)  # right after the creation, the trial would be read without asking
    _before_reconnecting(far, lambda: near.set_trial_user_attr(trial_id, "a", 2))
    cutter.cut_replies_to("set_trial_field")
    far.set_trial_user_attr(trial_id, "a", 1)
    assert far.get_trial(trial_id).user_attrs == {"a": 2}
    _before_reconnecting(far, lambda: near.set_study_user_attr(study_id, "a", 2))
    cutter.cut_replies_to("set_study_attr")
    far.set_study_user_attr(study_id, "a", 1)
    assert far.get_study_user_attrs(study_id) == {"a": 2}


def test_a_thread_that_dawdles_in_the_middle_of_a_creation_is_not_overtaken_by_another(
    near: RedisLockedStorage, study_id: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6: the server remembers the last operation of a process, which therefore has one at a time."""
    draw = near._node.next_sequence

    def dawdle() -> int:
        sequence = draw()
        time.sleep(0.002 * (sequence % 3))
        return sequence

    monkeypatch.setattr(near._node, "next_sequence", dawdle)
    with ThreadPoolExecutor(4) as threads:
        ids = list(threads.map(lambda _: near.create_new_trial(study_id), range(40)))
    assert sorted(ids) == [study_id << 32 | number for number in range(40)]
