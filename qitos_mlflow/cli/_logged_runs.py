"""Reads logged runs back from MLflow, so that the commands show what the server has.

Imports mlflow when called, never before. The library does not use this module.
"""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
from qitos_mlflow.redaction.uris import without_credentials

PORT = 5000
"""Port of the suggested server for a local store; MLflow's own default."""


@dataclass(frozen=True)
class LoggedRun:
    """One run as MLflow has it. None means that the run has no such metric or tag."""

    run_id: str
    name: str
    status: str
    model: str | None
    stop_reason: str | None
    steps: int | None
    tool_calls: int | None
    tokens: int | None
    critic_score: float | None
    duration_s: float | None


@dataclass(frozen=True)
class LoggedRunsReader:
    """The runs of one experiment, oldest first, and the address of their page."""

    tracking_uri: str
    experiment_id: str | None
    runs: tuple[LoggedRun, ...]

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
        served = self.server_command is not None
        shown = without_credentials(self.tracking_uri).rstrip("/")
        server = f"http://localhost:{PORT}" if served else shown
        return (
            server if self.experiment_id is None else f"{server}/#/experiments/{self.experiment_id}"
        )


def _mlflow() -> str:
    """The command that starts the mlflow of this Python."""
    beside = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "mlflow"
    if beside.exists():
        return shlex.quote(str(beside))
    return f"{shlex.quote(sys.executable)} -m mlflow"


def read_runs(
    tracking_uri: str | None, experiment_name: str, tag: tuple[str, str] | None = None
) -> LoggedRunsReader:
    """The runs of an experiment. Blocks on the server; raises what mlflow raises.

    Args:
        tracking_uri: server or store; None: MLflow's own default.
        experiment_name: where to look; one that does not exist has no runs.
        tag: only runs with this key and value, which may hold no quotes or backquotes.
    """
    mlflow = import_module("mlflow")
    uri = tracking_uri or mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(experiment_name)
    if experiment is None:
        return LoggedRunsReader(uri, None, ())
    found = client.search_runs(
        [experiment.experiment_id],
        filter_string=f"tags.`{tag[0]}` = '{tag[1]}'" if tag else "",
        order_by=["attributes.start_time ASC"],
    )
    return LoggedRunsReader(uri, experiment.experiment_id, tuple(_logged(run) for run in found))


def _logged(run: object) -> LoggedRun:
    info, data = run.info, run.data  # type: ignore[attr-defined]  # mlflow's Run, see above
    metrics: dict[str, float] = data.metrics

    def count(name: str) -> int | None:
        return int(metrics[name]) if name in metrics else None

    return LoggedRun(
        run_id=info.run_id,
        name=info.run_name,
        status=info.status,
        model=data.params.get("model_name"),
        stop_reason=data.tags.get("stop_reason"),
        steps=count("total_steps"),
        tool_calls=count("total_tool_calls"),
        tokens=count("total_tokens"),
        critic_score=metrics.get("critic/avg_score"),
        duration_s=metrics.get("duration_s"),
    )
