"""Every way a run can fail: spans closed in reverse order, trace ended once, exception unchanged.

The fixture checks after each test that everything was closed once, children before parents.
"""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from qitos import Decision, Engine, Task
from qitos.core.state import StateValidationError
from qitos.engine import RuntimeBudget
from qitos.engine.hooks import EngineHook

from qitos_mlflow import bridge, tracing
from tests.bridge.agents import FINAL, Model, ModelAgent, ScriptAgent, act, toolbox
from tests.bridge.test_run import Judge
from tests.fakes.recorder import Recorder
from tests.undo import uninstall


def outcome(recorder: Recorder) -> tuple[Any, Any, Any]:
    """Status, stop reason and error of the only trace."""
    metadata = recorder.only().metadata
    assert metadata["success"] is (metadata["status"] == "ok")
    return metadata["status"], metadata["stop_reason"], metadata.get("error")


def failed(recorder: Recorder) -> list[str]:
    """The types of the spans with an error, outermost first."""
    return [node.type for node in recorder.nodes.values() if node.error is not None]


def test_a_model_that_raises_ends_the_run_as_the_host_says(recorder: Recorder) -> None:
    """An exception the Engine gives up on: the result is returned, the trace is an error."""
    error = RuntimeError("no such model")
    result = ModelAgent(Model(error)).run("sum", return_state=True, render=False)
    assert result.state.stop_reason == "unrecoverable_error"
    assert outcome(recorder) == ("error", "unrecoverable_error", "RuntimeError: no such model")
    assert failed(recorder) == ["agent", "step", "decide", "generation"]
    assert all(node.exception is error for node in recorder.nodes.values())
    assert recorder.only().error is None


def test_a_model_that_recovers_leaves_a_failed_step_in_a_fine_run(recorder: Recorder) -> None:
    """A network error followed by an answer: the step failed, the run did not."""
    result = ModelAgent(Model(ConnectionError("reset"), FINAL)).run(
        "sum", return_state=True, render=False
    )
    assert result.state.stop_reason == "final"
    assert outcome(recorder) == ("ok", "final", None)
    first, second = recorder.of("step")
    assert first.error == "ConnectionError: reset"
    assert first.output == {"ended_by": "RECOVER"}
    assert second.error is None
    assert failed(recorder) == ["step", "decide", "generation"]


def test_an_agent_that_uses_up_its_state_raises_and_is_told_apart(recorder: Recorder) -> None:
    """Garbage until the state's steps are used: the host raises, the stop reason is max_steps."""
    engine: Any = Engine(agent=ModelAgent(Model(""), max_steps=3))
    with pytest.raises(StateValidationError):
        engine.run("sum")
    status, reason, error = outcome(recorder)
    assert (status, reason) == ("error", "max_steps")
    assert error.startswith("StateValidationError: ")
    assert recorder.only().error.__class__ is StateValidationError
    assert recorder.of("agent")[0].error == error


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt(), SystemExit(3)])
def test_an_interrupt_in_the_model_goes_through_every_open_span(
    recorder: Recorder, interrupt: BaseException
) -> None:
    """Stopping the program closes generation, decide, step and agent, and goes on as it was."""
    with pytest.raises(type(interrupt)) as caught:
        ModelAgent(Model(interrupt)).run("sum", render=False)
    assert caught.value is interrupt
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    assert outcome(recorder)[:2] == ("interrupted", "interrupted")
    assert failed(recorder) == ["agent", "step", "decide", "generation"]
    assert recorder.only().error is interrupt
    if isinstance(interrupt, KeyboardInterrupt):
        assert recorder.of("generation")[0].error == "KeyboardInterrupt"


def test_an_interrupt_in_a_tool_closes_the_tool_too(recorder: Recorder) -> None:
    """Stopping the program inside a tool closes tool, act, step and agent."""

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ScriptAgent(act("stop"), tools=toolbox(stop=stop)).run("sum", render=False)
    assert failed(recorder) == ["agent", "step", "act", "tool"]


def test_a_critic_that_raises_is_the_critic_that_failed(recorder: Recorder) -> None:
    """An exception of one critic leaves the run, and only its span and those around it fail."""
    error = ZeroDivisionError("taste")
    critics = [Judge({"action": "continue"}, "calm"), Judge(error, "angry")]
    with pytest.raises(ZeroDivisionError) as caught:
        Engine(agent=ScriptAgent(Decision.final("x")), critics=critics).run("sum")
    assert caught.value is error
    assert outcome(recorder) == ("error", "unrecoverable_error", "ZeroDivisionError: taste")
    errors = {node.data["critic_name"]: node.error for node in recorder.of("critic")}
    assert errors == {"calm": None, "angry": "ZeroDivisionError: taste"}


