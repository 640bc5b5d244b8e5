"""What is imported, and when: an agent pays for nothing that it does not use."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LATE = {"mlflow", "pluggy", "requests", "click", "rich", "opentelemetry", "sqlalchemy", "qitos"}
"""Packages that cost time and memory, and are needed only once something is logged."""


def modules_after(code: str) -> set[str]:
    """The top-level packages that a fresh Python has loaded once `code` has run in it."""
    report = "import json, sys; print(json.dumps(sorted({n.split('.')[0] for n in sys.modules})))"
    command = [sys.executable, "-W", "error", "-c", f"{code}\n{report}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_no_other() -> None:
    """`import qitos_mlflow` loads nothing that is not in the standard library."""
    assert not modules_after("import qitos_mlflow") & LATE


def test_making_a_processor_does_not_import_mlflow() -> None:
    """The processor is there at once; the second that `import mlflow` takes is not the agent's."""
    loaded = modules_after("import qitos_mlflow; qitos_mlflow.MlflowTraceProcessor()")
    # Protobuf writes what is sent: the thread that sends loads it.
    assert not loaded & {"mlflow", "sqlalchemy", "opentelemetry", "google"}


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
