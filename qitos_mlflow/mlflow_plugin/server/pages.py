"""Addresses of MLflow's pages (3.12 to 3.17), and the one line that shows a run's."""

from __future__ import annotations

import os
import sys
from urllib.parse import quote

from qitos_mlflow._guard import has_stderr, say, shield
from qitos_mlflow._inheritance import check
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
from qitos_mlflow.redaction.redact import without_credentials

SILENT_VARIABLE = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
"""MLflow's switch for the same line of its own runs."""

_shown: list[None] = []


def run_page(uri: str, experiment_id: str, run_id: str, workspace: str | None = None) -> str:
    """The page of a run on the server at `uri`."""
    return f"{_experiment(uri, experiment_id)}/runs/{run_id}{_in(workspace, '?')}"


def trace_page(uri: str, experiment_id: str, trace_id: str, workspace: str | None = None) -> str:
    """The page of a trace on the server at `uri`."""
    traces = f"{_experiment(uri, experiment_id)}/traces"
    return f"{traces}?selectedEvaluationId={trace_id}{_in(workspace, '&')}"


def _experiment(uri: str, experiment_id: str) -> str:
    return f"{without_credentials(uri).rstrip('/')}/#/experiments/{experiment_id}"


def _in(workspace: str | None, mark: str) -> str:
    named = workspace and workspace != "default"
    return f"{mark}workspace={quote(workspace or '', safe='')}" if named else ""


def show_run(uri: str | None, run: RunRef, workspace: str | None = None) -> None:
    """Sending thread. Say on a terminal where the process's first run is, as MLflow does."""
    silent = os.environ.get(SILENT_VARIABLE, "").lower() in ("1", "true")
    if _shown or silent or uri is None or not is_http(uri):
        return
    _shown.append(None)
    with shield("pages.show_run"):
        if has_stderr() and sys.stderr.isatty():
            page = run_page(uri, run.experiment_id, run.run_id, workspace)
            say(f"View run {run.run_name} at: {page}", begin="🏃 ")
    check()  # A terminal may wait.
