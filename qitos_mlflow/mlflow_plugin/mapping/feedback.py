"""A critic's verdict as MLflow feedback on the trace and its span. Pure."""

from __future__ import annotations

import re
from datetime import datetime, timezone
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.ids import digest, span_id, trace_id
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text, mapping
from qitos_mlflow.recording.record import SpanEnd

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_MODELS = frozenset({"llm", "judge", "gpt", "claude", "gemini"})
"""Words in the name of a critic that is a model; ``RemodelBudget`` and ``ModelCheck`` have none."""


def feedback_of(record: SpanEnd, qitos_trace_id: str) -> dict[str, Any] | None:
    """MLflow's assessment, as JSON, for a critic's span record; None if there is no verdict.

    The value is the score, or the critic's action if there is no score. The id follows from the
    span's, so that the same assessment written again replaces the first one.
    """
    data = mapping(record.get("data"))
    verdict = mapping(data.get("output_content"))
    score = data.get("score")
    value: Any = limits.clean_metric(None if isinstance(score, (str, bool)) else score)
    if value is None:
        value = verdict.get("action")
    if not isinstance(value, (str, float)):
        return None
    name = clean_text(data.get("critic_name") or "critic", limits.KEY_CHARS)
    at = rfc3339(limits.clean_ns(record.get("end_ns")))
    judge = verdict.get("model") or mapping(verdict.get("details")).get("model")
    # If the bridge found no model, the verdict or the name may still have one.
    found = mapping(record.get("output")).get("judged_by_model") is True
    words = {word.lower() for word in _WORD.findall(name)}
    by_model = found or judge or not words.isdisjoint(_MODELS)
    own = str(record.get("span_id", ""))
    facts = {"step": record.get("step"), "action": verdict.get("action")}
    feedback: dict[str, Any] = {
        "assessment_id": f"a-{digest('feedback', qitos_trace_id, own, size=16).hex()}",
        "assessment_name": name,
        "trace_id": trace_id(qitos_trace_id),
        "span_id": span_id(qitos_trace_id, own).hex(),
        "source": {"source_type": "LLM_JUDGE" if by_model else "CODE", "source_id": name},
        "create_time": at,
        "last_update_time": at,
        "feedback": {"value": value},
        "metadata": {
            f"qitos.{key}": clean_text(fact, limits.KEY_CHARS)
            for key, fact in facts.items()
            if fact is not None
        },
        "valid": True,
    }
    if verdict.get("reason"):
        feedback["rationale"] = clean_text(verdict["reason"], limits.TAG_CHARS)
    return feedback


def rfc3339(ns: int) -> str:
    """Nanoseconds since the epoch as the time text of protobuf's JSON form, to the microsecond."""
    moment = datetime.fromtimestamp(min(ns // 1_000_000_000, _LAST_S), timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ns % 1_000_000_000 // 1_000:06d}Z"


_LAST_S = 253_402_300_799
"""The end of the year 9999, which neither datetime nor protobuf can pass."""
