"""Scores and expected values: the record of one becomes MLflow's assessment, and a metric. Pure.

The id of an assessment follows from its trace, name and source, so that the same one written again,
or a later one of the same name and source, replaces the first one.
"""

from __future__ import annotations

from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.entities import Metric
from qitos_mlflow.mlflow_plugin.mapping.ids import digest, trace_id
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text, mapping
from qitos_mlflow.recording.record import Assessment

OWN_ID = "qitos.assessment_id"
"""Metadata with the id that we give. Some stores give ids of their own."""
SAID_AT = "qitos.said_at_ns"
"""Metadata with the time when it was said (nanoseconds since the epoch): the latest one stays."""


def assessment_of(record: Assessment) -> dict[str, Any]:
    """MLflow's assessment, as JSON, for its record."""
    of = str(record.get("mlflow_trace_id") or trace_id(str(record["trace_id"])))
    feedback = record.get("type") != "expectation"
    name = clean_text(record.get("name") or limits.UNNAMED, limits.KEY_CHARS)
    source_type = str(record.get("source_type") or "CODE")
    source_id = clean_text(record.get("source_id") or "default", limits.KEY_CHARS)
    kind = "feedback" if feedback else "expectation"
    own = f"a-{digest(kind, of, name, source_type, source_id, size=16).hex()}"
    said_ns = limits.clean_ns(record.get("time_ns"))
    at = limits.rfc3339(said_ns)
    found: dict[str, Any] = {
        "assessment_id": own,
        "assessment_name": name,
        "trace_id": of,
        "source": {"source_type": source_type, "source_id": source_id},
        "create_time": at,
        "last_update_time": at,
        "metadata": {
            OWN_ID: own,
            SAID_AT: str(said_ns),
            **{
                clean_text(key, limits.KEY_CHARS): clean_text(fact, limits.TAG_CHARS)
                for key, fact in mapping(record.get("metadata")).items()
            },
        },
        "valid": True,
    }
    value = record.get("value")
    if feedback:
        found["feedback"] = {"value": value}
        if record.get("rationale"):
            found["rationale"] = clean_text(record["rationale"], limits.TAG_CHARS)
    elif isinstance(value, (dict, list)):
        text = _json.dumps(value).decode()
        found["expectation"] = {
            "serialized_value": {"serialization_format": "JSON_FORMAT", "value": text}
        }
    else:
        found["expectation"] = {"value": value}
    return found


def metric_of(record: Assessment) -> Metric | None:
    """The run's metric for a score that is a number, or true or false; None for all else."""
    value = record.get("value")
    if record.get("type") == "expectation" or not isinstance(value, (bool, int, float)):
        return None
    number = limits.clean_metric(value)
    if number is None:
        return None
    key = limits.clean_key(record.get("name") or limits.UNNAMED)
    return Metric(key, number, limits.clean_ms(record.get("time_ns")), 0)
