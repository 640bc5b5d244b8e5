"""The agent's spans in MLflow's own tracer: what is current, what ends, what is left alone."""

from __future__ import annotations

import contextvars
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from cachetools import TTLCache
from mlflow.tracing import provider
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils import maybe_get_request_id
from opentelemetry.context import Context

from qitos_mlflow.mlflow_plugin.fluent import in_background, mlflow_tree, origins, surroundings
from qitos_mlflow.mlflow_plugin.fluent.mlflow_tree import MlflowTree, tree_around
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef

# MLflow's own, where it imports itself as a span begins.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")

TRACE = "0123456789abcdef0123456789abcdef"
FIELD_BYTES = 1 << 20
STARTED = "2026-01-01T00:00:00.000001+00:00"


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's spans are not sent, and none is current at first."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    monkeypatch.setattr(MlflowV3SpanExporter, "export", lambda exporter, spans: None)
    mlflow.tracing.reset()
    contexts = provider.get_context_api()
    token = contexts.attach(Context())
    yield
    contexts.detach(token)
    mlflow.tracing.reset()
    InMemoryTraceManager.reset()


def agents_trace(**metadata: Any) -> Any:
    """A host's trace, as far as it matters here: one of an agent."""
    return SimpleNamespace(trace_id=TRACE, name="agent", metadata={"agent_name": "a", **metadata})


def span(number: int, parent: int | None = None, kind: str = "tool") -> Any:
    """A QitOS span, as far as it matters here."""
    above = None if parent is None else f"span-{parent}"
    data = SimpleNamespace(type=kind, name=f"{kind} {number}")
    return SimpleNamespace(
        span_id=f"span-{number}", parent_span_id=above, data=data, started_at=STARTED
    )


def record(one: Any, **fields: Any) -> bytes:
    """The record of a span that has ended."""
    own = {"kind": "span", "trace_id": TRACE, "span_id": one.span_id, "type": one.data.type}
    times = {"started_at": STARTED, "ended_at": STARTED}
    return json.dumps({**own, **times, "error": None, "data": {}, **fields}).encode()


def around(trace: Any, run: PendingRun | None = None, parent: str | None = None) -> MlflowTree:
    """The tree that the trace is part of."""
    tree = tree_around(trace, run or PendingRun(), FIELD_BYTES, parent)
    assert tree is not None
    return tree


def settle(tree: MlflowTree) -> None:
    """Wait until what the tree was given is shown."""
    tree._background.wait(60.0, 60.0)


def evaluating() -> Any:
    """As while `mlflow.genai.evaluate` calls its `predict_fn` for a row."""
    from mlflow.pyfunc.context import Context, set_prediction_context

    return set_prediction_context(Context(request_id="row 1", is_evaluate=True))


def current() -> Any:
    found = mlflow.get_current_active_span()
    return None if found is None else found.name


def spans(trace_id: str) -> dict[str, Any]:
    """The spans that MLflow knows of its trace, by their names."""
    with InMemoryTraceManager.get_instance().get_trace(trace_id) as trace:
        return {one.name: one for one in trace.span_dict.values()}


def test_spans_are_current_while_they_go() -> None:
    """One inside the other; afterwards the user's own span is current again."""
    with mlflow.start_span("the user's") as own:
        tree = around(agents_trace())
        tree.enter(span(1))
        tree.enter(span(2, 1))
        assert current() == "tool 2"
        with mlflow.start_span("autologged") as below:
            assert below.parent_id == spans(own.trace_id)["tool 2"].span_id
        tree.fold(record(span(2)))
        tree.leave(span(2))
        assert current() == "tool 1"
        tree.fold(record(span(1)))
        tree.leave(span(1))
        assert current() == "the user's"
        settle(tree)
        assert not tree._open
    assert current() is None


def test_a_span_of_the_users_in_between() -> None:
    """An agent that a traced tool starts is below the user's span; one elsewhere is not."""
    with mlflow.start_span("top") as top:
        tree = around(agents_trace())
        tree.enter(span(1))
        with mlflow.start_span("inside") as inside:
            tree.enter(span(2, 1))
            tree.leave(span(2))
        other = contextvars.copy_context()
        tree.enter(span(3, 1))
        # A thread whose context is older than the span it works for.
        thread = threading.Thread(target=other.run, args=(tree.enter, span(4, 3)))
        thread.start()
        thread.join()
        found = spans(top.trace_id)
        assert found["tool 2"].parent_id == inside.span_id
        assert found["tool 4"].parent_id == found["tool 3"].span_id
        tree.end()


