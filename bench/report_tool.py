"""`optuna-dlock report` from cold, and a refresh of `watch`: `python -m bench report`.

Its peer is what the notes do by hand: `get_trials()` of each study, then the median of each host.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path

import optuna
from optuna.trial import TrialState, create_trial

from bench.environment import describe
from bench.servers import start_valkey
from optuna_dlock import RedisLockedStorage
from optuna_dlock.report_source import ReportSource

_BY_HAND = """
import sys, statistics, optuna
from optuna.trial import TrialState
from optuna_dlock import RedisLockedStorage
with RedisLockedStorage(sys.argv[1]) as storage:
    for name in optuna.get_all_study_names(storage):
        hosts = {}
        for trial in optuna.load_study(study_name=name, storage=storage).get_trials():
            if trial.state == TrialState.COMPLETE:
                hosts.setdefault(trial.user_attrs["HOST"]["host"], []).append(trial.duration.total_seconds())
        print(name, {host: statistics.median(found) for host, found in hosts.items()})
"""


def main(argv: Sequence[str]) -> int:
    """Run, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__)
    parser.add_argument("--studies", type=int, default=8)
    parser.add_argument("--trials", type=int, default=8000, help="of each study")
    parser.add_argument("--hosts", type=int, default=7)
    parser.add_argument("--repeat", type=int, default=5, help="runs of each; the median counts")
    options = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="optuna-dlock-bench-") as name:
        server = start_valkey(Path(name) / "valkey")
        try:
            for title, text in describe(server.url).items():
                print(f"{title:<14}{text}")
            _fill(server.url, options.studies, options.trials, options.hosts)
            print(f"\n{options.studies} studies of {options.trials} trials, {options.hosts} hosts")
            tool = [sys.executable, "-m", "optuna_dlock.cli", "report", server.url]
            _print_row("report, process and all", [_run(tool) for _ in range(options.repeat)])
            _print_row(
                "report --format html", [_run([*tool, "--format", "html"]) for _ in range(options.repeat)]
            )
            took = [_took(tool) for _ in range(options.repeat)]
            print(f"{'of which reading and counting':<40}{statistics.median(took):8.3f} s")
            by_hand = [sys.executable, "-c", _BY_HAND, server.url]
            _print_row("get_trials() and medians by hand", [_run(by_hand) for _ in range(options.repeat)])
            _print_refresh(server.url)
        finally:
            server.stop()
    return 0


def _fill(url: str, studies: int, trials: int, hosts: int) -> None:
    begun = datetime.now() - timedelta(days=1)
    distribution = optuna.distributions.FloatDistribution(0, 1)
    names = [f"x{n}" for n in range(5)]
    with RedisLockedStorage(url) as storage:
        for number in range(studies):
            study = optuna.create_study(storage=storage, study_name=f"study{number}")
            made = []
            for at in range(trials):
                trial = create_trial(
                    state=TrialState.COMPLETE,
                    value=at % 997 / 997,
                    params=dict.fromkeys(names, at / trials),
                    distributions=dict.fromkeys(names, distribution),
                    user_attrs={"HOST": {"host": f"m{at % hosts}"}},
                )
                trial.datetime_start = begun + timedelta(seconds=at)
                trial.datetime_complete = trial.datetime_start + timedelta(seconds=2 + at % 13 / 7)
                made.append(trial)
            study.add_trials(made)


def _run(command: Sequence[str]) -> tuple[float, float]:
    """Seconds on the wall and of CPU time that a process takes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _took(tool: Sequence[str]) -> float:
    done = subprocess.run([*tool, "--json"], capture_output=True, check=True)
    return float(json.loads(done.stdout)["seconds"])


def _print_row(title: str, runs: Sequence[tuple[float, float]]) -> None:
    wall, cpu = (statistics.median(figures) for figures in zip(*runs, strict=True))
    print(f"{title:<40}{wall:8.3f} s  CPU {cpu:.3f} s", flush=True)


def _print_refresh(url: str) -> None:
    """A later look: nothing changed, then one more trial."""
    source = ReportSource(url)
    source.refresh()
    with RedisLockedStorage(url) as storage:
        study = optuna.load_study(study_name="study0", storage=storage)
        quiet, busy = [], []
        for _ in range(50):
            quiet.append(_seconds(source))
            study.tell(study.ask(), 1.0)
            busy.append(_seconds(source))
    source.close()
    for title, figures in (("refresh, nothing changed", quiet), ("refresh after one new trial", busy)):
        print(f"{title:<40}{statistics.median(figures) * 1000:8.2f} ms")


def _seconds(source: ReportSource) -> float:
    start = time.perf_counter()
    source.refresh()
    return time.perf_counter() - start
