"""How a trace ended, as the status of its MLflow run. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow._stop_reasons import ERROR_STOPS


def run_status(metadata: Mapping[str, Any], failure: BaseException | None) -> str:
    """MLflow's run status for how the trace ended: FINISHED, FAILED or KILLED."""
    # Anybody writes the metadata: what is no text may not even be comparable.
    status, reason = (
        value if isinstance(value, str) else None
        for value in (metadata.get("status"), metadata.get("stop_reason"))
    )
    if status == "interrupted":
        return "KILLED"
    if failure is not None:
        return "FAILED" if isinstance(failure, Exception) else "KILLED"
    if status == "error" or reason in ERROR_STOPS:
        return "FAILED"
    return "FINISHED"
