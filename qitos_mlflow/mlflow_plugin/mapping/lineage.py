"""What a run and a trace were made with, under MLflow's names: code, model, prompts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping.entities import PromptRef
from qitos_mlflow.mlflow_plugin.mapping.limits import TRACE_TAG_CHARS, mapping

MODEL_ID = "mlflow.modelId"
"""Metadata of a trace: the active model."""

PROMPTS = "mlflow.linkedPrompts"
"""Tag of a run and of a trace: the versions of prompts that were loaded."""

_CODE = {
    "commit": "mlflow.source.git.commit",
    "branch": "mlflow.source.git.branch",
    "repository": "mlflow.source.git.repoURL",
    "dirty": "mlflow.source.git.dirty",
}


def code_tags(record: Mapping[str, Any]) -> dict[str, str]:
    """The version of the code in a record, as tags of a run or metadata of a trace."""
    if "code" not in record:
        return {}
    code = mapping(record["code"])
    found = {tag: code[key] for key, tag in _CODE.items() if code.get(key) not in (None, "")}
    return {
        tag: str(value).lower() if isinstance(value, bool) else str(value)
        for tag, value in found.items()
    }


def prompts_tag(prompts: Sequence[PromptRef]) -> str:
    """The text of the tag for prompts, as many as there is room for."""
    text = _json.dumps(prompts).decode()
    return text if len(text) <= TRACE_TAG_CHARS else prompts_tag(prompts[: len(prompts) // 2])


def prompts_in(tags: Mapping[str, str]) -> list[PromptRef]:
    """The prompts that the tag names; none if it was damaged."""
    try:
        return [PromptRef(**one) for one in _json.loads(tags.get(PROMPTS, "[]"))]
    except (TypeError, ValueError):
        return []
