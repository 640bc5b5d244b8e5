"""A smaller copy of what was too large for something between here and the server. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from qitos_mlflow import _json
from qitos_mlflow.redaction.trim import note_large

LEAST = 256
"""Texts are not cut to fewer bytes: names and ids are not longer."""


def shorter(item: Any) -> Any | None:
    """A copy of at most half the size, its longest texts cut; None if texts are not what is large.

    Args:
        item: a span; a trace's info or another JSON value; or a kind and a pair of texts.
    """
    if isinstance(item, Span):
        return _shorter_span(item)
    if isinstance(item, tuple):
        kind, pair = item
        if not isinstance(pair, tuple) or len(pair[1]) <= LEAST:
            return None  # A metric, a file or a short text.
        return kind, (pair[0], note_large(pair[1], len(pair[1]) // 2, trim_rest=True))
    size = most = len(_json.dumps(item))
    while (most := most // 2) >= LEAST:
        smaller = note_large(item, most, trim_rest=True)
        if len(_json.dumps(smaller)) <= size // 2:
            return smaller
    return None


def _shorter_span(span: Span) -> Span | None:
    copy, most = Span(), span.ByteSize()
    copy.CopyFrom(span)
    texts = [*texts_in(one.value for one in copy.attributes)]
    texts += texts_in(one.value for event in copy.events for one in event.attributes)
    while copy.ByteSize() > span.ByteSize() // 2:
        if (most := most // 2) < LEAST:
            return _without_largest(copy)
        for text in texts:
            text.string_value = note_large(text.string_value, most, trim_rest=True)
    return copy


def _without_largest(span: Span) -> Span | None:
    """`span` with a note in the place of its largest attribute; None if that is small."""
    largest = max(span.attributes, key=lambda one: one.ByteSize(), default=None)
    if largest is None or (size := largest.ByteSize()) < LEAST:
        return None
    largest.value.Clear()
    largest.value.string_value = f"[left out: {size} bytes]"
    return span


def texts_in(values: Iterable[AnyValue]) -> Iterator[AnyValue]:
    """The texts among attributes and within them, to be changed in their place."""
    for value in values:
        if value.HasField("string_value"):
            yield value
        elif value.HasField("array_value"):
            yield from texts_in(value.array_value.values)
        elif value.HasField("kvlist_value"):
            yield from texts_in(one.value for one in value.kvlist_value.values)
