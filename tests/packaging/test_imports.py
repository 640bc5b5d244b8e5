"""What is imported, and when: an agent pays for nothing that it does not use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LATE = {"mlflow", "pluggy", "requests", "click", "rich", "opentelemetry", "sqlalchemy", "qitos"}
"""Packages that cost time and memory, and are needed only once something is logged."""


def all_modules_after(code: str, **environ: str) -> set[str]:
    """The modules that a fresh Python has loaded once `code` has run in it."""
    report = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "error", "-c", f"{code}\n{report}"]
    env = {**os.environ, **environ}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_after(code: str) -> set[str]:
    """The top-level packages that it has loaded."""
    return {name.split(".")[0] for name in all_modules_after(code)}


def test_importing_the_package_imports_no_other() -> None:
    """`import qitos_mlflow` loads nothing that is not in the standard library."""
    assert not modules_after("import qitos_mlflow") & LATE


def test_making_a_processor_does_not_import_mlflow() -> None:
    """The processor is there at once; the second that `import mlflow` takes is not the agent's."""
    loaded = modules_after("import qitos_mlflow; qitos_mlflow.MlflowTraceProcessor()")
    # Protobuf writes what is sent: the thread that sends loads it.
    assert not loaded & {"mlflow", "sqlalchemy", "opentelemetry", "google"}


WITH_QITOS = {
    "qitos_mlflow",
    "qitos_mlflow._after_import",
    "qitos_mlflow._forks",
    "qitos_mlflow._selection",
    "qitos_mlflow._startup",
    "qitos_mlflow.bridge",
    "qitos_mlflow.bridge.patches",
    "qitos_mlflow.mlflow_plugin",
    "qitos_mlflow.mlflow_plugin.fluent",
    "qitos_mlflow.mlflow_plugin.fluent.carried",
    "qitos_mlflow.mlflow_plugin.fluent.origins",
    "qitos_mlflow.mlflow_plugin.watches",
    "qitos_mlflow.tracing",
    "qitos_mlflow.tracing._search",
    "qitos_mlflow.tracing.compat",
    "qitos_mlflow.wiring",
}
"""Modules of ours that `import qitos` loads. Each takes 0.1 to 0.2 ms of the 3 ms that it may."""

DESTINATIONS = [
    {"QITOS_TRACE_PLUGINS": "no:none-such"},
    {"QITOS_TRACE_PLUGINS": "mlflow"},
    {"QITOS_TRACE_PLUGINS": "all", "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"},
]


@pytest.mark.parametrize("environ", DESTINATIONS, ids=["none", "local store", "server"])
def test_importing_qitos_loads_no_plugin(environ: dict[str, str]) -> None:
    """Beside qitos itself it loads a few small modules of ours, with a destination or without."""
    start = "import qitos_mlflow._startup; qitos_mlflow._startup.install()"
    without = all_modules_after("import qitos", QITOS_TRACE_PLUGINS="none")
    loaded = all_modules_after(f"{start}; import qitos", **environ) - without
    assert {name for name in loaded if name.startswith("qitos_mlflow")} <= WITH_QITOS
    others = {name for name in loaded if not name.startswith("qitos_mlflow")}
    assert others <= {"qitos.tracing", "contextvars", "_contextvars"}


def test_the_plugins_are_imported_by_the_first_trace() -> None:
    """Not by the first use of `qitos.tracing`, which attaches their processor before all others."""
    code = """
import sys
import qitos_mlflow.auto, qitos
from qitos.tracing import NoOpTraceProcessor, add_trace_processor, create_trace
from qitos_mlflow import tracing
add_trace_processor(NoOpTraceProcessor())
adapter, other = tracing.processors()
assert type(adapter).__name__ == "PluginTraceProcessor" and type(other) is NoOpTraceProcessor
assert not {"qitos_mlflow.mlflow_plugin.plugin", "importlib_metadata"} & {*sys.modules}
with create_trace("first"):
    assert [*adapter.plugins] == ["mlflow"]
    assert "qitos_mlflow.mlflow_plugin.plugin" in sys.modules
"""
    loaded = all_modules_after(code, QITOS_TRACE_PLUGINS="mlflow", QITOS_MLFLOW_OFFLINE="1")
    assert "mlflow" not in loaded


