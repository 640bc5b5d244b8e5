"""Trace and span events to bytes, once, on the agent's thread: nobody can change them later.

The bytes are JSON as orjson writes it (a 4 KB span costs 3 µs, 200 KB of messages 0.05 ms;
`benchmarks/agent_thread.py`). Not pickle, which is faster still, because pickling an unknown
object copies all it refers to and runs its code; here an unknown object becomes its short
`repr`. Everything else (times, redaction, mapping) happens later, on the worker: see `refine`.

orjson is only ever given our own copies, made of dicts, lists, texts and numbers alone. It keeps
pointers into the container it is in, and crashes the process where that one changes meanwhile: by
another thread, or by Python code that it calls (`default`, an Enum's value, a time zone). It
crashes as well where such code raises.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence, Set, ValuesView
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from enum import Enum
from itertools import islice
from os import PathLike, fspath
from types import TracebackType
from typing import Any
from uuid import UUID

import orjson

from qitos_mlflow.mlflow_plugin.limits import CUT_HERE
from qitos_mlflow.tracing.redaction import REDACTED, redacted_export

MAX_FRAMES = 64
"""Stack frames kept of an exception, the innermost ones."""

MAX_REPR = 2_000
"""Characters kept of an unknown object's `repr`."""

MAX_ARRAY = 1_000
"""Elements of an array, or of whatever has a shape, that is written out; larger ones are told."""

MAX_DEPTH, MAX_NODES = 24, 20_000
"""Bounds of containers that are neither list, tuple nor dict, and of the slow path for payloads
that orjson refuses (cycles, lone surrogates, …)."""

MAX_LEVELS = 250
"""Levels of lists and dicts that orjson is given; it takes 254."""

_ATOMS = frozenset({str, int, float, bool, type(None)})


def encode(record: Mapping[str, Any]) -> bytes:
    """`record` as JSON; total: whatever it holds, something readable comes out."""
    try:
        copied = _copied(record, MAX_LEVELS, [MAX_NODES])
        try:
            return orjson.dumps(copied)
        except TypeError:
            return orjson.dumps(_with_text_keys(copied))
    except Exception:  # noqa: BLE001 - too deep, too large a number, somebody else's __eq__, …
        return orjson.dumps(_plain(record, MAX_DEPTH, [MAX_NODES]))


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
        "message": _text_of(error),
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
        data["token_usage"] = {key: _finite(value) for key, value in usage.items()}
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


def cut(text: str, length: int) -> str:
    """The first `length` characters of `text` and a note of how long it was."""
    return f"{text[:length]}{CUT_HERE}{len(text)} characters in all]"


def failure_in_flight(at_start: BaseException | None) -> BaseException | None:
    """The exception that is leaving a ``with`` block right now, on hosts whose Trace ignores it.

    `at_start` is what was being handled when the block was entered (a retry inside an
    ``except`` clause): that one is not the block's own.
    """
    current = sys.exc_info()[1]
    return None if current is at_start else current


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _copied(value: Any, levels: int, budget: list[int]) -> Any:
    """`value` as dicts, lists and atoms, of which no container is anybody else's."""
    if levels == 0:
        raise RecursionError
    kind = type(value)
    pairs: Iterable[tuple[Any, Any]]
    if kind is dict:
        value = value.copy()  # In one go, as `[*value]`: no other thread comes in between.
        pairs = value.items()
    elif kind is list or kind is tuple:
        value = [*value]
        if _ATOMS.issuperset(map(type, value)):
            return value
        pairs = enumerate(value)
    elif kind in _ATOMS:
        return value
    else:
        return _copied(_known(value, budget), levels - 1, budget)
    for key, item in pairs:
        kind = type(item)
        if kind is not str and kind not in _ATOMS:
            value[key] = _copied(item, levels - 1, budget)
    return value


