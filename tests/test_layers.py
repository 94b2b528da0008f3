"""The layers of optuna_dlock/README.md: imports point down only, as the syntax trees show."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import optuna_dlock

PACKAGE = Path(optuna_dlock.__file__).parent
# From the top to the ground.
LAYERS = {
    "tools": {
        "audit",
        "cli",
        "cli_completion",
        "cli_locks",
        "cli_output",
        "cli_report",
        "cli_studies",
        "cli_trials",
        "demo",
        "demo_view",
        "demo_worker",
        "doctor",
        "doctor_ask",
        "doctor_view",
        "open_storage",
        "report",
        "report_hosts",
        "report_html",
        "report_plots",
        "report_run",
        "report_source",
        "report_svg",
        "report_view",
        "watch",
    },
    "facade": {
        "__init__",
        "budget",
        "samplers",
        "graceful_stop",
        "grid_sampler",
        "signal_watch",
        "skipping",
        "step_range",
        "storage",
        "twins",
    },
    "state": {
        "cache",
        "claims",
        "heartbeats",
        "limits",
        "live_trial",
        "runners",
        "studies",
        "trial_reads",
        "trials",
    },
    "exclusion": {
        "distributed_lock",
        "ensemble_lock",
        "lease",
        "lock",
        "lock_table",
        "pottery_lock",
        "pottery_masters",
        "section",
    },
    "server": {
        "channel",
        "embedded",
        "ensemble",
        "fanout",
        "master",
        "node",
        "open_ballot",
        "repair",
        "scripts",
        "server",
        "spacing",
        "supervisor",
    },
    "ground": {
        "codec",
        "distributions",
        "duplicates",
        "errors",
        "grid",
        "keys",
        "quorum",
        "retry",
        "url",
        "worker",
    },
}
HEIGHT = {module: len(LAYERS) - at for at, (_, modules) in enumerate(LAYERS.items()) for module in modules}
FILES = sorted(path.stem for path in PACKAGE.glob("*.py"))


def _imports(module: str, source: str) -> Iterator[str]:
    """Modules of the package that a module imports, within functions too."""
    for node in ast.walk(ast.parse(source, module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "optuna_dlock":
            yield from (f"optuna_dlock.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""


def _upward(module: str, source: str) -> list[str]:
    """The imports of a module that point to a higher layer."""
    wrong = []
    for name in _imports(module, source):
        package, _, imported = name.partition(".")
        if package == "optuna_dlock":
            # A name that is no module, such as RedisLockedStorage, comes from the facade.
            target = imported if imported in HEIGHT else "__init__"
            if HEIGHT[target] > HEIGHT[module]:
                wrong.append(name)
    return wrong


def _source(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text("utf-8")


def test_every_module_has_its_layer() -> None:
    assert set(FILES) == set(HEIGHT)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down_only(module: str) -> None:
    assert _upward(module, _source(module)) == []


@pytest.mark.parametrize(
    "line",
    ["from optuna_dlock.node import Node", "import optuna_dlock.storage", "from optuna_dlock import cli"],
)
def test_an_import_that_points_up_is_seen(line: str) -> None:
    assert _upward("errors", line)


@pytest.mark.parametrize("module", FILES)
def test_the_architecture_page_names_the_module(module: str) -> None:
    page = (PACKAGE / "README.md").read_text("utf-8")
    name = next((f"{group}*" for group in ("demo", "doctor", "report") if module.startswith(group)), module)
    assert module == "__init__" or name in page


@pytest.mark.parametrize("module", FILES)
def test_nothing_is_unpickled(module: str) -> None:
    assert not {"pickle", "marshal", "shelve", "joblib", "dill"}.intersection(
        _imports(module, _source(module))
    )


def test_the_cache_does_no_input_or_output() -> None:
    for module in ("cache", "live_trial", "codec", "distributions"):
        names = set(_imports(module, _source(module)))
        assert not names & {"socket", "redis", "hiredis", "optuna_dlock.node", "optuna_dlock.channel"}
