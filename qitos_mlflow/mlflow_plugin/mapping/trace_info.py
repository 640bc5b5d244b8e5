"""A trace's info as MLflow's JSON (TraceInfoV3), from what its fold knows. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.feedback import rfc3339
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text

if TYPE_CHECKING:
    from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree

_STATES = {"FINISHED": "OK", "FAILED": "ERROR", "KILLED": "ERROR"}


def trace_info(fold: SpanTree) -> dict[str, Any]:
    """The info as it stands; `locate` says where it belongs."""
    metadata = dict(fold.metadata)
    if fold.request:
        metadata["mlflow.traceInputs"] = fold.request
    if fold.response and fold.ended_ns is not None:
        metadata["mlflow.traceOutputs"] = fold.response
    if fold.usage:
        metadata["mlflow.trace.tokenUsage"] = orjson.dumps(fold.usage).decode()
    info: dict[str, Any] = {
        "trace_id": trace_id(fold.id),
        "client_request_id": clean_text(fold.id, limits.CLIENT_REQUEST_CHARS),
        "request_time": rfc3339(fold.start_ns),
        "state": "IN_PROGRESS" if fold.ended_ns is None else _STATES.get(fold.status, "ERROR"),
        "trace_metadata": metadata,
        "tags": dict(fold.tags),
    }
    if fold.request:
        info["request_preview"] = fold.request
    if fold.ended_ns is not None:
        info["execution_duration"] = f"{max(0, fold.ended_ns - fold.start_ns) / 1e9:.3f}s"
        if fold.response:
            info["response_preview"] = fold.response
    if fold.assessments:
        info["assessments"] = fold.assessments
    return info


def locate(info: Mapping[str, Any], experiment_id: str, run_id: str | None) -> dict[str, Any]:
    """`info` completed for ``POST /api/3.0/mlflow/traces``.

    Args:
        info: what `SpanTree.info` returned.
        experiment_id: where the trace belongs.
        run_id: the run it is linked to, None for none.
    """
    experiment = {"experiment_id": experiment_id}
    metadata = dict(info["trace_metadata"])
    if run_id:
        metadata["mlflow.sourceRun"] = run_id
    return {
        **info,
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": experiment},
        "trace_metadata": metadata,
    }
