"""What a trace's records add to its run and its tree, for tests of the mapping."""

from __future__ import annotations

from typing import Any

import orjson

from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState


def new_state(
    settings: dict[str, Any] | None = None, *, trace_id: str = "trace-1", late: bool = False
) -> TraceState:
    """The state of a trace before its first record, on a server that stores traces."""
    return TraceState.begin(trace_id, settings or {}, tree=True, late=late, resumed=False)


def fold(*records: dict[str, Any], state: TraceState | None = None) -> TraceState:
    """The state after the records, with all that waits; it goes through JSON after each record."""
    state = state or new_state(trace_id=records[0]["trace_id"])
    for record in records:
        waiting = state.waiting
        state = TraceState.from_json(orjson.loads(orjson.dumps(state.to_json())))
        state.waiting = waiting
        state.take(record, b"")
    return state


def info_of(state: TraceState) -> dict[str, Any]:
    """The info of the trace as it stands."""
    assert state.tree is not None
    return state.tree.info()


def last(state: TraceState) -> dict[str, float]:
    """The last value of each metric that waits."""
    return {metric.key: metric.value for metric in state.waiting.metrics}
