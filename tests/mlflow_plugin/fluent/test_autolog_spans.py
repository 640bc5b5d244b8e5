"""MLflow's current span is the QitOS span that is going, where and only where that is right."""

from __future__ import annotations

import contextlib
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from cachetools import TTLCache
from mlflow.entities import LiveSpan
from mlflow.tracing import provider
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter
from mlflow.tracing.trace_manager import InMemoryTraceManager
from mlflow.tracing.utils.timeout import MlflowTraceTimeoutCache
from opentelemetry import trace as otel
from opentelemetry.context import Context

from qitos_mlflow.mlflow_plugin.fluent.autolog_spans import AutologSpans
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.mapping.ids import span_id, trace_id

# MLflow's own, where it imports itself as a span begins.
pytestmark = pytest.mark.filterwarnings("ignore:.*Any type hint is inferred")

HERE = "http://127.0.0.1:9"
TRACE = "0123456789abcdef0123456789abcdef"
OTHER = TRACE[::-1]


@pytest.fixture(autouse=True)
def _mlflow_goes_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's own calls go to `HERE`, where no server listens; its spans are not even sent."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", HERE)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_TRACE_LOGGING", "false")
    monkeypatch.setattr(MlflowV3SpanExporter, "export", lambda exporter, spans: None)
    mlflow.tracing.reset()
    contexts = provider.get_context_api()
    # Other tests of this process leave spans that never end; here none is current at first.
    token = contexts.attach(Context())
    yield
    contexts.detach(token)
    mlflow.tracing.reset()
    InMemoryTraceManager.reset()


def span(number: int) -> Any:
    """A QitOS span, as far as it matters here."""
    return SimpleNamespace(span_id=f"span-{number}", data=SimpleNamespace(type="tool"))


def current() -> str | None:
    """The id of MLflow's current span on this thread, None when there is none."""
    context = provider.get_current_otel_span().get_span_context()
    return f"{context.span_id:016x}" if context.is_valid else None


def identity(number: int) -> str:
    """MLflow's id of a span."""
    return span_id(TRACE, f"span-{number}").hex()


def known() -> bool:
    """Whether MLflow knows the trace."""
    with InMemoryTraceManager.get_instance().get_trace(trace_id(TRACE)) as trace:
        return trace is not None


def goes_to() -> str | None:
    """The trace in which a span made by the user's own code ends up; None when it is lost."""
    with mlflow.start_span("the user's") as own:
        return own.trace_id if isinstance(own, LiveSpan) else None


def is_the_users_own(trace: str | None) -> bool:
    """Whether the trace is one that MLflow has made for the user's own code."""
    return trace not in (None, trace_id(TRACE), trace_id(OTHER))


def on_another_thread(call: Callable[..., object], *args: Any) -> None:
    """Call it there, and wait."""
    thread = threading.Thread(target=call, args=args)
    thread.start()
    thread.join()


@pytest.fixture
def nesting() -> AutologSpans:
    """Of a trace that goes where MLflow's own calls go."""
    run = PendingRun()
    run.created(RunRef("r", "7", "run", "", 0))
    return AutologSpans(TRACE, run, HERE)


def test_the_innermost_span_is_current(nesting: AutologSpans) -> None:
    """Spans are current while they go, one inside the other, and then what was before is again."""
    nesting.enter(span(1))
    assert current() == identity(1)
    nesting.enter(span(2))
    assert current() == identity(2)
    nesting.leave(span(2))
    assert current() == identity(1)
    nesting.leave(span(1))
    assert current() is None
    assert mlflow.get_current_active_span() is None


def test_the_callers_own_span_comes_back(nesting: AutologSpans) -> None:
    """A span of MLflow's that was current before is current afterwards."""
    contexts = provider.get_context_api()
    own = otel.NonRecordingSpan(otel.SpanContext(1, 2, is_remote=False))
    token = contexts.attach(otel.set_span_in_context(own, contexts.get_current()))
    before = current()
    nesting.enter(span(1))
    assert current() == identity(1)
    nesting.leave(span(1))
    assert current() == before == f"{2:016x}"
    contexts.detach(token)


def test_a_trace_without_mlflows_spans_is_forgotten_at_once(nesting: AutologSpans) -> None:
    """What MLflow knows of the trace does not stay, or reading it would not go to the server."""
    nesting.enter(span(1))
    assert known()
    nesting.leave(span(1))
    assert nesting.end() == {}
    assert not known()


