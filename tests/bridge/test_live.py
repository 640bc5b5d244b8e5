"""A trace while it goes on, at its ugly ends: forks, signals, late threads, Ctrl-C as it begins."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from qitos import Decision, Engine

from qitos_mlflow import tracing
from qitos_mlflow.bridge import calls
from qitos_mlflow.bridge.live import LiveTrace
from qitos_mlflow.bridge.run import here
from qitos_mlflow.tracing.models import NOT_FINISHED
from tests.bridge.agents import ScriptAgent
from tests.fakes.recorder import Recorder
from tests.hosts import run_on
from tests.interrupts import ctrl_c

FORKED_TOOL = """
    import os, sys, warnings
    import orjson
    warnings.simplefilter("ignore", DeprecationWarning)  # Forking with threads is the point here.
    from qitos import Decision
    from qitos_mlflow import MlflowTraceProcessor, bridge, tracing
    from qitos_mlflow.delivery import waiting_records
    from tests.bridge.agents import ScriptAgent, act, toolbox

    processor = MlflowTraceProcessor(tracking_uri="http://127.0.0.1:9", offline=True)
    tracing.add_trace_processor(processor)
    bridge.install()

    def tell(who):
        (pipeline,) = processor.mlflow_plugin.recorder._pipelines
        processor.force_flush()
        for payload in waiting_records(pipeline.paths):
            record = orjson.loads(payload)
            if record["kind"] in ("trace_start", "trace_end"):
                found = record["metadata"]
                linked = "linked" if "linked_trace_id" in found else "alone"
                print(who, record["kind"], found["task"], linked, record.get("status"), flush=True)

    def work():
        from qitos_mlflow.bridge.run import here
        with here.get().run.live._lock:  # As another thread may hold it.
            child = os.fork()
        if child == 0:
            ScriptAgent(Decision.final("x")).run("first", render=False)
            ScriptAgent(act("add", a=1, b=2), Decision.final("x")).run("second", render=False)
            tell("child")
            LEAVE
        assert os.waitpid(child, 0)[1] == 0

    agent = ScriptAgent(act("work"), Decision.final("x"), tools=toolbox(work=work))
    agent.run("outer", render=False)
    tell("parent")
"""


def traces(who: str, *tasks: str, linked: str) -> list[str]:
    """The events of traces, from start to end, one after the other."""
    return [
        line
        for task in tasks
        for line in (
            f"{who} trace_start {task} {linked} None",
            f"{who} trace_end {task} {linked} FINISHED",
        )
    ]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("leave", ["os._exit(0)", "sys.exit()", "return"])
def test_agents_in_a_process_forked_off_within_a_run(leave: str) -> None:
    """Each is a linked trace of its own, recorded in the child; the parent's trace is untouched.

    A child that returns into the agent goes on with it, in a linked trace too.
    """
    printed = run_on(None, FORKED_TOOL.replace("LEAVE", leave), "-W", "ignore").splitlines()
    ends = [line for line in printed if "trace_" in line]
    child = traces("child", "first", "second", linked="linked")
    parent = traces("parent", "outer", linked="alone")
    if leave == "return":  # There the rest of the script runs in both.
        child += traces("parent", "first", "second", "outer", linked="linked")
    assert ends == child + parent


def test_what_still_runs_when_its_trace_ends_is_no_success(recorder: Recorder) -> None:
    """Its span ends with its trace and says so; how it went on is not recorded."""
    live = LiveTrace("a", {})
    span = live.start(tracing.ToolSpanData(tool_name="slow"), None)
    live.end(None)
    live.finish(span, "too late")
    assert [node.error for node in recorder.of("tool")] == [NOT_FINISHED]


def test_a_signal_handler_may_run_an_agent_at_any_time(recorder: Recorder) -> None:
    """Also while the thread it interrupts holds the lock of the trace it is in."""
    live = LiveTrace("a", {})

    def handler(*args: Any) -> None:
        live.finish(live.start(tracing.CustomSpanData(name="in the handler"), None))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        with live._lock:
            if live._lock.acquire(blocking=False):
                live._lock.release()
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    live.end(None)
    assert [node.data["name"] for node in recorder.of("custom")] == ["in the handler"]


class Interrupting(tracing.NoOpTraceProcessor):
    """Stands for Ctrl-C at a moment of a run's beginning."""

    def __init__(self, moment: str) -> None:
        setattr(self, moment, ctrl_c)


@pytest.mark.parametrize("moment", ["on_trace_start", "on_span_start"])
def test_ctrl_c_as_a_run_begins(recorder: Recorder, moment: str) -> None:
    """It leaves no trace open and the thread where it was; the next run is traced."""
    interrupting = Interrupting(moment)
    tracing.add_trace_processor(interrupting)
    with pytest.raises(KeyboardInterrupt):
        ScriptAgent(Decision.final("x")).run("first", render=False)
    tracing.remove_trace_processor(interrupting)
    assert here.get() is None
    ScriptAgent(Decision.final("x")).run("second", render=False)
    assert [trace.metadata["task"] for trace in recorder.ended] == ["first", "second"]
    assert isinstance(recorder.ended[0].error, KeyboardInterrupt)


def test_ctrl_c_as_a_trace_ends(recorder: Recorder) -> None:
    """Where it arrives while what is left open is closed, the trace ends all the same."""
    live = LiveTrace("a", {})
    live.start(tracing.CustomSpanData(name="left open"), None)
    interrupting = Interrupting("on_span_end")
    tracing.add_trace_processor(interrupting)
    with pytest.raises(KeyboardInterrupt):
        live.end(None)
    tracing.remove_trace_processor(interrupting)
    assert [trace.trace_id for trace in recorder.ended] == [live.trace.trace_id]


def test_a_late_start_is_heard_of_by_nobody(recorder: Recorder) -> None:
    """A span that starts as its trace ends on another thread is no part of it, and does no harm."""
    live = LiveTrace("a", {})
    live.end(None)
    span = live.start(tracing.ToolSpanData(tool_name="late"), None)
    span.data.output_content = "x"
    live.annotate({"late": True})
    live.finish(span)
    assert recorder.nodes == {}


def test_ctrl_c_between_the_beginning_and_the_run(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that has begun is ended, wherever the exception arrives."""

    class Late(calls.AgentRun):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            ctrl_c()

    monkeypatch.setattr(calls, "AgentRun", Late)
    with pytest.raises(KeyboardInterrupt):
        ScriptAgent(Decision.final("x")).run("sum", render=False)
    assert here.get() is None
    assert recorder.only().metadata["status"] == "interrupted"


def test_ctrl_c_while_the_hook_is_attached(recorder: Recorder) -> None:
    """The trace is ended, and the hook is gone."""

    class Hooks(list[Any]):
        def append(self, hook: Any) -> None:
            super().append(hook)
            ctrl_c()

    engine: Any = Engine(agent=ScriptAgent(Decision.final("x")))
    engine.hooks = Hooks()
    with pytest.raises(KeyboardInterrupt):
        engine.run("sum")
    assert (here.get(), engine.hooks) == (None, [])
    assert recorder.only().metadata["status"] == "interrupted"
