"""Turns what a QitOS Engine does into Trace and Span objects, for the attached processors.

This module wraps the Engine's entry points; `calls` has what happens around each call, and is
imported by the first one, because `import qitos` is not to pay for it. A run that no processor
wants is passed through. Nothing here knows of MLflow.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

from qitos_mlflow._after_import import after_import, imported
from qitos_mlflow.bridge.patches import wrap
from qitos_mlflow.tracing.compat import install as serve_tracing

installed = False
"""Whether Engines are being traced."""
_lock = threading.Lock()

CALLS = "qitos_mlflow.bridge.calls"


def ensure_bridge() -> None:
    """Trace Engine runs: from now on if qitos is imported, else as soon as it is. Idempotent.

    On hosts without it, `qitos.tracing` can be imported from then on. Any thread; never raises.
    What goes wrong is logged.
    """
    after_import("qitos", _serve_and_install)


def _serve_and_install(_qitos: ModuleType) -> None:
    serve_tracing()
    install()


def install() -> None:
    """Trace every Engine of this process, existing ones included. Idempotent.

    Imports the host's Engine. Its tools stay as they are until the first run that a processor
    wants: a wrapper costs about a microsecond a call.

    Raises:
        ImportError: QitOS is not installed, or has no Engine.
    """
    global installed
    module = importlib.import_module("qitos.engine.engine")
    engine_class = getattr(module, "Engine", None)
    if engine_class is None:
        raise ImportError("qitos.engine.engine has no Engine", name="qitos.engine.engine")
    with _lock:
        if installed:
            return
        wrap(engine_class, "run", _first_importing("run"))
        if hasattr(engine_class, "init_session") and hasattr(engine_class, "step"):
            wrap(engine_class, "init_session", _first_importing("init_session"))
            wrap(engine_class, "step", _first_importing("step"))
        installed = True


def _first_importing(name: str) -> Callable[..., Any]:
    """The function of that name in `calls`."""

    def call(
        wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        calls = imported(CALLS) or _import_calls()
        if calls is None:
            return wrapped(*args, **kwargs)
        return getattr(calls, name)(wrapped, engine, args, kwargs)

    return call


def _import_calls() -> ModuleType | None:
    """Import `calls`, on the thread of the first run. None, with one warning, if that fails."""
    try:
        from qitos_mlflow._forks import importing

        with importing():
            return importlib.import_module(CALLS)
    except BaseException as error:  # noqa: BLE001 - the agent runs without a trace
        from qitos_mlflow import _guard

        _guard.contain("bridge.import", error)
        return None
