"""A trace's info as MLflow's JSON (TraceInfoV3), from its tree. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.feedback import rfc3339
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text
from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree

_STATES = {"FINISHED": "OK", "FAILED": "ERROR", "KILLED": "ERROR"}


def trace_info(tree: SpanTree) -> dict[str, Any]:
    """The info as it stands; `locate` says where it belongs.

    Its assessments have ids of their own, so that each is on the server once. Totals are always
    explicit: the server stops adding up by itself once it has an info (see `sink.trace_cost`).
    """
    facts = tree.facts
    metadata, tags = dict(tree.metadata), facts.trace_tags
    if facts.started:
        tags["mlflow.traceName"] = clean_text(facts.name or "trace", limits.KEY_CHARS)
    info: dict[str, Any] = {
        "trace_id": trace_id(facts.trace_id),
        "client_request_id": clean_text(facts.trace_id, limits.CLIENT_REQUEST_CHARS),
        "request_time": rfc3339(tree.start_ns),
        "state": _STATES.get(facts.status, "ERROR") if facts.ended else "IN_PROGRESS",
        "trace_metadata": metadata,
        "tags": tags,
    }
    if tree.request:
        metadata["mlflow.traceInputs"] = info["request_preview"] = tree.request
    if facts.ended_ns is not None:
        info["execution_duration"] = f"{max(0, facts.ended_ns - tree.start_ns) / 1e9:.3f}s"
        if tree.response:
            metadata["mlflow.traceOutputs"] = info["response_preview"] = tree.response
    if tree.usage:
        metadata["mlflow.trace.tokenUsage"] = orjson.dumps(tree.usage).decode()
    if tree.assessments:
        info["assessments"] = list(tree.assessments)
    return info


def locate(info: Mapping[str, Any], experiment_id: str, run_id: str) -> dict[str, Any]:
    """`info` completed for ``POST /api/3.0/mlflow/traces``: in its experiment, linked to its run.

    Args:
        info: what `trace_info` returned; it stays as it is.
        experiment_id: MLflow's id.
        run_id: MLflow's id.
    """
    experiment = {"experiment_id": experiment_id}
    return {
        **info,
        "trace_location": {"type": "MLFLOW_EXPERIMENT", "mlflow_experiment": experiment},
        "trace_metadata": {**info["trace_metadata"], "mlflow.sourceRun": run_id},
    }
