"""Links the run of an agent to the trace of MLflow's own tracer that has the agent's spans."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qitos_mlflow.mlflow_plugin.server.transport import Refused, Transport
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState


def link_trace(
    transport: Transport, trace: TraceState, items: Sequence[Any], timeout_s: float
) -> None:
    """Make the run's page show the trace with this id. Twice is as once."""
    assert trace.run is not None
    try:
        transport.link_traces(trace.run.run_id, items, timeout_s)
    except Refused as refusal:
        if refusal.code != "NOT_IMPLEMENTED":  # A file store has no links.
            raise
