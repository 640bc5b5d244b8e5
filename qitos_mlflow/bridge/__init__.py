"""Turns what a QitOS Engine does into Trace and Span objects, for the attached processors.

This module wraps the Engine's entry points; `calls` has what happens around each call. A run that
no processor wants is passed through. Nothing here knows of MLflow.
"""

from __future__ import annotations

import importlib
import threading
from types import ModuleType

from qitos_mlflow._after_import import after_import
from qitos_mlflow.bridge import calls
from qitos_mlflow.bridge.patches import wrap
from qitos_mlflow.tracing import compat

installed = False
"""Whether Engines are being traced."""
_lock = threading.Lock()


def ensure_bridge() -> None:
    """Trace Engine runs: from now on if qitos is imported, else as soon as it is. Idempotent.

    On hosts without it, `qitos.tracing` can be imported from then on. Any thread; never raises.
    What goes wrong is logged.
    """
    after_import("qitos", _serve_and_install)


def _serve_and_install(_qitos: ModuleType) -> None:
    compat.install()
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
        wrap(engine_class, "run", calls.run)
        if hasattr(engine_class, "init_session") and hasattr(engine_class, "step"):
            wrap(engine_class, "init_session", calls.init_session)
            wrap(engine_class, "step", calls.step)
        installed = True
