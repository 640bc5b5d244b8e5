"""OpenTelemetry's protobuf spans from plain values. Pure.

Attributes are sent as native values (nested lists and maps), as MLflow's own exporter does: JSON
texts store the span's type with quotes in it, and break on MLflow 3.6.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.content_blocks import Encoded, as_text
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_ns, clean_text, encodable

NATIVE_LEVELS = 20
"""Deeper values are sent as JSON text: each level is three of protobuf's, which allows 100."""

SPAN_NAME_CHARS = 1000
"""Longest name of a span (characters). MLflow has no limit; a longer one cannot be read."""


def set_value(target: AnyValue, value: Any, depth: int = NATIVE_LEVELS) -> None:
    """Write `value` (JSON types; others as text) into `target`; None leaves it unset."""
    if isinstance(value, str):  # Most are.
        target.string_value = encodable(value)
    elif isinstance(value, bool):
        target.bool_value = value
    elif isinstance(value, int) and abs(value) <= limits.MAX_INT64:
        target.int_value = value
    elif isinstance(value, float):
        target.double_value = value
    elif isinstance(value, dict) and depth:
        target.kvlist_value.SetInParent()
        _add(target.kvlist_value.values, value, depth - 1)
    elif isinstance(value, (list, tuple)) and depth:
        target.array_value.SetInParent()
        for item in value:
            if type(item) is Encoded:
                target.array_value.MergeFromString(item.messages)
            else:
                set_value(target.array_value.values.add(), item, depth - 1)
    elif value is not None:
        target.string_value = encodable(as_text(value))


def _add(target: Any, values: Mapping[Any, Any], depth: int = NATIVE_LEVELS) -> None:
    for key, value in values.items():
        pair = target.add()
        pair.key = key if type(key) is str and key.isascii() else encodable(str(key))
        if type(value) is str and value.isascii():  # Most are.
            pair.value.string_value = value
        else:
            set_value(pair.value, value, depth)


def encode_messages(messages: list[Any]) -> bytes:
    """Messages of a model call as the bytes of an `ArrayValue`.

    In protobuf, the bytes of two lists one after the other are those of both as one.
    """
    array = ArrayValue()
    for message in messages:
        set_value(array.values.add(), message, NATIVE_LEVELS - 2)  # In a list of an attribute.
    return array.SerializeToString()


def build_span(
    trace: bytes,
    span: bytes,
    parent: bytes | None,
    name: str,
    start_ns: Any,
    end_ns: Any,
    attributes: Mapping[str, Any],
) -> Span:
    """A span. Attributes that are None are left out; if one time is missing, the other stands in.

    Args:
        trace: 16 bytes.
        span: 8 bytes.
        parent: 8 bytes, None for the root. A span cannot be its own parent: MLflow's server
            would never finish adding up its tokens (observed: 100 % CPU for ever).
        name: anything.
        start_ns: nanoseconds since the epoch.
        end_ns: the same; not before the start.
        attributes: JSON values by name.
    """
    start = clean_ns(end_ns if start_ns is None else start_ns)
    message = Span(
        trace_id=trace,
        span_id=span,
        parent_span_id=parent if parent is not None and parent != span else b"",
        name=clean_text(name or "unnamed", SPAN_NAME_CHARS),
        start_time_unix_nano=start,
        end_time_unix_nano=max(start, clean_ns(end_ns)),
    )
    _add(message.attributes, {key: value for key, value in attributes.items() if value is not None})
    return message


def set_status(span: Span, error: str | None, exception: Mapping[str, Any] | None) -> None:
    """OK; or ERROR with its text, and the exception as the event OpenTelemetry has for it."""
    failure = failure_of(error, exception)
    if failure is None:
        span.status.code = Status.STATUS_CODE_OK
        return
    span.status.code = Status.STATUS_CODE_ERROR
    span.status.message, attributes = failure
    event = span.events.add(name="exception", time_unix_nano=span.end_time_unix_nano)
    _add(event.attributes, attributes)


def failure_of(
    error: str | None, exception: Mapping[str, Any] | None
) -> tuple[str, dict[str, str]] | None:
    """The text of a span's status and the attributes of its exception event; None: it is OK."""
    if error is None and not exception:
        return None
    details = exception or {}
    kind, message = details.get("type"), details.get("message")
    if not kind:  # "ValueError: text", as the bridge writes errors
        head, mark, tail = (error or "").partition(": ")
        named = mark and head.isidentifier()
        kind, message = (head, tail) if named else ("Error", error or message)
    text = error or (f"{kind}: {message}" if message else str(kind))
    return clean_text(text, limits.TAG_CHARS), {
        "exception.type": str(kind),
        "exception.message": str(message or ""),
        "exception.stacktrace": str(details.get("stacktrace") or ""),
    }


def distinct(spans: Iterable[Span]) -> list[Span]:
    """`spans` with each id once (the last wins) and without circles of parents.

    PostgreSQL refuses a batch with the same id twice, and the server never finishes with a circle.
    All are spans of one trace.
    """
    by_id = {span.span_id: span for span in spans}
    seen: set[bytes] = set()
    for key in by_id:
        way: set[bytes] = set()
        while key in by_id and key not in seen and key not in way:
            way.add(key)
            key = by_id[key].parent_span_id
        if key in way:
            by_id[key].parent_span_id = b""
        seen |= way
    return list(by_id.values())
