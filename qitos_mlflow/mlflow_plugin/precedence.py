"""Which of several MLflow plugins logs a run, so that it is logged once, and only if wanted."""

from __future__ import annotations

import logging
import os
from enum import IntEnum

from qitos_mlflow import tracing
from qitos_mlflow._guard import log
from qitos_mlflow.plugins.selection import named
from qitos_mlflow.settings import TRACKING_VARIABLE, Settings


class Origin(IntEnum):
    """How a plugin was registered. A plugin logs nothing if there is one of a higher value."""

    INSTALLED = 0
    AUTOLOG = 1
    BY_HAND = 2


def stands_down(origin: Origin, settings: Settings, said: set[str]) -> bool:
    """Whether a plugin must not log a run that starts now. Costs microseconds.

    Another plugin with a higher `Origin` logs it, or the host's own processor does. A plugin that
    is only installed also needs a destination. Each reason is logged once.

    Args:
        origin: how the plugin was registered.
        settings: the plugin's.
        said: what has been logged; added to.
    """
    if origin is Origin.BY_HAND:
        return False
    for processor in tracing.processors():
        plugin = getattr(processor, "mlflow_plugin", None)
        if plugin is not None and plugin.origin > origin:
            return True
        theirs = None if plugin is not None else _hosts_own(type(processor))
        if theirs is not None:
            _say_once(
                said,
                logging.WARNING,
                "this package logs nothing, because the host's own %s.MlflowTraceProcessor is "
                "registered. To use this package, remove that processor, or register "
                "qitos_mlflow.MlflowTraceProcessor in its place.",
                theirs.__module__,
            )
            return True
    if origin is Origin.AUTOLOG or settings.tracking_uri:
        return False
    if os.environ.get(TRACKING_VARIABLE) or named("mlflow"):
        return False
    _say_once(
        said,
        logging.INFO,
        "QitOS runs are not logged to MLflow: no destination is set. Set MLFLOW_TRACKING_URI, "
        "or QITOS_TRACE_PLUGINS=mlflow for MLflow's local store.",
    )
    return True


def _hosts_own(kind: type) -> type | None:
    """The host's own MLflow processor, if `kind` is that or a subclass of it."""
    return next((base for base in kind.__mro__ if base.__name__ == "MlflowTraceProcessor"), None)


def _say_once(said: set[str], level: int, message: str, *args: object) -> None:
    if message not in said:
        said.add(message)
        log(level, message, *args)
