"""`qitos-mlflow demo`: a few agents that need no key and no network, logged like any others."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import uuid
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli._options import experiment_name, tracking_uri
from qitos_mlflow.cli._show import complain, table
from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
    from qitos_mlflow.settings import Settings

PORT = 5000
"""Port of the suggested server for a local store; MLflow's own default."""

LOCAL_STORE_S = 60.0
"""Deadline of delivery to a local store, whose first use imports mlflow and creates tables."""

TAG = "qitos.demo"
"""Tag of the demo's runs. Each demo gives it another value."""

METRICS = {
    "steps": ("total_steps", 0),
    "tools": ("total_tool_calls", 0),
    "tokens": ("total_tokens", 0),
    "critic": ("critic/avg_score", 2),
    "sec": ("duration_s", 2),
}
"""Columns of the table: the metric, and how many digits follow the point."""


@click.command()
@tracking_uri()
@experiment_name
def demo(tracking_uri: str | None, experiment_name: str | None) -> None:
    """Log a few offline agents to MLflow and show the runs.

    A real QitOS Engine with real tools runs six tasks. Only the model is scripted, so no key and
    no network is needed. By design, one task fails, one exceeds its budget, one is reviewed by a
    critic, one asks a second agent and one calls two tools at once.
    """
    if find_spec("qitos") is None:
        raise QitosMlflowError("the demo's agents need QitOS; install it with: pip install qitos")
    from qitos_mlflow.cli._demo_agent import TASKS
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor, remove_trace_processor

    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # MLflow logs each table it creates.
    tag = (TAG, uuid.uuid4().hex)
    named: dict[str, Any] = {"experiment_name": experiment_name} if experiment_name else {}
    processor = MlflowTraceProcessor(tracking_uri=tracking_uri, tags=dict([tag]), **named)
    add_trace_processor(processor)
    try:
        delivered = run_and_deliver(processor)
    finally:
        remove_trace_processor(processor)
        processor.shutdown()
    if not delivered:
        complain(
            "not all runs were delivered in time; the rest is kept in the spool. "
            "See what is left: qitos-mlflow status. Deliver it later: qitos-mlflow sync"
        )
        raise SystemExit(1)
    logged = show_runs(processor.mlflow_plugin.settings, tag)
    if logged < len(TASKS):
        complain(
            f"only {logged} of {len(TASKS)} runs are in MLflow. "
            "See why the server rejected the others: qitos-mlflow status"
        )
        raise SystemExit(1)


def run_and_deliver(processor: MlflowTraceProcessor) -> bool:
    """Run the tasks one after another. True if everything is delivered before the deadline."""
    from rich.progress import track

    from qitos_mlflow.cli._demo_agent import TASKS, run_task
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http

    settings = processor.mlflow_plugin.settings
    for task in track(TASKS, "agents"):
        run_task(task)
    wait_s = settings.flush_timeout_s if is_http(tracking_uri(settings)) else LOCAL_STORE_S
    return processor.force_flush(wait_s)


def show_runs(settings: Settings, tag: tuple[str, str]) -> int:
    """Print the runs with this tag as MLflow has them, and how to open their page.

    Imports mlflow and blocks on the server; raises what mlflow raises. The tag's key and value may
    hold no quotes or backquotes. Returns the number of runs.
    """
    from qitos_mlflow.redaction.redact import without_credentials

    mlflow = import_module("mlflow")
    uri = settings.tracking_uri or mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(settings.experiment_name)
    runs = []
    if experiment is not None:
        runs = client.search_runs(
            [experiment.experiment_id],
            filter_string=f"tags.`{tag[0]}` = '{tag[1]}'",
            order_by=["attributes.start_time ASC"],
        )
    print_table(runs)
    command = server_command(uri)
    page = f"http://localhost:{PORT}" if command else without_credentials(uri).rstrip("/")
    if experiment is not None:
        page += f"/#/experiments/{experiment.experiment_id}"
    see = f"See them with\n\n  {command}\n\nand then at" if command else "See them at"
    click.echo(f"{see}  {page}")
    return len(runs)


def print_table(runs: Iterable[Any]) -> None:
    """Print one row for each `mlflow.entities.Run`."""
    from rich.console import Console

    rows = table("run", "status", "stop reason", *(f">{heading}" for heading in METRICS))
    for run in runs:
        status = run.info.status
        numbers = (
            f"{run.data.metrics[metric]:.{digits}f}" if metric in run.data.metrics else ""
            for metric, digits in METRICS.values()
        )
        rows.add_row(
            run.info.run_name,
            status if status == "FINISHED" else f"[red]{status}[/red]",
            run.data.tags.get("stop_reason", ""),
            *numbers,
        )
    Console().print(rows)


def server_command(uri: str) -> str | None:
    """The command that serves the page of a local store; None if there is a server already.

    A database's password is left out.
    """
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
    from qitos_mlflow.redaction.redact import without_credentials

    if is_http(uri) or uri.split(":")[0] in {"databricks", "uc"}:
        return None
    store = shlex.quote(without_credentials(uri))
    return f"{_mlflow()} server --backend-store-uri {store} --port {PORT}"


def _mlflow() -> str:
    """The command that starts the mlflow of this Python."""
    beside = Path(sys.executable).with_name("mlflow")
    found = shutil.which("mlflow")
    if found is not None and Path(found).resolve() == beside.resolve():
        return "mlflow"
    if beside.exists():
        return shlex.quote(str(beside))
    return f"{shlex.quote(sys.executable)} -m mlflow"
