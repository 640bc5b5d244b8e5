"""QitOS's own evaluations (`qitos.evaluate`, `qitos.metric`), logged by themselves.

What a suite or an evaluator of a benchmark says of a run becomes scores of the run's trace. What
metrics say of many runs becomes metrics of their parent run. Wraps what the host has of these. Runs
that this process has not logged are passed over, and so are metrics outside of any run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow.bridge import results
from qitos_mlflow.bridge.live import is_wanted
from qitos_mlflow.bridge.patches import wrap
from qitos_mlflow.mlflow_plugin.destination import Destination, tracking_uri
from qitos_mlflow.mlflow_plugin.evaluations import current as current_evaluation
from qitos_mlflow.mlflow_plugin.evaluations import evaluation
from qitos_mlflow.mlflow_plugin.feedback import logged, offer, score, settings_here
from qitos_mlflow.mlflow_plugin.fluent.carried import current
from qitos_mlflow.mlflow_plugin.fluent.surroundings import surroundings

MAX_RESULTS = 100
"""Evaluators of one suite, or numbers of one registry, that are logged."""

_in_suite: ContextVar[bool] = ContextVar("qitos_mlflow_in_suite", default=False)


def wrap_evaluators(module: ModuleType) -> None:
    """Put our wrappers around what one of the host's modules has of these: log what they say."""
    if module.__name__ == "qitos.evaluate.base":
        wrap(module.EvaluationSuite, "evaluate", _evaluate_all)
    elif module.__name__ == "qitos.metric.base":
        wrap(module.MetricRegistry, "compute_all", _compute_all)
    else:
        for name in module.__all__:
            wrap(getattr(module, name), "evaluate", _evaluate)


def _evaluate_all(
    wrapped: Callable[..., Any], suite: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``EvaluationSuite.evaluate``."""
    before = _in_suite.get()
    _in_suite.set(True)
    try:
        verdict = wrapped(*args, **kwargs)
    finally:
        _in_suite.set(before)
    with shield("evaluators.suite"):
        evaluators = zip(suite.evaluators, verdict.results, strict=False)
        _log(args, kwargs, [*islice(evaluators, MAX_RESULTS), (None, verdict)])
    return verdict


def _evaluate(
    wrapped: Callable[..., Any], evaluator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``evaluate`` of one of the host's evaluators, called by itself."""
    verdict = wrapped(*args, **kwargs)
    if not _in_suite.get():
        with shield("evaluators.evaluator"):
            _log(args, kwargs, [(evaluator, verdict)])
    return verdict


def _log(args: tuple[Any, ...], kwargs: dict[str, Any], verdicts: list[tuple[Any, Any]]) -> None:
    trace_id = _trace_of(args[0] if args else kwargs.get("context"))
    if trace_id is None or not logged(trace_id):
        return
    for evaluator, verdict in verdicts:
        with shield("evaluators.verdict"):  # Such as NaN; the others are logged.
            judge = getattr(evaluator, "llm", None) is not None
            name = str(getattr(verdict, "name", "evaluation"))
            more: Any = {
                "source": name,
                "source_type": "LLM_JUDGE" if judge else "CODE",
                "rationale": "; ".join(map(str, getattr(verdict, "reasons", ()))) or None,
            }
            # MLflow's pages leave out what is before the last slash of a name.
            score(trace_id, f"{name}_success", bool(verdict.success), **more)
            score(trace_id, f"{name}_score", float(verdict.score), **more)


def _trace_of(context: Any) -> str | None:
    """QitOS's id of the trace that an evaluation is about; None if it is not known."""
    if (found := results.trace_of(getattr(context, "run", None))) is not None:
        return found
    run_dir, manifest = getattr(context, "run_dir", None), getattr(context, "manifest", None)
    run_id = manifest.get("run_id") if isinstance(manifest, dict) else None
    known = (results.trace_of_run(str(one)) for one in (run_id, Path(run_dir or "").name) if one)
    return next(filter(None, known), None)


def _compute_all(
    wrapped: Callable[..., Any], registry: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``MetricRegistry.compute_all``."""
    reports = wrapped(*args, **kwargs)
    with shield("evaluators.metrics"):
        if is_wanted():
            numbers = dict(islice(_numbers(reports), MAX_RESULTS))
            for record, run in _parents():
                for name, value in numbers.items():
                    record(kind="assessment", type="feedback", name=name, value=value, **run)
    return reports


def _parents() -> Iterator[tuple[Callable[..., Any], dict[str, Any]]]:
    """The runs that an agent's run would be a child of: what records a number, and its fields."""
    around = current_evaluation()
    if isinstance(around, evaluation) and around.owner:
        for logger in around.loggers.values():
            yield logger.record, logger.own
    elif (settings := settings_here()) is not None:
        to, given = Destination.of(tracking_uri(settings)), current.get()
        found = surroundings(to.uri, (given and given.parent_run_id) or settings.parent_run_id)
        if run_id := found.parent_run_id or found.inherited_run_id:
            # No trace has this id: the run is all that it is about.
            yield partial(offer, settings, to), {"trace_id": f"run {run_id}", "run_id": run_id}


def _numbers(reports: Any) -> Iterator[tuple[str, Any]]:
    """The numbers of metrics' reports, by their names; of a dict, each of its numbers."""
    for report in reports:
        value = report.value
        named = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, one in named:
            if isinstance(one, (bool, int, float)):
                yield str(report.name) if key is None else f"{report.name}/{key}", one
