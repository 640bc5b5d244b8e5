"""What only later hosts have, on the stand-in for one. Run by `test_later_hosts` in a process.

That process has the stand-in `qitos` in front of the real one, with its own `qitos.tracing`.
"""

from __future__ import annotations

import gc
import sys
import threading
from typing import Any

import pytest
from qitos.core import Action, Decision, Tools
from qitos.engine.critic_result import CriticResult
from qitos.engine.engine import Agent, Engine
from qitos.engine.interrupt import answers, interrupt
from qitos.kit.tool.agent.agent_tool import BackgroundAgent
from qitos.kit.tool.fanout import fan_out

from qitos_mlflow import bridge, tracing
from qitos_mlflow.bridge import calls, results
from qitos_mlflow.bridge.run import here
from tests.fakes.recorder import Recorder
from tests.hosts import BUILTIN_TRACING, run_on
from tests.interrupts import ctrl_c
from tests.undo import uninstall

WAIT_S = 20.0
FINAL = Decision("final", final_answer="42")


def act(*names: str, **args: Any) -> Decision:
    return Decision(
        "act", [Action(name, dict(args), action_id=f"tc{n}") for n, name in enumerate(names)]
    )


def add(a: int = 1, b: int = 1) -> int:
    return a + b


def agent(*script: Any, name: str = "main", **tools: Any) -> Any:
    return Agent(name, Tools(add=add, **tools), *script)


def test_a_resumed_run_names_the_one_before(recorder: Recorder) -> None:
    """Such a host gives the id of the run that it resumes in the place of the task."""
    Engine(agent(FINAL)).run("t")
    Engine(agent(FINAL)).run("run_before", _resume_state={"step": 3}, _resume_step=3)
    first, second = recorder.ended
    assert "resumed_from" not in first.metadata
    assert second.metadata["resumed_from"] == "run_before"


def test_the_host_has_tracing_and_it_is_used(recorder: Recorder) -> None:
    """Spans are the host's own objects, from its provider; its current span is never ours."""
    from qitos.tracing import models

    assert tracing.host_has_tracing
    Engine(agent(act("add"), FINAL)).run("t")
    assert type(recorder.only()) is models.Trace
    assert {type(node.span) for node in recorder.nodes.values()} == {models.Span}
    assert models.current.get() is None
    assert recorder.tree() == [
        "agent",
        ["step", ["decide", "act", ["tool"], "reduce"], "step", ["decide", "reduce"]],
    ]


def test_disabled_tracing_is_no_tracing(recorder: Recorder) -> None:
    """With the host's tracing off nothing is made, and the run runs."""
    tracing.set_tracing_mode(tracing.TracingMode.DISABLED)
    try:
        assert Engine(agent(FINAL)).run("t").state.final_result == "42"
    finally:
        tracing.set_tracing_mode(tracing.TracingMode.ENABLED)
    assert recorder.started == []


def test_without_data_the_hosts_redaction_is_kept(recorder: Recorder) -> None:
    """Under ENABLED_WITHOUT_DATA every span still ends, through the host's redaction."""
    tracing.set_tracing_mode(tracing.TracingMode.ENABLED_WITHOUT_DATA)
    try:
        Engine(agent(act("add", a=1, b=2), FINAL)).run("t")
    finally:
        tracing.set_tracing_mode(tracing.TracingMode.ENABLED)
    (tool,) = recorder.of("tool")
    assert tool.data["tool_args"] != {"a": 1, "b": 2}


def test_private_message_keys_are_not_recorded(recorder: Recorder) -> None:
    """The host's bookkeeping in messages (leading underscore) stays out; the message list stays."""
    main = agent(None)
    usage = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    main.llm = lambda messages: ("hi", {"usage": usage, "model_name": "m1"}, FINAL)
    Engine(main).run("t")
    (generation,) = recorder.of("generation")
    assert generation.data["input_content"] == [{"role": "user", "content": "t"}]
    assert generation.data["token_usage"] == usage
    assert generation.data["model"] == "m1"