def test_agents_that_begin_at_once_all_have_the_plugins() -> None:
    """A run that begins while another thread attaches the plugins is logged like any other."""
    code = """
from threading import Event, Thread
from qitos_mlflow._after_import import after_import
begun, answered, found = Event(), Event(), []
after_import("qitos_mlflow.tracing._host", lambda _: (begun.set(), answered.wait(0.5)))
import qitos_mlflow.auto, qitos
from qitos_mlflow.bridge.live import is_wanted
def ask():
    begun.wait(20)
    found.append(is_wanted())
    answered.set()
other = Thread(target=ask)
other.start()
assert is_wanted()
other.join(20)
assert found == [True]
"""
    all_modules_after(code, QITOS_TRACE_PLUGINS="mlflow")


def test_processors_that_replace_all_replace_the_plugins() -> None:
    """`set_trace_processors` before the first trace counts as it does after."""
    code = """
import qitos_mlflow.auto, qitos
qitos.tracing.set_trace_processors([])
from qitos_mlflow import tracing
with tracing.create_trace("first"):
    assert tracing.processors() == ()
"""
    loaded = all_modules_after(code, QITOS_TRACE_PLUGINS="mlflow")
    assert "qitos_mlflow.mlflow_plugin.plugin" not in loaded


def test_what_comes_before_a_trace_is_watched_from_the_start() -> None:
    """Threads know where they come from, and the host's runners are evaluations, at once."""
    code = """
import sys, threading
import qitos_mlflow.auto, qitos
from qitos_mlflow.mlflow_plugin.fluent.carried import STARTER
thread = threading.Thread(target=print)
thread.start()
assert vars(thread)[STARTER]() is threading.main_thread()
assert "qitos_mlflow.mlflow_plugin.plugin" not in sys.modules
import qitos.benchmark.runner
assert hasattr(qitos.benchmark.runner.run_benchmark_tasks, "_qitos_mlflow")
import qitos.evaluate.base
assert hasattr(qitos.evaluate.base.EvaluationSuite.evaluate, "__wrapped__")
"""
    all_modules_after(code, QITOS_TRACE_PLUGINS="mlflow")


def test_nothing_is_watched_for_a_plugin_that_is_not_selected() -> None:
    """Where the MLflow plugin is left out, threads start as they do without the package."""
    code = """
import threading
start = threading.Thread.start
import qitos_mlflow.auto, qitos
assert threading.Thread.start is start
"""
    all_modules_after(code, QITOS_TRACE_PLUGINS="no:mlflow")


def test_a_first_trace_in_an_exit_handler(tmp_path: Path) -> None:
    """The plugin is imported when none can be registered any more, and all is on the disk."""
    code = """
import atexit
import qitos_mlflow.auto, qitos
def run():
    from qitos.tracing import create_trace
    with create_trace("last"):
        pass
atexit.register(run)
"""
    spool = tmp_path / "spool"
    all_modules_after(
        code,
        QITOS_TRACE_PLUGINS="mlflow",
        QITOS_MLFLOW_OFFLINE="1",
        QITOS_MLFLOW_SPOOL_DIR=str(spool),
    )
    assert b"".join(path.read_bytes() for path in spool.glob("*.seg")).count(b"trace_end") == 1


@pytest.mark.parametrize(
    "statement",
    [
        "from qitos_mlflow import MlflowTraceProcessor",
        "import qitos_mlflow.auto; from qitos.tracing.mlflow_processor import MlflowTraceProcessor",
    ],
)
def test_without_mlflow_the_import_says_what_to_install(
    statement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both homes of `MlflowTraceProcessor` raise an `ImportError` with the command to run."""
    monkeypatch.delenv("QITOS_TRACE_PLUGINS")
    code = """
import sys
sys.modules["mlflow"] = None  # What a package that is not installed looks like to find_spec.
try:
    {statement}
except ImportError as error:
    assert "pip install" in str(error), error
else:
    raise AssertionError("no ImportError")
"""
    modules_after(code.format(statement=statement))


def test_the_startup_line_may_run_twice(source_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run twice over (two site directories, a .pth and a .start), the watchers go together.

    Until qitos is imported, the .pth imports nothing at all.
    """
    code = """
import sys
from pathlib import Path
from pkgutil import resolve_name
line, start = (Path(FILES + suffix).read_text() for suffix in (".pth", ".start"))
before = [f for f in sys.meta_path if not getattr(f, "qitos_watcher", False)]
modules = set(sys.modules)
exec(line); exec(line)
assert set(sys.modules) == modules
from qitos_mlflow._startup import arrived
install = resolve_name(start.strip())
install(); install()
assert len(sys.meta_path) > len(before) + 1
arrived()
assert sys.meta_path[1:] == before, sys.meta_path
""".replace("FILES", repr(str(source_tree / "startup" / "qitos_mlflow")))
    monkeypatch.delenv("QITOS_TRACE_PLUGINS")
    assert not modules_after(code) & LATE
