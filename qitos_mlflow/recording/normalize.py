"""Captured bytes to the record that goes to disk: times, stacks, redaction. On the worker.

This is the one choke point for secrets: nothing reaches spool or server but through `refine`.
"""

from __future__ import annotations

import linecache
from calendar import timegm
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import orjson

from qitos_mlflow.recording.run_files import read
from qitos_mlflow.redaction.redact import redact, redact_json
from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS, note_large, trim_fields

Additions = Callable[[dict[str, Any]], dict[str, Any]]

OURS = frozenset(
    {"kind", "trace_id", "span_id", "parent_id", "type", "step", "time_ns", "start_ns", "end_ns"}
)
"""Fields that hold nothing but ids, times and words of ours."""


def refine(payload: bytes, field_bytes: int, additions: Additions | None = None) -> bytes | None:
    """The redacted record of what `capture` encoded; None for a file that is not there.

    Args:
        payload: one captured event.
        field_bytes: longest text kept of one field (bytes).
        additions: asked what to add to the redacted record; redacted like the rest.
    """
    record: dict[str, Any] | None = orjson.loads(payload)
    if record is None or (record["kind"] == "artifact" and (record := read(record)) is None):
        return None
    for text, number in (("started_at", "start_ns"), ("ended_at", "end_ns")):
        if text in record:
            record[number] = nanoseconds(record.pop(text))
    for key in ("exception", "error"):
        failure = record.get(key)
        if isinstance(failure, dict) and "frames" in failure:
            failure["stacktrace"] = _stack(failure)
    whole = record["kind"] == "artifact"
    if len(payload) > MAX_INLINED_CHARS and not whole:
        # Before all else: pictures neither cost time nor take the room of what can be read.
        record = note_large(record)
    content = record.pop("content") if _is_json_file(record) else None
    record = {key: value if key in OURS else redact(value) for key, value in record.items()}
    if content is not None:
        lines = content.split("\n") if record["path"].endswith(".jsonl") else [content]
        record["content"] = "\n".join(map(redact_json, lines))
    if len(payload) > field_bytes and not whole:
        # Redacted first: a cut could leave half a secret.
        record = trim_fields(record, field_bytes)
    if additions is not None and (added := additions(record)):
        for part, values in (record.get("added") or {}).items():
            added[part] = {**values, **added.get(part, {})}
        record |= trim_fields({"added": redact(added)}, field_bytes)
    return orjson.dumps(record)


def _is_json_file(record: dict[str, Any]) -> bool:
    if record["kind"] != "artifact" or not isinstance(record.get("content"), str):
        return False
    return str(record.get("path")).endswith((".json", ".jsonl"))


def nanoseconds(iso: str | None) -> int | None:
    """Nanoseconds since the epoch of an ISO 8601 time; a time without a zone is UTC."""
    if not isinstance(iso, str):
        return None
    try:
        moment = datetime.fromisoformat(iso.replace("Z", "+00:00"))
    except ValueError:
        return None
    moment = moment.astimezone(timezone.utc) if moment.tzinfo else moment
    # Integers only: a float of nanoseconds is off by hundreds.
    return timegm(moment.timetuple()) * 1_000_000_000 + moment.microsecond * 1_000


def _stack(failure: dict[str, Any]) -> str:
    """The traceback as Python prints it, with the source lines that can be found."""
    lines = ["Traceback (most recent call last):"]
    for file, number, function in failure.pop("frames"):
        lines.append(f'  File "{file}", line {number}, in {function}')
        if source := linecache.getline(file, number).strip():
            lines.append(f"    {source}")
    lines.append(f"{failure.get('type')}: {failure.get('message')}")
    return "\n".join(lines)
