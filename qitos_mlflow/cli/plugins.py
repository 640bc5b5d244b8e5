"""`qitos-mlflow plugins`: which trace plugins are installed, and whether they load."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from importlib.machinery import PathFinder
from typing import Any

import click

from qitos_mlflow._texts import clean
from qitos_mlflow.cli._show import complain, echo, echo_json, fact, row, show, table
from qitos_mlflow.cli._spool import DEFAULT_STORE


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def plugins(as_json: bool) -> None:
    """List the trace plugins that are installed, and whether they load.

    Exits with 1 if a plugin that is selected does not load, or if QITOS_TRACE_PLUGINS has a name,
    also after "no:", that no installed plugin has.
    """
    found = survey()
    if as_json:
        echo_json(found)
    else:
        _show(found)
    if failed := [one["name"] for one in found["plugins"] if one["state"] == "failed"]:
        complain(f"not loaded, see the error above: {', '.join(failed)}")
    if found["unknown"]:
        complain(f"not installed: {', '.join(found['unknown'])}")
    if failed or found["unknown"]:
        raise SystemExit(1)


def survey() -> dict[str, Any]:
    """The content of --json.

    Loads the selected plugins to see whether they load. Does not import qitos or mlflow itself.
    """
    startup_line = {"active": startup_line_is_active()}
    from qitos_mlflow._selection import VARIABLE, Selection
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor
    from qitos_mlflow.plugins.loader import GROUP, load

    found = load(PluginTraceProcessor())
    return {
        "group": GROUP,
        "variable": {"name": VARIABLE, "value": os.environ.get(VARIABLE)},
        "startup_line": startup_line,
        "destination": destination(),
        "host": host(),
        "plugins": [asdict(plugin) for plugin in found],
        "unknown": Selection.from_environ().unknown((one.name, one.distribution) for one in found),
    }


def startup_line_is_active() -> bool:
    """Whether the start-up line waits for `import qitos` in this process."""
    return any(getattr(finder, "qitos_watcher", False) for finder in sys.meta_path)


def destination() -> str | None:
    """Where the installed MLflow plugin logs to, without credentials. None if it logs nothing."""
    from qitos_mlflow._selection import Selection
    from qitos_mlflow.redaction.redact import without_credentials
    from qitos_mlflow.settings import TRACKING_VARIABLE

    if uri := os.environ.get(TRACKING_VARIABLE):
        return without_credentials(uri)
    return DEFAULT_STORE if Selection.from_environ().asks_for("mlflow") else None


def host() -> dict[str, Any]:
    """Whether QitOS is installed, its version, and whether it has its own `qitos.tracing`."""
    import importlib_metadata

    # Path finders only: our finder serves `qitos.tracing` too, and qitos is not imported this way.
    spec = PathFinder.find_spec("qitos")
    if spec is None:
        return {"installed": False, "version": None, "own_tracing": False}
    try:
        version: str | None = importlib_metadata.version("qitos")
    except importlib_metadata.PackageNotFoundError:
        version = None  # A source tree on sys.path.
    tracing = PathFinder.find_spec("qitos.tracing", spec.submodule_search_locations)
    return {"installed": True, "version": version, "own_tracing": tracing is not None}


def _show(found: dict[str, Any]) -> None:
    from rich.text import Text

    echo(f"Entry points of the group {found['group']}")
    rows = table("plugin", "from", "state", "hooks or error")
    for plugin in found["plugins"]:
        distribution = clean(f"{plugin['distribution']} {plugin['version']}")
        source = Text(f"{distribution}\n{clean(plugin['value'])}")
        what = plugin["error"] or ", ".join(plugin["hooks"])
        row(rows, plugin["name"], source, plugin["state"], what or "")
    if found["plugins"]:
        show(rows)
    else:
        echo("  none is installed in this Python\n", lines=True)
    host, value = found["host"], found["variable"]["value"]
    if not host["installed"]:
        qitos = "not installed; install it with: pip install qitos"
    else:
        whose = "its own" if host["own_tracing"] else "provided by qitos-mlflow"
        qitos = f"{host['version'] or 'of an unknown version'}, qitos.tracing: {whose}"
    if found["startup_line"]["active"]:
        startup = "active in this Python"
    elif value is not None and value.strip().lower() in ("", "none"):
        startup = f"not active, because {found['variable']['name']} loads nothing"
    else:
        startup = "not active in this Python; use: qitos-mlflow run, or import qitos_mlflow.auto"
    if ("mlflow", "blocked") in ((one["name"], one["state"]) for one in found["plugins"]):
        nowhere = f"none, because {found['variable']['name']} leaves the mlflow plugin out"
    else:
        nowhere = (
            "not set, so the mlflow plugin logs nothing; set MLFLOW_TRACKING_URI, or "
            "QITOS_TRACE_PLUGINS=mlflow for MLflow's local store"
        )
    facts = {
        "qitos": qitos,
        "start-up line": startup,
        found["variable"]["name"]: "not set" if value is None else repr(value),
        "destination": found["destination"] or nowhere,
    }
    for label, text in facts.items():
        fact(label, text)
