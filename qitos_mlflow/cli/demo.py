"""`qitos-mlflow demo`: a few agents that need no key and no network, logged like any others."""

from __future__ import annotations

import os
import shlex
import sys
import time
import uuid
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from qitos_mlflow._texts import clean
from qitos_mlflow.cli._options import experiment_name, tracking_uri
from qitos_mlflow.cli._show import complain, echo, row, show, table
from qitos_mlflow.errors import QitosMlflowError

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

    A real QitOS Engine with real tools runs five tasks. Only the model is scripted, so no key and
    no network is needed. By design, one task fails, one exceeds its budget, one is reviewed by a
    critic, one asks a second agent and one calls two tools at once.
    """
    if find_spec("qitos") is None:
        raise QitosMlflowError("the demo's agents need QitOS; install it with: pip install qitos")
    from rich.console import Console
    from rich.progress import track

    from qitos_mlflow.cli._demo_agent import TASKS, run_task
    from qitos_mlflow.mlflow_plugin import destination
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor, remove_trace_processor

    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # MLflow logs each table it creates.
    tag = uuid.uuid4().hex
    processor = MlflowTraceProcessor(experiment_name, None, tracking_uri, {TAG: tag})
    recorder = processor.mlflow_plugin.recorder
    uri = destination.tracking_uri(recorder.settings)
    add_trace_processor(processor)
    try:
        bar = Console(stderr=True)
        for task in track(TASKS, "agents", console=bar, disable=not bar.is_terminal):
            run_task(task)
        delivered = _flush(processor)
    finally:
        remove_trace_processor(processor)
        recorder.close(0.0)  # What time can do, `_flush` has waited for.
    if not delivered:
        if why := recorder.hopeless:
            complain(why)
        complain(
            "not all runs were delivered in time; the rest is kept in the spool. "
            "See what is left: qitos-mlflow status. Deliver it later: qitos-mlflow sync"
        )
        raise SystemExit(1)
    found = {trace.run.ref.experiment_id for trace in recorder.traces if trace.run.ref}
    logged = show_runs(uri, next(iter(found), None), tag)
    if logged < len(TASKS):
        complain(
            f"only {logged} of {len(TASKS)} runs are in MLflow. "
            "See why the server refused the others: qitos-mlflow status"
        )
        raise SystemExit(1)


def _flush(processor: Any) -> bool:
    """Deliver for as long as the destination gets on; False once it does not."""
    recorder, seen, until = processor.mlflow_plugin.recorder, None, 0.0
    while not processor.force_flush(0.5):
        if (progress := recorder.progress) != seen:
            seen, until = progress, time.monotonic() + recorder.settings.flush_timeout_s
        if recorder.hopeless or time.monotonic() > until:
            return False
    return True


def show_runs(uri: str | None, experiment_id: str | None, tag: str) -> int:
    """Print the runs with this tag in an experiment, if there is one, and how to open its page.

    Imports mlflow and blocks on the server; raises what mlflow raises. Returns the number of runs.
    """
    from rich.text import Text

    mlflow = import_module("mlflow")
    uri = uri or mlflow.get_tracking_uri()
    client = mlflow.MlflowClient(tracking_uri=uri)
    where = [] if experiment_id is None else [experiment_id]
    runs: Any = where and client.search_runs(
        where, f"tags.`{TAG}` = '{tag}'", order_by=["attributes.start_time ASC"]
    )
    rows = table("run", "status", "stop reason", *(f">{heading}" for heading in METRICS))
    for run in runs:
        metrics, status = run.data.metrics, run.info.status
        row(
            rows,
            run.info.run_name,
            status if status == "FINISHED" else Text(clean(status), style="red"),
            run.data.tags.get("stop_reason", ""),
            *(f"{metrics[m]:.{n}f}" if m in metrics else "" for m, n in METRICS.values()),
        )
    show(rows)
    echo(page(uri) + "".join(f"/#/experiments/{number}" for number in where), lines=True, own=True)
    return len(runs)


def page(uri: str) -> str:
    """Where a store's pages are, after the command that serves them if no server does.

    A database's password is left out.
    """
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
    from qitos_mlflow.redaction.redact import without_credentials

    shown = without_credentials(uri)
    if is_http(uri) or uri.split(":")[0] in {"databricks", "uc"}:
        return f"See them at  {shown.rstrip('/')}"
    # Which `mlflow` is on the PATH, if any, may be another Python's.
    server = f"{shlex.quote(sys.executable)} -m mlflow server"
    where = f"--backend-store-uri {shlex.quote(shown)} --port 5000"
    return f"See them with\n\n  {server} {where}\n\nand then at  http://localhost:5000"
