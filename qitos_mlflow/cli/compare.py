"""`qitos-mlflow compare`: two or more evaluations of the same tasks, with intervals and tests."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import click

from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._show import plural, table
from qitos_mlflow.comparison.runs import Comparison, Run, compare
from qitos_mlflow.errors import QitosMlflowError

PAGE = 1000
"""Runs that are asked for at once."""
SHOWN = 10
"""Tasks that are listed for each reason; `--json` has all."""


@click.command("compare")
@tracking_uri()
@click.option("--metric", "metrics", multiple=True, help="Only this metric.  [repeatable]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--log", metavar="RUN", help="Also log the comparison as artifacts of this run.")
@click.argument("evaluations", metavar="RUN RUN...", nargs=-1, required=True)
def compare_command(
    tracking_uri: str | None,
    metrics: Sequence[str],
    as_json: bool,
    log: str | None,
    evaluations: Sequence[str],
) -> None:
    """Compare evaluations of the same tasks.

    Each RUN is the ID of a run whose children are the tasks' runs, or the name or ID of an
    experiment. All are compared with the first one. Runs are paired by benchmark, split, task and
    trial.

    For each metric the table has both means, the mean difference, its 95 % interval, and the
    p-value of a paired test: McNemar's exact test for 0 and 1, Wilcoxon's signed-rank test for
    other numbers. The p-values are not corrected for the number of metrics.
    """
    if len(evaluations) < 2:
        raise click.UsageError("give at least two evaluations")
    if find_spec("scipy") is None:
        raise QitosMlflowError(
            "`compare` needs scipy; install it with: pip install 'qitos-mlflow[compare]'"
        )
    from mlflow import MlflowClient

    from qitos_mlflow.mlflow_plugin.destination import tracking_uri as uri_of
    from qitos_mlflow.settings import Settings

    client = MlflowClient(uri_of(Settings.resolve(tracking_uri=tracking_uri)))
    found = [(name, _tasks(client, name)) for name in evaluations]
    made = [compare(found[0], other, metrics) for other in found[1:]]
    text = json.dumps([one.to_json() for one in made], indent=2)
    shown = "\n\n".join(_shown(one) for one in made)
    click.echo(text if as_json else shown)
    if log is not None:
        client.log_text(log, text, "comparison.json")
        client.log_text(log, shown, "comparison.txt")


def _tasks(client: Any, evaluation: str) -> list[Run]:
    """The runs of an evaluation's tasks.

    Raises:
        QitosMlflowError: there is no such run or experiment, or it has no runs of tasks.
    """
    from mlflow.exceptions import MlflowException

    wanted = f"tags.`mlflow.parentRunId` = '{evaluation}'"
    try:
        experiment_id = client.get_run(evaluation).info.experiment_id
    except MlflowException:
        try:
            experiment = client.get_experiment_by_name(evaluation)
            experiment_id = (experiment or client.get_experiment(evaluation)).experiment_id
        except MlflowException as error:
            raise QitosMlflowError(f"no run and no experiment {evaluation!r}") from error
        wanted = ""
    runs = [run for run in _search(client, experiment_id, wanted) if run.said("qitos.trace_id")]
    if not runs:
        raise QitosMlflowError(f"{evaluation!r} has no runs of agents to compare")
    return runs


def _search(client: Any, experiment_id: str, wanted: str) -> Iterator[Run]:
    token = None
    while True:
        page = client.search_runs([experiment_id], wanted, max_results=PAGE, page_token=token)
        for run in page:
            info, data = run.info, run.data
            yield Run(info.run_id, info.start_time, data.metrics, data.params, data.tags)
        token = page.token
        if not token:
            return


def _shown(comparison: Comparison) -> str:
    """A comparison as text: the metrics' table, and the tasks that differ."""
    from rich.console import Console

    heads = ("metric", ">pairs", ">first", ">second", ">difference", ">95 % interval", ">p", "test")
    made = table(*heads)
    for name, one in comparison.metrics.items():
        interval = "" if one.low is None else f"{_number(one.low)} to {_number(one.high)}"
        p = "" if one.p is None else f"{one.p:.3g}"
        numbers = (*map(_number, (one.first, one.second)), f"{one.mean:+.4g}")
        made.add_row(name, str(one.n), *numbers, interval, p, one.test)
    console = Console(width=120, highlight=False)
    with console.capture() as captured:
        console.print(made)
    lines = [f"first:  {comparison.first}", f"second: {comparison.second}", "", captured.get()]
    for name, what in (
        ("won", "solved by the second only"),
        ("lost", "solved by the first only"),
        ("only_first", "not in the second"),
        ("only_second", "not in the first"),
    ):
        if tasks := getattr(comparison, name):
            more = "" if len(tasks) <= SHOWN else f", and {len(tasks) - SHOWN} more"
            some = ", ".join(map(str, tasks[:SHOWN]))
            lines.append(f"{plural(len(tasks), 'task')} {what}: {some}{more}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
