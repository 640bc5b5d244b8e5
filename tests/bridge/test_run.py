"""What a run that goes well leaves: the tree, and what each span says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qitos import Decision, Engine, Task
from qitos.core.task import TaskBudget
from qitos.engine import RuntimeBudget
from qitos.engine.critic import Critic
from qitos.models import GeminiModel

from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, ScriptAgent, act, answer, toolbox
from tests.fakes.recorder import Recorder

STEP_WITH_MODEL = ["decide", ["generation"], "act", ["tool"], "reduce"]
LAST_WITH_MODEL = ["decide", ["generation"], "reduce"]


def test_the_tree_of_a_run_has_every_phase_below_its_step(recorder: Recorder) -> None:
    """A run of two steps is an agent span over step spans over their phases."""
    ModelAgent(Model(ADD, FINAL)).run("sum", render=False)
    assert recorder.tree() == ["agent", ["step", STEP_WITH_MODEL, "step", LAST_WITH_MODEL]]


def test_the_trace_says_what_ran_and_how_it_ended(recorder: Recorder) -> None:
    """Trace metadata names agent, model, protocol, tools, run directory, and the outcome."""
    result = ModelAgent(Model(ADD, FINAL)).run("sum", return_state=True, render=False)
    trace = recorder.only()
    metadata = trace.metadata
    assert trace.name == "asker"
    assert result.state.final_result == "42"
    assert metadata == {
        "agent_name": "asker",
        "task": "sum",
        "model_name": "scripted-1",
        "model_family": "scripted",
        "protocol": "react_text_v1",
        "max_steps": 10,
        "qitos_version": "0.3.0",
        "qitos_run_id": metadata["qitos_run_id"],
        "qitos_run_dir": metadata["qitos_run_dir"],
        "tools": ["add", "fail"],
        "stop_reason": "final",
        "final_result": "42",
        "success": True,
        "status": "ok",
    }
    manifest = json.loads((Path(metadata["qitos_run_dir"]) / "manifest.json").read_text())
    assert manifest["run_id"] == metadata["qitos_run_id"]
    at_start = recorder.start_metadata[trace.trace_id]
    assert at_start["agent_name"] == "asker"
    assert "stop_reason" not in at_start


def test_a_task_brings_its_benchmark_and_budget(recorder: Recorder) -> None:
    """Task id, benchmark, split, seed and step budget are metadata. It is no group of its own."""
    task = Task(
        id="gaia-17",
        objective="sum",
        budget=TaskBudget(max_steps=4),
        metadata={"benchmark": "gaia", "split": "validation", "seed": 7},
    )
    Engine(agent=ModelAgent(Model(FINAL))).run(task)
    trace = recorder.only()
    expected = {
        "task_id": "gaia-17",
        "task": "sum",
        "benchmark_name": "gaia",
        "benchmark_split": "validation",
        "seed": 7,
        "max_steps": 4,
    }
    assert {key: trace.metadata[key] for key in expected} == expected
    assert trace.group_id is None
    assert trace.metadata["qitos_run_id"].startswith("run_")
    assert "qitos_run_dir" not in trace.metadata


def test_a_task_given_by_keyword_is_the_same_task(recorder: Recorder) -> None:
    """``engine.run(task=…)`` is traced like ``engine.run(…)``."""
    Engine(agent=ModelAgent(Model(FINAL))).run(task="by name")
    assert recorder.only().metadata["task"] == "by name"


def test_a_generation_has_messages_output_model_and_usage(recorder: Recorder) -> None:
    """A generation span holds what was sent, what came back, and what it cost in tokens."""
    calls = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    usage = {"input_tokens": 11, "output_tokens": 5, "cache_read_input_tokens": 4}
    llm = Model(
        answer(
            FINAL,
            usage=usage,
            model_name="scripted-1-2026",
            provider="offline",
            finish_reason="stop",
            tool_calls=calls,
            metadata={"id": "r1"},
        )
    )
    ModelAgent(llm).run("sum", render=False)
    (generation,) = recorder.of("generation")
    data = generation.data
    assert data["model"] == "scripted-1-2026"
    assert data["input_content"] == llm.asked[0]
    assert data["input_content"][-1] == {"role": "user", "content": "task: sum"}
    assert data["output_content"] == FINAL
    assert data["token_usage"] == {
        "prompt_tokens": 15,
        "completion_tokens": 5,
        "total_tokens": 20,
        "cache_read_tokens": 4,
    }
    assert data["model_response"] == {
        "usage": usage,
        "finish_reason": "stop",
        "tool_calls": calls,
        "model_name": "scripted-1-2026",
        "provider": "offline",
        "metadata": {"id": "r1"},
    }


def test_thoughts_of_the_hosts_gemini_are_counted(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host's own model hands on prompt, answer and total; what is missing was thought."""

    class Answer:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

        def raise_for_status(self) -> None: ...

        def json(self) -> Any:
            counts = {"promptTokenCount": 10, "candidatesTokenCount": 5, "totalTokenCount": 115}
            return {
                "candidates": [{"content": {"parts": [{"text": "42"}]}}],
                "usageMetadata": {**counts, "thoughtsTokenCount": 100},
            }

    monkeypatch.setattr("requests.post", Answer)
    agent = ModelAgent(GeminiModel(api_key="none"))
    Engine(agent=agent, budget=RuntimeBudget(max_steps=1)).run("sum")
    assert recorder.of("generation")[0].data["token_usage"] == {
        "prompt_tokens": 10,
        "completion_tokens": 105,
        "total_tokens": 115,
    }


