"""Links: runs to traces of MLflow's own tracer, and traces to the prompts that they have loaded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping.entities import PromptRef
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.server.transport import NotThere, Poisoned, Refused, Transport
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


def link_prompts(
    transport: Transport, trace: TraceState, prompts: Sequence[PromptRef], timeout_s: float
) -> None:
    """Have a prompt's page find the trace. The trace's own page shows the prompts by its tag."""
    if trace.has_info:
        with suppress(NotThere, Poisoned, Refused):  # A server that has no such links.
            transport.link_prompts(trace_id(trace.facts.trace_id), prompts, timeout_s)
