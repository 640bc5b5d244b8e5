"""Reads logged runs back from MLflow, so that the demo shows what the server has.

Imports mlflow when called, never before. The library does not use this module.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
from qitos_mlflow.redaction.uris import without_credentials

PORT = 5000
"""Port of the suggested server for a local store; MLflow's own default."""


@dataclass(frozen=True)
class LoggedRuns:
    """Runs of one experiment, oldest first, as `mlflow.entities.Run`; and where their page is."""

    tracking_uri: str
    experiment_id: str | None
    runs: tuple[Any, ...]

    @property
    def server_command(self) -> str | None:
        """The command that serves the page of a local store; None if there is a server already.

        A database's password is left out.
        """
        if is_http(self.tracking_uri) or self.tracking_uri.split(":")[0] in {"databricks", "uc"}:
            return None
        uri = shlex.quote(without_credentials(self.tracking_uri))
        return f"{_mlflow()} server --backend-store-uri {uri} --port {PORT}"

    @property
    def page(self) -> str:
        """The address of the experiment's page, once its server runs."""
        shown = without_credentials(self.tracking_uri).rstrip("/")
        server = shown if self.server_command is None else f"http://localhost:{PORT}"
        return f"{server}/#/experiments/{self.experiment_id}" if self.experiment_id else server


def _mlflow() -> str:
    """The command that starts the mlflow of this Python."""
    beside = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "mlflow"
    if beside.exists():
        return shlex.quote(str(beside))
    return f"{shlex.quote(sys.executable)} -m mlflow"


def read_runs(tracking_uri: str | None, experiment_name: str, tag: tuple[str, str]) -> LoggedRuns:
    """The runs with a tag. Blocks on the server; raises what mlflow raises.

    Args:
        tracking_uri: server or store; None: MLflow's own default.
        experiment_name: where to look; an experiment that does not exist has no runs.
        tag: key and value, which may hold no quotes or backquotes.
    """
    mlflow = import_module("mlflow")
    uri = tracking_uri or mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return LoggedRuns(uri, None, ())
    found = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`{tag[0]}` = '{tag[1]}'",
        order_by=["attributes.start_time ASC"],
    )
    return LoggedRuns(uri, experiment.experiment_id, tuple(found))
