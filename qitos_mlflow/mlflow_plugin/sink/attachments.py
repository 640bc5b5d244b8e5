"""Attachments of traces on one server: where they go, and what spans say if it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow.mlflow_plugin.mapping.attachments import Attachment, inlined
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.shorter import texts_in
from qitos_mlflow.mlflow_plugin.server.transport import Transport
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState


class Attachments:
    """The attachments of one server. Used by one thread."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._supported: bool | None = None
        self._places: tuple[str, str] = ("", "")

    def fit(self, trace: TraceState, spans: Sequence[Span], timeout_s: float) -> Sequence[Span]:
        """The spans, without attachments if the server has none."""
        if trace.pictures and not self._are_supported(timeout_s):
            return [_without(span, trace) for span in spans]
        return spans

    def write(self, trace: TraceState, run: RunRef, file: Any, timeout_s: float) -> None:
        """Write a file of the run, or an attachment of the trace."""
        if not isinstance(file, Attachment):
            path, content = file
            self._transport.write_artifact(run, path, content, timeout_s)
        elif self._are_supported(timeout_s) and not trace.untraced:
            own = trace_id(trace.facts.trace_id)
            if self._places[0] != own:
                self._places = own, self._transport.artifacts_of_trace(own, timeout_s)
            of_trace = replace(run, artifact_uri=self._places[1])
            self._transport.write_artifact(of_trace, file.path, file.content, timeout_s)

    def _are_supported(self, timeout_s: float) -> bool:
        if self._supported is None:
            self._supported = self._transport.has_attachments(timeout_s)
        return self._supported


def _without(span: Span, trace: TraceState) -> Span:
    known = {one.id: one for one in trace.waiting.artifacts if isinstance(one, Attachment)}
    copy = Span()
    copy.CopyFrom(span)
    for text in texts_in(one.value for one in copy.attributes):
        text.string_value = inlined(text.string_value, known)
    return copy