def test_estimated_tokens_never_pass_for_real_ones(recorder: Recorder) -> None:
    """A model that reports no usage gets none, though the host estimates some."""
    result = ModelAgent(Model(FINAL)).run("sum", return_state=True, render=False)
    assert result.task_result.metrics["token_usage"] > 0
    assert recorder.of("generation")[0].data["token_usage"] is None


def test_messages_are_those_of_the_call_even_if_the_model_changes_its_list(
    recorder: Recorder,
) -> None:
    """A model that appends to the list it was given does not change what is recorded."""

    class Greedy(Model):
        def __call__(self, messages: Any, **options: Any) -> Any:
            messages.append({"role": "assistant", "content": "mine"})
            return super().__call__(messages, **options)

    ModelAgent(Greedy(FINAL)).run("sum", render=False)
    sent = recorder.of("generation")[0].data["input_content"]
    assert [message["role"] for message in sent] == ["system", "user"]


def test_a_cached_answer_has_no_usage_of_its_own(recorder: Recorder) -> None:
    """A caching model that repeats the usage of its last miss is not counted again."""

    class Cached(Model):
        _hits = 0

        def __init__(self, *script: Any) -> None:
            super().__init__(*script)
            self._hits = 0

        def __call__(self, messages: Any, **options: Any) -> Any:
            self._hits += len(self.asked)
            return super().__call__(messages, **options)

    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    ModelAgent(Cached(answer(ADD, usage=usage), answer(FINAL, usage=usage))).run(
        "sum", render=False
    )
    first, second = recorder.of("generation")
    assert first.data["token_usage"] == usage
    assert second.data["token_usage"] is None
    assert second.data["model_response"]["cached"] is True


def test_a_tool_span_has_arguments_result_and_how_it_went(recorder: Recorder) -> None:
    """A tool span holds arguments and result, and in its output attempts, latency and status."""
    ScriptAgent(act("add", a=19, b=23), Decision.final("42")).run("sum", render=False)
    (tool,) = recorder.of("tool")
    assert tool.data == {
        "type": "tool",
        "tool_name": "add",
        "tool_args": {"a": 19, "b": 23},
        "output_content": 42,
    }
    assert (tool.output["status"], tool.output["attempts"], tool.error) == ("success", 1, None)
    assert isinstance(tool.output["latency_ms"], float)
    (acting,) = recorder.of("act")
    assert acting.data["action_name"] is None, "one call would count twice"
    assert acting.data["output_content"] == [42]


def test_a_tool_error_is_the_tools_not_the_runs(recorder: Recorder) -> None:
    """A tool that raises has the exception on its span; the run that recovers is fine."""
    agent = ScriptAgent(act("fail", why="full moon"), Decision.final("anyway"))
    assert agent.run("try", render=False) == "anyway"
    (tool,) = recorder.of("tool")
    assert tool.error == "ValueError: full moon"
    assert isinstance(tool.exception, ValueError)
    assert tool.exception.__traceback__ is not None
    assert tool.data["output_content"] == {"error": "full moon"}
    assert tool.output["error_category"] == "runtime_error"
    assert [node.type for node in recorder.nodes.values() if node.error] == ["tool"]
    assert recorder.only().metadata["status"] == "ok"


