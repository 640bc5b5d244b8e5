"""Turns what a QitOS Engine does into Trace and Span objects, for the attached processors.

This module wraps the Engine's entry points and restores the originals; `calls` has what happens
around each call. A run that no processor wants is passed through. Nothing here knows of MLflow.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from qitos_mlflow._guard import warn
from qitos_mlflow.bridge import calls
from qitos_mlflow.bridge.calls import patches


def install() -> None:
    """Trace every Engine of this process, existing ones included. Idempotent.

    Imports the host's Engine. Its tools stay as they are until the first run that a processor
    wants: a wrapper costs about a microsecond a call.

    Raises:
        ImportError: QitOS is not installed, or has no Engine.
    """
    module = importlib.import_module("qitos.engine.engine")
    engine_class = getattr(module, "Engine", None)
    if engine_class is None:
        raise ImportError("qitos.engine.engine has no Engine", name="qitos.engine.engine")
    with patches.lock:
        if patches.active:
            return
        patches.wrap(engine_class, "run", calls.run)
        if hasattr(engine_class, "init_session") and hasattr(engine_class, "step"):
            patches.wrap(engine_class, "init_session", calls.init_session)
            patches.wrap(engine_class, "step", calls.step)
        patches.before_first_run = _wrap_tools_and_critics
        patches.active = True


def uninstall() -> None:
    """Put every original back. Open runs are traced to their end. Idempotent."""
    patches.undo()


def installed() -> bool:
    """Whether Engines are being traced."""
    return patches.active


def _wrap_tools_and_critics() -> None:
    executor = getattr(_module("qitos.engine.action_executor"), "ActionExecutor", None)
    if executor is None:
        warn("bridge.tools", "this QitOS has no ActionExecutor; tool calls get no spans")
    else:
        patches.wrap(executor, "_execute_one", calls.execute_one)
        patches.wrap(executor, "_call_tool", calls.call_tool)
    verdict = getattr(_module("qitos.engine.critic_result"), "CriticResult", None)
    if verdict is not None:
        patches.wrap(verdict, "from_dict", calls.critic_result)


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None
