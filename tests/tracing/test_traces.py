"""Traces and spans: parents, threads, ends."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import gc
import inspect
import pickle
import re
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from qitos_mlflow.tracing import provider, span_data
from qitos_mlflow.tracing.models import NOT_FINISHED, Span, Trace
from qitos_mlflow.tracing.provider import NoOpSpan, NoOpTrace, TracingProvider
from qitos_mlflow.tracing.span_data import SpanType, StepSpanData, ToolSpanData
from tests.fakes.recorder import Recorder


def step(trace: Trace, number: int = 1, **kwargs: Any) -> Span:
    return trace.create_span(SpanType.STEP, StepSpanData(number), **kwargs)


def a_trace(recorder: Recorder | None = None, name: str = "run") -> Trace:
    trace = TracingProvider([recorder] if recorder else []).create_trace(name)
    assert isinstance(trace, Trace)
    return trace


@pytest.mark.parametrize(
    ("found", "signature"),
    [
        (span_data.AgentSpanData, "(name, *, model=None, tools=None, output_type=None)"),
        (span_data.StepSpanData, "(step_number, *, observation=None, decision=None)"),
        (
            span_data.DecideSpanData,
            "(*, input_content=None, output_content=None, model_response=None)",
        ),
        (
            span_data.GenerationSpanData,
            "(*, model=None, input_content=None, output_content=None, model_response=None, "
            "token_usage=None)",
        ),
        (span_data.ActSpanData, "(*, action_name=None, tool_args=None, output_content=None)"),
        (span_data.ToolSpanData, "(*, tool_name, tool_args=None, output_content=None)"),
        (span_data.ReduceSpanData, "(*, input_count=0, output_content=None)"),
        (
            span_data.CriticSpanData,
            "(*, critic_name=None, input_content=None, output_content=None, score=None)",
        ),
        (
            span_data.HandoffSpanData,
            "(*, from_agent=None, to_agent=None, output_content=None, context_strategy=None, "
            "messages_passed=None)",
        ),
        (
            span_data.MCPSpanData,
            "(*, server_name=None, tool_name=None, tool_args=None, output_content=None)",
        ),
        (span_data.CustomSpanData, "(*, name, data=None)"),
        (Span.finish, "(self, error=None)"),
        (Span.set_output, "(self, output)"),
        (NoOpSpan.finish, "(self, error=None)"),
        (provider.create_trace, "(name, group_id=None, metadata=None)"),
        (
            provider.TracingProvider.create_trace,
            "(self, name, group_id=None, metadata=None, trace_id=None)",
        ),
    ],
)
def test_signatures(found: Any, signature: str) -> None:
    """Names, order and defaults of the arguments are those of every QitOS host."""
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(found).parameters.values()
    ]
    assert str(inspect.Signature(bare)) == signature


@pytest.mark.parametrize(
    ("found", "signature"),
    [
        (Span, "(trace_id, span_id, data, parent_span_id=None, processor=None"),
        (Trace, "(trace_id, name, group_id=None, metadata=None, processor=None"),
        (Trace.create_span, "(self, span_type, data, span_id=None"),
        (NoOpTrace.create_span, "(self, span_type, data, span_id=None"),
    ],
)
def test_signatures_that_we_extend(found: Any, signature: str) -> None:
    """What we accept beyond a host comes after what every host accepts."""
    bare = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in inspect.signature(found).parameters.values()
    ]
    assert str(inspect.Signature(bare)).startswith(signature)


def test_span_data_exports_type_and_fields() -> None:
    """`export` is a dict of the type and the constructor's arguments, and of nothing else."""
    data = ToolSpanData(tool_name="grep", tool_args={"q": 1})
    data.note = "not a field"  # type: ignore[attr-defined]
    exported = {"tool_name": "grep", "tool_args": {"q": 1}, "output_content": None}
    assert data.export() == {"type": "tool", **exported}
    assert span_data.AgentSpanData("a").export()["tools"] == []
    assert span_data.CustomSpanData(name="n").export()["data"] == {}
    handoff = span_data.HandoffSpanData(from_agent="a", messages_passed=0).export()
    assert "context_strategy" not in handoff
    assert handoff["messages_passed"] == 0


