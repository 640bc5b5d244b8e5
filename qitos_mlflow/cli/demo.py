"""`qitos-mlflow demo`: a few agents that need no key and no network, logged as any others are."""

from __future__ import annotations

import os
import tempfile
import uuid
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow.cli import Refused
from qitos_mlflow.cli._options import experiment_name, tracking_uri

if TYPE_CHECKING:
    from qitos_mlflow.cli._logged_runs import LoggedRun, LoggedRunsReader
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor

LOCAL_STORE_S = 60.0
"""A local store is certain to be there, but its first use imports mlflow and makes tables."""

TAG = "qitos.demo"
"""Tag of the demo's runs; its value is another one each time."""


@click.command()
@tracking_uri()
@experiment_name
def demo(tracking_uri: str | None, experiment_name: str | None) -> None:
    """Log a few offline agents to MLflow and show the runs.

    A real QitOS Engine with real tools runs eight tasks; only the model is scripted, so no key
    and no network is needed. One task fails, one is reviewed by a critic, one runs into its
    budget and one asks another agent: all as they should.
    """
    if find_spec("qitos") is None:
        raise Refused("the demo's agents need QitOS; install it with: pip install qitos")
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor, remove_trace_processor

    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")  # This screen is the demo's.
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
        click.echo(
            "Not all runs could be delivered in time; they are kept. See what is left with\n\n"
            "  qitos-mlflow status\n\nand deliver it, once the server is there, with\n\n"
            "  qitos-mlflow sync",
            err=True,
        )
        raise SystemExit(1)
    from qitos_mlflow.cli._demo_tasks import TASKS
    from qitos_mlflow.cli._logged_runs import read_runs

    settings = processor.mlflow_plugin.settings
    found = read_runs(settings.tracking_uri, settings.experiment_name, tag)
    show(found)
    if len(found.runs) < len(TASKS):
        click.echo(
            f"Only {len(found.runs)} of {len(TASKS)} runs are there. To see why the server refused "
            "the others, run\n\n  qitos-mlflow status",
            err=True,
        )
        raise SystemExit(1)


def run_and_deliver(processor: MlflowTraceProcessor) -> bool:
    """Run the tasks one after another; True when all of it has been delivered in time.

    With a progress bar where there is a terminal.
    """
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    from qitos_mlflow.cli._demo_tasks import TASKS, prepare_workspace, run_task
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http

    settings = processor.mlflow_plugin.settings
    wait_s = settings.flush_timeout_s if is_http(tracking_uri(settings)) else LOCAL_STORE_S
    columns = TextColumn("{task.description:28}"), BarColumn(), TaskProgressColumn()
    with tempfile.TemporaryDirectory() as directory, Progress(*columns) as progress:
        prepare_workspace(Path(directory))
        bar = progress.add_task("", total=sum(len(task.replies) for task in TASKS))
        for task in TASKS:
            progress.update(bar, description=f"{task.agent}: {task.id}")
            run_task(task, Path(directory), step_began=lambda: progress.advance(bar))
        progress.update(bar, description="agents")
        bar = progress.add_task("delivery to MLflow", total=None)
        delivered = processor.force_flush(wait_s)
        progress.update(bar, total=1, completed=int(delivered))
    return delivered


def show(found: LoggedRunsReader) -> None:
    """Print the runs as MLflow has them, and how to look at them there."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))  # 80 columns are enough.
    for heading in ("run", "status", "stop reason"):
        table.add_column(heading, no_wrap=True)
    for heading in ("steps", "tools", "tokens", "critic", "sec"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in found.runs:
        table.add_row(*_row(run))
    console.print(table)
    command = found.server_command
    if command is None:
        click.echo(f"See them at  {found.page}")
    else:
        click.echo(f"See them with\n\n  {command}\n\nand then at  {found.page}")


def _row(run: LoggedRun) -> list[str]:
    status = run.status if run.status == "FINISHED" else f"[red]{run.status}[/red]"
    score = "" if run.critic_score is None else f"{run.critic_score:.2f}"
    duration = "" if run.duration_s is None else f"{run.duration_s:.2f}"
    return [
        *(run.name, status, run.stop_reason or ""),
        *("" if count is None else str(count) for count in (run.steps, run.tool_calls, run.tokens)),
        *(score, duration),
    ]