def test_parallel_tools_are_siblings_below_their_act(recorder: Recorder) -> None:
    """Tools on pool threads, which have no context, still have the act span as parent."""
    meet = threading.Barrier(2, timeout=WAIT_S)
    idents: set[int] = set()

    def look(n: int = 0) -> int:
        idents.add(threading.get_ident())
        meet.wait()
        return n

    tools = Tools(parallel=["look"], look=look, add=add)
    Engine(Agent("main", tools, act("look", "add", "look"), FINAL)).run("t")
    assert len(idents) == 2
    (acting,) = recorder.of("act")
    assert acting.data["action_name"] is None
    children = recorder.children(acting.span.span_id)
    assert sorted(node.data["tool_name"] for node in children) == ["add", "look", "look"]
    assert sorted(node.output["action_id"] for node in children) == ["tc0", "tc1", "tc2"]


def test_a_delegate_under_a_time_limit_is_below_its_tool(recorder: Recorder) -> None:
    """An agent in a tool with a time limit, on another thread, is a subtree of that tool."""
    inner = agent(act("add"), FINAL, name="inner")
    tools = Tools(limits={"delegate": WAIT_S}, delegate=lambda: Engine(inner).run("part").run_id)
    Engine(Agent("main", tools, act("delegate"), act("delegate"), FINAL)).run("t")
    recorder.only()
    delegates = [node for node in recorder.of("tool") if node.data["tool_name"] == "delegate"]
    for node in delegates:
        (below,) = recorder.children(node.span.span_id)
        assert (below.type, below.data["name"]) == ("agent", "inner")
    assert len(delegates) == 2


def test_fanned_out_agents_are_below_their_tool(recorder: Recorder) -> None:
    """Agents that a fan-out runs at once are siblings below the tool that fanned out."""
    inner = [agent(FINAL, name=f"inner{n}") for n in range(3)]
    Engine(agent(act("fan"), FINAL, fan=lambda: fan_out(inner))).run("t")
    recorder.only()
    (fan,) = recorder.of("tool")
    names = sorted(node.data["name"] for node in recorder.children(fan.span.span_id))
    assert names == ["inner0", "inner1", "inner2"]


def test_a_background_agent_is_a_linked_trace(recorder: Recorder) -> None:
    """An agent that is meant to outlive the run has a trace of its own, linked to the tool."""
    background = BackgroundAgent()
    inner = agent(FINAL, name="inner")
    Engine(agent(act("start"), FINAL, start=lambda: background.start(inner))).run("t")
    background.future.result(WAIT_S)
    background.pool.shutdown()
    by_name = {trace.name: trace for trace in recorder.started}
    link = by_name["inner"].metadata
    assert link["linked_trace_id"] == by_name["main"].trace_id
    assert recorder.nodes[link["linked_span_id"]].type == "tool"


def test_a_tool_that_runs_out_of_time_fails_and_its_agent_goes_on(recorder: Recorder) -> None:
    """The tool span ends when the host gives up; what still runs ends in a linked trace."""
    recorder.outlives = True
    go, done = threading.Event(), threading.Event()

    def slow() -> str:
        assert go.wait(WAIT_S)
        return "late"

    inner = agent(act("slow"), FINAL, name="inner", slow=slow)

    def delegate() -> None:
        Engine(inner).run("part")
        done.set()

    tools = Tools(limits={"delegate": 0.2}, delegate=delegate)
    Engine(Agent("main", tools, act("delegate"), FINAL)).run("t")
    (outer,) = recorder.ended
    delegated = recorder.of("tool")[0]
    assert delegated.error == "timed_out_category: too slow"
    go.set()
    assert done.wait(WAIT_S)
    late = recorder.started[1]
    assert late.metadata["linked_trace_id"] == outer.trace_id
    assert late.metadata["status"] == "ok"


def test_pool_threads_do_not_get_the_hosts_own_context(recorder: Recorder) -> None:
    """Only our place is carried to pool threads: the host's variables stay as they would be."""
    seen: list[Any] = []
    tools = Tools(limits={"ask": WAIT_S}, ask=lambda: seen.append((answers.get(), here.get())))
    token = answers.set("yes")
    try:
        Engine(Agent("main", tools, act("ask"), FINAL)).run("t")
    finally:
        answers.reset(token)
    ((answer, place),) = seen
    assert answer is None
    assert place is not None