def test_span_data_of_ones_own() -> None:
    """A class derived from any span data, with its own constructor, works like the others."""

    class Search(ToolSpanData):
        def __init__(self, query: str) -> None:
            super().__init__(tool_name="search", tool_args={"query": query})

    assert Search("qitos").export()["tool_args"] == {"query": "qitos"}
    assert Search("qitos").type == "tool"


def test_content_stays_out_of_reprs() -> None:
    """A span, trace or span data in a log line shows ids, never content."""
    with a_trace() as trace:
        span = trace.create_span(SpanType.TOOL, ToolSpanData(tool_name="t", tool_args={"k": "pw"}))
        span.set_output("pw")
    assert "pw" not in f"{span!r}{trace!r}{span.data!r}"


def test_any_span_has_a_repr() -> None:
    """Also one that does nothing, and one with data of another kind."""
    assert repr(NoOpSpan()) == "<Span None  of trace >"
    odd: Any = {"x": "secret"}
    assert repr(Span("t", "s", odd)) == "<Span None s of trace t>"


def test_events_in_order_with_times() -> None:
    """A processor gets a trace and its spans, starts and ends, in order; times are ISO UTC."""
    recorder = Recorder()
    with a_trace(recorder) as trace:
        span = step(trace).start()
        span.set_output({"ok": True})
        span.finish("no good")
    assert recorder.names == ["trace_start", "span_start", "span_end", "trace_end"]
    for time in (span.started_at, span.ended_at):
        assert time is not None
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}\+00:00", time)
    assert span.started_at <= span.ended_at  # type: ignore[operator]
    exported = trace.export()["spans"][0]
    assert exported["error"] == "no good"
    assert exported["output"] == {"ok": True}
    assert exported["data"]["step_number"] == 1


def test_nested_spans_have_parents() -> None:
    """A span started while another of its trace is going on is part of that one."""
    with a_trace() as trace:
        outer = step(trace).start()
        inner = step(trace).start()
        inner.finish()
        sibling = step(trace).start()
        sibling.finish()
        outer.finish()
        after = step(trace)
    assert inner.parent_span_id == sibling.parent_span_id == outer.span_id
    assert outer.parent_span_id is after.parent_span_id is None


def test_no_parent_from_another_trace() -> None:
    """The first span of a trace within a trace has no parent; afterwards the outer ones go on."""
    with a_trace() as outer:
        outer_span = step(outer).start()
        with a_trace() as inner:
            root = step(inner).start()
            child = step(inner).start()
            interleaved = step(outer).start()
            for span in (interleaved, child, root):
                span.finish()
        outer_child = step(outer)
    assert root.parent_span_id is None
    assert child.parent_span_id == root.span_id
    assert interleaved.parent_span_id == outer_span.span_id
    assert outer_child.parent_span_id == outer_span.span_id


def test_explicit_parent() -> None:
    """`parent` may be a span or an id, and beats the current span; a foreign span is no parent."""
    with a_trace() as other:
        foreign = step(other).start()
    with a_trace() as trace:
        first = step(trace).start()
        second = step(trace).start()
        assert second.parent_span_id == first.span_id
        assert step(trace, parent=first).parent_span_id == first.span_id
        assert step(trace, parent="some-id").parent_span_id == "some-id"
        assert step(trace, parent=foreign).parent_span_id is None
        assert step(trace, span_id="mine").span_id == "mine"


def test_out_of_order_finish_leaves_nothing_behind() -> None:
    """Finishing an outer span first leaves the inner one current, and then none."""
    with a_trace() as trace:
        outer, inner = step(trace).start(), step(trace).start()
        outer.finish()
        assert step(trace).parent_span_id == inner.span_id
        inner.finish()
        assert step(trace).parent_span_id is None


def test_finish_on_another_thread() -> None:
    """A span finished on another thread reaches the processor, and is no parent afterwards."""
    recorder = Recorder()
    with a_trace(recorder) as trace:
        span = step(trace).start()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(span.finish).result()
        assert recorder.objects("span_end") == [span]
        assert step(trace).parent_span_id is None


