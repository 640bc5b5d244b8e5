"""What a run's texts are: params and tags from a trace's metadata and its losses. Pure.

`run_totals` has the run's numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_key, clean_text, mapping
from qitos_mlflow.recording.record import TraceEnd

MAX_PARAMS = 500
"""Params of one run; metadata beyond is counted as ``too_many_params``."""

MAX_NESTING = 8
"""Levels of nested metadata that become params."""

LOST_IN_SPOOL = "lost_in_spool"
"""Reason of a span that was written to the spool and not read: a damaged line, a deleted file."""

_NOT_PARAMS = frozenset(
    # How the run went: tags, metrics and status. A param is an input of the run.
    {"stop_reason", "final_result", "success", "status", "error", "qitos.closed"}
    # Ties to other traces.
    | {"linked_trace_id", "linked_span_id"}
)

_METADATA_TAGS = {
    "qitos_run_id": "qitos.run_id",
    "agent_name": "qitos.agent",
    "task_id": "qitos.task_id",
    "benchmark_name": "qitos.benchmark",
    "linked_trace_id": "qitos.linked_trace_id",
    "qitos.closed": "qitos.closed",
}
"""Metadata that people search runs by, and its tags."""

_RECORD_TAGS = {
    "trace_id": "qitos.trace_id",
    "group_id": "qitos.group_id",
    "parent_run_id": "mlflow.parentRunId",
}

_SETTINGS_TAGS = {"source": "mlflow.source.name", "user": "mlflow.user"}


def start_tags(
    record: Mapping[str, Any], settings: Mapping[str, Any], lost: Counter[str] | None
) -> list[tuple[str, str]]:
    """Tags of a run from its trace_start record and its settings; configured ones come last."""
    configured = mapping(settings.get("tags")).items()
    return [
        *_picked(record, _RECORD_TAGS, lost),
        *_picked(settings, _SETTINGS_TAGS, lost),
        *_picked(mapping(record.get("metadata")), _METADATA_TAGS, lost),
        *((clean_key(key), clean_text(text, limits.TAG_CHARS, lost)) for key, text in configured),
    ]


def end_tags(record: TraceEnd, lost: Counter[str] | None) -> list[tuple[str, str]]:
    """Tags of a run from its trace_end record: stop reason, error, what was not known before."""
    metadata = mapping(record.get("metadata"))
    error = error_text(record.get("error")) or metadata.get("error")
    outcome = {"stop_reason": metadata.get("stop_reason"), "qitos.error": error}
    return _picked(metadata, _METADATA_TAGS, lost) + [
        (tag, clean_text(value, limits.TAG_CHARS, lost)) for tag, value in outcome.items() if value
    ]


def params(
    metadata: Mapping[str, Any], written: Collection[str], lost: Counter[str]
) -> list[tuple[str, str]]:
    """Scalars of `metadata` as params, nested ones by their path (``a.b``), without `written`.

    MLflow refuses the whole batch that changes a param or names it twice, so the first value of
    a key is the one that stays.
    """
    found: dict[str, str] = {}
    too_many = 0
    for name, value in _flat(metadata, MAX_NESTING):
        key = clean_key(name)
        if name in _NOT_PARAMS or key in written or key in found:
            continue
        if len(written) + len(found) >= MAX_PARAMS:
            too_many += 1
            continue
        found[key] = clean_text(value, limits.PARAM_CHARS, lost)
    # Not a sum: a trace's metadata comes again, and more complete, when it ends.
    if too_many > lost["too_many_params"]:
        lost["too_many_params"] = too_many
    return list(found.items())


def ledger_tags(recorded: int, delivered: int, dropped: Mapping[str, int]) -> list[tuple[str, str]]:
    """The run's account of its spans.

    `RunTotals` counts every span that it sees as delivered. If the server refuses some (dead
    letters), the sink sends these tags again, and the last ones stay.

    Args:
        recorded: spans that ended in the agent.
        delivered: spans that are on the server.
        dropped: spans lost, by reason, as far as the agent knew when the trace ended. What is
            missing beyond that was lost in the spool. There is no tag if there are none.
    """
    tags = [("qitos.spans.recorded", str(recorded)), ("qitos.spans.delivered", str(delivered))]
    missing = recorded - delivered - sum(dropped.values())
    if missing > 0:
        dropped = {**dropped, LOST_IN_SPOOL: missing}
    if any(dropped.values()):
        tags.append(("qitos.spans.dropped", _counts_text(dropped)))
    return tags


def lost_tags(lost: Mapping[str, int]) -> list[tuple[str, str]]:
    """The run's account of single values dropped or trimmed; nothing when there are none."""
    return [("qitos.values.dropped", _counts_text(lost))] if any(lost.values()) else []


def _picked(
    source: Mapping[str, Any], names: Mapping[str, str], lost: Counter[str] | None
) -> list[tuple[str, str]]:
    return [
        (tag, clean_text(source[key], limits.TAG_CHARS, lost))
        for key, tag in names.items()
        if isinstance(source.get(key), (str, int, float)) and source[key] != ""
    ]


def _counts_text(counts: Mapping[str, int]) -> str:
    text = ", ".join(f"{reason}={count}" for reason, count in sorted(counts.items()) if count)
    return clean_text(text, limits.TAG_CHARS)


def error_text(error: Any) -> str:
    """An error as one line; empty for none."""
    if not isinstance(error, Mapping):
        return str(error) if error else ""
    return ": ".join(str(error[key]) for key in ("type", "message") if error.get(key))


def _flat(metadata: Mapping[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in metadata.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if depth > 1:
                yield from _flat(value, depth - 1, f"{name}.")
        elif isinstance(value, list):
            if value and all(isinstance(item, (str, int, float)) for item in value):
                yield name, ", ".join(map(str, value))
        elif isinstance(value, (str, int, float)):  # bool is an int; None says nothing
            yield name, str(value)
