"""Turns what a QitOS Engine does into Trace and Span objects, for whatever processors listen.

`install` wraps the Engine's entry points, `uninstall` restores the very originals. In between a
run without a listening processor is handed through. Knows nothing of MLflow.
"""

from __future__ import annotations

from qitos_mlflow.bridge.instrument import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
