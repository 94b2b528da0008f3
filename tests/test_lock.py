"""The public lock, on real servers: exclusion, order, fencing, renewal, and what breaks it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from optuna_dlock.distributed_lock import DistributedLock
from optuna_dlock.errors import (
    CorruptRecordError,
    LockError,
    LockLostError,
    LockNotAcquiredError,
    ServerConfigurationError,
    StorageUnavailableError,
)
from optuna_dlock.keys import lock_keys
from optuna_dlock.lock import LockManager
from optuna_dlock.node import Node, connection_factory
from optuna_dlock.pottery_lock import PotteryLockManager
from optuna_dlock.scripts import script
from optuna_dlock.url import parse_url
from tests.proxy import CuttingProxy
from tests.servers import Server

BACKENDS = {"redlock": LockManager, "pottery": PotteryLockManager}
PATIENCE = 30.0  # seconds; only a failing test waits for so long

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["tests.test_lock"])


def make_manager(url: str, backend: str = "redlock", timeout: float = PATIENCE) -> LockManager:
    location = parse_url(url)
    assert location.redis_url is not None
    factory = connection_factory(location.redis_url, timeout)
    kind: type[LockManager] = BACKENDS[backend]
    return kind(factory, location.address, timeout, location.prefix)


@pytest.fixture
def make() -> Iterator[Callable[..., LockManager]]:
    """Makes managers and closes them: each stands for another process."""
    made: list[LockManager] = []

    def make(url: str, backend: str = "redlock", timeout: float = PATIENCE) -> LockManager:
        made.append(make_manager(url, backend, timeout))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url.partition("?")[0], protocol=2)


def until(condition: Callable[[], Any], patience: float = PATIENCE) -> float:
    """Wait for it; the seconds that took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < patience, "waited in vain"
        time.sleep(0.002)
    return time.monotonic() - start


def waiters(url: str, name: str) -> int:
    keys = lock_keys(parse_url(url).prefix, name)
    with client(url) as server:
        return int(server.llen(keys.queue))


class Waiter(threading.Thread):
    """Acquires a lock in a thread."""

    def __init__(self, lock: DistributedLock, timeout: float | None = PATIENCE) -> None:
        super().__init__(daemon=True)
        self.lock = lock
        self._timeout = timeout
        self.answers: queue.Queue[Any] = queue.Queue()
        self.start()

    def run(self) -> None:
        try:
            self.answers.put(self.lock.acquire(self._timeout))
        except Exception as error:
            self.answers.put(error)

    def answer(self, patience: float = PATIENCE) -> Any:
        return self.answers.get(timeout=patience)


class Agent:
    """A process that does with one lock what it is told."""

    def __init__(self, url: str, name: str, ttl: float, backend: str = "redlock") -> None:
        self._pipe, theirs = _processes.Pipe()
        self.process = _processes.Process(target=_agent, args=(theirs, url, name, ttl, backend), daemon=True)
        self.process.start()
        theirs.close()
        assert self.answer() == "ready"

    def tell(self, what: str) -> None:
        self._pipe.send(what)

    def answer(self, patience: float = PATIENCE) -> Any:
        assert self._pipe.poll(patience), "the agent does not answer"
        return self._pipe.recv()

    def ask(self, what: str) -> Any:
        self.tell(what)
        return self.answer()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self._pipe.close()


def _agent(pipe: Any, url: str, name: str, ttl: float, backend: str) -> None:
    lock = make_manager(url, backend).lock(name, ttl=ttl)
    actions: dict[str, Callable[[], Any]] = {
        "acquire": lock.acquire,
        "release": lock.release,
        "is lost": lambda: lock.lost.wait(PATIENCE),
        "is held": lambda: lock.held,
    }
    pipe.send("ready")
    while True:
        try:
            pipe.send(actions[pipe.recv()]())
        except EOFError:
            return
        except Exception as error:
            pipe.send(error)


@pytest.fixture
def agent() -> Iterator[Callable[..., Agent]]:
    """Makes agents and ends them."""
    agents: list[Agent] = []

    def agent(url: str, name: str = "a", ttl: float = 1.0, backend: str = "redlock") -> Agent:
        agents.append(Agent(url, name, ttl, backend))
        return agents[-1]

    yield agent
    for one in agents:
        one.end()


# -- exclusion ---------------------------------------------------------------------------------------


