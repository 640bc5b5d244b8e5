"""Processors that keep what they receive, or raise."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from qitos_mlflow import tracing


@dataclass
class Node:
    """One span as it was when it started, and when it ended."""

    span: Any
    trace_id: str
    type: str
    parent_id: str | None
    started_at: str
    ended_at: str | None = None
    error: str | None = None
    exception: BaseException | None = None
    data: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    order: int = -1
    starts: int = 0
    ends: int = 0


class Recorder(tracing.TraceProcessor):
    """Keeps every trace and span; any thread.

    Args:
        log: a list to share with other recorders, for the order among them.
    """

    def __init__(self, log: list[tuple[str, Any]] | None = None) -> None:
        self.events: list[tuple[str, Any]] = [] if log is None else log
        """(event, trace or span), in order."""
        self.started: list[Any] = []
        self.start_metadata: dict[str, dict[str, Any]] = {}
        self.ended: list[Any] = []
        self.nodes: dict[str, Node] = {}
        self.outlives = False
        """Whether an agent of this test runs longer than the span it was started in."""
        self._lock = threading.Lock()
        self._ends = 0

    def on_trace_start(self, trace: Any) -> None:
        with self._lock:
            self.events.append(("trace_start", trace))
            self.started.append(trace)
            self.start_metadata[trace.trace_id] = dict(trace.metadata)

    def on_trace_end(self, trace: Any) -> None:
        with self._lock:
            self.events.append(("trace_end", trace))
            self.ended.append(trace)

    def on_span_start(self, span: Any) -> None:
        with self._lock:
            self.events.append(("span_start", span))
            self._node(span).starts += 1

    def on_span_end(self, span: Any) -> None:
        with self._lock:
            self.events.append(("span_end", span))
            node = self._node(span)
            node.ends += 1
            node.ended_at, node.error = span.ended_at, span.error
            node.exception = getattr(span, "exception", None)
            node.data, node.output = span.data.export(), span.output
            node.order, self._ends = self._ends, self._ends + 1

    def _node(self, span: Any) -> Node:
        if span.span_id not in self.nodes:
            self.nodes[span.span_id] = Node(
                span, span.trace_id, span.data.type, span.parent_span_id, span.started_at
            )
        return self.nodes[span.span_id]

    @property
    def names(self) -> list[str]:
        """The events, in order."""
        return [name for name, _ in self.events]

    def objects(self, event: str) -> list[Any]:
        """What was passed at each event of this name, in order."""
        return [item for name, item in self.events if name == event]

    def of(self, span_type: str, trace_id: str | None = None) -> list[Node]:
        """The spans of a type, in the order they were started."""
        return [
            node
            for node in self.nodes.values()
            if node.type == span_type and trace_id in (None, node.trace_id)
        ]

    def children(self, span_id: str | None, trace_id: str | None = None) -> list[Node]:
        """The spans below one (None: at the top), in the order they were started."""
        return [
            node
            for node in self.nodes.values()
            if node.parent_id == span_id and trace_id in (None, node.trace_id)
        ]

    def tree(self, trace: Any = None) -> list[Any]:
        """The span types as nested lists: ``["agent", [...]]``; of the only trace for None."""
        trace_id = self.only().trace_id if trace is None else trace.trace_id

        def below(span_id: str | None) -> list[Any]:
            found: list[Any] = []
            for node in self.children(span_id, trace_id):
                found.append(node.type)
                if inner := below(node.span.span_id):
                    found.append(inner)
            return found

        return below(None)

    def only(self) -> Any:
        """The one trace there was."""
        assert len(self.started) == 1, self.started
        return self.started[0]

    def check(self) -> None:
        """Every trace and span ended once; children within their parents' times and order."""
        ended = [trace.trace_id for trace in self.ended]
        assert sorted(ended) == sorted(trace.trace_id for trace in self.started)
        for node in self.nodes.values():
            assert (node.starts, node.ends) == (1, 1), (node.type, node.starts, node.ends)
            assert node.ended_at is not None
            assert node.started_at <= node.ended_at
            if node.parent_id is None:
                continue
            parent = self.nodes[node.parent_id]
            assert parent.trace_id == node.trace_id
            assert parent.started_at <= node.started_at, (parent.type, node.type)
            assert parent.ended_at is not None
            if self.outlives:
                continue
            assert node.ended_at <= parent.ended_at, (parent.type, node.type)
            assert node.order < parent.order, (parent.type, node.type)


class Failing(tracing.TraceProcessor):
    """Raises in every method."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_trace_start(self, trace: Any) -> None:
        raise self.error

    def on_trace_end(self, trace: Any) -> None:
        raise self.error

    def on_span_start(self, span: Any) -> None:
        raise self.error

    def on_span_end(self, span: Any) -> None:
        raise self.error

    def shutdown(self) -> None:
        raise self.error

    def force_flush(self) -> bool:
        raise self.error