def test_init_state_that_raises_is_a_failed_trace_without_steps(recorder: Recorder) -> None:
    """A run that fails before the host calls any hook still leaves an ended trace."""

    class Broken(ScriptAgent):
        def init_state(self, task: str, **kwargs: Any) -> Any:
            raise LookupError(task)

    with pytest.raises(LookupError):
        Broken(Decision.final("x")).run("sum", render=False)
    assert recorder.tree() == ["agent"]
    assert outcome(recorder) == ("error", "unrecoverable_error", "LookupError: sum")
    assert recorder.only().metadata["qitos_run_id"]


def test_a_rejected_task_is_an_error_with_the_hosts_reason(recorder: Recorder) -> None:
    """A task that fails validation before the first step ends the trace as an error."""
    Engine(agent=ScriptAgent(Decision.final("x"))).run(Task(id="t", objective=""))
    status, reason, error = outcome(recorder)
    assert (status, reason) == ("error", "task_validation_failed")
    assert "objective" in error
    assert recorder.tree() == ["agent"]


def test_should_stop_that_raises_leaves_the_run(recorder: Recorder) -> None:
    """An exception from the agent's own stop condition closes the step it happened in."""

    class Broken(ScriptAgent):
        def should_stop(self, state: Any) -> bool:
            raise OverflowError("never")

    with pytest.raises(OverflowError):
        Broken(act("add", a=1, b=1)).run("sum", render=False)
    assert failed(recorder) == ["agent", "step"]


def test_reduce_that_raises_is_the_phase_that_failed(recorder: Recorder) -> None:
    """An exception in reduce fails reduce, step and agent; decide and act went well."""

    class Broken(ScriptAgent):
        def reduce(self, state: Any, observation: Any, decision: Any) -> Any:
            raise KeyError("memory")

    Broken(act("add", a=1, b=1)).run("sum", render=False)
    assert outcome(recorder)[:2] == ("error", "unrecoverable_error")
    assert failed(recorder) == ["agent", "step", "reduce"]


def test_acting_without_tools_names_the_action_that_failed(recorder: Recorder) -> None:
    """An act phase that fails before any tool runs names the action and has the error."""
    engine: Any = Engine(agent=ScriptAgent(act("add", a=1, b=1)), budget=RuntimeBudget(max_steps=1))
    engine.executor = None
    engine.run("sum")
    (acting,) = recorder.of("act")
    assert acting.data["action_name"] == "add"
    assert acting.error is not None


def test_the_traceback_gets_one_frame_of_ours_at_most(recorder: Recorder) -> None:
    """An exception that leaves a run passes through one function of the bridge."""
    error = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError) as caught:
        Engine(agent=ScriptAgent(Decision.final("x")), critics=[Judge(error)]).run("sum")
    names = [entry.path for entry in caught.traceback]
    assert len([name for name in names if "bridge/calls.py" in str(name)]) == 1


def test_processors_of_a_host_find_the_exception_in_sys_exc_info(recorder: Recorder) -> None:
    """The trace ends inside the exception's handler: a host's own trace has it no other way."""
    seen: list[Any] = []

    class Looking(tracing.NoOpTraceProcessor):
        def on_trace_end(self, trace: Any) -> None:
            seen.append(sys.exc_info()[1])

    looking = Looking()
    tracing.add_trace_processor(looking)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            ModelAgent(Model(KeyboardInterrupt())).run("sum", render=False)
    finally:
        tracing.remove_trace_processor(looking)
    assert seen == [caught.value]


def test_what_a_failed_tool_held_is_let_go_at_once(recorder: Recorder) -> None:
    """Local variables of a tool that raised do not live until the end of the run."""

    class Resource:
        pass

    alive: list[weakref.ref[Resource]] = []
    gone: list[bool] = []

    def leak() -> None:
        resource = Resource()
        alive.append(weakref.ref(resource))
        raise ValueError("leak")

    def look() -> str:
        gc.collect()
        gone.append(alive[0]() is None)
        return "ok"

    class Forgetful(Recorder):
        def on_span_end(self, span: Any) -> None:
            super().on_span_end(span)
            self.nodes[span.span_id].exception = None

    tracing.remove_trace_processor(recorder)
    forgetful = Forgetful()
    tracing.add_trace_processor(forgetful)
    try:
        tools = toolbox(leak=leak, look=look)
        ScriptAgent(act("leak"), act("look"), Decision.final("x"), tools=tools).run(
            "t", render=False
        )
    finally:
        tracing.remove_trace_processor(forgetful)
    assert gone == [True]