@pytest.mark.parametrize("usage", [{"prompt_tokens": 1}, None])
def test_a_call_that_is_a_qitos_span_has_its_price_there(
    nesting: AutologSpans, usage: dict[str, int] | None
) -> None:
    """MLflow's spans of it are free, however deep, unless QitOS knows no tokens. Others are not."""
    call = span(1)
    call.data = SimpleNamespace(type="generation", token_usage=usage)
    nesting.enter(call)
    with mlflow.start_span("chain") as chain, mlflow.start_span("completion") as completion:
        pass
    nesting.leave(call)
    nesting.enter(span(2))
    with mlflow.start_span("a tool's own call") as other:
        pass
    nesting.leave(span(2))
    prices = [one.attributes.get("mlflow.llm.cost") for one in (chain, completion, other)]
    free = {"input_cost": 0.0, "output_cost": 0.0, "total_cost": 0.0}
    assert prices == ([free, free, None] if usage else [None] * 3)


def test_mlflow_knows_which_trace_was_last(nesting: AutologSpans) -> None:
    """As it does after one of its own."""
    nesting.enter(span(1))
    nesting.leave(span(1))
    nesting.end()
    assert mlflow.get_last_active_trace_id() == trace_id(TRACE)
    assert mlflow.get_last_active_trace_id(thread_local=True) == trace_id(TRACE)


def test_a_span_that_ends_on_another_thread(nesting: AutologSpans) -> None:
    """It changes nothing there, and is not current any more on the thread it began on."""
    nesting.enter(span(1))
    nesting.enter(span(2))
    on_another_thread(nesting.leave, span(2))
    assert current() == identity(1)
    nesting.leave(span(1))
    assert current() is None
    nesting.leave(span(2))  # Never twice.
    assert current() is None


def test_spans_that_end_in_another_order(nesting: AutologSpans) -> None:
    """The innermost that still goes is current, also when one around it has ended."""
    nesting.enter(span(1))
    nesting.enter(span(2))
    nesting.leave(span(1))
    assert current() == identity(2)
    nesting.leave(span(2))
    assert current() is None
    assert is_the_users_own(goes_to())


def test_a_span_that_ends_inside_one_of_mlflows(nesting: AutologSpans) -> None:
    """MLflow restores it when its own span ends; by then it stands for nothing."""
    nesting.enter(span(1))
    with mlflow.start_span("the user's"):
        nesting.leave(span(1))
    assert current() is None
    assert is_the_users_own(goes_to())


def ended_on_another_thread(nesting: AutologSpans) -> None:
    """The trace ends on another thread than it ran on, after its span."""
    on_another_thread(nesting.leave, span(1))
    on_another_thread(nesting.end)


@pytest.mark.parametrize("end", [AutologSpans.end, ended_on_another_thread])
def test_a_trace_that_ended_is_no_parent(
    nesting: AutologSpans, end: Callable[[AutologSpans], object]
) -> None:
    """The user's spans are kept after a trace whose spans could not be detached."""
    nesting.enter(span(1))
    end(nesting)
    assert current() is None
    assert is_the_users_own(goes_to())


def test_the_callers_own_span_is_the_parent_after_a_trace_within_it(nesting: AutologSpans) -> None:
    """What is below a trace's unfinished spans is the caller's own span, not nothing."""
    with mlflow.start_span("the user's") as own:
        nesting.enter(span(1))
        nesting.enter(span(2))
        nesting.end()
        assert current() == own.span_id
        with mlflow.start_span("after") as after:
            assert after.parent_id == own.span_id


def test_traces_that_take_turns_on_a_thread(nesting: AutologSpans) -> None:
    """Each is current while it goes, and the user's own spans are kept after both."""
    other = AutologSpans(OTHER, nesting._run, HERE)
    nesting.enter(span(1))
    other.enter(span(2))
    nesting.leave(span(1))
    nesting.end()
    assert current() == span_id(OTHER, "span-2").hex()
    other.leave(span(2))
    other.end()
    assert current() is None
    assert is_the_users_own(goes_to())


def test_a_span_that_starts_after_its_trace(nesting: AutologSpans) -> None:
    """Nothing is made current for a trace that MLflow has forgotten."""
    nesting.enter(span(1))
    nesting.end()
    nesting.enter(span(2))
    assert current() is None
    assert is_the_users_own(goes_to())


def test_ended_spans_do_not_pile_up(nesting: AutologSpans) -> None:
    """A context out of reach refers to what was current at first, not to all spans since."""
    for number in range(5000):  # Far beyond the depth of recursion.
        nesting.enter(span(number))
        contextvars.copy_context().run(nesting.leave, span(number))
    assert current() is None
    assert is_the_users_own(goes_to())


