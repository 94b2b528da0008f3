"""The stacks of `deploy/`: what the files say, and what servers and workers started by them do."""

from __future__ import annotations

import configparser
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest

from optuna_dlock import AccessDeniedError, RedisLockedStorage, cli
from optuna_dlock.doctor_ask import examine
from tests.stacks import DEPLOY, PASSWORD, STACKS, Stack, masters_of, needs, read_stack

IMAGES = {"valkey": "valkey/valkey:8.1.8-alpine", "keydb": "eqalpha/keydb:x86_64_v6.3.4"}
NOTES = "--active-replica yes --multi-master yes --protected-mode no --replicaof {peer} 6379"


@pytest.fixture(scope="module", params=STACKS)
def running(request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The servers of each stack; for tests that leave them as they are."""
    needs(request.param)
    with Stack(request.param) as stack:
        yield stack


def _until(condition: Callable[[], bool], timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _script(service: dict[str, Any]) -> str:
    shell, option, script = service["command"]
    assert (shell, option) == ("sh", "-c")
    return str(script)


# -- what the files say ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKS)
def test_each_server_has_what_keeps_data_and_strangers_apart(name: str) -> None:
    stack = read_stack(name)
    volumes = []
    for service in (stack["services"][master] for master in masters_of(stack)):
        flavour = service["image"].partition("/")[2].partition(":")[0]
        assert service["image"] == IMAGES[flavour]
        assert service["user"] == flavour
        assert service["secrets"] == ["optuna_password"]
        assert service["networks"] == ["optuna"]
        assert "ports" not in service
        (volume,) = service["volumes"]
        volumes.append(volume.removesuffix(":/data"))
        script = _script(service)
        assert f"exec {flavour}-server " in script
        assert "--maxmemory-policy noeviction" in script
        assert "requirepass" in script
        assert "--appendonly yes" in script
        assert ("--save 60 1" in script) == (flavour == "keydb")
        deploy = service["deploy"]
        assert deploy["replicas"] == 1
        assert deploy["update_config"] == {"parallelism": 1, "order": "stop-first"}
        assert deploy["restart_policy"]["condition"] == "any"
        assert service["stop_grace_period"] == "1m"
        assert set(service["healthcheck"]) == {"test", "interval", "timeout", "retries", "start_period"}
    assert volumes == list(stack["volumes"]) == sorted(set(volumes))
    assert stack["networks"]["optuna"] == {"driver": "overlay", "attachable": True}
    assert stack["secrets"] == {"optuna_password": {"external": True}}


@pytest.mark.parametrize("name", STACKS)
def test_the_worker_names_all_masters_and_the_secret_and_no_password(name: str) -> None:
    stack = read_stack(name, WORKERS="7")
    worker = stack["services"]["worker"]
    url = worker["environment"]["OPTUNA_DLOCK_URL"]
    hosts, _, options = url.partition("://")[2].partition("/0?")
    assert hosts == ",".join(f"{master}:6379" for master in masters_of(stack))
    assert options == "password_file=/run/secrets/optuna_password"
    assert worker["secrets"] == ["optuna_password"]
    assert worker["init"] is True
    assert worker["stop_signal"] == "SIGINT"
    assert worker["deploy"]["replicas"] == worker["environment"]["WORKERS"] == "7"
    assert worker["deploy"]["restart_policy"]["condition"] == "on-failure"


@pytest.mark.parametrize("name", STACKS)
def test_each_variable_has_a_default_and_is_listed_at_the_top(name: str) -> None:
    text = (DEPLOY / name).read_text("utf-8")
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", text))
    assert used == set(re.findall(r"(?<!\$)\$\{(\w+):-[^}]", text))
    listed = re.search(r"# Variables, each with its default: (.*)\.\n", text)
    assert listed is not None
    assert set(listed[1].split(", ")) == used


def test_the_places_of_the_masters_are_the_notes_and_can_be_changed() -> None:
    def places(**variables: str) -> list[str]:
        services = read_stack("keydb-pair.yml", **variables)["services"]
        return [services[name]["deploy"]["placement"]["constraints"][0] for name in ("keydb1", "keydb2")]

    assert places() == ["node.hostname == m8", "node.hostname == m10"]
    assert places(KEYDB2_ON="node.labels.disk == ssd")[1] == "node.labels.disk == ssd"


def test_the_keydb_pair_has_the_flags_of_the_notes() -> None:
    services = read_stack("keydb-pair.yml")["services"]
    for name, peer in (("keydb1", "keydb2"), ("keydb2", "keydb1")):
        script = _script(services[name])
        assert NOTES.format(peer=peer) in script
        assert "masterauth" in script  # --protected-mode no only with a password, and the peer has to know it
    assert _script(services["keydb1"]).replace("keydb2", "") == _script(services["keydb2"]).replace(
        "keydb1", ""
    )


def test_the_plain_masters_do_not_replicate() -> None:
    for service in read_stack("valkey-three.yml")["services"].values():
        assert not re.search("replica|slave", str(service.get("command")))


def test_the_image_of_the_workers_is_built_from_what_is_here_and_runs_as_nobody_special() -> None:
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    lines = [line.split() for line in text.splitlines() if line and not line.startswith("#")]
    top = DEPLOY.parent
    sources = [source for line in lines if line[0] == "COPY" for source in line[1:-1]]
    assert {"pyproject.toml", "README.md", "optuna_dlock", "deploy/worker.py"} == set(sources)
    assert all((top / source).exists() for source in sources)
    assert [line[0] for line in lines][-2:] == ["USER", "CMD"]
    assert lines[-2] == ["USER", "worker"]
    assert read_stack("valkey.yml")["services"]["worker"]["image"] in text.partition("\n")[0]


# -- what servers started by them do -----------------------------------------------------------------


def test_nobody_gets_in_without_the_password(running: Stack) -> None:
    for name in running.names:
        assert running.answers(name)
        assert not running.answers(name, None)
        assert not running.answers(name, PASSWORD + "\n")
    wrong = re.sub(r"password_file=\S+", "password=wrong", running.url)
    with pytest.raises(AccessDeniedError):
        RedisLockedStorage(wrong, timeout=2.0).get_all_studies()


def test_the_password_is_in_no_command_line_environment_or_log(running: Stack) -> None:
    assert PASSWORD not in (DEPLOY / "valkey.yml").read_text("utf-8")
    for name, process in running.processes.items():
        for what in ("cmdline", "environ"):
            assert b"pass\\word" not in Path(f"/proc/{process.pid}/{what}").read_bytes()
        assert b"-server" in Path(f"/proc/{process.pid}/cmdline").read_bytes()  # exec: signals reach it
        assert "pass\\word" not in running.log(name)


def test_the_health_check_passes_and_fails_when_it_should(running: Stack) -> None:
    if running.client is None:
        pytest.skip("no redis-cli, valkey-cli or keydb-cli here")
    name = running.names[-1]
    good = running.check_health(name)
    assert (good.returncode, good.stdout, good.stderr) == (0, "", "")
    running.command(name, "CONFIG", "SET", "requirepass", "another")
    try:
        assert running.check_health(name).returncode != 0
    finally:
        running.command(name, "CONFIG", "SET", "requirepass", PASSWORD, password="another")  # noqa: S106
    assert running.check_health(name).returncode == 0


def test_the_doctor_finds_nothing_that_rules_a_server_out(running: Stack) -> None:
    if len(running.names) == 2:
        _until(lambda: all("link_status:down" not in _replication(running, name) for name in running.names))
    assert cli.main(["audit", running.url]) == 0
    report = examine([running.url], 10.0)
    assert [master.error for master in report.masters] == [None] * len(running.names)
    assert report.ok
    warned = [finding.text for finding in report.findings if finding.level == "warn"]
    # Two masters stop when either is down.
    assert [text.partition(":")[0] for text in warned] == (["2 masters"] if len(running.names) == 2 else [])


def _replication(stack: Stack, name: str) -> str:
    info = stack.command(name, "INFO", "replication")
    return "\n".join(f"{key}:{value}" for key, value in info.items()) if isinstance(info, dict) else str(info)


class _Worker:
    """The worker program of the image, with the environment of its service."""

    def __init__(self, stack: Stack, trials: int) -> None:
        service = stack.definition["services"]["worker"]
        variables = {**service["environment"], "STUDY": "s", "TRIALS": str(trials)}
        self._stop_signal = signal.Signals[service["stop_signal"]]
        self._log = Path(tempfile.mkstemp(dir=stack.folder)[1])
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(DEPLOY / "worker.py")],
                env={
                    **stack.environment,
                    "PYTHONPATH": str(DEPLOY.parent),
                    **{name: stack.translate(value) for name, value in variables.items()},
                },
                stdout=log,
                stderr=log,
            )

    def stop(self) -> None:
        """Send the signal that Docker sends first."""
        self._process.send_signal(self._stop_signal)

    def wait(self) -> None:
        """Return when it has ended well."""
        assert self._process.wait(90) == 0, self._log.read_text("utf-8")[-2000:]

    def has_begun(self) -> bool:
        """Whether it has told of a trial: before it takes trials a signal ends it at once."""
        return not self.check() and "finished with value" in self._log.read_text("utf-8")

    def check(self) -> bool:
        """False; an error if it has ended badly."""
        assert not self._process.poll(), self._log.read_text("utf-8")[-2000:]
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.mark.parametrize("name", STACKS)
def test_workers_go_on_after_a_server_was_killed_and_its_volume_has_all_of_it(name: str) -> None:
    needs(name)
    with Stack(name) as stack:
        workers = [_Worker(stack, 10**6) for _ in range(3)]
        try:
            storage = RedisLockedStorage(stack.url)
            _until(lambda: _count(storage, "s") >= 15 or _ended(workers))
            victim = stack.names[-1]
            stack.kill(victim)
            if name == "valkey-three.yml":  # the others go on
                _until_more(storage, workers)
            stack.start(victim)
            _until_more(storage, workers)
            _until(lambda: all(worker.has_begun() for worker in workers))
            for worker in workers:
                worker.stop()
            for worker in workers:
                worker.wait()
        finally:
            for worker in workers:
                worker.kill()
        study = optuna.load_study(study_name="s", storage=storage)
        before = study.get_trials()
        storage.close()
        assert [trial.number for trial in before] == list(range(len(before)))
        assert all(trial.state.is_finished() for trial in before)
        for master in stack.names:  # the way `docker stack rm` ends them
            assert stack.kill(master, signal.SIGTERM) == 0
        for master in stack.names:
            stack.start(master)
        with RedisLockedStorage(stack.url) as storage:
            assert optuna.load_study(study_name="s", storage=storage).get_trials() == before


def _until_more(storage: RedisLockedStorage, workers: list[_Worker]) -> None:
    reached = _count(storage, "s") + 10
    _until(lambda: _count(storage, "s") >= reached or _ended(workers))


def _ended(workers: list[_Worker]) -> bool:
    """False; an error if one has ended badly."""
    return any(worker.check() for worker in workers)


def _count(storage: RedisLockedStorage, study: str) -> int:
    ids = {found.study_name: found._study_id for found in optuna.get_all_study_summaries(storage)}
    return storage.get_n_trials(ids[study], optuna.trial.TrialState.COMPLETE) if study in ids else 0


def test_a_worker_that_gets_the_stop_signal_of_its_service_finishes_its_trial() -> None:
    needs("valkey.yml")
    with Stack("valkey.yml") as stack:
        worker = _Worker(stack, 10**6)
        try:
            with RedisLockedStorage(stack.url) as storage:
                _until(worker.has_begun)
                worker.stop()
                worker.wait()
                trials = optuna.load_study(study_name="s", storage=storage).get_trials()
        finally:
            worker.kill()
        assert {trial.state for trial in trials} == {optuna.trial.TrialState.COMPLETE}


def test_a_worker_ends_when_the_study_has_its_trials() -> None:
    needs("valkey.yml")
    with Stack("valkey.yml") as stack:
        worker = _Worker(stack, 5)
        worker.wait()
        with RedisLockedStorage(stack.url) as storage:
            assert _count(storage, "s") == 5


# -- without Docker ----------------------------------------------------------------------------------


def _unit(name: str) -> configparser.SectionProxy:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd" / name)
    return unit["Service"]


def test_the_unit_of_the_server_starts_what_the_stack_starts() -> None:
    assert _unit("optuna-valkey.service")["ExecStart"] == "/bin/sh /etc/optuna/start-valkey"
    script = (DEPLOY / "systemd" / "start-valkey").read_text("utf-8").partition("\n")[2]
    script = script.replace('"$STATE_DIRECTORY"', "/data")
    script = script.replace('"$CREDENTIALS_DIRECTORY/password"', "/run/secrets/optuna_password")
    assert script == _script(read_stack("valkey.yml")["services"]["valkey"])


def test_the_unit_of_the_worker_stops_it_as_the_stack_does() -> None:
    unit = _unit("optuna-worker@.service")
    worker = read_stack("valkey.yml")["services"]["worker"]
    assert unit["KillSignal"] == worker["stop_signal"]
    assert unit["Restart"] == worker["deploy"]["restart_policy"]["condition"]
    assert unit["LoadCredential"].split(":")[0] == "password"