def test_a_handoff_is_a_span_of_its_step(recorder: Recorder) -> None:
    """Handing over to another agent is one span; the run stays the first agent's trace."""
    other = agent(FINAL, FINAL, name="other")
    handoff = Decision("handoff", meta={"handoff_target": "other"})
    Engine(agent(handoff), agents={"other": other}).run("t")
    assert recorder.tree() == [
        "agent",
        ["step", ["decide", "handoff"], "step", ["decide", "reduce"]],
    ]
    (span,) = recorder.of("handoff")
    assert span.data == {
        "type": "handoff",
        "from_agent": "main",
        "to_agent": "other",
        "output_content": None,
        "context_strategy": "full",
        "messages_passed": 3,
    }
    assert recorder.of("step")[0].output == {"ended_by": "HANDOFF_END"}
    assert recorder.only().name == "main"


def test_a_failed_handoff_leaves_the_run(recorder: Recorder) -> None:
    """An unknown target raises out of run(): the step and the trace are errors."""
    handoff = Decision("handoff", meta={"handoff_target": "nowhere"})
    with pytest.raises(ValueError, match="no agent nowhere"):
        Engine(agent(handoff)).run("t")
    assert recorder.only().metadata["status"] == "error"
    assert recorder.of("step")[0].error == "ValueError: no agent nowhere"


def test_a_cancelled_run_is_interrupted(recorder: Recorder) -> None:
    """Where only the last event knows that the run was cancelled, the trace knows too."""
    engine = Engine(agent())

    def stop() -> Any:
        engine.cancel()
        return act("add")

    engine.agent.script = [stop]
    engine.run("t")
    metadata = recorder.only().metadata
    assert (metadata["status"], metadata["stop_reason"]) == ("interrupted", "cancelled_immediate")


def test_an_interrupt_for_a_human_is_no_error(recorder: Recorder) -> None:
    """The host ends such a run as an unrecoverable error; it is an interruption."""
    Engine(agent(act("ask"), ask=lambda: interrupt("sure?"))).run("t")
    metadata = recorder.only().metadata
    assert (metadata["status"], metadata["error"]) == ("interrupted", "EngineInterrupt: sure?")


def test_an_action_the_host_blocks_is_named_by_its_act(recorder: Recorder) -> None:
    """A call stopped as a loop runs no tool and ends without a callback: the act span names it."""
    Engine(agent(act("loop"), FINAL)).run("t")
    (acting,) = recorder.of("act")
    assert acting.data["action_name"] == "loop"
    assert recorder.of("tool") == []


def test_a_score_the_host_made_up_is_none(recorder: Recorder) -> None:
    """Critics that gave no score have none, though the host records 1.0 for them."""

    class Says:
        def __init__(self, verdict: Any) -> None:
            self.verdict = verdict

        def evaluate(self, *args: Any) -> Any:
            return self.verdict

    verdicts = [{"reason": "a"}, CriticResult(score=1.0, reason="b"), {"score": 1.0}, {}]
    Engine(agent(FINAL), critics=[Says(verdict) for verdict in verdicts]).run("t")
    assert [node.data["score"] for node in recorder.of("critic")] == [None, 1.0, 1.0, None]


# -- the step-by-step API ----------------------------------------------------------------------


def test_a_session_is_one_trace(recorder: Recorder) -> None:
    """A session driven by hand is one trace from init_session to the step that stops."""
    engine = Engine(agent(act("add"), FINAL))
    state, observation = engine.init_session("t")
    assert here.get() is None
    run_id = engine._active_run_id
    assert engine.hooks == []
    stop = False
    while not stop:
        result = engine.step(state, observation)
        observation, stop = result.observation, result.stop
        assert engine.hooks == []
        assert here.get() is None
        assert results.trace_of(result) == recorder.started[0].trace_id
    metadata = recorder.only().metadata
    assert recorder.tree() == [
        "agent",
        ["step", ["decide", "act", ["tool"], "reduce"], "step", ["decide", "reduce"]],
    ]
    assert (metadata["status"], metadata["stop_reason"]) == ("ok", "final")
    assert metadata["final_result"] == "42"
    assert metadata["qitos_run_id"] == run_id
    assert not calls._sessions