def test_copied_context_keeps_the_parent() -> None:
    """A thread that runs in a copied context goes on below the span it was copied in."""
    with a_trace() as trace, ThreadPoolExecutor(1) as pool:
        parent = step(trace).start()
        context = contextvars.copy_context()
        inside = pool.submit(context.run, lambda: step(trace).start()).result()
        outside = pool.submit(lambda: step(trace)).result()
        assert inside.parent_span_id == parent.span_id
        assert outside.parent_span_id is None
        assert step(trace).parent_span_id == parent.span_id  # The thread's span is the thread's.
        inside.finish()


def test_asyncio_tasks_do_not_mix() -> None:
    """Traces in tasks that run at once keep to themselves, whatever the order of their steps."""

    async def run(name: str, turns: int) -> tuple[Trace, Span]:
        with a_trace(name=name) as trace:
            outer = step(trace).start()
            for number in range(turns):
                inner = step(trace, number).start()
                await asyncio.sleep(0)
                inner.finish()
            outer.finish()
        return trace, outer

    async def both() -> list[tuple[Trace, Span]]:
        return await asyncio.gather(run("a", 3), run("b", 5))

    for trace, outer in asyncio.run(both()):
        assert {span.trace_id for span in trace.spans} == {trace.trace_id}
        assert {span.parent_span_id for span in trace.spans[1:]} == {outer.span_id}


def test_traces_in_many_threads() -> None:
    """16 traces in 8 threads, one processor: each trace has its own spans, all of them, once."""
    recorder = Recorder()
    shared = TracingProvider([recorder])
    together = threading.Barrier(8)

    def work(number: int) -> None:
        together.wait()
        for _ in range(2):
            with shared.create_trace(f"run {number}") as trace:
                for turn in range(20):
                    outer = trace.create_span(SpanType.STEP, StepSpanData(turn)).start()
                    trace.create_span(SpanType.STEP, StepSpanData(turn)).start().finish()
                    outer.finish()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    traces = recorder.objects("trace_end")
    assert len({trace.trace_id for trace in traces}) == 16
    ended = recorder.objects("span_end")
    assert len(ended) == len({span.span_id for span in ended}) == 16 * 40
    for trace in traces:
        assert len(trace.spans) == 40
        own = {span.span_id for span in trace.spans} | {None}
        assert all(span.parent_span_id in own for span in trace.spans)


def test_finish_counts_once() -> None:
    """However many threads finish a span, it ends once, with the error of the first one."""
    recorder = Recorder()
    together = threading.Barrier(8)
    with a_trace(recorder) as trace:
        span = step(trace).start()

        def finish(number: int) -> None:
            together.wait()
            span.finish(f"error {number}")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(finish, range(8)))
        first = span.error
        span.finish("too late")
        span.start()
    assert recorder.names == ["trace_start", "span_start", "span_end", "trace_end"]
    assert span.error == first != "too late"


def test_finish_takes_exceptions() -> None:
    """An exception given to `finish` is kept as it is, and as text."""
    with a_trace() as trace:
        span = step(trace).start()
        error = ValueError("bad key")
        span.finish(error)
    assert span.exception is error
    assert span.error == "ValueError: bad key"


def test_finish_takes_exceptions_without_words() -> None:
    """An exception whose own `__str__` raises does not get into the agent."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with a_trace() as trace:
        span = step(trace).start()
        span.finish(Mute())
    assert span.error == "Mute"


def test_finish_without_start() -> None:
    """A span that was never started can be finished; it took no time."""
    recorder = Recorder()
    with a_trace(recorder) as trace:
        span = step(trace)
        span.finish()
    assert recorder.objects("span_end") == [span]
    assert span.started_at == span.ended_at is not None


def test_trace_keeps_the_exception() -> None:
    """Processors find the exception that left the `with` block; the caller gets it unchanged."""
    recorder = Recorder()
    error = KeyboardInterrupt()
    seen: list[BaseException | None] = []
    recorder.on_trace_end = lambda trace: seen.append(trace.error)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) as caught, a_trace(recorder):
        raise error
    assert caught.value is error
    assert seen == [error]


def test_trace_closes_open_spans_in_reverse() -> None:
    """Spans left open are closed innermost first, before the trace's end, and say so."""
    recorder = Recorder()
    with a_trace(recorder) as trace:
        spans = [step(trace, number).start() for number in range(3)]
        unstarted = step(trace)
    assert recorder.objects("span_end") == spans[::-1]
    assert recorder.names[-1] == "trace_end"
    assert {span.error for span in spans} == {NOT_FINISHED}
    assert unstarted.ended_at is None
    with a_trace() as later:
        assert step(later).parent_span_id is None


