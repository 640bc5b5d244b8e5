"""Turns what a QitOS Engine does into Trace and Span objects, for the attached processors.

`install` wraps the Engine's entry points, `uninstall` restores the originals. A run that no
processor wants is passed through. Nothing here knows of MLflow.
"""

from __future__ import annotations

from qitos_mlflow.bridge.instrument import install, installed, uninstall

__all__ = ["install", "installed", "uninstall"]