def test_an_unknown_tool_is_a_failed_tool_span(recorder: Recorder) -> None:
    """A tool that does not exist was still called by the agent."""
    ScriptAgent(act("nope"), Decision.final("x")).run("try", render=False)
    (tool,) = recorder.of("tool")
    assert tool.data["tool_name"] == "nope"
    assert tool.error is not None
    assert "nope" in tool.error


def test_retries_are_one_tool_span(recorder: Recorder) -> None:
    """A tool called again until it works is one span that counts the attempts, without error."""
    left = [OSError("busy"), OSError("busy")]

    def flaky() -> str:
        if left:
            raise left.pop()
        return "there"

    decision = act("flaky")
    decision.actions[0].max_retries = 2
    agent = ScriptAgent(decision, Decision.final("x"), tools=toolbox(flaky=flaky))
    agent.run("try", render=False)
    (tool,) = recorder.of("tool")
    assert (tool.output["attempts"], tool.error, tool.exception) == (3, None, None)


def test_a_tool_that_says_it_failed_did(recorder: Recorder) -> None:
    """A result whose status is an error makes the span one, though nothing was raised."""

    def refuse() -> dict[str, str]:
        return {"status": "error", "message": "not today"}

    agent = ScriptAgent(act("refuse"), Decision.final("x"), tools=toolbox(refuse=refuse))
    agent.run("try", render=False)
    assert recorder.of("tool")[0].error == "error: not today"


def test_several_tools_of_one_step_are_siblings(recorder: Recorder) -> None:
    """Each action of a decision is a tool span below the same act span."""
    decision = act("add", a=1, b=2)
    decision.actions += act("add", a=3, b=4).actions
    ScriptAgent(decision, Decision.final("x")).run("try", render=False)
    (acting,) = recorder.of("act")
    tools = recorder.children(acting.span.span_id)
    assert [node.data["output_content"] for node in tools] == [3, 7]


def test_an_action_without_a_tool_span_is_named_by_its_act_span(recorder: Recorder) -> None:
    """If a host's executor is not the one we know, the act span is the call's."""

    class OtherExecutor:
        def execute(self, actions: Any, env: Any = None, state: Any = None) -> list[Any]:
            from qitos.core.action import ActionResult, ActionStatus

            return [ActionResult(a.name, ActionStatus.SUCCESS, output="done") for a in actions]

    engine: Any = Engine(agent=ScriptAgent(act("add", a=1, b=2), Decision.final("x")))
    engine.executor = OtherExecutor()
    engine.run("try")
    (acting,) = recorder.of("act")
    assert acting.data["action_name"] == "add"
    assert acting.data["tool_args"] == {"a": 1, "b": 2}
    assert recorder.of("tool") == []


def test_steps_carry_number_observation_and_decision(recorder: Recorder) -> None:
    """Step spans count as the engine counts and hold what was seen and decided."""
    ScriptAgent(act("add", a=19, b=23), Decision.final("42", rationale="done")).run(
        "sum", render=False
    )
    one, two = recorder.of("step")
    assert (one.data["step_number"], two.data["step_number"]) == (0, 1)
    assert one.data["observation"]["action_results"] == [42]
    assert one.data["decision"] == {
        "mode": "act",
        "actions": [{"name": "add", "args": {"a": 19, "b": 23}}],
    }
    assert two.data["decision"] == {"mode": "final", "final_answer": "42", "rationale": "done"}
    assert two.output == {"ended_by": "CHECK_STOP"}
    decide = recorder.of("decide")[1]
    assert decide.data["input_content"]["action_results"] == [42]
    assert decide.data["output_content"] == two.data["decision"]


def test_reduce_carries_the_state_diff(recorder: Recorder) -> None:
    """A reduce span says how many results went in and what changed."""
    ScriptAgent(act("add", a=1, b=1), Decision.final("x")).run("sum", render=False)
    reduce = recorder.of("reduce")[0]
    assert reduce.data["input_count"] == 1
    assert reduce.data["output_content"] == {"seen": {"before": [], "after": ["act"]}}


