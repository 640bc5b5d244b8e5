"""QitOS's own evaluations of a run (`qitos.evaluate`), logged as scores of its trace.

Wrapped by what the host has. A run that this process has not logged is passed over.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from qitos_mlflow._after_import import after_import
from qitos_mlflow._guard import shield
from qitos_mlflow.bridge import results
from qitos_mlflow.bridge.patches import wrap
from qitos_mlflow.mlflow_plugin.feedback import logged, score

MAX_RESULTS = 100
"""Evaluators of one suite whose results are logged."""


@functools.cache
def watch_evaluators() -> None:
    """Log what evaluation suites say, from now on, or as soon as the host has them. Once."""
    after_import("qitos.evaluate.base", _wrap_suite)


def _wrap_suite(module: ModuleType) -> None:
    wrap(module.EvaluationSuite, "evaluate", _evaluate)


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
