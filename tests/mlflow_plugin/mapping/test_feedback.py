"""A critic's verdict as feedback: what it says, and whether a model said it."""

from __future__ import annotations

import math
from typing import Any

import pytest

from qitos_mlflow.mlflow_plugin.mapping.span_tree import feedback_of
from tests.mlflow_plugin.records import Records


def source(name: str, verdict: Any = None, output: Any = None) -> str:
    """Who is said to have judged."""
    record = Records().span(
        "critic", critic_name=name, score=0.5, output_content=verdict, output=output
    )
    feedback = feedback_of(record, "trace-1")
    assert feedback is not None
    return str(feedback["source"]["source_type"])


def test_a_critic_that_holds_a_model_is_one() -> None:
    """What the bridge saw of the critic, or what its verdict names, says so; a name does not."""
    assert source("LLMJudge") == "CODE"
    assert source("Reviewer", output={"judged_by_model": True}) == "LLM_JUDGE"
    assert source("Reviewer", output={"judged_by_model": False}) == "CODE"
    assert source("Reviewer", {"details": {"model": "gpt-4o"}}) == "LLM_JUDGE"
    assert source("Reviewer", {"model": "gpt-4o"}) == "LLM_JUDGE"


@pytest.mark.parametrize(
    "score", [None, math.nan, math.inf, "NaN", "0.8", "good", True, [0.5], {}, 10**400]
)
def test_without_a_score_there_is_none(score: Any) -> None:
    """A verdict without a number is no feedback, whatever else it says."""
    verdict = {"action": "retry", "reason": "too short"}
    record = Records().span("critic", critic_name="judge", score=score, output_content=verdict)
    assert feedback_of(record, "trace-1") is None
    feedback = feedback_of({**record, "data": {**record["data"], "score": 1}}, "trace-1")
    assert feedback is not None
    assert (feedback["feedback"], feedback["rationale"]) == ({"value": 1.0}, "too short")
