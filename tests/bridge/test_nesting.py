"""Agents within agents, in threads, one after another and at once: true parents, nothing mixed."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from copy import deepcopy
from typing import Any

import pytest
from qitos import Decision, Engine

from qitos_mlflow import bridge, tracing
from qitos_mlflow.bridge.pools import BackgroundPool, ContextPool
from qitos_mlflow.bridge.run import here
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, ScriptAgent, act, toolbox
from tests.fakes.recorder import Recorder
from tests.undo import uninstall

WAIT_S = 20.0


def calling(body: Any) -> ScriptAgent:
    """An agent that calls one tool, ``work``, and then ends."""
    return ScriptAgent(act("work"), Decision.final("outer"), tools=toolbox(work=body))


def test_an_agent_in_a_tool_is_a_subtree_of_its_trace(recorder: Recorder) -> None:
    """An agent that a tool runs is an agent span below that tool's span; one trace in all."""
    inner = ModelAgent(Model(ADD, FINAL))
    calling(lambda: inner.run("inner", render=False)).run("outer", render=False)
    recorder.only()
    outer_agent, inner_agent = recorder.of("agent")
    (work, _) = recorder.of("tool")
    assert inner_agent.parent_id == work.span.span_id
    assert inner_agent.output == "42"
    assert inner_agent.data["task"] == "inner"
    assert "task" not in outer_agent.data  # Its trace has it.
    assert outer_agent.output == "outer"
    inner_tree = ["step", ["decide", ["generation"], "act", ["tool"], "reduce"]]
    inner_tree += ["step", ["decide", ["generation"], "reduce"]]
    assert recorder.tree() == [
        "agent",
        [
            *("step", ["decide", "act", ["tool", ["agent", inner_tree]], "reduce"]),
            *("step", ["decide", "reduce"]),
        ],
    ]
    assert recorder.only().metadata["agent_name"] == "script"
    assert recorder.only().metadata["final_result"] == "outer"


def test_a_nested_agent_that_fails_fails_alone(recorder: Recorder) -> None:
    """An exception in a nested agent that the outer one survives is on the nested spans only."""
    inner = ModelAgent(Model(RuntimeError("no")))
    calling(lambda: inner.run("inner", render=False)).run("outer", render=False)
    outer_agent, inner_agent = recorder.of("agent")
    assert (outer_agent.error, inner_agent.error) == (None, "RuntimeError: no")
    assert recorder.only().metadata["status"] == "ok"


