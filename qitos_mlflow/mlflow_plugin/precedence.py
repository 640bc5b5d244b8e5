"""Which of several MLflow plugins logs a run, so that it is logged once, and only if wanted."""

from __future__ import annotations

import logging
import os
from enum import IntEnum

from qitos_mlflow import tracing
from qitos_mlflow.plugins.selection import Selection
from qitos_mlflow.settings import TRACKING_VARIABLE, Settings


class Origin(IntEnum):
    """How a plugin was registered. A plugin logs nothing if there is one of a higher value."""

    INSTALLED = 0
    AUTOLOG = 1
    BY_HAND = 2


def reason_to_stand_down(origin: Origin, settings: Settings) -> tuple[int, str] | None:
    """Why a plugin must not log a run that starts now, None if it logs it. Costs microseconds.

    Another plugin with a higher `Origin` logs it, or the host's own processor does. A plugin that
    is only installed also needs a destination. The reason is what to log, once: level and message.

    Args:
        origin: how the plugin was registered.
        settings: the plugin's.
    """
    if origin is Origin.BY_HAND:
        return None
    for processor in tracing.processors():
        plugin = getattr(processor, "mlflow_plugin", None)
        if plugin is not None:
            if plugin.origin > origin:
                return logging.DEBUG, "another processor that logs to MLflow takes precedence"
            continue
        for base in type(processor).__mro__:
            if base.__name__ == "MlflowTraceProcessor":
                return logging.WARNING, (
                    "this package logs nothing, because the host's own "
                    f"{base.__module__}.MlflowTraceProcessor is registered. To use this package, "
                    "remove that processor, or register qitos_mlflow.MlflowTraceProcessor in its "
                    "place."
                )
    given = settings.tracking_uri or os.environ.get(TRACKING_VARIABLE)
    if origin is Origin.AUTOLOG or given or Selection.from_environ().asks_for("mlflow"):
        return None
    return logging.INFO, (
        "QitOS runs are not logged to MLflow: no destination is set. Set MLFLOW_TRACKING_URI, "
        "or QITOS_TRACE_PLUGINS=mlflow for MLflow's local store."
    )