def _worker(url: str, backend: str, turns: int, overlaps: Any) -> None:
    manager = make_manager(url, backend)
    prefix = parse_url(url).prefix
    occupant, counter, tokens = (f"{prefix}-test-{name}" for name in ("occupant", "counter", "tokens"))
    lock = manager.lock("contended", ttl=10.0)
    with client(url) as server:
        for _ in range(turns):
            with lock as token:
                alone = server.set(occupant, os.getpid(), nx=True)  # first detector: who else is here?
                count = int(server.get(counter) or 0)
                server.rpush(tokens, token)
                server.set(counter, count + 1)  # second detector: an overlap loses an update
                if not alone or server.delete(occupant) != 1:
                    with overlaps.get_lock():
                        overlaps.value += 1
    manager.close()


def _assert_exclusion(url: str, backend: str, processes: int, turns: int) -> None:
    overlaps = _processes.Value("i", 0)
    workers = [
        _processes.Process(target=_worker, args=(url, backend, turns, overlaps)) for _ in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120.0)
    prefix = parse_url(url).prefix
    with client(url) as server:
        counter = int(server.get(f"{prefix}-test-counter") or 0)
        tokens: Any = server.lrange(f"{prefix}-test-tokens", 0, -1)
    assert [worker.exitcode for worker in workers] == [0] * processes
    assert overlaps.value == 0
    assert counter == processes * turns
    assert [int(token) for token in tokens] == sorted({int(token) for token in tokens})


def test_of_eight_processes_one_is_in_the_section(url: str) -> None:
    """On each kind of server: no overlap, no lost update, and tokens rise in the order of the sections."""
    _assert_exclusion(url, "redlock", 8, 200)


def test_of_eight_processes_one_is_in_the_section_with_pottery(valkey_url: str) -> None:
    """The same detectors, the other backend."""
    _assert_exclusion(valkey_url, "pottery", 8, 200)


