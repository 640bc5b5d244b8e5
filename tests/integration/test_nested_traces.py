"""Agents within agents, read back from MLflow: subtrees with true parents, and linked traces."""

from __future__ import annotations

import os
import threading
from contextvars import copy_context
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Span, Trace, TraceState
from qitos import Decision

from tests.bridge.agents import ScriptAgent, act, toolbox
from tests.hosts import BUILTIN_TRACING
from tests.integration.logged import ROOT, logged, run_script
from tests.integration.server import MlflowServer

FLUSH_S = 90.0
WAIT_S = 20.0


def traces(client: MlflowClient, experiment_name: str) -> dict[str, Trace]:
    """The traces of an experiment by name."""
    experiment = client.get_experiment_by_name(experiment_name)
    found = client.search_traces(locations=[experiment.experiment_id])
    return {trace.info.tags["mlflow.traceName"]: trace for trace in found}


def tree(trace: Trace) -> dict[str, list[str]]:
    """The names of the spans below each span, in the order they began; the root's below ``""``."""
    names: dict[str | None, str] = {span.span_id: span.name for span in trace.data.spans}
    found: dict[str, list[str]] = {}
    for span in sorted(trace.data.spans, key=lambda span: span.start_time_ns):
        above = "" if span.parent_id is None else names[span.parent_id]
        found.setdefault(above, []).append(span.name)
    return found


def named(trace: Trace, name: str) -> Span:
    """The one span of this name."""
    (span,) = [span for span in trace.data.spans if span.name == name]
    return span


def points_to(late: Trace, span: Span) -> bool:
    """Whether a trace says that it began in this span."""
    (root,) = [one for one in late.data.spans if one.parent_id is None]
    if not hasattr(root, "links"):  # MLflow 3.12: its tag says it.
        return bool(late.info.tags["qitos.linked_trace_id"])
    (link,) = root.links
    return (link.trace_id, link.span_id) == (span.trace_id, span.span_id)


LATER_HOST = """
    import threading
    from qitos.core import Action, Decision, Tools
    from qitos.engine.engine import Agent, Engine
    from qitos.kit.tool.agent.agent_tool import BackgroundAgent
    from qitos.kit.tool.fanout import fan_out
    from qitos.tracing import add_trace_processor
    from qitos_mlflow import MlflowTraceProcessor

    processor = MlflowTraceProcessor(experiment_name={experiment!r}, tracking_uri={uri!r})
    add_trace_processor(processor)

    def act(name):
        return Decision("act", [Action(name, {{}}, action_id="tc")])

    def agent(name, *script, limits=None, **tools):
        final = Decision("final", final_answer=name)
        return Agent(name, Tools(limits=limits or {{}}, **tools), *script, final)

    researcher = agent("researcher", act("read"), read=lambda: "page")
    workers = [agent(f"worker{{n}}", act(f"dig{{n}}"), **{{f"dig{{n}}": int}}) for n in range(3)]
    background, go = BackgroundAgent(), threading.Event()
    straggler = agent("straggler", act("sleep"), sleep=lambda: go.wait(20))
    closer = agent("closer")

    boss = agent(
        "boss",
        act("delegate"),
        act("fan"),
        act("start"),
        Decision("handoff", meta={{"handoff_target": "closer"}}),
        limits={{"delegate": 20}},
        delegate=lambda: Engine(researcher).run("research").run_id,
        fan=lambda: fan_out(workers),
        start=lambda: background.start(straggler),
    )
    Engine(boss, agents={{"closer": closer}}).run("everything")
    go.set()
    background.future.result(20)
    background.pool.shutdown()
    assert processor.force_flush(90)
"""


