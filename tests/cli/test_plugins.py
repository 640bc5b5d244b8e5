"""`qitos-mlflow plugins`: what is installed, what loads, and why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Run

GOOD = """\
import pluggy
class Plugin:
    @pluggy.HookimplMarker("qitos")
    def qitos_span_end(self, span): pass
"""
PLUGINS = {"good": GOOD, "broken": "raise RuntimeError('out of order')\n", "quiet": GOOD}


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three distributions with a trace plugin each, one of which cannot be imported."""
    site = tmp_path / "site"
    site.mkdir()
    for name, source in PLUGINS.items():
        (site / f"plugin_{name}.py").write_text(source)
        info = site / f"trace_{name}-1.{len(name)}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: trace-{name}\nVersion: 1.{len(name)}\n"
        )
        (info / "entry_points.txt").write_text(
            f"[qitos.trace_plugins]\n{name} = plugin_{name}:Plugin\n"
        )
    monkeypatch.setenv("PYTHONPATH", str(site))


def ours(done: Any) -> dict[str, dict[str, Any]]:
    """The plugins of these tests in the command's JSON, by name."""
    assert done.returncode in (0, 1), done.stderr
    return {p["name"]: p for p in json.loads(done.stdout)["plugins"] if p["name"] in PLUGINS}


@pytest.mark.usefixtures("installed")
def test_each_plugin_is_found_with_its_state(cli: Run) -> None:
    """The list shows a loaded plugin's hooks, a failed one's exception, and a blocked one."""
    found = ours(cli("plugins", "--json", QITOS_TRACE_PLUGINS="good,broken"))
    assert found["good"]["state"] == "loaded"
    assert found["good"]["hooks"] == ["qitos_span_end"]
    assert (found["good"]["distribution"], found["good"]["version"]) == ("trace-good", "1.4")
    assert found["good"]["value"] == "plugin_good:Plugin"
    assert found["broken"]["state"] == "failed"
    assert "RuntimeError: out of order" in found["broken"]["error"]
    assert found["quiet"]["state"] == "blocked"
    assert "QITOS_TRACE_PLUGINS" in found["quiet"]["error"]


@pytest.mark.usefixtures("installed")
def test_where_nothing_is_selected_all_are_found_as_blocked(cli: Run) -> None:
    """With QITOS_TRACE_PLUGINS=none the list is still there, and nothing of it is loaded."""
    found = ours(cli("plugins", "--json", QITOS_TRACE_PLUGINS="none"))
    assert {name: plugin["state"] for name, plugin in found.items()} == dict.fromkeys(
        PLUGINS, "blocked"
    )


@pytest.mark.usefixtures("installed")
def test_the_table_says_the_same(cli: Run) -> None:
    """Without --json there is a table with names, distributions, states and reasons."""
    done = cli("plugins", QITOS_TRACE_PLUGINS="good,broken")
    for text in ("trace-good 1.4", "loaded", "failed", "RuntimeError: out of order", "blocked"):
        assert text in done.stdout


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("options", [(), ("--json",)])
@pytest.mark.parametrize(
    ("selected", "code", "said"),
    [
        ("good,broken", 1, "qitos-mlflow: not loaded, see the error above: broken\n"),
        ("good,Gost", 1, "qitos-mlflow: not installed: gost\n"),
        ("good,no:gost", 1, "qitos-mlflow: not installed: gost\n"),
        ("trace_quiet:good", 1, "qitos-mlflow: not installed: trace_quiet:good\n"),
        ("good,quiet", 0, ""),
        ("good", 0, ""),
        ("no:broken", 0, ""),
        ("none,gost", 0, ""),  # Nothing at all.
    ],
)
def test_a_plugin_that_fails_or_is_missing_is_named_and_fails_the_command(
    cli: Run, options: tuple[str, ...], selected: str, code: int, said: str
) -> None:
    """A script can ask whether all that is named is there and loads; the others do not count."""
    done = cli("plugins", *options, QITOS_TRACE_PLUGINS=selected)
    assert done.returncode == code
    verdicts = ("qitos-mlflow: not loaded, see", "qitos-mlflow: not installed")
    lines = done.stderr.splitlines(keepends=True)
    assert "".join(line for line in lines if line.startswith(verdicts)) == said


def test_host_and_start_up_line_are_found(cli: Run, python: Run) -> None:
    """Which QitOS there is, and whether the start-up line ran in this interpreter."""
    found = json.loads(cli("plugins", "--json").stdout)
    version = python("-c", "import qitos; print(qitos.__version__)").stdout.strip()
    assert found["host"]["installed"] is True
    assert found["host"]["version"] == version
    assert found["variable"] == {"name": "QITOS_TRACE_PLUGINS", "value": "none"}
    watches = "import sys; print(any(getattr(f, 'qitos_watcher', False) for f in sys.meta_path))"
    ran = python("-c", watches).stdout.strip()
    assert str(found["startup_line"]["active"]) == ran


def test_a_host_with_its_own_tracing_is_seen(
    tmp_path: Path, cli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A qitos that has its own `qitos.tracing` is recognised without importing it."""
    tracing = tmp_path / "host" / "qitos" / "tracing"
    tracing.mkdir(parents=True)
    for package in (tracing, tracing.parent):
        (package / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "host"))
    found = json.loads(cli("plugins", "--json").stdout)
    assert found["host"]["own_tracing"] is True


@pytest.mark.parametrize(
    ("variables", "wanted", "line"),
    [
        ({}, None, "not set, so the mlflow plugin logs nothing; set MLFLOW_TRACKING_URI"),
        (
            {"QITOS_TRACE_PLUGINS": "none"},
            None,
            "none, because QITOS_TRACE_PLUGINS leaves the mlflow plugin out",
        ),
        (
            {"MLFLOW_TRACKING_URI": "http://user:secret@host:5000"},
            "http://host:5000",
            "destination  http://host:5000",
        ),
        ({"QITOS_TRACE_PLUGINS": "mlflow"}, "MLflow's local store", "MLflow's local store"),
    ],
)
def test_the_destination_of_runs_is_shown(
    cli: Run,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    wanted: str | None,
    line: str,
) -> None:
    """Without a destination nothing is logged, and the command says so."""
    monkeypatch.delenv("QITOS_TRACE_PLUGINS")
    assert json.loads(cli("plugins", "--json", **variables).stdout)["destination"] == wanted
    shown = cli("plugins", **variables).stdout
    assert line in shown
    assert "secret" not in shown
