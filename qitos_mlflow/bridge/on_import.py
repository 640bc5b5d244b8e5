"""Turns the bridge on as soon as qitos is imported."""

from __future__ import annotations

from types import ModuleType

from qitos_mlflow import bridge
from qitos_mlflow._after_import import after_import
from qitos_mlflow.tracing import compat


def ensure_bridge() -> None:
    """Trace Engine runs: from now on if qitos is imported, else as soon as it is. Idempotent.

    On hosts without it, `qitos.tracing` can be imported from then on. Any thread; never raises.
    What goes wrong is logged.
    """
    after_import("qitos", install_bridge)


def install_bridge(_qitos: ModuleType) -> None:
    """Serve `qitos.tracing` where the host has none, and wrap the Engine."""
    compat.install()
    bridge.install()
