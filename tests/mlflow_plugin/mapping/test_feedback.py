"""A critic's verdict as feedback: what it says, and whether a model said it."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    "name", ["LLMJudge", "llm_as_judge", "GPT4Critic", "ClaudeReview", "judge", "my-llm", "TheLLM"]
)
def test_a_model_is_known_by_its_name(name: str) -> None:
    """Whole words, in any way of writing names."""
    assert source(name) == "LLM_JUDGE"


@pytest.mark.parametrize(
    "name", ["ModelOutputFormatCheck", "RemodelBudget", "Prejudged", "Reviewer", "ArgptCheck", ""]
)
def test_code_is_not_taken_for_a_model(name: str) -> None:
    """Parts of words, and words that other critics have too, say nothing."""
    assert source(name) == "CODE"


def test_a_critic_that_holds_a_model_is_one() -> None:
    """What the bridge saw of the critic, or what its verdict names, says more than its name."""
    assert source("Reviewer", output={"judged_by_model": True}) == "LLM_JUDGE"
    assert source("Reviewer", output={"judged_by_model": False}) == "CODE"
    assert source("Reviewer", {"details": {"model": "gpt-4o"}}) == "LLM_JUDGE"
    assert source("Reviewer", {"model": "gpt-4o"}) == "LLM_JUDGE"