def test_all_spans_end_with_the_trace() -> None:
    """MLflow sends no trace with an open span. A span whose record is lost ends without it."""
    with mlflow.start_span("top") as top:
        tree = around(agents_trace())
        for number in range(3):
            tree.enter(span(number))
        tree.leave(span(2))
        settle(tree)
        assert spans(top.trace_id)["tool 2"].end_time_ns
        tree.end()
        tree.enter(span(4))  # Late.
        assert all(one.end_time_ns for one in spans(top.trace_id).values() if one is not top)
        assert current() == "top"
        assert len(spans(top.trace_id)) == 4


def test_ended_spans_do_not_pile_up() -> None:
    """A context out of reach refers to what was current at first, not to all spans since."""
    with mlflow.start_span("top"):
        tree = around(agents_trace())
        for number in range(2000):  # Beyond the depth of recursion.
            tree.enter(span(number))
            contextvars.copy_context().run(tree.leave, span(number))
        tree.end()
        assert current() == "top"


def test_a_long_trace_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow drops a trace after an hour, with all its spans."""
    clock = [0.0]
    traces: Any = TTLCache(maxsize=1000, ttl=3600, timer=lambda: clock[0])
    monkeypatch.setattr(InMemoryTraceManager.get_instance(), "_traces", traces)
    monkeypatch.setattr(mlflow_tree.time, "monotonic", lambda: clock[0])
    with mlflow.start_span("top") as top:
        tree = around(agents_trace())
        for minute in range(150):
            clock[0] = minute * 60.0
            tree.enter(span(minute))
            tree.leave(span(minute))
        assert len(spans(top.trace_id)) == 151
        tree.end()


def test_an_evaluation_without_a_span_gets_a_trace() -> None:
    """The one that MLflow looks for; outside of an evaluation there is none."""
    assert tree_around(agents_trace(), PendingRun(), FIELD_BYTES, None) is None
    with evaluating():
        tree = around(agents_trace())
        start = {"kind": "trace_start", "trace_id": TRACE, "metadata": {"task_id": "a task"}}
        tree.fold(json.dumps(start).encode())
        settle(tree)
        with InMemoryTraceManager.get_instance().get_trace(tree.trace_id) as trace:
            assert trace.info.tags["mlflow.eval.requestId"] == "row 1"
            assert trace.info.tags["qitos.task_id"] == "a task"
        assert current() == "agent"
        tree.end()
        assert current() is None


@pytest.mark.parametrize(("first", "wrapped"), [("agent", True), ("span", False)])
def test_an_evaluation_makes_a_span_around_rows_that_begin_with_an_agent(
    first: str, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if autologging makes spans in the agent; what has a span of its own gets no other."""
    from mlflow.genai.utils.trace_utils import convert_predict_fn

    names: list[str] = []
    monkeypatch.setattr(
        MlflowV3SpanExporter, "export", lambda exporter, ended: names.extend(s.name for s in ended)
    )

    def predict(question: str) -> str:
        if first == "span":
            mlflow.start_span_no_context("own").end()
        surroundings.is_trial()
        with mlflow.start_span("autologged"):
            return question

    convert_predict_fn(predict, {"question": "why?"})({"question": "why?"})
    assert ("predict" in names) is wrapped