class Judge(Critic):
    """Gives a fixed verdict."""

    def __init__(self, verdict: Any, name: str | None = None) -> None:
        self.verdict = verdict
        if name is not None:
            self.name = name

    def evaluate(self, state: Any, decision: Any, results: Any) -> Any:
        if isinstance(self.verdict, BaseException):
            raise self.verdict
        return self.verdict() if callable(self.verdict) else self.verdict


def test_each_critic_is_a_span_with_its_verdict(recorder: Recorder) -> None:
    """Critic spans are siblings, named, with a score exactly where the critic gave one."""
    critics = [
        Judge(
            {"action": "continue", "reason": "fine", "score": 0.25, "details": {"n": 1}}, "taste"
        ),
        Judge({"action": "continue", "reason": "no opinion"}),
        Judge("not a dict"),
    ]
    Engine(agent=ScriptAgent(Decision.final("x")), critics=critics).run("sum")
    (step,) = recorder.of("step")
    spans = recorder.of("critic")
    assert {node.parent_id for node in spans} == {step.span.span_id}
    assert [node.data["critic_name"] for node in spans] == ["taste", "Judge", "Judge"]
    assert [node.data["score"] for node in spans] == [0.25, None, None]
    assert spans[0].data["output_content"]["reason"] == "fine"
    assert spans[0].data["input_content"]["decision"] == {"mode": "final", "final_answer": "x"}
    assert [node.output for node in spans] == [{"judged_by_model": False}] * 3


@pytest.mark.parametrize("attribute", ["llm", "model"])
def test_a_critic_with_a_model_is_told_apart(recorder: Recorder, attribute: str) -> None:
    """A verdict says whether a model or a rule gave it."""
    critic = Judge({"action": "continue", "score": 1})
    setattr(critic, attribute, Model(FINAL))
    Engine(agent=ScriptAgent(Decision.final("x")), critics=[critic]).run("sum")
    assert recorder.of("critic")[0].output == {"judged_by_model": True}


@pytest.mark.parametrize(
    ("verdict", "reason", "steps"), [("stop", "critic_stop", 1), ("retry", "budget_steps", 2)]
)
def test_a_critic_can_end_a_step_early(
    recorder: Recorder, verdict: str, reason: str, steps: int
) -> None:
    """Stop and retry end the step at the critic; the stop reason is the host's."""
    engine: Any = Engine(
        agent=ScriptAgent(act("add", a=1, b=1)),
        critics=[Judge({"action": verdict, "reason": "because", "score": 1})],
        budget=RuntimeBudget(max_steps=2),
    )
    engine.run("sum")
    assert recorder.only().metadata["stop_reason"] == reason
    assert [node.output for node in recorder.of("step")] == [{"ended_by": "CRITIC"}] * steps


def test_running_out_of_steps_is_not_an_error(recorder: Recorder) -> None:
    """A used-up budget ends the run without success and without error."""
    engine: Any = Engine(agent=ScriptAgent(act("add", a=1, b=1)), budget=RuntimeBudget(max_steps=2))
    engine.run("sum")
    metadata = recorder.only().metadata
    assert (metadata["stop_reason"], metadata["status"], metadata["success"]) == (
        "budget_steps",
        "ok",
        False,
    )
    assert "error" not in metadata
    assert recorder.of("agent")[0].error is None


def test_waiting_steps_have_no_act_span(recorder: Recorder) -> None:
    """A decision not to act makes no act span, though the host announces one."""
    ScriptAgent(Decision.wait("hm"), Decision.final("x")).run("sum", render=False)
    assert recorder.of("act") == []


def test_the_agent_span_has_model_tools_and_the_answer(recorder: Recorder) -> None:
    """The agent span names model and tools; its output is the final result."""
    ModelAgent(Model(FINAL)).run("sum", render=False)
    (agent,) = recorder.of("agent")
    assert (agent.parent_id, agent.error, agent.output) == (None, None, "42")
    assert agent.data["name"] == "asker"
    assert agent.data["model"] == "scripted-1"
    assert agent.data["tools"] == ["add", "fail"]
