"""The hook implementations: what each event becomes, read back from the spool."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pluggy
import pytest
from qitos import Decision
from qitos.engine.critic import Critic

from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.delivery import find_segments, inspect_segment, waiting_records
from qitos_mlflow.mlflow_plugin.plugin import MlflowPlugin, OpenTrace, Origin, entry_point
from qitos_mlflow.recording import recorder, simpler
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.settings import Settings
from qitos_mlflow.tracing import SpanType, create_trace
from tests.bridge.agents import ScriptAgent, State, act, toolbox
from tests.fakes.lazy import (
    Cursor,
    Patience,
    Report,
    Rows,
    Slow,
    SlowAndRaises,
    SlowSlots,
    Watched,
)
from tests.interrupts import ctrl_c

Spooled = Callable[[], list[dict[str, Any]]]
Lost = Callable[[], dict[str, int]]


@pytest.fixture
def lost(spool: Path) -> Lost:
    """Shut every processor down, and return the losses that `qitos-mlflow status` will tell of."""

    def read() -> dict[str, int]:
        for processor in tracing.processors():
            processor.shutdown()
        found: Counter[str] = Counter()
        for segment in find_segments(spool):
            found.update(inspect_segment(segment).losses)
        return dict(found)

    return read


def step(trace: Any, data: Any, error: Any = None) -> None:
    """One span of a trace, from start to finish."""
    trace.create_span(SpanType(data.type), data).start().finish(error)


# -- records ---------------------------------------------------------------------------------


def test_a_trace_is_its_start_its_spans_and_its_end(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """The records of a trace come in order, with all that is known at each moment."""
    attach()
    metadata = {"seed": 7, "agent_name": "agent"}  # Of an agent: its first span is the root.
    with create_trace("agent", group_id="gaia", metadata=metadata) as trace:
        step(trace, tracing.StepSpanData(4))
        trace.metadata["stop_reason"] = "final"
    start, root, span, end = records()
    assert start["kind"] == "trace_start"
    assert (start["name"], start["group_id"], start["metadata"]) == ("agent", "gaia", metadata)
    assert (root["kind"], root["type"]) == ("span_start", "step")
    assert (span["kind"], span["type"], span["step"]) == ("span", "step", 4)
    assert span["span_id"] == root["span_id"]
    assert (end["kind"], end["status"], end["error"]) == ("trace_end", "FINISHED", None)
    assert end["metadata"] == {**metadata, "stop_reason": "final"}
    assert (end["recorded"], end["dropped"]) == (1, {})
    assert {record["trace_id"] for record in (start, root, span, end)} == {trace.trace_id}
    assert start["time_ns"] <= span["start_ns"] <= span["end_ns"] <= end["time_ns"]


def test_hooks_are_all_that_it_needs(records: Spooled) -> None:
    """A plugin manager of pluggy's that knows nothing of this package calls it, and it logs."""
    manager = pluggy.PluginManager("qitos")
    manager.register(MlflowPlugin(Settings.resolve(offline=True)))

    class Caller(tracing.TraceProcessor):
        def on_trace_start(self, trace: Any) -> None:
            manager.hook.qitos_trace_start(trace=trace)

        def on_trace_end(self, trace: Any) -> None:
            manager.hook.qitos_trace_end(trace=trace)

        def on_span_start(self, span: Any) -> None:
            manager.hook.qitos_span_start(span=span)

        def on_span_end(self, span: Any) -> None:
            manager.hook.qitos_span_end(span=span)

    with tracing.TracingProvider([Caller()]).create_trace("agent") as trace:
        step(trace, tracing.StepSpanData(1))
    manager.hook.qitos_shutdown()
    assert [record["kind"] for record in records()] == ["trace_start", "span", "trace_end"]


