"""What is watched from `import qitos` on, before any trace: threads, evaluations, benchmarks.

What is not needed before something is seen is imported then.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

from qitos_mlflow._after_import import after_import
from qitos_mlflow._forks import importing
from qitos_mlflow.mlflow_plugin.fluent import origins

EVALUATORS = ("qitos.evaluate.base", "qitos.kit.evaluate", "qitos.metric.base")
"""Modules of the host that `evaluators` wraps."""

BENCHMARKS = (
    *("qitos.benchmark.runner", "qitos.benchmark.common"),
    *("qitos.recipes.benchmarks._shared", "qitos.experiment.runner"),
)
"""Those that `benchmarks` wraps."""


@cache
def watch() -> None:
    """Have threads and processes know where they come from, and log evaluations. Once."""
    origins.watch()
    for name in EVALUATORS:
        after_import(name, _wrap_evaluators)
    for name in BENCHMARKS:
        after_import(name, _wrap_benchmarks)


def _wrap_evaluators(module: ModuleType) -> None:
    with importing():
        from qitos_mlflow.mlflow_plugin import evaluators
    evaluators.wrap_evaluators(module)


def _wrap_benchmarks(module: ModuleType) -> None:
    with importing():
        from qitos_mlflow.mlflow_plugin import benchmarks
    benchmarks.wrap_runners(module)
