"""The agents of the demo, on the real Engine, without any logging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow.cli._demo_agent import (
    TASKS,
    DemoTask,
    calculate,
    run_task,
    search_almanac,
)

STOPS = {"counting-bees": "budget_steps", "equator-walk": "unrecoverable_error"}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """Every task's EngineResult."""
    return {demo.id: run_task(demo) for demo in TASKS}


@pytest.mark.parametrize("demo", TASKS, ids=lambda demo: demo.id)
def test_each_task_ends_as_scripted(demo: DemoTask, results: dict[str, Any]) -> None:
    """Each task takes the steps and ends with the stop reason that its script says."""
    result = results[demo.id]
    assert result.state.stop_reason == STOPS.get(demo.id, "final")
    assert len(result.records) == len(demo.replies)
    assert result.state.current_step <= len(demo.replies)


def test_usage_is_counted_from_what_was_said(results: dict[str, Any]) -> None:
    """Every reply carries token counts that add up and grow with the conversation."""
    for result in results.values():
        usages = [r.model_response["usage"] for r in result.records if r.model_response]
        assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)
        prompts = [u["prompt_tokens"] for u in usages]
        assert prompts == sorted(set(prompts))


def test_one_tool_fails_and_the_agent_goes_on(results: dict[str, Any]) -> None:
    """Exactly one tool call of the whole demo fails, in a task that is answered."""
    failed = {
        task_id
        for task_id, result in results.items()
        for record in result.records
        for invocation in record.tool_invocations
        if invocation["status"] == "error"
    }
    assert failed == {"sunlight"}
    assert results["sunlight"].state.final_result == "About 8.3 minutes."


def test_the_critic_scores_and_says_why(results: dict[str, Any]) -> None:
    """The reviewed answer is sent back twice and gets better each time."""
    outputs = [
        output
        for record in results["boiling-water"].records
        for output in record.critic_outputs
        if output["reason"] != "no answer yet"
    ]
    assert [output["score"] for output in outputs] == [0.25, 0.75, 1.0]
    assert [output["action"] for output in outputs] == ["retry", "retry", "continue"]
    assert outputs[0]["reason"] == "does not mention 70, almanac, 8849"


def test_the_demo_leaves_nothing_in_the_working_directory() -> None:
    """QitOS's own run directories are off: stdout and the working directory are the demo's."""
    run_task(TASKS[0])
    assert list(Path.cwd().iterdir()) == []


def test_tools_do_what_they_say() -> None:
    """The calculator calculates and refuses code, the almanac finds the nearest sentence."""
    assert calculate("-(2+3)*4/8") == -2.5
    for code in ("__import__('os')", "9**9**9", "1e9"):
        with pytest.raises(ValueError, match="cannot calculate"):
            calculate(code)
    [found] = search_almanac("how high is the summit", top=1)
    assert found == "The summit of Mount Everest is 8849 metres above the sea."


def test_one_step_calls_two_tools_at_once(results: dict[str, Any]) -> None:
    """The demo shows parallel tools: one reply of the first task calls the almanac twice."""
    first = results["moonlight"].records[0]
    assert [call["tool_name"] for call in first.tool_invocations] == ["search_almanac"] * 2