def _with_text_keys(value: Any) -> Any:
    """What `_copied` has made, with keys as orjson takes them: numbers and the like as JSON."""
    if type(value) is dict:
        return {_text_key(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if type(value) is list else value


def _text_key(key: Any) -> str:
    if type(key) is not str:
        key = _copied(key, MAX_DEPTH, [MAX_NODES])
    return key if type(key) is str else orjson.dumps(key).decode()


def _known(value: Any, budget: list[int]) -> Any:
    """What orjson cannot write by itself, as something it can; cheap, however large it is."""
    kind = type(value)
    try:
        if issubclass(kind, str):
            return str.__str__(value)
        if issubclass(kind, int):
            return int.__int__(value)
        if issubclass(kind, dict):
            return dict(dict.items(value))  # None of its own code, here and below.
        if issubclass(kind, list):
            return [*list.__iter__(value)]
        if issubclass(kind, Enum):
            return value.value
        if kind in (datetime, date, time):
            return value.isoformat()
        if kind is UUID:
            return str(value)
        if is_dataclass(kind):
            return _attributes(value)
        if isinstance(value, (bytes, bytearray, memoryview)):
            return f"<{len(value)} bytes>"
        if hasattr(kind, "shape"):
            return _array(value)
        if isinstance(value, Mapping):
            pairs = _first(value.items(), budget)
            if pairs and type(pairs[-1]) is str:
                pairs[-1] = ("…", pairs[-1])
            return dict(pairs)
        if isinstance(value, (Set, Sequence, ValuesView)):
            return _first(value, budget)
        if isinstance(value, PathLike):
            return fspath(value)
    except Exception:  # noqa: BLE001 - somebody else's class
        pass
    return _text_of(value)


def _attributes(value: Any) -> dict[str, Any]:
    """The public attributes of a dataclass's instance; one with slots may not have set them all."""
    held = {**getattr(value, "__dict__", {})} or {
        field.name: getattr(value, field.name)
        for field in fields(value)
        if hasattr(value, field.name)
    }
    return {name: item for name, item in held.items() if name[:1] != "_"}


def _first(values: Collection[Any], budget: list[int]) -> list[Any]:
    """As many of `values` as the budget allows, and how many there are where that is not all."""
    items = list(islice(values, budget[0] + 1))
    if len(items) > budget[0]:
        items[-1] = f"{CUT_HERE}{len(values)} items in all]"
    budget[0] = max(0, budget[0] - len(items))
    return items


def _array(value: Any) -> Any:
    """A number or an array of numpy's, or something like it (a tensor, a data frame)."""
    shape = tuple(value.shape)
    if math.prod(shape) > MAX_ARRAY:
        # Its repr may be slow, or copy it from another device.
        kind = getattr(value, "dtype", "")
        return f"<{type(value).__qualname__} {shape} {kind}".rstrip() + ">"
    numpy = sys.modules.get("numpy")  # Perhaps half imported, by another thread.
    array, scalar = (getattr(numpy, name, ()) for name in ("ndarray", "generic"))
    plain: Any = value
    if isinstance(value, array):
        plain = value.tolist()
    elif isinstance(value, scalar) and value.dtype.kind not in "mM":
        plain = value.item()
    # Of some types it is what it was; of a time, nanoseconds.
    return plain if type(plain) in (bool, int, float, str, list) else _text_of(value)


def _text_of(value: Any) -> str:
    try:
        text = str.__str__(str(value) if isinstance(value, BaseException) else repr(value))
    except Exception:  # noqa: BLE001 - somebody else's __repr__
        return f"<{type(value).__qualname__} without a repr>"
    return text if len(text) <= MAX_REPR else cut(text, MAX_REPR)


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    """A copy of `value` that orjson is sure to take, cut where it is too deep or too large."""
    budget[0] -= 1
    if depth == 0 or budget[0] < 0:
        return f"<{type(value).__qualname__}, cut>"
    try:
        return _plain_of(value, depth, budget)
    except Exception:  # noqa: BLE001 - somebody else's class: it alone becomes its text
        return _plain_of(_text_of(value), depth, budget)


def _plain_of(value: Any, depth: int, budget: list[int]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value).encode("utf-8", "replace").decode()
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        pairs = list(islice(value.items(), budget[0] + 1))
        return {_key(key, budget): _plain(item, depth - 1, budget) for key, item in pairs}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = list(islice(value, budget[0] + 1))
        return [_plain(item, depth - 1, budget) for item in items]
    if depth == 1:  # What comes of it would be too deep, and may be large.
        return f"<{type(value).__qualname__}, cut>"
    share = max(0, budget[0]) // 4  # What stands beside it needs some, too.
    return _plain(_known(value, [share]), depth - 1, budget)


def _key(key: Any, budget: list[int]) -> Any:
    try:
        key = str(key)
    except Exception:  # noqa: BLE001
        key = _text_of(key)
    return _plain(key, 1, budget)
