"""`qitos-mlflow compare`: two or more evaluations of the same tasks, with intervals and tests.

Receives ids of runs or experiments, reads their children from the server, and prints what
`comparison` computes of them; writes to the server only with ``--log``. Imports mlflow, because it
reads whole runs from any kind of store, logs artifacts, and has no agent to slow down.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from qitos_mlflow._texts import clean
from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._show import echo, echo_json, in_plain, plural, row, table
from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from qitos_mlflow.comparison.runs import Comparison
    from qitos_mlflow.mlflow_plugin.mapping.entities import StoredRun

PAGE = 1000
"""Runs that are asked for at once."""
SHOWN = 10
"""Tasks that are listed for each reason; `--json` has all."""
WIDTH = 120
"""Of the table if it is not for a terminal (characters)."""

OF_PARAMS = {"task": "qitos.task_id", "trial": "qitos.trial"}
"""Params that say what the tags of a run may not."""


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
    from qitos_mlflow.cli._server import ask
    from qitos_mlflow.comparison.runs import compare
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri as uri_of
    from qitos_mlflow.settings import Settings

    uri = uri_of(Settings.resolve(tracking_uri=tracking_uri))
    if (answer := ask(uri, trusted=True)).reachable is False:
        raise QitosMlflowError(f"{answer.uri}: {answer.detail}")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(uri)
        found = [(name, _tasks(client, name)) for name in evaluations]
        made = [compare(found[0], other, metrics) for other in found[1:]]
        known = {name for one in made for name in one.metrics}
        if missing := set(metrics) - known:
            raise QitosMlflowError(f"no task has the metric {min(missing)!r} in two evaluations")
        text = json.dumps([one.to_json() for one in made], indent=2, allow_nan=False)
        shown = "\n\n".join(_shown(one) for one in made)
        if as_json:
            echo_json([one.to_json() for one in made])
        else:
            echo(shown, lines=True)
        if log is not None:
            client.log_text(log, text, "comparison.json")
            client.log_text(log, shown, "comparison.txt")
    except MlflowException as error:
        raise QitosMlflowError(str(error)) from error


def _tasks(client: Any, evaluation: str) -> list[StoredRun]:
    """The runs of an evaluation's tasks.

    Raises:
        QitosMlflowError: there is no such run or experiment, or it has no runs of tasks.
    """
    from mlflow.exceptions import MlflowException

    from qitos_mlflow.mlflow_plugin.mapping.trace_facts import EVALUATION_TAG

    def unless_missing(ask: Any) -> Any:
        try:
            return ask(evaluation)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            return None

    if run := unless_missing(client.get_run):
        place, wanted = run.info.experiment_id, f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
    elif experiment := (
        client.get_experiment_by_name(evaluation) or unless_missing(client.get_experiment)
    ):
        place, wanted = experiment.experiment_id, ""
    else:
        raise QitosMlflowError(f"no run and no experiment {evaluation!r}")
    page = client.search_runs([place], wanted, max_results=PAGE)
    runs = [_stored(run) for run in page]
    while page.token:
        page = client.search_runs([place], wanted, max_results=PAGE, page_token=page.token)
        runs += map(_stored, page)
    # An evaluation's own run is no task of it.
    found = [run for run in runs if "qitos.trace_id" in run.tags and EVALUATION_TAG not in run.tags]
    if not found:
        raise QitosMlflowError(f"{evaluation!r} has no runs of agents to compare")
    return found


def _stored(run: Any) -> StoredRun:
    from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef, StoredRun

    info, params = run.info, run.data.params
    tags = {tag: params[name] for name, tag in OF_PARAMS.items() if name in params}
    ref = RunRef(
        info.run_id, info.experiment_id, info.run_name, info.artifact_uri, info.start_time or 0
    )
    return StoredRun(ref, info.status, info.end_time, run.data.metrics, tags | run.data.tags)


def _shown(comparison: Comparison) -> str:
    """A comparison as text: the metrics' table, and the tasks that differ."""
    heads = ("metric", ">pairs", ">first", ">second", ">difference", ">95 % interval", ">p", "test")
    made = table(*heads)
    for name, one in comparison.metrics.items():
        interval = "" if one.low is None else f"{one.low:.4g} to {one.high:.4g}"
        numbers = (f"{one.first:.4g}", f"{one.second:.4g}", f"{one.mean:+.4g}")
        p = "" if one.p is None else f"{one.p:.3g}"
        row(made, name, str(one.n), *numbers, interval, p, one.test)
    width = shutil.get_terminal_size((WIDTH, 0)).columns
    # Not for a terminal: the text is an artifact, too.
    plain = in_plain(made, width) if made.rows else "No task has a metric in both.\n"
    lines = [f"first:  {clean(comparison.first)}", f"second: {clean(comparison.second)}", "", plain]
    for name, what in (
        ("won", "solved by the second only"),
        ("lost", "solved by the first only"),
        ("only_first", "not finished in the second"),
        ("only_second", "not finished in the first"),
    ):
        if tasks := getattr(comparison, name):
            more = "" if len(tasks) <= SHOWN else f", and {len(tasks) - SHOWN} more"
            some = clean(", ".join(map(str, tasks[:SHOWN])))
            lines.append(f"{plural(len(tasks), 'task')} {what}: {some}{more}")
    return "\n".join(lines)
