"""One schedule: masters, clients and what befalls them, all from one seed."""

from __future__ import annotations

import contextlib
import functools
import gc
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime

from optuna.study import StudyDirection

import optuna_dlock.master
from optuna_dlock import RedisLockedStorage
from optuna_dlock.keys import DEFAULT_PREFIX, RegistryKeys, StudyKeys
from tests.simulation.clients import STUDY, Client, read_all
from tests.simulation.invariants import History, Violation
from tests.simulation.scheduler import Process, Scheduler, Stopped, Task
from tests.simulation.seams import EPOCH, simulated
from tests.simulation.server import Backend, Mutations, SimulatedMaster, Words
from tests.simulation.wire import Network, Weather

MASTERS = ("plain", "replicated", "keydb")
MOST_MASTERS = 5
_PRESENT, _SNAPSHOT, _BEGINNING = range(3)  # databases of a master; then one for each number of masters
_SIZES = (3, 3, 3, 3, 3, 3, 2, 5)
_MOST_CLIENTS = 7
_SECOND = 1_000_000
_LIMIT = 600 * _SECOND  # by when all has to be over


@dataclass
class Setup:
    """What a schedule may contain, besides what the seed decides.

    Attributes:
        begins: "founded" lets this setup's own code found the study first; "empty" leaves that to the
            clients, who all come at once; by default the study is there, or the seed says "empty".
        masters: "plain"; "replicated" ones execute each other's writes blindly and late; "keydb" ones say
            that they are KeyDB, where scripts do not replicate, and full resyncs bring what a master lacks.
        mutations: Mistakes in Lua.
        patches: What makes mistakes in Python, for the time of a schedule.
    """

    begins: str = ""
    masters: str = "plain"
    mutations: Mutations = field(default_factory=Mutations)
    patches: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


@dataclass
class Result:
    """What a schedule came to.

    Attributes:
        problem: What went wrong; None if all held.
    """

    seed: int
    problem: str | None
    trace_hash: int
    messages: int
    reads: int
    trials: int
    lines: list[str] | None

    @property
    def is_violation(self) -> bool:
        """Whether a guarantee was broken."""
        return self.problem is not None and self.problem.startswith(Violation.__name__)


