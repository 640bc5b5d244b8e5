"""QitOS's own evaluations (`qitos.evaluate`, `qitos.metric`), logged by themselves.

What a suite says of a run becomes scores of its trace. What metrics say of many runs becomes
metrics of the run that these are children of. Wrapped by what the host has. Runs that this process
has not logged are passed over, and so are metrics outside of any run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qitos_mlflow._after_import import after_import
from qitos_mlflow._guard import shield
from qitos_mlflow.bridge import results
from qitos_mlflow.bridge.live import is_wanted
from qitos_mlflow.bridge.patches import wrap
from qitos_mlflow.mlflow_plugin.destination import Destination, tracking_uri
from qitos_mlflow.mlflow_plugin.feedback import later_ns, logged, offer, score, settings_here
from qitos_mlflow.mlflow_plugin.fluent.carried import current
from qitos_mlflow.mlflow_plugin.fluent.surroundings import surroundings

MAX_RESULTS = 100
"""Evaluators of one suite, or numbers of one registry, that are logged."""


@functools.cache
def watch_evaluators() -> None:
    """Log what evaluations say, from now on, or as soon as the host has them. Once."""
    after_import("qitos.evaluate.base", _wrap_suite)
    after_import("qitos.metric.base", _wrap_registry)


def _wrap_suite(module: ModuleType) -> None:
    wrap(module.EvaluationSuite, "evaluate", _evaluate)


def _wrap_registry(module: ModuleType) -> None:
    wrap(module.MetricRegistry, "compute_all", _compute_all)


def _evaluate(
    wrapped: Callable[..., Any], suite: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``EvaluationSuite.evaluate``."""
    verdict = wrapped(*args, **kwargs)
    with shield("evaluators.evaluate"):
        trace_id = _trace_of(args[0] if args else kwargs.get("context"))
        if trace_id is not None and logged(trace_id):
            for one in verdict.results[:MAX_RESULTS]:
                _log(trace_id, str(one.name), one, "; ".join(map(str, one.reasons)))
            _log(trace_id, "evaluation", verdict, None)
    return verdict


def _trace_of(context: Any) -> str | None:
    """QitOS's id of the trace that an evaluation is about; None if it is not known."""
    if (found := results.trace_of(getattr(context, "run", None))) is not None:
        return found
    run_dir, manifest = getattr(context, "run_dir", None), getattr(context, "manifest", None)
    run_id = manifest.get("run_id") if isinstance(manifest, dict) else None
    known = (results.trace_of_run(str(one)) for one in (run_id, Path(run_dir or "").name) if one)
    return next(filter(None, known), None)


def _log(trace_id: str, name: str, verdict: Any, rationale: str | None) -> None:
    score(trace_id, f"{name}/success", bool(verdict.success), rationale=rationale, source=name)
    score(trace_id, f"{name}/score", float(verdict.score), rationale=rationale, source=name)


def _compute_all(
    wrapped: Callable[..., Any], registry: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``MetricRegistry.compute_all``."""
    reports = wrapped(*args, **kwargs)
    with shield("evaluators.metrics"):
        if is_wanted():
            given, settings = current.get(), settings_here()
            to = Destination.of(tracking_uri(settings))
            around = surroundings(to.uri, (given and given.parent_run_id) or settings.parent_run_id)
            run_id = around.parent_run_id or around.inherited_run_id
            for name, value in list(_numbers(reports))[: MAX_RESULTS if run_id else 0]:
                # No trace has this id: the run is all that it is about.
                about = {"trace_id": f"run {run_id}", "run_id": run_id, "type": "feedback"}
                said = {"name": name, "value": value, "time_ns": later_ns()}
                offer(settings, to, {"kind": "assessment", **about, **said})
    return reports


def _numbers(reports: Any) -> Iterator[tuple[str, Any]]:
    """The numbers of metrics' reports, by their names; of a dict, each of its numbers."""
    for report in reports:
        value = report.value
        named = value.items() if isinstance(value, Mapping) else [(None, value)]
        for key, one in named:
            if isinstance(one, (bool, int, float)):
                yield str(report.name) if key is None else f"{report.name}/{key}", one
