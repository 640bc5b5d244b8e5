"""Links traces to the prompts that were loaded in them.

The trace's tag shows them on its page; by the link, a prompt's page finds the trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from qitos_mlflow.mlflow_plugin.mapping.entities import PromptRef
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.server.transport import NotThere, Poisoned, Refused, Transport
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState


def link_prompts(
    transport: Transport, trace: TraceState, prompts: Sequence[PromptRef], timeout_s: float
) -> None:
    """Link a trace that is on the server. A server that cannot do it has the tag."""
    if trace.has_info:
        with suppress(NotThere, Poisoned, Refused):
            transport.link_prompts(trace_id(trace.facts.trace_id), prompts, timeout_s)
