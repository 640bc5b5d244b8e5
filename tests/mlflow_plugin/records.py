"""Records of one trace, as the plugin writes them, for tests of the mapping."""

from __future__ import annotations

from itertools import count
from typing import Any

START_NS = 1_790_000_000_000_000_000
MS = 1_000_000


class Records:
    """Builds records; each span starts 10 ms after the one before and lasts 5 ms."""

    def __init__(self, trace_id: str = "trace-1", start_ns: int = START_NS) -> None:
        self.trace_id = trace_id
        self.start_ns = start_ns
        self._order = count()

    def start(self, name: str = "agent", **fields: Any) -> dict[str, Any]:
        """A trace_start."""
        return {
            "kind": "trace_start",
            "trace_id": self.trace_id,
            "name": name,
            "group_id": None,
            "metadata": {},
            "time_ns": self.start_ns,
            **fields,
        }

    def announced(self, span_id: str = "A", name: str = "solver") -> dict[str, Any]:
        """A span_start of the agent whose run the trace is."""
        return {
            "kind": "span_start",
            "trace_id": self.trace_id,
            "span_id": span_id,
            "parent_id": None,
            "type": "agent",
            "data": {"name": name},
        }

    def span(self, kind: str, *, step: int | None = 0, **fields: Any) -> dict[str, Any]:
        """A span of this type; fields that the record does not have are its data."""
        order = next(self._order)
        began = self.start_ns + order * 10 * MS
        record = {
            "kind": "span",
            "trace_id": self.trace_id,
            "span_id": f"span-{order}",
            "parent_id": None,
            "type": kind,
            "step": step,
            "start_ns": began,
            "end_ns": began + 5 * MS,
            "error": None,
            "exception": None,
            "output": None,
        }
        own = {key: fields.pop(key) for key in list(fields) if key in record}
        return {**record, **own, "data": fields}

    def end(self, status: str = "FINISHED", after_ms: int = 1_000, **fields: Any) -> dict[str, Any]:
        """A trace_end."""
        return {
            "kind": "trace_end",
            "trace_id": self.trace_id,
            "time_ns": self.start_ns + after_ms * MS,
            "metadata": {},
            "status": status,
            "error": None,
            "recorded": 0,
            "dropped": {},
            **fields,
        }
