"""QitOS agent runs in MLflow. Public names load on first use: importing this costs next to nothing.

`MlflowTraceProcessor` logs traces when registered by hand; `autolog` turns logging on for every
run; `context` says who and what the agents in a block are for; `evaluation` puts the runs of many
tasks together; `score` and `expect` say afterwards how a run was; `Settings` holds what can be set.
See README.md for the other ways in.
"""

# Where Python reads `qitos_mlflow.start` (3.15 and later) every process runs this file (see
# `_startup`), so it imports nothing: `typing` alone takes 10 ms. Type checkers know this name for
# what it means.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from typing import Any

    from qitos_mlflow.mlflow_plugin.evaluations import evaluation as evaluation
    from qitos_mlflow.mlflow_plugin.feedback import expect as expect
    from qitos_mlflow.mlflow_plugin.feedback import score as score
    from qitos_mlflow.mlflow_plugin.fluent.context import context as context
    from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor as MlflowTraceProcessor
    from qitos_mlflow.settings import Settings as Settings
    from qitos_mlflow.wiring import autolog as autolog

    __version__: str

_HOMES = {
    "MlflowTraceProcessor": "qitos_mlflow.mlflow_plugin.processor",
    "Settings": "qitos_mlflow.settings",
    "autolog": "qitos_mlflow.wiring",
    "context": "qitos_mlflow.mlflow_plugin.fluent.context",
    "evaluation": "qitos_mlflow.mlflow_plugin.evaluations",
    "expect": "qitos_mlflow.mlflow_plugin.feedback",
    "score": "qitos_mlflow.mlflow_plugin.feedback",
}

__all__ = [
    "MlflowTraceProcessor",
    "Settings",
    "__version__",
    "autolog",
    "context",
    "evaluation",
    "expect",
    "score",
]


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("qitos-mlflow")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> "list[str]":
    return sorted(__all__)
