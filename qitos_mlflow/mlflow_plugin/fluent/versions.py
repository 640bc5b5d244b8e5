"""The versions that MLflow knows of what runs here: its active model, and prompts that are loaded.

Of this process only: nothing here connects to a server or imports mlflow.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any
from weakref import WeakValueDictionary

from qitos_mlflow._after_import import after_import
from qitos_mlflow._guard import shield
from qitos_mlflow.mlflow_plugin.fluent.origins import mlflow_in_use
from qitos_mlflow.mlflow_plugin.mapping.entities import PromptRef

MODEL_VARIABLES = ("MLFLOW_ACTIVE_MODEL_ID", "_MLFLOW_ACTIVE_MODEL_ID")
"""Name the active model of a process in which `mlflow.set_active_model` was not called."""

MAX_PROMPTS = 100
"""Prompts that are kept of one trace."""

WATCHED = "_qitos_mlflow_prompts"
"""Attribute of what replaces `MlflowClient.load_prompt`."""

current_trace: ContextVar[str | None] = ContextVar("qitos_mlflow_trace", default=None)
"""QitOS's id of the trace in which this thread or task works."""


class Prompts(dict[PromptRef, None]):
    """The prompts of one trace, in the order in which they were loaded."""


_loaded: WeakValueDictionary[str, Prompts] = WeakValueDictionary()
"""The prompts of each trace that `prompts_of` was asked for, while its caller keeps them."""


def active_model() -> str | None:
    """MLflow's id of the active model, which is on MLflow's own server; None if there is none."""
    with shield("versions.active_model"):
        if (fluent := mlflow_in_use()) is not None:
            found = fluent._get_active_model_id_global()
            return str(found) if found else None
        return next(filter(None, map(os.environ.get, MODEL_VARIABLES)), None)
    return None


def prompts_of(qitos_trace_id: str) -> Prompts:
    """The prompts that are loaded in a trace, from now on and for as long as this is kept."""
    return _loaded.setdefault(qitos_trace_id, Prompts())


def watch_prompts() -> None:
    """Note from now on which prompts are loaded. Once; any thread.

    MLflow's own tracer notes them only in spans that it records itself.
    """
    after_import("mlflow.tracking.client", _wrap_client)


def _wrap_client(module: Any) -> None:
    load: Callable[..., Any] = module.MlflowClient.load_prompt
    if hasattr(load, WATCHED):
        return

    @functools.wraps(load)
    def noting_load(*args: Any, **kwargs: Any) -> Any:
        prompt = load(*args, **kwargs)
        with shield("versions.load_prompt"):
            _note(prompt)
        return prompt

    setattr(noting_load, WATCHED, True)
    module.MlflowClient.load_prompt = noting_load


def _note(prompt: Any) -> None:
    known = _loaded.get(current_trace.get() or "")
    if known is not None and prompt is not None and len(known) < MAX_PROMPTS:
        known[PromptRef(str(prompt.name), str(prompt.version))] = None