def test_trace_closes_open_spans_with_its_exception() -> None:
    """Spans left open by an exception carry it."""
    error = ValueError("bad key")
    with pytest.raises(ValueError, match="bad key"), a_trace() as trace:
        step(trace).start()
        raise error
    (span,) = trace.spans
    assert span.exception is error
    assert span.error == f"{NOT_FINISHED} with ValueError: bad key"


def test_span_on_a_living_thread_outlives_its_trace() -> None:
    """A span still open on another thread ends once, when that thread finishes it."""
    recorder = Recorder()
    started, go_on = threading.Event(), threading.Event()
    with a_trace(recorder) as trace:

        def tool() -> None:
            span = step(trace).start()
            started.set()
            go_on.wait(10)
            span.finish()

        thread = threading.Thread(target=tool)
        thread.start()
        assert started.wait(10)
    assert recorder.names[-1] == "trace_end"
    go_on.set()
    thread.join()
    assert recorder.names[2:] == ["trace_end", "span_end"]
    assert recorder.objects("span_end")[0].error is None


def test_span_of_a_dead_thread_is_closed() -> None:
    """A span whose thread ended without finishing it is closed by its trace, not lost."""
    recorder = Recorder()
    with a_trace(recorder) as trace:
        thread = threading.Thread(target=lambda: step(trace).start())
        thread.start()
        thread.join()
    assert [span.error for span in recorder.objects("span_end")] == [NOT_FINISHED]


def test_trace_begins_and_ends_once() -> None:
    """Entering and leaving a trace again notifies no processor."""
    recorder = Recorder()
    trace = a_trace(recorder)
    for _ in range(2):
        with trace:
            pass
    assert recorder.names == ["trace_start", "trace_end"]


def test_metadata_is_the_trace_s_own() -> None:
    """One dict given to two traces is not shared by them."""
    given = {"task": "t"}
    one, other = Trace("1", "a", metadata=given), Trace("2", "b", metadata=given)
    one.metadata["stop_reason"] = "final"
    assert "stop_reason" not in other.metadata
    assert given == {"task": "t"}


def test_copies_are_snapshots() -> None:
    """A copied or pickled span or trace keeps its attributes and notifies no processor."""
    recorder = Recorder()
    with a_trace(recorder) as trace:
        span = step(trace).start()
        for other in (copy.copy(span), copy.deepcopy(span), pickle.loads(pickle.dumps(span))):
            other.finish()
            assert other.export()["span_id"] == span.span_id
            assert isinstance(other.data, StepSpanData)
        with copy.copy(trace) as other_trace:
            assert other_trace.spans == [span]
        assert recorder.objects("span_end") == recorder.objects("trace_end") == []
        assert span.ended_at is None
    assert recorder.objects("trace_end") == [trace]


def test_spans_are_not_kept_alive() -> None:
    """Once a trace has ended, this thread holds none of its spans, wherever they were finished."""
    with a_trace() as trace:
        span = step(trace).start()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(span.finish).result()
    dead = weakref.ref(span)
    del span, trace
    gc.collect()
    assert dead() is None


def test_noop_metadata_is_not_shared() -> None:
    """What is written into the metadata of one switched-off trace is not found in another."""
    with NoOpTrace() as one:
        one.metadata["x"] = 1
        assert one.create_span(SpanType.STEP, StepSpanData(1)).start().export() == {}
    assert NoOpTrace().metadata == {}
    assert one.spans == []
    span = NoOpSpan()
    span.set_output("x")
    span.finish(ValueError())
    assert span.output is None