def test_an_interrupt_in_our_own_code_leaves_no_hook(recorder: Recorder) -> None:
    """Ctrl-C just as the hook is taken out: the session goes on, and no step is traced twice."""

    class Hooks(list[Any]):
        interrupts = 1

        def __delitem__(self, index: Any) -> None:
            if self.interrupts:
                self.interrupts -= 1
                ctrl_c()
            super().__delitem__(index)

    engine = Engine(agent(act("add"), FINAL, FINAL))
    engine.hooks = Hooks()
    state, observation = engine.init_session("t")
    with pytest.raises(KeyboardInterrupt):
        engine.step(state, observation)
    assert engine.hooks == []
    assert engine.step(state, observation).stop
    assert len(recorder.of("decide")) == 2
    engine.hooks.interrupts = 1
    with pytest.raises(KeyboardInterrupt):
        engine.run("t")
    assert engine.hooks == []


def test_a_session_is_ended_by_one_thread_only(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever another thread comes between: here at each line, by a trace function."""
    ended: list[Any] = []
    end = calls.AgentRun.end
    monkeypatch.setattr(calls.AgentRun, "end", lambda run, **why: [ended.append(run), end(run)])
    codes = {function.__code__ for name, function in vars(calls).items() if "_end_s" in name}

    def between(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code not in codes:
            return None
        if event == "line" and frame.f_lineno == line:
            before = sys.gettrace()
            sys.settrace(None)
            calls._end_sessions()
            sys.settrace(before)
        return between

    for line in sorted({at for code in codes for *_, at in code.co_lines() if at}):
        Engine(agent(act("add"))).init_session("left")
        ended.clear()
        before = sys.gettrace()
        sys.settrace(between)
        calls._end_sessions()
        sys.settrace(before)
        assert len(ended) == 1, line


def test_a_session_open_at_exit_is_ended_before_its_processors_flush() -> None:
    """At exit the session's trace ends first, then what its processors registered runs."""
    script = """
        import atexit
        from qitos.core import Decision, Tools
        from qitos.engine.engine import Agent, Engine
        from qitos_mlflow import bridge, tracing

        class Late(tracing.NoOpTraceProcessor):
            def on_trace_start(self, trace):
                atexit.register(print, "flushed")

            def on_trace_end(self, trace):
                print("ended", trace.metadata["task"])

        bridge.install()
        tracing.add_trace_processor(Late())
        engine = Engine(Agent("main", Tools(), Decision("act")))
        engine.init_session("left")
    """
    assert run_on(BUILTIN_TRACING, script).split() == ["ended", "left", "flushed"]


def test_a_new_session_ends_the_one_before(recorder: Recorder) -> None:
    """init_session again, or run, on the same Engine ends the session that was going on."""
    engine = Engine(agent(act("add")), max_steps=1)
    engine.step(*engine.init_session("one"))
    engine.init_session("two")
    assert [trace.metadata["task"] for trace in recorder.ended] == ["one"]
    engine.run("three")
    assert [trace.metadata["task"] for trace in recorder.ended] == ["one", "two", "three"]


def test_a_session_ended_in_the_middle_of_its_step(recorder: Recorder) -> None:
    """A step in which a new session begins returns as it would without us."""

    class Resets:
        def on_after_reduce(self, ctx: Any, engine: Any) -> None:
            engine.hooks.remove(self)
            engine.init_session("two")

    engine = Engine(agent(act("add")))
    state, observation = engine.init_session("one")
    engine.hooks.append(Resets())
    assert engine.step(state, observation).observation == {"action_results": [2]}
    assert [trace.metadata["task"] for trace in recorder.ended] == ["one"]
    engine.run("three")
    assert [trace.metadata["task"] for trace in recorder.ended] == ["one", "two", "three"]


def test_a_session_whose_engine_is_gone_is_ended(recorder: Recorder) -> None:
    """An abandoned session ends with the next run, or at exit."""
    engine = Engine(agent(act("add")))
    engine.step(*engine.init_session("left"))
    del engine
    gc.collect()
    assert recorder.ended == []
    Engine(agent(FINAL)).run("next")
    assert [trace.metadata["task"] for trace in recorder.ended] == ["left", "next"]
    Engine(agent(act("add"))).init_session("last")
    gc.collect()
    calls._end_sessions()
    assert recorder.ended[-1].metadata["task"] == "last"


def test_a_session_step_that_raises_is_closed_and_the_session_goes_on(recorder: Recorder) -> None:
    """An exception leaves step() unchanged; the next step is part of the same trace."""
    engine = Engine(agent(KeyboardInterrupt(), act("add"), FINAL))
    state, observation = engine.init_session("t")
    with pytest.raises(KeyboardInterrupt):
        engine.step(state, observation)
    assert [node.error for node in recorder.of("step")] == ["KeyboardInterrupt"]
    for number in (1, 2):
        state.current_step = number
        engine.step(state, observation)
    assert recorder.only().metadata["status"] == "ok"
    assert len(recorder.of("step")) == 3


def test_a_session_left_after_an_error_is_an_error(recorder: Recorder) -> None:
    """A session that is not continued after a step that raised did not succeed."""
    engine = Engine(agent(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        engine.step(*engine.init_session("t"))
    engine.init_session("next")
    assert recorder.ended[0].metadata["status"] == "interrupted"
    calls._end_sessions()


def test_a_sessions_interrupt_ends_it_as_interrupted(recorder: Recorder) -> None:
    """A step that stops for a human ends the session's trace, interrupted."""
    engine = Engine(agent(act("ask"), ask=lambda: interrupt("sure?")))
    assert engine.step(*engine.init_session("t")).stop
    metadata = recorder.only().metadata
    assert (metadata["status"], metadata["stop_reason"]) == ("interrupted", "interrupt")


def test_a_session_that_gives_up_is_an_error(recorder: Recorder) -> None:
    """A step that the host cannot recover from ends the trace with its exception."""
    engine = Engine(agent(RuntimeError("no")))
    engine.step(*engine.init_session("t"))
    metadata = recorder.only().metadata
    assert (metadata["status"], metadata["error"]) == ("error", "RuntimeError: no")
    assert recorder.of("agent")[0].error == "RuntimeError: no"


def test_a_session_of_another_thread_can_be_ended_here(recorder: Recorder) -> None:
    """Spans started on one thread end on another, which this host's spans alone cannot."""
    engine = Engine(agent(act("add"), FINAL))
    begun: list[Any] = []
    thread = threading.Thread(target=lambda: begun.append(engine.init_session("t")))
    thread.start()
    thread.join(WAIT_S)
    state, observation = begun[0]
    engine.step(state, observation)
    engine.step(state, observation)
    assert recorder.only().metadata["stop_reason"] == "final"


def test_each_piece_is_replaced_once(recorder: Recorder) -> None:
    """Methods and thread pools are replaced with the first run, and once."""
    from concurrent.futures import ThreadPoolExecutor

    from qitos.engine import action_executor
    from qitos.kit.tool import fanout

    uninstall()
    methods = {
        Engine: ["run", "init_session", "step"],
        action_executor.ActionExecutor: ["_execute_one", "_call_tool"],
    }
    before = [vars(owner)[name] for owner, names in methods.items() for name in names]
    for _ in range(2):
        bridge.install()
        Engine(agent(FINAL)).run("t")
    now = [vars(owner)[name] for owner, names in methods.items() for name in names]
    assert [method.__wrapped__ for method in now] == before
    assert fanout.ThreadPoolExecutor is not ThreadPoolExecutor
    assert action_executor.ThreadPoolExecutor is not ThreadPoolExecutor