def test_our_own_bugs_never_reach_the_agent(
    recorder: Recorder,
    swallowed: list[tuple[str, BaseException]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With every extraction failing, the agent's result is the same and every span is closed."""
    from qitos_mlflow.bridge import extract, run

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise TypeError("our bug")

    for name in ("decision", "messages", "response", "tool_result"):
        monkeypatch.setattr(extract, name, broken)
    monkeypatch.setattr(run, "outcome_of", broken)
    agent = ModelAgent(Model("Thought: sum\nAction: add(a=19, b=23)", FINAL))
    assert agent.run("sum", render=False) == "42"
    places = [where for where, _ in swallowed]
    assert {"bridge.on_event", "bridge.on_after_decide", "bridge.tool", "bridge.outcome"} <= set(
        places
    )
    assert places.count("bridge.on_after_decide") == 2, "once a step: the host saw no TypeError"
    swallowed.clear()


def test_a_run_is_the_same_when_tracing_it_cannot_begin(
    recorder: Recorder,
    swallowed: list[tuple[str, BaseException]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If our set-up fails the original is called, exactly once."""
    from qitos_mlflow.bridge import extract

    def broken(*args: Any) -> Any:
        raise RuntimeError("our bug")

    monkeypatch.setattr(extract, "run_metadata", broken)
    llm = Model(FINAL)
    assert ModelAgent(llm).run("sum", render=False) == "42"
    assert len(llm.asked) == 1
    assert recorder.started == []
    assert [where for where, _ in swallowed] == ["bridge.begin"]
    swallowed.clear()


def test_a_processor_that_raises_everywhere_changes_nothing(
    installed: None, swallowed: list[tuple[str, BaseException]]
) -> None:
    """A processor that raises does not harm the agent on whose thread it runs."""

    class Broken(tracing.TraceProcessor):
        def on_trace_start(self, trace: Any) -> None:
            raise OSError

        on_trace_end = on_span_start = on_span_end = on_trace_start

    broken = Broken()
    tracing.add_trace_processor(broken)
    try:
        assert ModelAgent(Model(FINAL)).run("sum", render=False) == "42"
    finally:
        tracing.remove_trace_processor(broken)
    swallowed.clear()


def test_users_hooks_stay_as_they_were(recorder: Recorder) -> None:
    """The list of hooks is the same object with the same hooks in the same order afterwards."""
    one, two = EngineHook(), EngineHook()
    for script in ((Decision.final("x"),), (act("add", a=1, b=1), KeyboardInterrupt())):
        engine: Any = Engine(agent=ScriptAgent(*script), hooks=[one, two])
        hooks = engine.hooks
        try:
            engine.run("sum")
        except KeyboardInterrupt:
            pass
        assert engine.hooks is hooks
        assert hooks == [one, two]


def test_a_run_that_clears_its_hooks_is_closed_anyway(recorder: Recorder) -> None:
    """``clear_hooks`` in the middle costs the rest of the steps, not the end."""
    engine: Any = Engine(agent=ScriptAgent())

    def clear() -> Any:
        engine.clear_hooks()
        return Decision.final("x")

    engine.agent.script = [act("add", a=1, b=1), clear]
    engine.run("sum")
    assert recorder.only().metadata["stop_reason"] == "final"


@pytest.mark.parametrize("script", [(act("add", a=1, b=1), Decision.final("x")), (act("fail"),)])
def test_the_hosts_own_files_are_the_same(tmp_path: Path, script: tuple[Any, ...]) -> None:
    """The run directory has the same events and steps with and without the bridge."""

    def files(name: str) -> dict[str, Any]:
        ScriptAgent(*script, max_steps=3).run(
            "sum", render=False, max_steps=3, trace_logdir=str(tmp_path / name)
        )
        (directory,) = (tmp_path / name).iterdir()
        lines = {
            path.name: [sorted(json.loads(line)) for line in path.read_text().splitlines()]
            for path in directory.glob("*.jsonl")
        }
        manifest = json.loads((directory / "manifest.json").read_text())
        return {**lines, "manifest": sorted(manifest), "status": manifest["status"]}

    plain = files("plain")
    bridge.install()
    recorder = Recorder()
    tracing.add_trace_processor(recorder)
    try:
        traced = files("traced")
    finally:
        tracing.remove_trace_processor(recorder)
        uninstall()
    assert recorder.ended
    assert plain["events.jsonl"]
    assert traced == plain