class Schedule:
    """The world of one schedule.

    Args:
        keeps_trace: Whether to keep all lines of the trace.
        n: How many masters; None if the seed decides.
    """

    def __init__(
        self, backend: Backend, seed: int, setup: Setup, keeps_trace: bool = False, n: int | None = None
    ) -> None:
        self.history = History()
        self._backend = backend
        self._seed = seed
        self._setup = setup
        self._rng = rng = random.Random(seed)
        self._n = n or rng.choice(_SIZES)
        self.scheduler = Scheduler(keeps_trace)
        addresses = [f"m{number}:6379" for number in range(self._n)]
        self.url = f"redis://{','.join(addresses)}/0"
        self._masters = [
            SimulatedMaster(
                backend,
                number,
                address,
                functools.partial(self._server_time, self._draw_skew()),
                setup.mutations,
                setup.masters == "keydb",
                None if setup.masters == "plain" else self._replicate,
            )
            for number, address in enumerate(addresses)
        ]
        self._network = Network(self.scheduler, rng, Weather(), self._masters)
        self._network.on_crash = self._crash
        self._processes: list[Process] = []
        self._clients: list[Task] = []
        self._healed = False
        self._stamps: dict[Process, datetime] = {}
        self._replicated_until = [[0] * self._n for _ in range(self._n)]
        self._echoes: dict[tuple[int, int], list[list[Words]]] = {}

    # -- what clients use of it ----------------------------------------------------------------------

    def sleep(self, microseconds: int) -> None:
        """Let time pass."""
        self.scheduler.wait(self.scheduler.now + microseconds + 1)

    def stamp(self) -> datetime:
        """The time that the last record of this process was given."""
        return self._stamps[self.scheduler.current.process]

    def _on_stamp(self, stamp: datetime) -> None:
        self._stamps[self.scheduler.current.process] = stamp
        self.history.tried.add(str(stamp))

    def _server_time(self, skew: int) -> int:
        return EPOCH + self.scheduler.now + skew

    def _draw_skew(self) -> int:
        return self._rng.choice((0, 0, self._rng.randrange(-5 * _SECOND, 5 * _SECOND)))

    # -- the course of it ------------------------------------------------------------------------------

    def run(self) -> Result:
        """Let it happen."""
        return self._run(self._do_all)

    def begin(self) -> Result:
        """Let a first client found the ensemble and its study; kept for other schedules."""
        return self._run(self._do_begin)

    def _do_all(self) -> None:
        self._prepare()
        self._live()
        self._end()

    def _do_begin(self) -> None:
        for master in self._masters:
            self._backend.flush(master.number)
        self._begin()
        for master in self._masters:
            self._backend.copy(self._database(master, _PRESENT), self._database(master, self._beginning))

    def _run(self, work: Callable[[], None]) -> Result:
        problem: str | None = None
        ttl_ms = self._rng.choice((10, 30, 100, 100, 2000))
        with (
            simulated(self.scheduler, self._network, self._rng, ttl_ms, self._on_stamp),
            self._setup.patches(),
        ):
            try:
                work()
            except AssertionError as error:
                problem = f"{type(error).__name__}: {error}"
            except Exception as error:
                problem = f"{type(error).__name__}: {error}"
                if self.scheduler.lines is not None:
                    import traceback

                    self.scheduler.lines.append(traceback.format_exc())
            finally:
                self.scheduler.close()
        return Result(
            self._seed,
            problem,
            self.scheduler.trace_hash,
            self._network.messages,
            self.history.reads,
            self.history.most,
            self.scheduler.lines,
        )

    def _prepare(self) -> None:
        """Masters that have the study already; sometimes empty ones, which everybody finds at once."""
        begins = self._setup.begins
        if self._rng.random() < 0.1:
            begins = "empty"
        for master in self._masters:
            if begins:
                self._backend.flush(master.number)
            else:
                self._backend.copy(self._database(master, self._beginning), self._database(master, _PRESENT))
        if begins == "founded":
            self._begin()
        self.scheduler.now = _SECOND

    @property
    def _beginning(self) -> int:
        return _BEGINNING + sorted(set(_SIZES)).index(self._n)

    def _database(self, master: SimulatedMaster, which: int) -> int:
        return self._backend.database(master.number, which)

    def _begin(self) -> None:
        task = self.scheduler.spawn("founder", Process("founder"), self._found)
        if not self.scheduler.join([task], _SECOND):
            raise Violation("the ensemble does not begin")

    def _found(self) -> None:
        storage = RedisLockedStorage(self.url)
        storage.create_new_study([StudyDirection.MINIMIZE], STUDY)
        storage.close()

    def _live(self) -> None:
        rng, scheduler = self._rng, self.scheduler
        self._network.weather = self._draw_weather()
        self._deferred = rng.random() < 0.7
        for _ in range(rng.choice((2, 2, 3, 3, 4))):
            self._begin_client()
        for _ in range(rng.randrange(12) if self._setup.masters == "keydb" else 0):
            at = scheduler.now + rng.randrange(rng.choice((30_000, 100_000)))
            scheduler.at(at, functools.partial(self._befall, self._resync_two))
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            at = scheduler.now + rng.randrange(rng.choice((10_000, 30_000, 30_000, 1 * _SECOND)))
            scheduler.at(at, functools.partial(self._befall, rng.choice(self._faults())))
        if not scheduler.join(self._clients, scheduler.now + _LIMIT):
            raise Violation("clients do not come to an end")

    def _begin_client(self) -> None:
        rng = self._rng
        name = f"c{len(self._clients)}"
        process = Process(name, self._draw_skew())
        self._processes.append(process)
        client = Client(name, self, random.Random(rng.random()), rng.randint(3, 8), self._deferred)
        self._clients.append(self.scheduler.spawn(name, process, client.run))

    def _draw_weather(self) -> Weather:
        rng = self._rng
        weather = Weather(latency=rng.choice((50, 100, 300)))
        if rng.random() < 0.7:
            weather.tail = rng.choice((0.01, 0.05, 0.2))
            weather.longest = rng.choice((5_000, 50_000, 50_000, 300_000))
            if rng.random() < 0.2:
                weather.tail, weather.longest = 0.01, 4 * _SECOND
        if rng.random() < 0.3:
            weather.cut = rng.choice((0.001, 0.005, 0.02))
        if rng.random() < 0.1:
            weather.swallow = 0.003
        if rng.random() < 0.5:
            weather.preempt = rng.choice((0.01, 0.05, 0.1))
        if rng.random() < 0.2:
            weather.crash = rng.choice((0.005, 0.02))
        if rng.random() < 0.05:
            weather.forget = 0.01
        self.scheduler.trace(weather)
        return weather

    def _end(self) -> None:
        """All is well again: in the end every master has all, and a new process sees it on any majority."""
        scheduler, network = self.scheduler, self._network
        scheduler.trace("healed")
        self._healed = True
        network.weather = Weather()
        network.cut_off.clear()
        for master in self._masters:
            if not master.up:
                self._start(master)
            master.paused_until = 0
        for process in self._processes:
            process.paused_until = 0
        self._let("healer", self._heal)
        if self._n > 2:
            network.cut_off.add(("last", self._rng.randrange(self._n)))
        self._let("last", self._look_at_all)
        for master in self._masters:
            self._check_data(master)

    def _let(self, name: str, work: Callable[[], None]) -> None:
        task = self.scheduler.spawn(name, Process(name), work)
        if not self.scheduler.join([task], self.scheduler.now + _LIMIT):
            raise Violation(f"{name} does not come to an end")

    def _heal(self) -> None:
        storage = RedisLockedStorage(self.url)
        while True:
            with contextlib.suppress(KeyError):
                read_all(storage)
            if all(map(self._is_whole, self._masters)):
                break
            self.sleep(100_000)
        storage.close()

    def _look_at_all(self) -> None:
        known = self.history.snapshot()
        storage = RedisLockedStorage(self.url)
        try:
            study, trials = read_all(storage)
        except KeyError as error:
            if self.history.is_empty:
                return
            raise Violation(f"G2: all is lost: {error}") from error
        self.history.read(trials, known)
        self.history.look_at_attrs(-1, storage.get_study_user_attrs(study), known)
        storage.close()

    def _check_data(self, master: SimulatedMaster) -> None:
        """G3: no trial is live and finished on one master."""
        keys = StudyKeys(self._prefix_of(master), 1)
        ask = functools.partial(self._backend.ask, master.number)
        both = set(ask("HKEYS", keys.live)) & set(ask("HKEYS", keys.finished))
        if both:
            raise Violation(f"G3: trials {both} are live and finished on {master.address}")

    @staticmethod
    def _prefix_of(master: SimulatedMaster) -> str:
        on_master = vars(optuna_dlock.master)["on_master"]  # as it is now: it may be a mistaken one
        return str(on_master(DEFAULT_PREFIX, master.address, master.run_id[:8]))

    # -- what befalls it -------------------------------------------------------------------------------

    def _faults(self) -> list[Callable[[], None]]:
        return [
            self._restart_one,
            self._restart_one,
            self._restart_one,
            self._restart_all,
            self._pause_master,
            self._cut_off,
            self._cut_off,
            self._pause_client,
            self._pause_client,
            self._kill_client,
        ]

    def _befall(self, fault: Callable[[], None]) -> None:
        if not self._healed:
            fault()

    def _duration(self) -> int:
        return self._rng.choice((1_000, 5_000, 20_000, 100_000, 3 * _SECOND))

    def _restart_one(self) -> None:
        """With its data, without, or with those of earlier; only while the others have all of theirs."""
        master = self._rng.choice(self._masters)
        others = [other for other in self._masters if other is not master]
        if not all(other.up and self._is_whole(other) for other in others):
            return
        what = self._rng.choice(("empty", "empty", "same", "snapshot"))
        if what == "snapshot":
            self._backend.copy(self._database(master, _PRESENT), self._database(master, _SNAPSHOT))
            later = self.scheduler.now + self._rng.randrange(10_000)
            restart = functools.partial(self._restart_later, master, others)
            self.scheduler.at(later, functools.partial(self._befall, restart))
        else:
            self._restart(master, what)

    def _restart_later(self, master: SimulatedMaster, others: list[SimulatedMaster]) -> None:
        if all(other.up and self._is_whole(other) for other in others):
            self._restart(master, "snapshot")

    def _restart_all(self) -> None:
        """A power failure: all come back with all of their data."""
        if all(master.up and self._is_whole(master) for master in self._masters):
            # An echo of what the earlier runs did would hit what they go on with; on KeyDB scripts have none.
            self._echoes.clear()
            for master in self._masters:
                self._restart(master, "same")

    def _restart(self, master: SimulatedMaster, what: str) -> None:
        self.scheduler.trace("restart", master.number, what)
        master.up = False
        master.restart()
        self._network.cut(lambda link: link.master is master)
        if what == "empty":
            self._backend.flush(master.number)
        elif what == "snapshot":
            self._backend.copy(self._database(master, _SNAPSHOT), self._database(master, _PRESENT))
        self.scheduler.at(self.scheduler.now + self._duration(), functools.partial(self._start, master))

    def _start(self, master: SimulatedMaster) -> None:
        if master.up:
            return
        master.up = True
        self.scheduler.trace("started", master.number)
        for (source, target), echoes in self._echoes.items():
            if target == master.number:  # facts 6, 7: what it wrote itself, and what others have
                for commands in echoes[-16:]:
                    self._send_effects(source, target, commands)
        if self._setup.masters == "keydb":
            for other in self._masters:
                if other is not master:
                    at = self.scheduler.now + self._network.delay() + self._rng.choice((0, 0, 1000, 10_000))
                    self.scheduler.at(at, functools.partial(self._resync, other, master))

    def _is_whole(self, master: SimulatedMaster) -> bool:
        """Whether it has all data in its present run."""
        prefix = self._prefix_of(master)
        ask = functools.partial(self._backend.ask, master.number)
        registry = RegistryKeys(prefix)
        studies = map(int, ask("HKEYS", registry.studies))
        objects: list[RegistryKeys | StudyKeys] = [registry, *(StudyKeys(prefix, study) for study in studies)]
        return all(ask("HEXISTS", keys.ballots, "s") for keys in objects)

    def _pause_master(self) -> None:
        master = self._rng.choice(self._masters)
        master.paused_until = self.scheduler.now + self._duration()
        self.scheduler.trace("pause", master.number)

    def _cut_off(self) -> None:
        pair = self._rng.choice(self._processes).name, self._rng.randrange(self._n)
        self._network.cut_off.add(pair)
        self.scheduler.trace("cut off", *pair)
        later = self.scheduler.now + self._duration()
        self.scheduler.at(later, functools.partial(self._network.cut_off.discard, pair))

    def _pause_client(self) -> None:
        process = self._rng.choice(self._processes)
        process.paused_until = self.scheduler.now + self._duration()
        self.scheduler.trace("pause", process.name)

    def _kill_client(self) -> None:
        self._kill(self._rng.choice(self._processes))

    def _crash(self, process: Process) -> None:
        """A client dies in the middle of what it does; mostly, somebody starts another one."""
        if process in self._processes:
            self._kill(process)
            raise Stopped

    def _kill(self, process: Process) -> None:
        self.scheduler.trace("kill", process.name)
        if process.alive and len(self._clients) < _MOST_CLIENTS and self._rng.random() < 0.8:
            self._begin_client()
        process.alive = False
        self.scheduler.stop(process)
        self._network.cut(lambda link: link.process is process)

    # -- KeyDB -------------------------------------------------------------------------------------------

    def _replicate(self, source: int, effects: list[Words]) -> None:
        """Let the peers of a master execute what it wrote, blindly and late."""
        for target in range(self._n):
            if target != source:
                self._echoes.setdefault((target, source), []).append(effects)
                self._send_effects(source, target, effects)

    def _send_effects(self, source: int, target: int, effects: list[Words]) -> None:
        until = self._replicated_until[source]
        until[target] = max(until[target] + 1, self.scheduler.now + self._network.delay())
        generation = self._masters[target].generation
        apply = functools.partial(self._apply_effects, target, generation, effects)
        self.scheduler.at(until[target], apply)

    def _apply_effects(self, target: int, generation: int, effects: list[Words]) -> None:
        master = self._masters[target]
        if master.up and master.generation == generation:
            self.scheduler.trace("effects", target, len(effects))
            master.apply(effects)

    def _resync_two(self) -> None:
        self._resync(*self._rng.sample(self._masters, 2))

    def _resync(self, source: SimulatedMaster, target: SimulatedMaster) -> None:
        if source.up and target.up:
            self.scheduler.trace("resync", source.number, target.number)
            here, there = self._backend.database(source.number), self._backend.database(target.number)
            self._backend.copy(here, there, merge=True)


class Runner:
    """Runs schedules, one after the other, on one real server."""

    def __init__(self) -> None:
        self._backend = Backend(MOST_MASTERS)
        for n in sorted(set(_SIZES)):
            result = Schedule(self._backend, n, Setup(), n=n).begin()
            assert result.problem is None, result.problem
        # The garbage of schedules is collected between them: closing a connection is an event.
        gc.collect()
        gc.freeze()
        gc.disable()
        self._runs = 0

    def run(self, seed: int, setup: Setup | None = None, keeps_trace: bool = False) -> Result:
        """Run one schedule."""
        result = Schedule(self._backend, seed, setup or Setup(), keeps_trace).run()
        self._runs += 1
        if self._runs % 32 == 0:
            gc.collect()
        return result

    def close(self) -> None:
        """End the server."""
        gc.enable()
        gc.unfreeze()
        self._backend.close()
