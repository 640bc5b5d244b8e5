"""Trace and span events to bytes, once, on the agent's thread: nobody can change them later.

The bytes are JSON as orjson writes it (a 4 KB span costs 3 µs, 200 KB of messages 0.03 ms;
`benchmarks/agent_thread.py`). Not pickle, which is faster still, because pickling an unknown
object copies all it refers to and runs its code; here an unknown object becomes its short
`repr`. Everything else (times, redaction, mapping) happens later, on the worker: see `refine`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from qitos_mlflow.recording.to_json import encode as encode
from qitos_mlflow.recording.to_json import text_of
from qitos_mlflow.redaction.trim import cut
from qitos_mlflow.tracing.redaction import REDACTED, redacted_export

MAX_FRAMES = 64
"""Stack frames kept of an exception, the innermost ones."""


def describe(error: BaseException) -> dict[str, Any]:
    """Type, message and stack of `error`; source lines are read later, on the worker."""
    frames: list[tuple[str, int, str]] = []
    step: TracebackType | None = error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        frames.append((code.co_filename, step.tb_lineno, code.co_name))
        step = step.tb_next
    return {
        "type": type(error).__qualname__,
        "message": text_of(error),
        "frames": frames[-MAX_FRAMES:],
    }


def span_record(
    trace_id: str, span: Any, step: int | None, content: bool, field_chars: int, late: int = 0
) -> bytes:
    """The record of a span that has just ended.

    Args:
        trace_id: of the trace it is recorded for.
        span: the host's Span; only its documented attributes are read.
        step: number of the agent's step it belongs to, None outside any.
        content: False leaves out inputs, outputs and error texts; numbers and names stay.
        field_chars: longest text kept of one field (characters).
        late: how many spans have ended after their trace, this one included; 0 before its end.
    """
    data = {**span.data.export()}
    kind = data.pop("type", None) or span.data.type
    record = {
        "kind": "span",
        "trace_id": trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_span_id,
        "type": kind,
        "step": step,
        "started_at": span.started_at,
        "ended_at": span.ended_at,
        "error": span.error,
    }
    if late:
        record["late"] = late
    # orjson writes NaN and infinity as null; as text they are dropped *and counted*.
    if kind == "critic":
        data["score"] = _finite(data.get("score"))
    elif kind == "generation" and isinstance(usage := data.get("token_usage"), Mapping):
        data["token_usage"] = {
            key: value if type(value) is int else _finite(value) for key, value in usage.items()
        }
    exception = getattr(span, "exception", None)
    if content:
        for key, value in data.items():
            if type(value) is str and len(value) > field_chars:
                data[key] = cut(value, field_chars)
        output = span.output
        if type(output) is str and len(output) > field_chars:
            output = cut(output, field_chars)
        record["output"] = output
        if exception is not None:
            record["exception"] = describe(exception)
    else:
        data = structure_only(redacted_export(data))
        if record["error"] is not None:
            record["error"] = WITHHELD
        if exception is not None:
            record["exception"] = {"type": type(exception).__qualname__, "message": WITHHELD}
    record["data"] = data
    return encode(record)


def root_record(trace_id: str, span: Any) -> dict[str, Any]:
    """The record that announces a trace's first span: the root its tree has from the start."""
    return {
        "kind": "span_start",
        "trace_id": trace_id,
        "span_id": span.span_id,
        "parent_id": span.parent_span_id,
        "type": span.data.type,
        "data": {"name": getattr(span.data, "name", None)},
    }


WITHHELD = "[content off]"


def structure_only(redacted: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of exported fields once those that held content are taken out."""
    return {key: value for key, value in redacted.items() if value != REDACTED}


def failure_in_flight(at_start: BaseException | None) -> BaseException | None:
    """The exception that is leaving a ``with`` block right now, on hosts whose Trace ignores it.

    `at_start` is what was being handled when the block was entered (a retry inside an
    ``except`` clause): that one is not the block's own.
    """
    current = sys.exc_info()[1]
    return None if current is at_start else current


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