@pytest.mark.parametrize("stalls", [True, False])
def test_a_server_that_does_not_answer_is_not_waited_for(
    stalls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inside an evaluation MLflow sends each span at once; then this one goes to its queue."""
    asked: list[Any] = []
    run = PendingRun(lambda: stalls)
    with (
        evaluating(),
        mlflow.start_span("predict") as top,
    ):
        tree = around(agents_trace(), run)
        tree.enter(span(1))
        live = spans(top.trace_id)["tool 1"]
        end = live.end
        monkeypatch.setattr(
            live, "end", lambda **how: (asked.append(maybe_get_request_id(True)), end(**how))
        )
        tree.fold(record(span(1)))
        settle(tree)
        assert asked == [None if stalls else "row 1"]
        tree.end()


def test_the_agent_does_not_wait_for_a_server_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MLflow sends a span in an evaluation: the agent goes on, the rest is left to a queue.

    OpenTelemetry sends what is in the queue on the thread that flushes it, without a limit.
    """
    monkeypatch.setattr(mlflow_tree, "STALL_S", 0.1)
    answers, hangs, flushes = threading.Event(), threading.Event(), threading.Event()
    flushed: list[bool] = []

    def flush(timeout_ms: int) -> None:
        flushes.set()
        flushed.append(answers.wait(30.0))

    def export(exporter: Any, ended: Any) -> None:
        if maybe_get_request_id(is_evaluate=True):
            hangs.set()
            answers.wait(60.0)

    monkeypatch.setattr(MlflowV3SpanExporter, "export", export)
    with evaluating(), mlflow.start_span("predict") as top:
        monkeypatch.setattr(provider.provider.get(), "force_flush", flush)
        tree = around(agents_trace())
        for number in range(4):
            tree.enter(span(number))
            tree.fold(record(span(number)))
            tree.leave(span(number))
        assert hangs.wait(60.0)
        tree.end()
        assert flushes.wait(60.0)
        assert not flushed, "it hangs still"
        assert current() == "predict"
        assert all(one.end_time_ns for one in spans(top.trace_id).values() if one is not top)
        answers.set()
        settle(tree)


def test_records_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond, a span ends without what it would show."""
    monkeypatch.setattr(mlflow_tree, "MAX_WAITING", 3)
    goes_on = threading.Event()
    with mlflow.start_span("top") as top:
        tree = around(agents_trace())
        tree._background.do(goes_on.wait)
        for number in range(9):
            tree.enter(span(number))
            tree.fold(record(span(number)))
            tree.leave(span(number))
        goes_on.set()
        tree.end()
        shown = [one for one in spans(top.trace_id).values() if one.attributes.get("qitos.span_id")]
        assert 0 < len(shown) < 4
        assert all(one.end_time_ns for one in spans(top.trace_id).values() if one is not top)


def test_a_trace_that_has_ended_holds_no_spans() -> None:
    """The last thousand traces are remembered; what their spans show may be large."""
    with mlflow.start_span("top") as top:
        tree = around(agents_trace())
        tree.enter(span(1))
        tree.fold(record(span(1)))
        tree.leave(span(1))
        tree.end()
        held = weakref.ref(top._span)
    InMemoryTraceManager.reset()
    del top
    gc.collect()
    assert held() is None
    assert tree.trace_id


@pytest.mark.parametrize(("ends", "linger_s"), [(True, 1000.0), (False, 0.01)])
def test_no_thread_is_left_of_many_traces(
    ends: bool, linger_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one that has ended at once; of one that never ends after a while."""
    monkeypatch.setattr(in_background, "LINGER_S", linger_s)
    before = set(threading.enumerate())
    with mlflow.start_span("top"):
        for _ in range(50):
            tree = around(agents_trace())
            tree.enter(span(1))
            tree.fold(record(span(1)))
            tree.leave(span(1))
            if ends:
                tree.end()
                assert not tree._open
    for thread in set(threading.enumerate()) - before:
        if thread.name == "qitos-mlflow-mlflow-tree":
            thread.join(60.0)
            assert not thread.is_alive()


def test_a_forked_process_makes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The span that is current in it is its parent's."""
    with mlflow.start_span("top") as top:
        monkeypatch.setattr(origins, "forked_ns", top.start_time_ns + 1)
        assert tree_around(agents_trace(), PendingRun(), FIELD_BYTES, None) is None


@pytest.mark.parametrize(("parent", "expected"), [("evaluation", "evaluation"), (None, "r")])
def test_the_run_that_mlflows_trace_belongs_to(parent: str | None, expected: str) -> None:
    """The one that is open around the agent, else the agent's; never one of another agent."""
    run = PendingRun()
    with mlflow.start_span("top") as top:
        with InMemoryTraceManager.get_instance().get_trace(top.trace_id) as trace:
            trace.info.trace_metadata["mlflow.sourceRun"] = "another agent's"
        tree = around(agents_trace(), run, parent)
        start = {"kind": "trace_start", "trace_id": TRACE, "metadata": {}, "name": "agent"}
        tree.fold(json.dumps(start).encode())
        run.created(RunRef("r", "7", "run", "", 0))
        end = {"kind": "trace_end", "trace_id": TRACE, "metadata": {"stop_reason": "final"}}
        tree.fold(json.dumps(end).encode())
        tree.end()
        with InMemoryTraceManager.get_instance().get_trace(top.trace_id) as trace:
            assert trace.info.trace_metadata["mlflow.sourceRun"] == expected
            assert trace.info.tags["qitos.trace_id"] == TRACE
            assert trace.info.tags["stop_reason"] == "final"


def test_a_failure_is_kept_from_the_agent(
    monkeypatch: pytest.MonkeyPatch, swallowed: list[Any]
) -> None:
    """A record that cannot be read costs what it shows, and the span ends."""
    with mlflow.start_span("top") as top:
        tree = around(agents_trace())
        tree.enter(span(1))
        tree.fold(b"{")
        tree.leave(span(1))
        tree.enter(span(2))
        with monkeypatch.context() as broken:
            broken.setattr(mlflow_tree, "span_name", None)
            tree.fold(record(span(2)))
            settle(tree)
        tree.leave(span(2))
        settle(tree)
        monkeypatch.setattr(tree, "_contexts", None)
        tree.enter(span(3))
        tree.leave(span(3))
        tree.end()
        assert all(one.end_time_ns for one in spans(top.trace_id).values() if one is not top)
    assert {where for where, _ in swallowed} == {
        "mlflow-tree",
        "mlflow_tree.enter",
        "mlflow_tree.leave",
        "mlflow_tree.end",
    }
    swallowed.clear()
