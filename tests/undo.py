"""Undoes in a process what the package never undoes by itself. For tests; scripts of theirs too."""

from __future__ import annotations

import sys

from qitos_mlflow import bridge, tracing, wiring
from qitos_mlflow.tracing import compat


def deactivate() -> None:
    """Detach our processors, unwrap the Engine, and stop serving `qitos.tracing`."""
    wiring.autolog(disable=True)
    if wiring._adapter is not None:
        tracing.remove_trace_processor(wiring._adapter)
        wiring._adapter = None
    bridge.uninstall()
    stop_serving()


def stop_serving() -> None:
    """Stop serving `qitos.tracing`. Modules that were served stay with those who imported them."""
    sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "serves_qitos_tracing", False)]
    for name in [*compat.SERVED, compat.PROCESSOR_MODULE]:
        if getattr(sys.modules.get(name), "__qitos_mlflow__", False):
            del sys.modules[name]
    host = sys.modules.get("qitos")
    if getattr(getattr(host, "tracing", None), "__qitos_mlflow__", False):
        del host.tracing  # type: ignore[union-attr]