def test_threads_exclude_each_other(make: Callable[..., LockManager], valkey_url: str) -> None:
    """Through one manager, with a lock object each and with one for all of them."""
    manager = make(valkey_url)
    shared = manager.lock("a")
    inside: list[int] = []
    overlaps: list[list[int]] = []

    def work(lock: DistributedLock) -> None:
        for _ in range(50):
            with lock as token:
                inside.append(token)
                if len(inside) > 1:
                    overlaps.append(list(inside))
                time.sleep(0.0001)  # lets other threads run
                inside.remove(token)

    threads = [threading.Thread(target=work, args=(manager.lock("a"),)) for _ in range(4)]
    threads += [threading.Thread(target=work, args=(shared,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not overlaps
    assert manager.lock("a").acquire() == 7 * 50 + 1


def test_other_names_do_not_exclude_each_other(make: Callable[..., LockManager], valkey_url: str) -> None:
    manager = make(valkey_url)
    names = ["a", "b", "a:b", "ä ö", "{a}", "a}b{", "*", "lock", "a\n", "x" * 500]
    for name in names:
        assert manager.lock(name).acquire(0) == 1
    for name in names:
        with pytest.raises(LockNotAcquiredError):
            manager.lock(name).acquire(0)


def test_the_lock_of_a_study_is_its_section_lock(make: Callable[..., LockManager], valkey_url: str) -> None:
    """Scripts of the storage look at that key."""
    manager = make(valkey_url)
    with manager.lock("study:7"), client(valkey_url) as server:
        assert server.exists(f"{parse_url(valkey_url).prefix}:{{7}}:lock")


# -- the face of a lock ------------------------------------------------------------------------------


def test_a_lock_is_held_between_acquire_and_release(
    make: Callable[..., LockManager], url: str, backend: str
) -> None:
    manager = make(url, backend)
    lock = manager.lock("a")
    key = manager.holder_key("a")
    with client(url) as server:
        assert (lock.held, lock.token, server.exists(key)) == (False, None, 0)
        with lock as token:
            lock.check()
            assert (lock.held, lock.token, server.exists(key)) == (True, token, 1)
            assert 29_000 < server.pttl(key) <= 30_000
        assert (lock.held, lock.token, server.exists(key)) == (False, None, 0)
    with pytest.raises(LockError, match="not held"):
        lock.check()
    with pytest.raises(LockError, match="not held"):
        lock.release()


def test_tokens_rise_from_holder_to_holder(
    make: Callable[..., LockManager], valkey_url: str, backend: str
) -> None:
    """Whoever holds it, whether the one before released it or died."""
    first, second = make(valkey_url, backend), make(valkey_url, backend)
    tokens = []
    for manager in (first, second, second, first):
        with manager.lock("a") as token:
            tokens.append(token)
    tokens.append(first.lock("a", ttl=0.2).acquire())
    first.close()  # renewed no more
    tokens.append(second.lock("a").acquire())
    assert tokens == sorted(set(tokens))


def test_a_second_acquire_by_the_same_thread_is_refused(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    """It would wait for itself for ever."""
    lock = make(valkey_url).lock("a")
    with lock:
        with pytest.raises(LockError, match="not reentrant"):
            lock.acquire()
        assert lock.held


def test_the_holder_is_known_by_host_process_and_thread(
    make: Callable[..., LockManager], url: str, backend: str
) -> None:
    manager = make(url, backend)
    assert manager.holder("a") is None
    with manager.lock("a", ttl=20.0) as token:
        time.sleep(0.05)
        holder = make(url, backend).holder("a")
        assert holder is not None
        assert holder.owner == f"{os.uname().nodename}:{os.getpid()}:{threading.current_thread().name}"
        assert holder.token == token
        assert 0.04 < holder.held_for < 5.0
        assert 14.0 < holder.ttl <= 20.0
    assert manager.holder("a") is None


@pytest.mark.parametrize("timeout", [0, 0.3])
def test_who_waits_in_vain_learns_who_held_it_and_for_how_long(
    make: Callable[..., LockManager], valkey_url: str, backend: str, timeout: float
) -> None:
    """The error has it as fields and in words, and survives pickling."""
    with make(valkey_url, backend).lock("a"):
        time.sleep(0.1)
        start = time.monotonic()
        with pytest.raises(LockNotAcquiredError) as caught:
            make(valkey_url, backend).lock("a").acquire(timeout)
        waited = time.monotonic() - start
    error = caught.value
    assert timeout <= waited < timeout + 2.0
    assert (error.name, error.timeout) == ("a", timeout)
    assert error.holder is not None
    assert str(os.getpid()) in error.holder
    assert error.held_for is not None
    assert 0.1 <= error.held_for < 5.0
    assert error.holder in str(error)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.held_for) == (str(error), error.held_for)


def test_a_thread_that_waits_for_a_shared_object_times_out_too(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    lock = make(valkey_url).lock("a")
    with lock:
        assert isinstance(Waiter(lock, 0.1).answer(), LockNotAcquiredError)


@pytest.mark.parametrize(
    "arguments",
    [
        {"name": ""},
        {"name": b"a"},
        {"ttl": 0.09},
        {"ttl": 0},
        {"ttl": float("nan")},
        {"ttl": float("inf")},
        {"timeout": -1},
        {"timeout": float("nan")},
    ],
)
def test_senseless_arguments_are_refused(
    make: Callable[..., LockManager], valkey_url: str, arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make(valkey_url).lock(**{"name": "a"} | arguments)


def test_acquire_and_release_take_a_round_trip_each(
    make: Callable[..., LockManager], valkey: Server, valkey_url: str
) -> None:
    with CuttingProxy(valkey.port) as proxy:
        lock = make(f"{proxy.url}?{valkey_url.partition('?')[2]}").lock("a")
        with lock:
            pass  # connects
        before = proxy.requests
        lock.acquire()
        assert proxy.requests == before + 1
        lock.release()
        assert proxy.requests == before + 2


def test_a_foreign_value_under_the_key_is_not_overwritten(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    manager = make(valkey_url)
    with client(valkey_url) as server:
        server.set(manager.holder_key("a"), "mine")
        with pytest.raises(CorruptRecordError):
            manager.lock("a").acquire()
        assert server.get(manager.holder_key("a")) == b"mine"


# -- order -------------------------------------------------------------------------------------------


def test_waiters_get_the_lock_in_the_order_of_their_coming(
    make: Callable[..., LockManager], url: str
) -> None:
    first = make(url).lock("a")
    token = first.acquire()
    queued = []
    for count in range(1, 6):
        queued.append(Waiter(make(url).lock("a")))
        until(functools.partial(lambda count: waiters(url, "a") == count, count))
    first.release()
    for waiter in queued:
        token += 1
        assert waiter.answer() == token
        assert waiters(url, "a") == 5 - (token - 1)
        waiter.lock.release()


def test_who_wants_the_lock_again_queues_behind_who_waits(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    """The release hands the lock over: not even for a moment is it free for the fastest."""
    lock, other = make(valkey_url).lock("a"), make(valkey_url).lock("a")
    lock.acquire()
    waiter = Waiter(other)
    until(lambda: waiters(valkey_url, "a") == 1)
    lock.release()
    with pytest.raises(LockNotAcquiredError):
        lock.acquire(0)
    assert waiter.answer() == 2


def test_a_waiter_that_gives_up_leaves_the_queue(make: Callable[..., LockManager], valkey_url: str) -> None:
    lock = make(valkey_url).lock("a")
    with lock:
        with pytest.raises(LockNotAcquiredError):
            make(valkey_url).lock("a").acquire(0.05)
        assert waiters(valkey_url, "a") == 0
    assert lock.acquire(0) == 2


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, even in a background job, which a shell makes deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_wait_that_is_interrupted_leaves_the_queue(
    make: Callable[..., LockManager], valkey_url: str, ctrl_c: None
) -> None:
    """Ctrl-C: the lock is not handed to a ticket that nobody knows of any more."""
    holder, manager = make(valkey_url).lock("a"), make(valkey_url)
    holder.acquire()

    def interrupt() -> None:
        until(lambda: waiters(valkey_url, "a") == 1)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        manager.lock("a").acquire(PATIENCE)
    thread.join()
    assert waiters(valkey_url, "a") == 0
    holder.release()
    assert manager.holder("a") is None
    assert manager.lock("a").acquire(0) == 2


# -- the scripts, one step at a time -----------------------------------------------------------------


class Steps:
    """Runs the scripts for named tickets, without a client that goes on by itself."""

    def __init__(self, url: str, name: str = "a") -> None:
        location = parse_url(url)
        assert location.redis_url is not None
        self.keys = lock_keys(location.prefix, name)
        self.node = Node(connection_factory(location.redis_url, PATIENCE), location.address, PATIENCE)

    def acquire(self, ticket: str, mode: int = 1, ttl_ms: int = 30_000) -> Any:
        keys = (self.keys.holder, self.keys.fence, self.keys.queue, *self._own(ticket))
        return self.node.run(
            script("acquire_lock"), keys, (ticket, ttl_ms, f"owner of {ticket}", self.keys.wake(""), mode)
        )

    def release(self, ticket: str) -> Any:
        keys = (self.keys.holder, self.keys.fence, self.keys.queue, self.keys.wake("line"))
        return self.node.run(script("release_lock"), keys, (ticket, self.keys.wake(""), 60_000))

    def leave(self, ticket: str) -> Any:
        keys = (self.keys.holder, self.keys.fence, self.keys.queue, *self._own(ticket))
        return self.node.run(script("leave_lock"), keys, (ticket, self.keys.wake("")))

    def renew(self, ticket: str, ttl_ms: int = 30_000) -> Any:
        return self.node.run(script("renew_lock"), (self.keys.holder,), (ticket, ttl_ms))

    def woken(self, ticket: str) -> Any:
        return self.node.command("LPOP", self.keys.wake(ticket))

    def stop_polling(self, ticket: str) -> None:
        """As if the ticket had not polled for longer than its mark lasts."""
        assert self.node.command("DEL", self._own(ticket)[1]) == 1

    def _own(self, ticket: str) -> tuple[str, str]:
        return self.keys.wake(ticket), self.keys.wake(ticket) + ":waits"


@pytest.fixture
def steps(url: str) -> Iterator[Steps]:
    steps = Steps(url)
    yield steps
    steps.node.close()


def test_the_same_ticket_gets_the_same_token(steps: Steps) -> None:
    assert steps.acquire("t1") == [0, 1]
    assert steps.acquire("t1") == [0, 1]
    assert steps.acquire("t1", mode=2) == [0, 1]
    assert steps.acquire("t2")[0] == -5
    assert steps.acquire("t2")[0] == -5
    assert steps.release("t1") == [0]
    assert steps.acquire("t2") == [0, 2]
    assert steps.release("t2") == [0]
    assert steps.acquire("t3") == [0, 3]  # t2 was in the queue once


def test_the_same_release_is_done_once(steps: Steps) -> None:
    """And does not release what the next one holds."""
    steps.acquire("t1")
    steps.acquire("t2")
    steps.acquire("t3")
    assert steps.release("t1") == [0]
    assert steps.release("t1") == [0]
    assert steps.woken("t2") == b"2"
    assert steps.acquire("t3", mode=0)[:2] == [-5, b"owner of t2"]
    assert steps.release("t0") == [-10]


def test_a_release_wakes_the_first_waiter_only(steps: Steps) -> None:
    steps.acquire("t1")
    steps.acquire("t2")
    steps.acquire("t3")
    steps.release("t1")
    assert steps.woken("t3") is None
    assert steps.woken("t2") == b"2"


def test_nothing_but_the_fence_stays_for_ever(steps: Steps, url: str) -> None:
    """Whatever else holders, waiters and the dead leave on the server expires."""
    for ticket in ("t1", "t2", "t3"):
        steps.acquire(ticket)
    steps.release("t1")
    pattern = f"{parse_url(url).prefix}:*"
    with client(url) as server:
        left = {key.decode().rpartition(":lock")[2]: server.pttl(key) for key in server.scan_iter(pattern)}
    assert left.pop(":fence") == -1
    assert set(left) == {"", ":queue", ":wake:t2", ":wake:t3:waits", ":wake:line"}
    assert min(left.values()) > 0


def test_who_listens_at_once_is_woken_at_once(steps: Steps) -> None:
    """Mode 2 asks and listens in one go: a free lock must not make it listen in vain."""
    assert steps.acquire("t1", mode=2) == [0, 1]
    assert steps.woken("t1") == b"1"


def test_a_waiter_that_does_not_poll_is_passed_over(steps: Steps) -> None:
    steps.acquire("t1")
    for ticket in ("dead1", "dead2", "t2"):
        steps.acquire(ticket)
    steps.stop_polling("dead1")
    steps.stop_polling("dead2")
    steps.release("t1")
    assert steps.woken("t2") == b"2"


def test_a_waiter_that_comes_back_queues_once(steps: Steps) -> None:
    """Its mark was gone, its place in the queue was not."""
    steps.acquire("t1")
    steps.acquire("t2")
    steps.stop_polling("t2")
    steps.acquire("t2")
    steps.release("t1")
    assert steps.woken("t2") == b"2"
    steps.release("t2")
    assert steps.acquire("t3") == [0, 3]


def test_who_times_out_while_the_lock_is_handed_over_takes_it(steps: Steps) -> None:
    """Its last try finds what it was given: a lock never belongs to a ticket that gave up."""
    steps.acquire("t1")
    steps.acquire("t2")
    steps.release("t1")
    assert steps.acquire("t2", mode=0) == [0, 2]


def test_who_is_interrupted_while_the_lock_is_handed_over_passes_it_on(steps: Steps) -> None:
    steps.acquire("t1")
    steps.acquire("t2")
    steps.acquire("t3")
    steps.release("t1")
    assert steps.leave("t2") == [0]
    assert steps.leave("t2") == [0]
    assert steps.woken("t3") == b"3"
    assert steps.leave("t3") == [0]
    assert steps.acquire("t4") == [0, 4]


def test_a_lock_that_is_not_fetched_goes_to_the_next(steps: Steps) -> None:
    """Who dies after its last poll is given the lock; who polls a second later takes it over."""
    steps.acquire("t1")
    steps.acquire("dead")
    steps.acquire("t2")
    steps.release("t1")
    assert steps.acquire("t2")[:2] == [-5, b"owner of dead"]
    time.sleep(1.1)
    assert steps.acquire("t2") == [0, 3]
    assert steps.renew("dead") == [-10]
    assert steps.woken("dead") is None


def test_a_lock_that_was_fetched_stays_with_its_holder(steps: Steps) -> None:
    steps.acquire("t1")
    steps.acquire("t2")
    steps.release("t1")
    assert steps.woken("t2") == b"2"
    time.sleep(1.1)
    assert steps.acquire("t3")[:2] == [-5, b"owner of t2"]


def test_a_lease_that_ended_goes_to_the_head_of_the_queue(steps: Steps) -> None:
    """Whoever notices first: it does not overtake."""
    steps.acquire("t1", ttl_ms=100)
    steps.acquire("t2")
    time.sleep(0.15)
    assert steps.acquire("t3")[:2] == [-5, b"owner of t2"]
    assert steps.acquire("t4", mode=0)[0] == -5
    assert steps.woken("t2") == b"2"
    assert steps.renew("t1") == [-10]


# -- leases ------------------------------------------------------------------------------------------


def test_renewal_keeps_a_lock_beyond_its_ttl(
    make: Callable[..., LockManager], valkey_url: str, backend: str
) -> None:
    lock = make(valkey_url, backend).lock("a", ttl=0.4)
    other = make(valkey_url, backend).lock("a")
    lock.acquire()
    end = time.monotonic() + 1.3
    while time.monotonic() < end:
        with pytest.raises(LockNotAcquiredError):
            other.acquire(0)
        time.sleep(0.01)
    lock.check()
    lock.release()


def test_a_short_lease_is_renewed_beside_a_long_one(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    """The renewal thread sleeps for the long one when the short one comes."""
    manager = make(valkey_url)
    with manager.lock("long", ttl=60.0):
        time.sleep(0.05)
        with manager.lock("short", ttl=0.3) as token:
            time.sleep(0.8)
            assert make(valkey_url).holder("short").token == token  # type: ignore[union-attr]


def test_renewal_starts_again_after_a_time_without_locks(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    manager = make(valkey_url)
    lock = manager.lock("a", ttl=0.3)
    with lock:
        pass
    time.sleep(0.3)  # the thread has found nothing to do
    with lock:
        time.sleep(0.8)
        lock.check()


def test_a_paused_holder_learns_that_it_lost_the_lock(
    agent: Callable[..., Agent], make: Callable[..., LockManager], valkey_url: str, backend: str
) -> None:
    """SIGSTOP for longer than ttl: the next one gets a higher token, and the first cannot release it."""
    paused = agent(valkey_url, ttl=0.5, backend=backend)
    token = paused.ask("acquire")
    paused.signal(signal.SIGSTOP)
    lock = make(valkey_url, backend).lock("a")
    try:
        assert lock.acquire(PATIENCE) > token
    finally:
        paused.signal(signal.SIGCONT)
    assert paused.ask("is lost") is True
    assert paused.ask("is held") is False
    error = paused.ask("release")
    assert isinstance(error, LockLostError)
    assert (error.name, error.token) == ("a", token)
    lock.check()
    lock.release()


def test_a_waiter_that_was_paused_while_it_got_the_lock_does_not_believe_it(
    agent: Callable[..., Agent], make: Callable[..., LockManager], valkey_url: str
) -> None:
    """Its wake-up is as old as the pause: meanwhile the lease ended, and somebody else has the lock."""
    lock = make(valkey_url).lock("a")
    lock.acquire()
    paused = agent(valkey_url, ttl=0.5)
    paused.tell("acquire")
    until(lambda: waiters(valkey_url, "a") == 1)
    paused.signal(signal.SIGSTOP)
    lock.release()
    try:
        assert lock.acquire(PATIENCE) == 3  # 2 was that of the paused one
    finally:
        paused.signal(signal.SIGCONT)
    with pytest.raises(AssertionError):
        paused.answer(0.5)
    lock.release()
    assert paused.answer() == 4


def test_the_lock_of_a_killed_holder_is_free_when_its_ttl_ends(
    agent: Callable[..., Agent], make: Callable[..., LockManager], valkey_url: str, backend: str
) -> None:
    dead = agent(valkey_url, ttl=1.5, backend=backend)
    dead.ask("acquire")
    dead.signal(signal.SIGKILL)
    start = time.monotonic()
    make(valkey_url, backend).lock("a").acquire(PATIENCE)
    assert 0.5 < time.monotonic() - start < 3.5  # the last renewal was up to ttl / 3 ago


def test_a_killed_waiter_does_not_stall_the_queue(
    agent: Callable[..., Agent], make: Callable[..., LockManager], valkey_url: str
) -> None:
    """The lock is handed to the dead one for 30 s; who waits behind it has it within seconds."""
    lock = make(valkey_url).lock("a")
    lock.acquire()
    dead = agent(valkey_url, ttl=30.0)
    dead.tell("acquire")
    until(lambda: waiters(valkey_url, "a") == 1)
    waiter = Waiter(make(valkey_url).lock("a"))
    until(lambda: waiters(valkey_url, "a") == 2)
    dead.signal(signal.SIGKILL)
    dead.process.join()
    lock.release()
    assert waiter.answer(8.0) == 3
    waiter.lock.release()


def test_a_lost_lock_tells_everybody(make: Callable[..., LockManager], valkey_url: str, backend: str) -> None:
    """The event, the callback, `check`, and the end of `with`."""
    told: queue.Queue[DistributedLock] = queue.Queue()
    manager = make(valkey_url, backend)
    lock = manager.lock("a", ttl=0.3, on_lost=told.put)
    with client(valkey_url) as server:
        lock.acquire()
        assert not lock.lost.is_set()
        server.delete(manager.holder_key("a"))
        assert lock.lost.wait(PATIENCE)
        assert told.get(timeout=PATIENCE) is lock
        assert not lock.held
        with pytest.raises(LockLostError):
            lock.check()
        with pytest.raises(LockLostError):
            lock.release()

        def section(error: Exception | None) -> None:
            with lock:
                assert not lock.lost.is_set()
                server.delete(manager.holder_key("a"))
                if error is not None:
                    raise error

        with pytest.raises(LockLostError):
            section(None)
        with pytest.raises(KeyError):  # the error of the section goes before
            section(KeyError())
    with lock:
        lock.check()


def test_a_lock_that_was_lost_can_be_acquired_again(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    """By the same thread, without a release that could only fail."""
    manager = make(valkey_url)
    lock = manager.lock("a", ttl=0.3)
    token = lock.acquire()
    with client(valkey_url) as server:
        server.delete(manager.holder_key("a"))
    assert lock.lost.wait(PATIENCE)
    assert lock.acquire() == token + 1
    lock.release()


def test_an_on_lost_that_fails_does_not_end_renewal(
    make: Callable[..., LockManager], valkey_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(_: DistributedLock) -> None:
        raise RuntimeError("in the callback")

    manager = make(valkey_url)
    lost, kept = manager.lock("a", ttl=0.3, on_lost=fail), manager.lock("b", ttl=0.3)
    lost.acquire()
    with kept:
        with client(valkey_url) as server:
            server.delete(manager.holder_key("a"))
        assert lost.lost.wait(PATIENCE)
        time.sleep(0.6)
        kept.check()
    assert "on_lost" in caplog.text


# -- faults ------------------------------------------------------------------------------------------


@pytest.fixture
def proxy(valkey: Server) -> Iterator[CuttingProxy]:
    with CuttingProxy(valkey.port) as proxy:
        yield proxy


@pytest.fixture
def proxy_url(proxy: CuttingProxy, valkey_url: str) -> str:
    """The key space of `valkey_url`, through the proxy."""
    return f"{proxy.url}?{valkey_url.partition('?')[2]}"


def sha(name: str) -> bytes:
    return script(name).sha.encode()


def test_a_lost_reply_to_acquire_changes_nothing_twice(
    make: Callable[..., LockManager], proxy: CuttingProxy, proxy_url: str, valkey_url: str
) -> None:
    manager = make(proxy_url)
    proxy.cut_next_reply(containing=sha("acquire_lock"))
    assert manager.lock("a").acquire() == 1
    assert proxy.cuts == 1
    assert make(valkey_url).holder("a").token == 1  # type: ignore[union-attr]


def test_a_lost_reply_to_release_changes_nothing_twice(
    make: Callable[..., LockManager], proxy: CuttingProxy, proxy_url: str, valkey_url: str
) -> None:
    """The lock goes to the first waiter and stays there, and the release does not look like a loss."""
    lock = make(proxy_url).lock("a")
    lock.acquire()
    first = Waiter(make(valkey_url).lock("a"))
    until(lambda: waiters(valkey_url, "a") == 1)
    second = Waiter(make(valkey_url).lock("a"))
    until(lambda: waiters(valkey_url, "a") == 2)
    proxy.cut_next_reply(containing=sha("release_lock"))
    lock.release()
    assert proxy.cuts == 1
    assert first.answer() == 2
    assert second.answers.empty()
    first.lock.release()
    assert second.answer() == 3


@pytest.mark.parametrize("hot", [False, True])
def test_a_lost_wake_up_is_made_good_by_the_next_poll(
    make: Callable[..., LockManager], proxy: CuttingProxy, proxy_url: str, valkey_url: str, hot: bool
) -> None:
    """Hot: the waiter asks and listens in one go, as it did wait shortly the time before."""
    holder, waiting = make(valkey_url).lock("a"), make(proxy_url).lock("a")
    token = holder.acquire()
    if hot:
        waiter = Waiter(waiting)
        until(lambda: waiters(valkey_url, "a") == 1)
        holder.release()
        waiter.answer()
        waiting.release()
        token = holder.acquire()
    proxy.cut_next_reply(containing=b"BLPOP")
    waiter = Waiter(waiting)
    until(lambda: waiters(valkey_url, "a") == 1)
    holder.release()
    assert waiter.answer(8.0) == token + 1
    assert proxy.cuts == 1
    waiting.release()


def test_many_lost_replies_do_not_break_exclusion(
    make: Callable[..., LockManager], proxy: CuttingProxy, proxy_url: str
) -> None:
    """Each thread counts up in its sections; no update is lost, no lock is left behind."""
    counter = 0
    errors: list[Exception] = []

    def work(manager: LockManager) -> None:
        nonlocal counter
        try:
            for _ in range(5):
                with manager.lock("a"):
                    count = counter
                    time.sleep(0.001)
                    counter = count + 1
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(make(proxy_url),)) for _ in range(3)]
    proxy.cut_randomly(0.1, seed=1)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * PATIENCE)
    proxy.cut_randomly(0)
    assert not errors
    assert counter == 15
    assert proxy.cuts > 3


def test_a_lock_survives_a_restart_with_its_data(make: Callable[..., LockManager]) -> None:
    with Server("valkey", appendonly=True) as server:
        manager = make(server.url)
        lock = manager.lock("a")
        with lock as token:
            waiter = Waiter(make(server.url).lock("a"))
            until(lambda: waiters(server.url, "a") == 1)
            server.stop()
            server.start()
            lock.check()
            with pytest.raises(LockNotAcquiredError):
                make(server.url).lock("a").acquire(0)
        assert waiter.answer() > token


def test_a_lock_on_a_server_that_lost_its_data_is_lost(make: Callable[..., LockManager]) -> None:
    """Somebody else may hold it since: a release that said nothing would hide that."""
    with Server("valkey") as server:
        first, second = make(server.url).lock("a"), make(server.url).lock("a")
        first.acquire()
        server.kill()
        server.start()
        second.acquire()
        with pytest.raises(LockLostError):
            first.release()
        second.release()


def test_a_lease_is_lost_when_the_server_is_silent(
    make: Callable[..., LockManager], proxy: CuttingProxy, proxy_url: str
) -> None:
    lock = make(proxy_url).lock("a", ttl=0.6)
    lock.acquire()
    proxy.black_hole()
    start = time.monotonic()
    assert lock.lost.wait(PATIENCE)
    assert 0.3 < time.monotonic() - start < 2.0
    with pytest.raises(LockLostError):
        lock.check()
    proxy.restore()


def test_a_server_that_stays_away_is_named(
    make: Callable[..., LockManager], proxy: CuttingProxy, proxy_url: str, backend: str
) -> None:
    manager = make(proxy_url, backend, 0.4)
    lock = manager.lock("a")
    with lock:
        pass
    proxy.refuse()
    proxy.cut_all()
    with pytest.raises(StorageUnavailableError, match=str(proxy.port)):
        lock.acquire()
    proxy.restore()
    with lock:
        lock.check()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_hold_what_its_parent_holds(
    make: Callable[..., LockManager], valkey_url: str
) -> None:
    """The child may use the same objects; it has tickets and connections of its own."""
    manager = make(valkey_url)
    lock, other = manager.lock("a"), manager.lock("b", ttl=0.3)
    with manager.lock("b"):
        pass
    lock.acquire()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            assert not lock.held
            with pytest.raises(LockError, match="not held"):
                lock.release()
            with pytest.raises(LockNotAcquiredError):
                lock.acquire(0)
            with other:
                time.sleep(0.8)
                other.check()  # renewed by a thread of the child's own
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    lock.check()
    assert make(valkey_url).holder("a").token == lock.token  # type: ignore[union-attr]
    lock.release()


def test_pottery_that_is_not_installed_is_asked_for(
    make: Callable[..., LockManager], valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pottery", None)
    with pytest.raises(ServerConfigurationError, match=r'pip install "optuna-dlock\[pottery\]"'):
        make(valkey_url, "pottery")
