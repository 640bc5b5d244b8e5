"""`qitos-mlflow compare`: two or more evaluations of the same tasks, with intervals and tests.

Receives ids of runs or experiments, reads their children from the server as the sink does, within
the same limits, and prints what `comparison` computes of them. Writes to the server only with
``--log``. Only a local store takes mlflow.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

import click

from qitos_mlflow._texts import clean
from qitos_mlflow.cli._endings import ends_on_signals
from qitos_mlflow.cli._options import tracking_uri
from qitos_mlflow.cli._show import echo, echo_json, in_plain, plural, row, table
from qitos_mlflow.errors import QitosMlflowError

if TYPE_CHECKING:
    from qitos_mlflow.comparison.runs import Comparison
    from qitos_mlflow.mlflow_plugin.mapping.entities import StoredRun
    from qitos_mlflow.mlflow_plugin.server.transport import Transport

READ_S = 600.0
"""Longest time to read the runs of one evaluation (seconds)."""
TRIES = 4
"""A page of runs is asked for so often. After a failure, the page is half as large."""
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
    with ends_on_signals(lambda: "the comparison is not finished"):
        _compare(tracking_uri, metrics, evaluations, as_json=as_json, log=log)


def _compare(
    tracking_uri: str | None,
    metrics: Sequence[str],
    evaluations: Sequence[str],
    *,
    as_json: bool,
    log: str | None,
) -> None:
    from qitos_mlflow.cli._server import ask
    from qitos_mlflow.comparison.runs import compare
    from qitos_mlflow.delivery import RetryLater
    from qitos_mlflow.mlflow_plugin.destination import tracking_uri as uri_of
    from qitos_mlflow.mlflow_plugin.sink.sink import open_transport
    from qitos_mlflow.settings import Settings

    uri = uri_of(Settings.resolve(tracking_uri=tracking_uri))
    if (answer := ask(uri, trusted=True)).reachable is False:
        raise QitosMlflowError(f"{answer.uri}: {answer.detail}")
    try:
        with closing(open_transport(uri)) as transport:
            found = [(name, _tasks(transport, name, metrics)) for name in evaluations]
            made = [compare(found[0], other, metrics) for other in found[1:]]
            known = {name for one in made for name in one.metrics}
            if missing := set(metrics) - known:
                raise QitosMlflowError(
                    f"no task has the metric {min(missing)!r} in two evaluations"
                )
            text = json.dumps([one.to_json() for one in made], indent=2, allow_nan=False)
            shown = "\n\n".join(_shown(one) for one in made)
            if as_json:
                echo_json([one.to_json() for one in made])
            else:
                echo(shown, lines=True)
            if log is not None:
                _log(transport, log, {"comparison.json": text, "comparison.txt": shown})
    except (RetryLater, UnicodeEncodeError) as error:  # Of a name that is no text.
        raise QitosMlflowError(f"{answer.uri}: {error}") from error


def _tasks(transport: Transport, evaluation: str, metrics: Sequence[str]) -> list[StoredRun]:
    """The runs of an evaluation's tasks.

    Raises:
        QitosMlflowError: there is no such run or experiment, or it has no runs of tasks.
    """
    from qitos_mlflow.mlflow_plugin.mapping.trace_facts import EVALUATION_TAG
    from qitos_mlflow.mlflow_plugin.sink.children import below

    run = transport.stored_run(evaluation, _timeout_s(transport))
    wanted = below(run.ref.run_id) if run else ""
    place = run.ref.experiment_id if run else None
    place = place or transport.find_experiment(evaluation, _timeout_s(transport))
    if place is None:
        raise QitosMlflowError(f"no run and no experiment {evaluation!r}")
    runs = _read(transport, place, wanted, metrics)
    # An evaluation's own run is no task of it.
    found = [run for run in runs if "qitos.trace_id" in run.tags and EVALUATION_TAG not in run.tags]
    if not found:
        raise QitosMlflowError(f"{evaluation!r} has no runs of agents to compare")
    return found


def _read(
    transport: Transport, experiment_id: str, wanted: str, metrics: Sequence[str]
) -> list[StoredRun]:
    """All runs of an experiment that the filter wants, with what is compared of them."""
    from qitos_mlflow.comparison.runs import SERIES
    from qitos_mlflow.mlflow_plugin.mapping.evaluation_totals import READ_TAGS
    from qitos_mlflow.mlflow_plugin.mapping.trace_facts import EVALUATION_TAG
    from qitos_mlflow.mlflow_plugin.server.transport import Oversized, Unanswered
    from qitos_mlflow.mlflow_plugin.sink.children import Children, Reading, left_s

    def kept(run: StoredRun) -> StoredRun:
        tags = {tag: run.params[name] for name, tag in OF_PARAMS.items() if name in run.params}
        tags |= {tag: run.tags[tag] for tag in (*READ_TAGS, EVALUATION_TAG) if tag in run.tags}
        numbers = {
            name: value
            for name, value in run.metrics.items()
            if name in metrics or not name.startswith(SERIES)
        }
        return replace(run, metrics=numbers, tags=tags, metric_times={}, params={})

    children, reading, failures = Children(transport), Reading(), 0
    deadline = time.monotonic() + READ_S
    while reading.token is not None:
        timeout_s = min(_timeout_s(transport), left_s(deadline))
        try:
            children.read(reading, wanted, [experiment_id], timeout_s, kept)
            failures = 0
        except (Oversized, Unanswered):  # The next page is a smaller one.
            failures += 1
            if failures == TRIES:
                raise
    return list(reading.runs.values())


def _log(transport: Transport, run_id: str, files: Mapping[str, str]) -> None:
    run = transport.stored_run(run_id, _timeout_s(transport))
    if run is None:
        raise QitosMlflowError(f"no run {run_id!r} to log the comparison to")
    for name, text in files.items():
        transport.write_artifact(run.ref, name, text.encode(), _timeout_s(transport))


def _timeout_s(transport: Transport) -> float:
    from qitos_mlflow.mlflow_plugin.server.http import REQUEST_TIMEOUT_S

    return REQUEST_TIMEOUT_S * transport.patience


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