def test_delegates_fan_out_and_hand_off(mlflow_server: MlflowServer, experiment_name: str) -> None:
    """Each agent another one starts is a subtree where it was started; a late one is linked."""
    run_script(
        LATER_HOST.format(experiment=experiment_name, uri=mlflow_server.uri),
        PYTHONPATH=os.pathsep.join([str(BUILTIN_TRACING), str(ROOT)]),
    )
    found = traces(mlflow_server.client, experiment_name)
    assert found.keys() == {"boss", "straggler"}
    boss = tree(found["boss"])
    assert boss[""] == ["boss"]
    assert boss["delegate"] == ["researcher"]
    assert sorted(boss["fan"]) == ["worker0", "worker1", "worker2"]
    for name in ("researcher", "worker0", "worker1", "worker2"):
        span = named(found["boss"], name)
        assert span.span_type == "AGENT"
        assert span.outputs == name
    parents = {span.span_id: span for span in found["boss"].data.spans}

    def agents_above(name: str) -> list[str]:
        span, above = named(found["boss"], name), []
        while span.parent_id is not None:
            span = parents[span.parent_id]
            above += [span.name] if span.span_type == "AGENT" else []
        return above

    assert agents_above("read") == ["researcher", "boss"]
    for number in range(3):
        assert agents_above(f"dig{number}") == [f"worker{number}", "boss"]
    handoff = named(found["boss"], "boss → closer")
    assert parents[handoff.parent_id].name == "step 3"
    assert agents_above("step 4") == ["boss"], "the run stays the first agent's"
    assert named(found["boss"], "boss").outputs == "closer"

    straggler = found["straggler"]
    assert straggler.info.state == TraceState.OK
    assert tree(straggler)[""] == ["straggler"]
    assert points_to(straggler, named(found["boss"], "start"))
    assert straggler.info.tags["qitos.linked_trace_id"] == found["boss"].info.tags["qitos.trace_id"]


def test_a_child_that_outlives_its_parent(
    mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """What an agent does after its parent's trace has ended is a trace, linked to its span."""
    inside, go = threading.Event(), threading.Event()
    threads: list[threading.Thread] = []

    def work() -> str:
        inside.set()
        assert go.wait(WAIT_S)
        return "late"

    child = ScriptAgent(act("work"), Decision.final("child"), tools=toolbox(work=work))
    child.name = "child"

    def begin() -> str:
        run = copy_context().run
        threads.append(
            threading.Thread(target=run, args=(child.run, "c"), kwargs={"render": False})
        )
        threads[0].start()
        assert inside.wait(WAIT_S)
        return "gave up waiting"

    parent = ScriptAgent(act("begin"), Decision.final("parent"), tools=toolbox(begin=begin))
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        parent.run("p", render=False)
        go.set()
        threads[0].join(WAIT_S)
        assert processor.force_flush(FLUSH_S) is True
    experiment = mlflow_server.client.get_experiment_by_name(experiment_name)
    early, late = mlflow_server.client.search_traces(
        locations=[experiment.experiment_id], order_by=["timestamp_ms ASC"]
    )
    assert {trace.info.state for trace in (early, late)} == {TraceState.OK}
    assert early.info.tags["qitos.trace_id"] == late.info.tags["qitos.linked_trace_id"]
    cut_short = named(early, "child")
    begun: Any = {span.span_id: span for span in early.data.spans}[cut_short.parent_id]
    assert begun.name == "begin"
    assert points_to(late, cut_short)
    assert named(early, "work").span_type == "TOOL", "begun there, and closed with it"
    assert tree(late) == {
        "": ["child"],
        "child": ["step 0", "step 1"],
        "step 0": ["reduce"],
        "step 1": ["decide", "reduce"],
    }
    assert late.info.response_preview == "child"


def test_a_model_that_judges(mlflow_server: MlflowServer, experiment_name: str) -> None:
    """The verdict of a critic that has a model is an LLM judge's."""
    from qitos.engine.critic import Critic

    class Reviewer(Critic):
        def __init__(self) -> None:
            self.llm = object()

        def evaluate(self, state: Any, decision: Any, results: list[Any]) -> dict[str, Any]:
            return {"action": "continue", "reason": "good", "score": 1.0}

    critic = Reviewer()
    with logged(mlflow_server.uri, experiment_name=experiment_name) as processor:
        ScriptAgent(Decision.final("x")).run("t", critics=[critic], render=False)
        assert processor.force_flush(FLUSH_S) is True
    (trace,) = traces(mlflow_server.client, experiment_name).values()
    (verdict,) = trace.info.assessments
    assert verdict.source.source_type == "LLM_JUDGE"
    assert verdict.source.source_id == verdict.name == "Reviewer"
