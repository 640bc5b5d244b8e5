"""The agents of the demo, on the real Engine, without any logging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow.cli._demo_agent import Notes, calculate, search_almanac
from qitos_mlflow.cli._demo_tasks import LARGE, TASKS, DemoTask, prepare_workspace, run_task


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    """Every task's EngineResult, by task and model."""
    workspace = tmp_path_factory.mktemp("desk")
    prepare_workspace(workspace)
    return {
        (demo.id, demo.model): run_task(demo, workspace, step_began=lambda: None) for demo in TASKS
    }


@pytest.mark.parametrize("demo", TASKS, ids=lambda demo: f"{demo.id}-{demo.model}")
def test_each_task_ends_as_scripted(demo: DemoTask, results: dict[tuple[str, str], Any]) -> None:
    """Each task takes the steps and ends with the stop reason that its script says."""
    result = results[demo.id, demo.model]
    assert result.state.stop_reason == demo.stop_reason
    assert len(result.records) == len(demo.replies)
    assert result.state.current_step <= demo.max_steps


def test_usage_is_counted_from_what_was_said(results: dict[tuple[str, str], Any]) -> None:
    """Every reply carries token counts that add up and grow with the conversation."""
    for result in results.values():
        usages = [r.model_response["usage"] for r in result.records if r.model_response]
        assert all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages)
        prompts = [u["prompt_tokens"] for u in usages]
        assert prompts == sorted(set(prompts))


def test_one_tool_fails_and_the_agent_goes_on(results: dict[tuple[str, str], Any]) -> None:
    """Exactly one tool call of the whole demo fails, in a task that is answered."""
    failed = {
        task_id
        for (task_id, _), result in results.items()
        for record in result.records
        for invocation in record.tool_invocations
        if invocation["status"] == "error"
    }
    assert failed == {"shopping"}
    assert results["shopping", "scripted-small"].state.final_result == "15 things."


def test_the_critic_scores_and_says_why(results: dict[tuple[str, str], Any]) -> None:
    """The reviewed answer is sent back twice and gets better each time."""
    outputs = [
        output
        for record in results["boiling-water", LARGE].records
        for output in record.critic_outputs
        if output["reason"] != "no answer yet"
    ]
    assert [output["score"] for output in outputs] == [0.25, 0.75, 1.0]
    assert [output["action"] for output in outputs] == ["retry", "retry", "continue"]
    assert outputs[0]["reason"] == "does not mention 70, almanac, 8849"


def test_step_began_is_called_for_each_step(tmp_path: Path) -> None:
    """The callback that moves the progress bar is called once a step, failing steps included."""
    steps: list[int] = []
    demo = next(demo for demo in TASKS if demo.stop_reason == "unrecoverable_error")
    run_task(demo, tmp_path, step_began=lambda: steps.append(1))
    assert len(steps) == len(demo.replies)


def test_the_demo_leaves_nothing_in_the_working_directory(tmp_path: Path) -> None:
    """QitOS's own run directories are off: stdout and the working directory are the demo's."""
    workspace = tmp_path / "desk"
    workspace.mkdir()
    run_task(TASKS[0], workspace, step_began=lambda: None)
    assert [path.name for path in Path.cwd().iterdir() if path != workspace] == []


def test_tools_do_what_they_say(tmp_path: Path) -> None:
    """The calculator calculates and refuses code, the search finds, notes stay in their place."""
    assert calculate("-(2+3)*4/8") == -2.5
    with pytest.raises(ValueError, match="cannot calculate"):
        calculate("__import__('os')")
    assert search_almanac("how long is a marathon", top=1) == ["A marathon is 42195 metres long."]
    notes = Notes(tmp_path)
    notes.write_note("a.txt", "b")
    assert notes.read_note("a.txt") == "b"
    with pytest.raises(FileNotFoundError, match=r"the notes are: a\.txt"):
        notes.read_note("b.txt")
    with pytest.raises(ValueError, match="plain name"):
        notes.read_note("../a.txt")