def test_every_span_knows_its_step(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A span belongs to the outermost step it is part of; outside of any, to none."""
    attach()
    with create_trace("agent") as trace:

        def span(data: Any, parent: Any = None) -> Any:
            return trace.create_span(SpanType(data.type), data, parent=parent).start()

        agent = span(tracing.AgentSpanData("outer"))
        outer = span(tracing.StepSpanData(5), agent)
        act = span(tracing.ActSpanData(action_name="ask"), outer)
        inner = span(tracing.StepSpanData(0), act)
        tool = span(tracing.ToolSpanData(tool_name="t"), inner)
        for one in (tool, inner, act, outer, agent):
            one.finish()
    spans = {record["span_id"]: record for record in records() if record["kind"] == "span"}
    steps = {one.data.type: spans[one.span_id]["step"] for one in (tool, act, agent)}
    assert steps == {"tool": 5, "act": 5, "agent": None}
    assert spans[inner.span_id]["step"] == spans[outer.span_id]["step"] == 5
    assert spans[inner.span_id]["data"]["step_number"] == 0


def starts(found: list[dict[str, Any]]) -> list[str]:
    """The names of the traces that were recorded, in order, one for each processor."""
    return [record["name"] for record in found if record["kind"] == "trace_start"]


def test_a_cell_that_runs_again_logs_each_run_once(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An equal processor replaces the earlier one, with one line each time; the others stay."""
    for cell in range(4):
        attach(tags={"of": "cell"})
        for number in range(2):
            with create_trace(f"{cell}.{number}"):
                pass
        said = [one for one in caplog.records if one.levelno >= logging.WARNING]
        assert ["replaces the earlier one" in one.getMessage() for one in said] == [True] * cell
    for _ in range(3):
        attach(tags={"of": "another cell"})
    with create_trace("of both"):
        pass
    said = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(said) == 3 + 1
    found = records()
    cells = [f"{cell}.{number}" for cell in range(4) for number in range(2)]
    assert sorted(starts(found)) == sorted([*cells, "of both", "of both"])
    ids = [record["trace_id"] for record in found if record["kind"] == "trace_end"]
    assert len({*ids}) == len(ids) == len(cells) + 2


def test_what_is_open_ends_where_it_began(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A trace that began before the second processor came is the first one's, to its end."""
    attach()
    with create_trace("open") as trace:
        step(trace, tracing.StepSpanData(0))
        attach()
        step(trace, tracing.StepSpanData(1))
        with create_trace("later") as later:
            step(later, tracing.StepSpanData(7))
    found = records()
    assert sorted(starts(found)) == ["later", "open"]
    steps = [record["data"]["step_number"] for record in found if record["kind"] == "span"]
    assert sorted(steps) == [0, 1, 7]
    assert [record["recorded"] for record in found if record["kind"] == "trace_end"] == [1, 2]


@pytest.mark.parametrize(
    "options", [{"tags": {"a": "b"}}, {"run_name": "x"}, {"log_traces": False}]
)
def test_unequal_processors_log_beside_each_other(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, options: dict[str, Any]
) -> None:
    """Two that differ in any setting log a run each."""
    attach()
    attach(**options)
    with create_trace("both"):
        pass
    assert starts(records()) == ["both", "both"]


def test_a_class_of_its_own_is_another_processor(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A processor whose class is the user's replaces none of ours, and ours none of those."""

    class Own(MlflowTraceProcessor):
        """May log less."""

    own = Own(offline=True)
    attach()
    tracing.add_trace_processor(own)
    try:
        with create_trace("both"):
            pass
        assert starts(records()) == ["both", "both"]
    finally:
        tracing.remove_trace_processor(own)


def test_only_one_that_gets_the_trace_replaces_another(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A trace of another provider, or of earlier processors, is logged by what gets its events."""
    first = attach()
    before = create_trace("before")
    provider = tracing.TracingProvider([first])
    attach()
    with provider.create_trace("of its own"):
        pass
    with before:
        pass
    tracing.set_trace_processors([first, *tracing.processors(), first])  # The first is the last.
    with create_trace("last"):
        pass
    found = records()
    assert sorted(starts(found)) == ["before", "last", "of its own"]
    assert len({record["trace_id"] for record in found}) == 3


@pytest.mark.parametrize("mode", tracing.TracingMode)
@pytest.mark.parametrize("there", [[0], [0, 1], [1, 0]])
@pytest.mark.parametrize("globally", [[], [0], [0, 1]])
def test_a_trace_without_data_has_the_processors_it_was_made_with(
    spool: Path, mode: tracing.TracingMode, there: list[int], globally: list[int]
) -> None:
    """One of equal processors logs a trace of a provider of one's own, whatever the global one has.

    In this mode they get a copy of the trace.
    """
    equal = [MlflowTraceProcessor(offline=True) for _ in range(2)]
    tracing.set_trace_processors([equal[number] for number in globally])
    try:
        provider = tracing.TracingProvider([equal[number] for number in there], mode)
        with provider.create_trace("of its own") as trace:
            step(trace, tracing.StepSpanData(0))
    finally:
        tracing.set_trace_processors([])
        for processor in equal:
            processor.shutdown()
    found = [
        orjson.loads(record) for one in find_segments(spool) for record in waiting_records(one)
    ]
    disabled = mode is tracing.TracingMode.DISABLED
    assert [record["kind"] for record in found] == (
        [] if disabled else ["trace_start", "span", "trace_end"]
    )


class Unchecked(State):
    def validate(self) -> None:
        """Any result will do."""


class Keeper(ScriptAgent):
    """Keeps an object in its state."""

    def __init__(self, *script: Any, sees: Any, **options: Any) -> None:
        super().__init__(*script, **options)
        self.sees = sees

    def init_state(self, task: str, **kwargs: Any) -> State:
        return Unchecked(task=task, max_steps=3)

    def reduce(self, state: Any, observation: Any, decision: Any) -> Any:
        state.seen = [self.sees]
        return state


@pytest.mark.parametrize("kind", [Slow, SlowSlots, SlowAndRaises])
def test_a_real_agent_waits_once_for_a_slow_repr(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
    kind: Callable[[Patience], Any],
) -> None:
    """The slow `repr` of a tool's result runs once in each trace, whatever else has the result."""
    monkeypatch.setattr(simpler, "perf_counter", patience := Patience(1.0), raising=False)
    value = kind(patience)

    def run() -> int:
        asked, tools = patience.asked, toolbox(look=lambda: value)
        agent = Keeper(act("look"), Decision.final(value), tools=tools, sees=value)
        agent.run("look", return_state=True, trace=False, render=False)
        return patience.asked - asked

    without = run()
    attach()
    assert [run() - without for _ in range(2)] == [1, 1]
    found = records()
    tools = [record for record in found if record.get("type") == "tool"]
    ends = [record for record in found if record["kind"] == "trace_end"]
    if kind is Slow:
        texts = [tool["data"]["output_content"] for tool in tools]
        assert texts == [end["metadata"]["final_result"] for end in ends]
        assert texts == ["<slow 1>", "<slow 2>"]


@pytest.mark.parametrize("kind", [Rows, Cursor, Report])
def test_a_real_agent_asks_nothing_more(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, kind: type[Watched]
) -> None:
    """Objects that may fetch are asked for nothing, wherever an agent has them, others for `repr`.

    Compared with the same agent without a processor: QitOS itself may ask.
    """

    def run() -> Counter[str]:
        value = kind()

        class Judge(Critic):
            def evaluate(self, state: Any, decision: Any, results: Any) -> Any:
                return {"action": "continue", "reason": "fine", "details": {"saw": value}}

        agent = Keeper(
            act("look", at=value),
            Decision.final(value),
            tools=toolbox(look=lambda at: {"status": at, "rows": at}),
            sees=value,
        )
        result = agent.run("look", return_state=True, critics=[Judge()], trace=False, render=False)
        assert result.state.final_result is value
        return value.asked

    without = run()
    attach()
    asked = run() - without
    found = records()
    name = f"<{kind.__qualname__}>"
    having = sum(name.encode() in orjson.dumps(record) for record in found)
    spans = {record["type"]: record for record in found if record["kind"] == "span"}
    assert {"tool", "act", "reduce", "critic", "step", "decide", "agent"} <= spans.keys()
    if kind is not Report:
        assert asked == {}
        assert spans["tool"]["data"]["tool_args"] == {"at": name}
        assert spans["tool"]["data"]["output_content"] == {"status": name, "rows": name}
        assert spans["decide"]["data"]["output_content"]["final_answer"] == name
        assert spans["agent"]["output"] == found[-1]["metadata"]["final_result"] == name
        assert having >= 8
    else:
        texts = [record for record in found if b"QuerySet" in orjson.dumps(record)]
        assert set(asked) == {"repr"}
        assert asked["repr"] <= len(texts)  # At most once in each record.


@pytest.mark.parametrize(
    ("metadata", "error", "status"),
    [
        ({}, None, "FINISHED"),
        ({"stop_reason": "final"}, None, "FINISHED"),
        ({"stop_reason": "budget_steps"}, None, "FINISHED"),
        ({"stop_reason": "unrecoverable_error"}, None, "FAILED"),
        ({"stop_reason": "context_overflow"}, None, "FAILED"),
        ({"status": "error"}, None, "FAILED"),
        ({"status": "interrupted"}, None, "KILLED"),
        ({}, ValueError("no"), "FAILED"),
        ({}, KeyboardInterrupt(), "KILLED"),
        ({}, SystemExit(1), "KILLED"),
        ({"status": "interrupted"}, RuntimeError("approval needed"), "KILLED"),
        ({"stop_reason": "final"}, ValueError("no"), "FAILED"),
    ],
)
def test_the_status_of_a_trace(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    metadata: dict[str, Any],
    error: BaseException | None,
    status: str,
) -> None:
    """What left the trace, what its metadata says of its end, or nothing bad: one of three."""
    attach()
    expected = nullcontext() if error is None else pytest.raises(type(error))
    with expected, create_trace("agent") as trace:
        trace.metadata.update(metadata)
        if error is not None:
            raise error
    end = records()[-1]
    assert end["status"] == status
    assert (end["error"] is None) == (error is None)
    if error is not None:
        assert end["error"]["type"] == type(error).__name__
        assert "Traceback" in end["error"]["stacktrace"]


def test_a_tool_error_is_the_tools(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A span's error is in its record, and does not fail the trace."""
    attach()
    with create_trace("agent") as trace:
        step(trace, tracing.ToolSpanData(tool_name="t"), ValueError("no such file"))
    _, span, end = records()
    assert span["error"] == "ValueError: no such file"
    assert span["exception"]["type"] == "ValueError"
    assert end["status"] == "FINISHED"


@pytest.mark.parametrize(
    "metadata", [{"stop_reason": ["final"]}, {"stop_reason": {}}, {"status": ["error"]}]
)
def test_odd_metadata_costs_no_trace_its_end(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, metadata: dict[str, Any]
) -> None:
    """Whatever is written where a text belongs, the run ends."""
    attach()
    with create_trace("agent") as trace:
        trace.metadata.update(metadata)
    end = records()[-1]
    assert (end["kind"], end["status"]) == ("trace_end", "FINISHED")


@pytest.mark.parametrize("error", [None, ValueError("no")])
@pytest.mark.parametrize("bug", ["status", "_metadata"])
def test_a_bug_costs_no_trace_its_end(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    swallowed: list[tuple[str, BaseException]],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception | None,
    bug: str,
) -> None:
    """What fails while the end is written down is reported; the run ends all the same."""

    def fails(*_: object) -> Any:
        raise RuntimeError("a bug")

    attach()
    with nullcontext() if error is None else pytest.raises(ValueError), create_trace("agent"):
        monkeypatch.setattr(OpenTrace, bug, fails)
        if error is not None:
            raise error
    end = records()[-1]
    assert end["kind"] == "trace_end"
    assert end["status"] == ("FINISHED" if error is None else "FAILED")
    assert [str(one) for _, one in swallowed] == ["a bug"]
    swallowed.clear()


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_processor_added_twice_logs_once(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, when: str
) -> None:
    """It gets everything twice, from the start or from some moment on, and recorded once."""
    processor = attach()
    if when == "before":
        tracing.add_trace_processor(processor)
    with create_trace("agent") as trace:
        outer = trace.create_span(SpanType.STEP, tracing.StepSpanData(0)).start()
        if when == "meanwhile":
            tracing.add_trace_processor(processor)
        outer.finish()
        step(trace, tracing.ToolSpanData(tool_name="t"))
    *others, end = records()
    assert [record["kind"] for record in others] == ["trace_start", "span", "span"]
    assert (end["kind"], end["recorded"]) == ("trace_end", 2)


def test_spans_of_one_id_are_all_recorded(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """One after the other or one in the other: what the user calls the same is not one event."""
    attach()
    with create_trace("agent") as trace:

        def started() -> Any:
            return trace.create_span(SpanType.STEP, tracing.StepSpanData(0), span_id="s").start()

        for _ in range(2):
            started().finish()
        outer, inner = started(), started()
        inner.finish()
        outer.finish()
    assert records()[-1]["recorded"] == 4


def test_ctrl_c_costs_no_trace_its_end(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where it arrives while the end is written down, it goes through, and so does the end."""
    attach()
    with pytest.raises(KeyboardInterrupt), create_trace("agent"):
        monkeypatch.setattr(OpenTrace, "status", ctrl_c)
    assert records()[-1]["kind"] == "trace_end"


# -- the ledger ------------------------------------------------------------------------------


class Unreadable(tracing.SpanData):
    """Data of a user's class that cannot be exported."""

    @property
    def type(self) -> str:
        return "custom"

    def export(self) -> dict[str, Any]:
        raise RuntimeError("not today")


def test_what_cannot_be_captured_is_counted(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    lost: Lost,
    swallowed: list[tuple[str, BaseException]],
) -> None:
    """A span whose data raises is lost, logged, and counted twice: on the run and in `status`."""
    attach()
    with create_trace("agent") as trace:
        step(trace, Unreadable())
        step(trace, tracing.StepSpanData(0))
    assert lost() == {"snapshot_failed": 1}
    end = records()[-1]
    assert (end["recorded"], end["dropped"]) == (2, {"snapshot_failed": 1})
    assert [str(error) for _, error in swallowed] == ["not today"]
    swallowed.clear()


def test_what_the_queue_refuses_is_counted(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A span too large for the queue is lost and counted; start and end always go through."""
    attach(queue_bytes=2_000)
    with create_trace("agent") as trace:
        step(trace, tracing.StepSpanData(0, observation="x" * 10_000))
        step(trace, tracing.StepSpanData(1))
    found = records()
    assert [record["kind"] for record in found] == ["trace_start", "span", "trace_end"]
    assert found[-1]["recorded"] == 2
    assert found[-1]["dropped"] == {"queue_full": 1}


def test_a_file_that_the_queue_refuses_is_counted(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """An answer too large for the queue is lost, and the end of the trace tells."""
    attach(queue_bytes=20_000)
    with create_trace("agent") as trace:
        trace.metadata["final_result"] = "x" * 30_000
    assert records()[-1]["lost"] == {"artifact_queue_full": 1}


def test_what_ends_after_its_trace_is_numbered(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """The account that the end gave is completed by the spans that come late."""
    attach()
    with ThreadPoolExecutor(1) as elsewhere:
        with create_trace("agent") as trace:
            late = [trace.create_span(SpanType.STEP, tracing.StepSpanData(n)) for n in range(2)]
            for span in late:
                elsewhere.submit(span.start).result()
            step(trace, tracing.StepSpanData(2))
        for span in late:
            elsewhere.submit(span.finish).result()
    start, *others = records()
    spans = [record for record in others if record["kind"] == "span"]
    assert [span.get("late") for span in spans] == [None, 1, 2]
    # What delivers them may not know the trace any more.
    assert [span.get("settings") for span in spans] == [None, *[start["settings"]] * 2]


def test_what_comes_after_the_end_is_refused_as_such(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Only what comes faster than the disk takes it is counted as the queue's."""
    processor = attach(auto_end_run=False)
    with create_trace("agent") as trace:
        processor.shutdown()
        step(trace, tracing.StepSpanData(0))
        trace.metadata["stop_reason"] = "final"
    [state] = processor.mlflow_plugin.recorder.traces
    assert state.pipeline._losses == {state.id: {("span", "closed"): 1}}


def test_a_flush_tells_of_each_loss_once(attach: Callable[..., MlflowTraceProcessor]) -> None:
    """It is True when nothing waits, and nothing was lost or damaged since the last one."""
    processor = attach()
    pipeline = processor.mlflow_plugin.recorder.pipeline_to("key", partial(RecordPipeline, b"{}"))
    assert processor.force_flush() is True
    pipeline.stats.add(dead_letters=1)
    assert [processor.force_flush() for _ in range(2)] == [False, True]
    pipeline.stats.drop("queue_full")
    assert [processor.force_flush() for _ in range(2)] == [False, True]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_span_begun_in_a_forked_child_is_counted(tmp_path: Path) -> None:
    """Its trace is the parent's: the child warns, its flush says so, and `status` will.

    What the parent began is the parent's alone, in whichever process it is left.
    """
    script = """
        import os, sys
        from qitos_mlflow import MlflowTraceProcessor, tracing
        from qitos_mlflow.tracing import SpanType, StepSpanData, create_trace

        processor = MlflowTraceProcessor("forks", offline=True)
        tracing.add_trace_processor(processor)
        with create_trace("outer") as trace:
            own = trace.create_span(SpanType.STEP, StepSpanData(0)).start()
            processor.mlflow_plugin.recorder.traces[0].pipeline.stats.drop("other", 1)
            processor.force_flush()  # What the parent has lost and reported is the parent's.
            child = os.fork()
            if child == 0:
                own.finish()
                assert [processor.force_flush() for _ in range(2)] == [True, True]
                trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
                assert processor.force_flush() is False
                sys.exit()
            assert os.waitpid(child, 0)[1] == 0
            own.finish()
        processor.shutdown()
        """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)],
        env={**os.environ, "QITOS_MLFLOW_SPOOL_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Begin a trace in the forked process" in done.stderr
    ended = [
        record
        for segment in find_segments(tmp_path)
        for record in map(orjson.loads, waiting_records(segment))
        if record["kind"] == "trace_end"
    ]
    assert [(end["recorded"], end["dropped"]) for end in ended] == [(1, {})]
    losses = [inspect_segment(segment).losses for segment in find_segments(tmp_path)]
    assert sorted(map(dict, losses), key=str) == [{"forked": 1}, {"other": 1}]


# -- life ------------------------------------------------------------------------------------


def test_nothing_happens_before_the_first_trace(
    attach: Callable[..., MlflowTraceProcessor], spool: Path
) -> None:
    """Made, registered, flushed and shut down without a trace: no thread, no file."""
    threads = threading.active_count()
    processor = attach()
    assert processor.wants_trace()
    assert processor.force_flush() is True
    processor.shutdown()
    assert threading.active_count() == threads
    assert not spool.exists()


def test_a_start_waits_for_no_other_thread(
    attach: Callable[..., MlflowTraceProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the first one it takes no lock of all traces, and to a server asks for no directory.

    A system call gives other threads the interpreter, which they may keep for 5 ms. MLflow looks
    for a local store if it is asked for its destination while none is set.
    """
    asked: list[object] = []
    attach(tracking_uri="http://127.0.0.1:9")
    with create_trace("first"):
        pass
    monkeypatch.setattr(os, "getcwd", lambda: asked.append("directory") or "/")

    def run() -> None:
        with create_trace("second"):
            asked.append("begun")

    with recorder._lock:
        agent = threading.Thread(target=run)
        agent.start()
        agent.join(20)
        assert asked == ["begun"]


def test_a_pipeline_that_was_looked_up_is_not_kept_for_another_place(
    attach: Callable[..., MlflowTraceProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last pipeline is remembered for its destination only, and not after a shutdown."""
    plugin = attach().mlflow_plugin
    pipelines = []
    for uri in ("http://one:1", "http://one:1/", "http://two:1", "http://one:1"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with create_trace("run"):
            pipelines.append(plugin.recorder.traces[-1].pipeline)
    first, again, other, last = pipelines
    assert first is again is last is not other
    plugin.qitos_shutdown()
    assert plugin.recorder._last is None


def test_after_shutdown_nothing_is_wanted(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """A processor that was shut down ignores new traces, and what is left of old ones."""
    processor = attach()
    with create_trace("going") as trace:
        processor.shutdown()
        assert not processor.wants_trace()
        step(trace, tracing.StepSpanData(0))
        with create_trace("new"):
            pass
    kinds = [(record["kind"], record.get("status")) for record in records()]
    assert kinds == [("trace_start", None), ("trace_end", "FINISHED")]


def test_a_trace_ends_once(attach: Callable[..., MlflowTraceProcessor], records: Spooled) -> None:
    """Shut down by several threads while it ends, a trace has one end."""
    processor = attach()
    together = threading.Barrier(4)

    def shut_down() -> None:
        together.wait()
        processor.shutdown()

    threads = [threading.Thread(target=shut_down) for _ in range(3)]
    for thread in threads:
        thread.start()
    with create_trace("going"):
        together.wait()
    for thread in threads:
        thread.join()
    assert [record["kind"] for record in records()].count("trace_end") == 1


def test_runs_to_be_left_open_stay_so(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """With `auto_end_run=False` shutting down does not end the run of a trace that is going."""
    processor = attach(auto_end_run=False)
    with create_trace("going"):
        processor.shutdown()
        kinds = [record["kind"] for record in records()]
    assert kinds == ["trace_start"]


def test_ended_traces_are_forgotten_in_the_end(
    attach: Callable[..., MlflowTraceProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the traces that have ended the last are remembered; one that is going never goes."""
    monkeypatch.setattr(recorder, "ENDED_TRACES", 3)
    plugin = attach().mlflow_plugin
    with create_trace("going") as going:
        others = []
        for number in range(10):
            with create_trace(f"{number}") as trace:
                others.append(trace.trace_id)
        assert [one.id for one in plugin.recorder.traces] == [going.trace_id, *others[-3:]]


def test_a_trace_with_open_spans_is_not_forgotten(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    lost: Lost,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its spans may end yet, on other threads; beyond the bound the oldest are lost and counted."""
    monkeypatch.setattr(recorder, "ENDED_TRACES", 3)
    attach()
    open_spans = []
    with ThreadPoolExecutor(1) as elsewhere:
        for number in range(6):
            with create_trace(f"{number}") as trace:
                span = trace.create_span(SpanType.STEP, tracing.StepSpanData(number))
                open_spans.append(elsewhere.submit(span.start).result())
        for span in open_spans:
            elsewhere.submit(span.finish).result()
    assert lost() == {"forgotten": 3}
    steps = [record["step"] for record in records() if record["kind"] == "span"]
    assert steps == [3, 4, 5]


def test_a_signal_handler_may_shut_down_while_a_trace_starts(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that the same thread holds keeps it waiting; the trace that began is whole."""
    processor = attach()
    forget_unused = recorder._forget_unused

    def interrupted() -> None:
        monkeypatch.setattr(recorder, "_forget_unused", forget_unused)
        processor.force_flush()
        processor.shutdown()

    monkeypatch.setattr(recorder, "_forget_unused", interrupted)
    with create_trace("agent"):
        pass
    assert [record["kind"] for record in records()] == ["trace_start", "trace_end"]


class Local:
    """Something of the agent's that is large."""


def test_an_ended_trace_keeps_nothing_of_the_agents(
    attach: Callable[..., MlflowTraceProcessor],
) -> None:
    """An exception that was in flight when a trace began, and its frames, are not kept alive."""
    attach()
    held: list[weakref.ref[Local]] = []

    def run() -> None:
        local = Local()
        held.append(weakref.ref(local))
        try:
            raise ValueError("first try")
        except ValueError:
            with create_trace("second try"):
                pass

    run()
    gc.collect()
    assert held[0]() is None


# -- whose turn it is ------------------------------------------------------------------------


def test_the_entry_point_makes_a_plugin_that_was_merely_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Installed, it wants traces where there is a destination, and says once where there is not."""
    caplog.set_level(logging.INFO, "qitos_mlflow")
    plugin = entry_point()
    assert plugin.origin is Origin.INSTALLED
    assert [plugin.qitos_wants_trace() for _ in range(3)] == [False] * 3
    assert caplog.text.count("no destination is set") == 1
    for variable, value in (
        ("MLFLOW_TRACKING_URI", "http://here"),
        ("QITOS_TRACE_PLUGINS", "mlflow"),
        ("QITOS_TRACE_PLUGINS", "all"),
    ):
        with monkeypatch.context() as context:
            context.setenv(variable, value)
            assert plugin.qitos_wants_trace()


def test_the_destination_of_each_trace_is_looked_up_when_it_starts(
    attach: Callable[..., MlflowTraceProcessor], spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If MLflow is set to log elsewhere in between, the next trace goes there."""
    processor = attach()
    for uri in ("http://one.test", "http://two.test", "http://one.test"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with create_trace(uri):
            pass
    processor.shutdown()
    assert len(list(find_segments(spool))) == 2


def test_settings_of_the_environment_that_cannot_be_used_are_the_loaders_to_tell(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The entry point raises what is wrong; the loader leaves the plugin out with one warning."""
    monkeypatch.setenv("QITOS_MLFLOW_QUEUE_BYTES", "plenty")
    with pytest.raises(ValueError, match="QITOS_MLFLOW_QUEUE_BYTES"):
        entry_point()


def test_a_plugin_nobody_holds_is_gone() -> None:
    """Registering for forks keeps no plugin alive."""
    held = weakref.ref(MlflowPlugin(Settings()))
    gc.collect()
    assert held() is None
