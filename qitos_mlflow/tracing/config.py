"""How much is traced."""

from __future__ import annotations

from enum import Enum

from qitos_mlflow.tracing.redaction import RedactingSpanData as RedactingSpanData


class TracingMode(str, Enum):
    """Everything, structure and numbers without content, or nothing at all."""

    ENABLED = "enabled"
    ENABLED_WITHOUT_DATA = "enabled_without_data"
    DISABLED = "disabled"