def test_an_interrupt_closes_both_agents(recorder: Recorder) -> None:
    """Stopping the program in a nested agent closes the inner tree, then the outer one."""
    inner = ModelAgent(Model(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        calling(lambda: inner.run("inner", render=False)).run("outer", render=False)
    assert [node.error for node in recorder.of("agent")] == ["KeyboardInterrupt"] * 2


@pytest.mark.parametrize("where", ["decide", "reduce", "should_stop"])
def test_an_agent_started_in_a_phase_is_below_that_phase(recorder: Recorder, where: str) -> None:
    """Agents that an agent's own methods run are below the span of the phase they run in."""
    inner = ScriptAgent(Decision.final("inner"))

    class Outer(ScriptAgent):
        def decide(self, state: Any, observation: Any) -> Any:
            return self.call("decide") or super().decide(state, observation)

        def reduce(self, state: Any, observation: Any, decision: Any) -> Any:
            return self.call("reduce") or super().reduce(state, observation, decision)

        def should_stop(self, state: Any) -> bool:
            return bool(self.call("should_stop"))

        def call(self, phase: str) -> None:
            if phase == where:
                inner.run(phase, render=False)

    Outer(act("add", a=1, b=1), Decision.final("x")).run("outer", render=False)
    inner_agent = recorder.of("agent")[1]
    assert inner_agent.parent_id is not None
    parent = recorder.nodes[inner_agent.parent_id]
    assert parent.type == {"should_stop": "step"}.get(where, where)


def test_the_same_engine_in_its_own_tool_is_a_subtree_too(recorder: Recorder) -> None:
    """An Engine run from within itself confuses the host, not the trace."""
    engine: Any = None
    left = [True]

    def again() -> str:
        if left:
            left.pop()
            engine.run("inner")
        return "done"

    engine = Engine(agent=calling(again))
    engine.run("outer")
    recorder.only()
    outer_agent, inner_agent = recorder.of("agent")
    assert recorder.nodes[inner_agent.parent_id or ""].type == "tool"
    assert recorder.children(outer_agent.span.span_id)[0].type == "step"


def test_an_engine_copied_within_its_run_is_an_engine_of_its_own(recorder: Recorder) -> None:
    """What an agent tries on a deep copy of its Engine is a subtree, heard of once."""
    engine: Any = None

    def copied() -> str:
        copy = deepcopy(engine)
        copy.agent.script = [Decision.final("tried")]
        return str(copy.run("try").state.final_result)

    engine = Engine(agent=calling(copied))
    engine.run("outer")
    tried = ["agent", ["step", ["decide", "reduce"]]]
    assert recorder.tree() == [
        "agent",
        [
            *("step", ["decide", "act", ["tool", tried], "reduce"]),
            *("step", ["decide", "reduce"]),
        ],
    ]


def test_a_subclass_that_goes_through_run_is_traced_once(recorder: Recorder) -> None:
    """One call is one trace, however many of the Engine's classes take part in it."""

    class Mine(Engine[Any, Any, Any]):
        def run(self, task: Any, **kwargs: Any) -> Any:
            return super().run(task, **kwargs)

    class Yours(Mine):
        def run(self, task: Any, **kwargs: Any) -> Any:
            return super().run(task, **kwargs)

    Yours(agent=ScriptAgent(Decision.final("x"))).run("sum")
    assert recorder.tree() == ["agent", ["step", ["decide", "reduce"]]]


def test_an_engine_made_before_install_is_traced(recorder: Recorder) -> None:
    """Installing reaches the Engines that exist already."""
    uninstall()
    engine: Any = Engine(agent=ScriptAgent(Decision.final("x")))
    bridge.install()
    engine.run("sum")
    recorder.only()


def test_one_agent_in_eight_threads_is_sixteen_traces(recorder: Recorder) -> None:
    """Runs at once, of one agent object, end up in their own traces, whole and unmixed."""
    agent = ScriptAgent(act("add", a=1, b=1), act("fail"), Decision.final("x"))
    alone = ["agent", ["step", ["decide", "act", ["tool"], "reduce"]] * 2]
    alone[1] += ["step", ["decide", "reduce"]]

    def work(number: int) -> None:
        Engine(agent=agent).run(f"task {number}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(16)))
    assert len(recorder.started) == 16
    for trace in recorder.started:
        assert recorder.tree(trace) == alone
    tasks = Counter(trace.metadata["task"] for trace in recorder.started)
    assert tasks == Counter(f"task {number}" for number in range(16))


def test_one_engine_in_many_threads_still_closes_everything(recorder: Recorder) -> None:
    """An Engine shared by threads corrupts itself; each call is still one ended trace."""
    meet = threading.Barrier(3, timeout=WAIT_S)

    def work() -> str:
        meet.wait()
        return "done"

    engine: Any = Engine(agent=calling(work))
    failures: list[BaseException] = []

    def call() -> None:
        try:
            engine.run("shared")
        except Exception as error:  # the host's own confusion
            failures.append(error)

    threads = [threading.Thread(target=call) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(recorder.ended) == 3
    assert engine.hooks == []
    for trace in recorder.started:
        assert len(recorder.of("agent", trace.trace_id)) == 1


def test_asyncio_tasks_are_traces_of_their_own(recorder: Recorder) -> None:
    """Runs gathered in an event loop's threads are separate traces."""

    async def main() -> None:
        agents = [ScriptAgent(act("add", a=n, b=n), Decision.final("x")) for n in range(4)]
        await asyncio.gather(*(asyncio.to_thread(Engine(agent=a).run, "t") for a in agents))

    asyncio.run(main())
    assert len(recorder.ended) == 4


def test_agents_gathered_in_a_tool_are_siblings_below_it(recorder: Recorder) -> None:
    """A tool that awaits two agents at once has both below its span."""

    def work() -> list[Any]:
        async def both() -> list[Any]:
            agents = [ScriptAgent(act("add", a=n, b=n), Decision.final(f"{n}")) for n in (1, 2)]
            return await asyncio.gather(
                *(asyncio.to_thread(Engine(agent=agent).run, "t") for agent in agents)
            )

        return asyncio.run(both())

    calling(work).run("outer", render=False)
    recorder.only()
    (work_span,) = [n for n in recorder.of("tool") if n.data["tool_name"] == "work"]
    assert [node.type for node in recorder.children(work_span.span.span_id)] == ["agent"] * 2


def test_pool_threads_stand_where_their_work_was_submitted(recorder: Recorder) -> None:
    """Agents in the pool of a tool are below that tool; the pool's threads remember nothing."""

    def work() -> None:
        agents = [ScriptAgent(Decision.final(f"{n}")) for n in range(3)]
        with ContextPool(2) as pool:
            for future in [pool.submit(agent.run, "t", render=False) for agent in agents]:
                future.result(WAIT_S)
            assert ThreadPoolExecutor.submit(pool, here.get).result(WAIT_S) is None

    calling(work).run("outer", render=False)
    recorder.only()
    (work_span,) = recorder.of("tool")
    assert [node.type for node in recorder.children(work_span.span.span_id)] == ["agent"] * 3


def test_pools_outside_of_a_run_are_ordinary(recorder: Recorder) -> None:
    """A pool that replaces the host's passes tasks through if no run is traced."""
    for pool_class in (ContextPool, BackgroundPool):
        with pool_class(1) as pool:
            assert pool.submit(divmod, 7, 2).result(WAIT_S) == (3, 1)


def test_an_agent_in_the_background_is_a_linked_trace(recorder: Recorder) -> None:
    """Work that is meant to outlive its run gets a trace of its own that names where it began."""
    go = threading.Event()

    def inner_work() -> str:
        assert go.wait(WAIT_S)
        return "late"

    inner = calling(inner_work)
    pool = BackgroundPool(1)
    futures: list[Any] = []

    def work() -> str:
        futures.append(pool.submit(inner.run, "inner", render=False))
        return "started"

    calling(work).run("outer", render=False)
    go.set()
    assert futures[0].result(WAIT_S) == "outer"
    pool.shutdown()
    outer, late = sorted(recorder.started, key=lambda trace: "linked_trace_id" in trace.metadata)
    assert late.metadata["linked_trace_id"] == outer.trace_id
    linked = recorder.nodes[late.metadata["linked_span_id"]]
    assert (linked.type, linked.trace_id) == ("tool", outer.trace_id)
    assert recorder.tree(late)[0] == "agent"


def test_an_agent_started_after_its_parents_trace_is_linked(recorder: Recorder) -> None:
    """A context kept beyond the run leads to a linked trace, never to a span in an ended one."""
    contexts: list[Any] = []
    calling(lambda: contexts.append(copy_context())).run("outer", render=False)
    contexts[0].run(ScriptAgent(Decision.final("x")).run, "late", render=False)
    outer, late = recorder.started
    assert late.metadata["linked_trace_id"] == outer.trace_id


def test_an_agent_that_outlives_its_parent_goes_on_in_a_linked_trace(recorder: Recorder) -> None:
    """A child still running when its parent's trace ends loses no span and leaves none open."""
    recorder.outlives = True
    inside, go = threading.Event(), threading.Event()

    def inner_work() -> str:
        inside.set()
        assert go.wait(WAIT_S)
        return "late"

    inner = calling(inner_work)
    threads: list[threading.Thread] = []

    def work() -> str:
        context = copy_context()
        threads.append(
            threading.Thread(
                target=context.run, args=(inner.run, "inner"), kwargs={"render": False}
            )
        )
        threads[0].start()
        assert inside.wait(WAIT_S)
        return "gave up waiting"

    calling(work).run("outer", render=False)
    (outer,) = recorder.ended
    assert all(n.ends == 1 for n in recorder.nodes.values() if n.trace_id == outer.trace_id)
    go.set()
    threads[0].join(WAIT_S)
    _, late = recorder.started
    assert late.metadata["linked_trace_id"] == outer.trace_id
    assert recorder.nodes[late.metadata["linked_span_id"]].type == "agent"
    assert late.metadata["final_result"] == "outer"
    assert late.metadata["status"] == "ok"
    assert recorder.tree(late)[0] == "agent"
    steps = [n.data["step_number"] for n in recorder.of("step", late.trace_id)]
    assert steps == [0, 1]


def test_nothing_of_a_run_stays_in_the_threads_context(recorder: Recorder) -> None:
    """After a run, well or badly ended, the thread stands where it stood."""
    ScriptAgent(Decision.final("x")).run("sum", render=False)
    assert here.get() is None
    with pytest.raises(KeyboardInterrupt):
        ScriptAgent(KeyboardInterrupt()).run("sum", render=False)
    assert here.get() is None


def test_a_trace_of_the_users_own_is_left_alone(recorder: Recorder) -> None:
    """A run inside a user's ``with create_trace`` is a trace beside it; parents do not cross."""
    with tracing.create_trace("mine") as mine:
        span = mine.create_span(
            tracing.SpanType.CUSTOM, tracing.CustomSpanData(name="around")
        ).start()
        ScriptAgent(Decision.final("x")).run("sum", render=False)
        child = mine.create_span(
            tracing.SpanType.CUSTOM, tracing.CustomSpanData(name="after")
        ).start()
        child.finish()
        span.finish()
    assert child.parent_span_id == span.span_id
    assert recorder.of("agent")[0].parent_id is None