@pytest.fixture
def ahead_s(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How far our clock is ahead, and that of MLflow's memory of traces."""
    ahead_s = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: time.monotonic() + ahead_s[0],
        time_ns=lambda: time.time_ns() + int(ahead_s[0] * 1e9),
    )
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.fluent.autolog_spans.time", clock)
    traces: Any = TTLCache(maxsize=1000, ttl=3600, timer=clock.monotonic)
    monkeypatch.setattr(InMemoryTraceManager.get_instance(), "_traces", traces)
    return ahead_s


def test_a_trace_that_has_ended_holds_no_spans(nesting: AutologSpans) -> None:
    """The last thousand traces are remembered; what their spans show may be large."""
    nesting.enter(span(1))
    with mlflow.start_span("autologged") as inner:
        held = weakref.ref(inner._span)
    nesting.leave(span(1))
    nesting.end()
    for thread in threading.enumerate():
        if thread.name == "qitos-mlflow-autolog":
            thread.join()
    InMemoryTraceManager.reset()
    del inner
    gc.collect()
    assert held() is None


def test_mlflow_never_forgets_a_trace_that_goes_on(
    nesting: AutologSpans, ahead_s: list[float]
) -> None:
    """Its hour begins anew with each minute; the spans sent by then are let go."""
    nesting.enter(span(0))
    with mlflow.start_span("lasts") as lasting:
        mlflow.update_current_trace(tags={"team": "blue"})
        for minute in range(150):
            ahead_s[0] = minute * 60.0
            nesting.enter(span(minute))
            assert goes_to() == trace_id(TRACE)
            nesting.leave(span(minute))
        with InMemoryTraceManager.get_instance().get_trace(trace_id(TRACE)) as trace:
            assert lasting.span_id in trace.span_dict
            assert len(trace.span_dict) < 5
    nesting.leave(span(0))
    assert nesting.end() == {"team": "blue"}


def test_a_trace_under_mlflows_time_limit_is_renewed(
    nesting: AutologSpans, ahead_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's other kind of memory renews only what it takes for new."""
    traces = MlflowTraceTimeoutCache(timeout=3600, maxsize=1000)
    monkeypatch.setattr(InMemoryTraceManager.get_instance(), "_traces", traces)
    monkeypatch.setenv("MLFLOW_TRACE_TIMEOUT_SECONDS", "3600")
    nesting.enter(span(1))
    before = traces._links[trace_id(TRACE)]
    ahead_s[0] = 61.0
    nesting.enter(span(2))
    assert traces._links[trace_id(TRACE)] is not before
    traces.clear()  # Ends its thread.


def test_a_manager_with_other_insides_is_asked_nothing(
    nesting: AutologSpans, ahead_s: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where traces cannot be renewed they are forgotten after an hour, and known until then."""
    nesting.enter(span(1))
    manager = InMemoryTraceManager.get_instance()
    with manager.get_trace(trace_id(TRACE)) as trace, monkeypatch.context() as other:
        other.setattr(manager, "get_trace", lambda _: contextlib.nullcontext(trace))
        other.delattr(manager, "_traces")
        ahead_s[0] = 61.0
        nesting.enter(span(2))
    assert current() == identity(2)


def test_the_tags_are_had_when_no_thread_can_be_started(
    nesting: AutologSpans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the interpreter's exit MLflow's spans are not forgotten, which does not matter then."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    nesting.enter(span(1))
    with mlflow.start_span("model call"):
        mlflow.update_current_trace(tags={"team": "blue"})
    nesting.leave(span(1))
    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert nesting.end() == {"team": "blue"}


@pytest.mark.parametrize("uri", ["http://127.0.0.1:10", "sqlite:////elsewhere.db", None])
def test_traces_that_go_elsewhere_are_left_alone(uri: str | None) -> None:
    """MLflow's spans would not arrive where the trace is: they stay traces of their own."""
    nesting = AutologSpans(TRACE, PendingRun(), uri)
    nesting.enter(span(1))
    assert current() is None
    assert not known()
    nesting.leave(span(1))
    assert nesting.end() == {}


def test_an_unreachable_server_is_left_alone() -> None:
    """Offline, or while the server is down, the spans could not be put together."""
    nesting = AutologSpans(TRACE, PendingRun(lambda: True), HERE)
    nesting.enter(span(1))
    assert current() is None
    nesting.leave(span(1))


def test_a_failure_is_kept_from_the_agent(
    nesting: AutologSpans, monkeypatch: pytest.MonkeyPatch, swallowed: list[Any]
) -> None:
    """Another MLflow with other insides costs the nesting, and nothing else."""
    monkeypatch.setattr(provider, "get_context_api", None)
    nesting.enter(span(1))
    nesting.leave(span(1))
    assert [where for where, _ in swallowed] == ["autolog_spans.enter"]
    swallowed.clear()
