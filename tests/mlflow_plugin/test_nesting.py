"""MLflow's current span is the QitOS span that is going, where and only where that is right."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest
from mlflow.tracing import provider
from mlflow.tracing.trace_manager import InMemoryTraceManager
from opentelemetry import trace as otel
from opentelemetry.context import Context

from qitos_mlflow.mlflow_plugin.ids import span_id, trace_id
from qitos_mlflow.mlflow_plugin.nesting import Nesting
from qitos_mlflow.mlflow_plugin.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.transport import RunRef

HERE = "http://127.0.0.1:9"
TRACE = "0123456789abcdef0123456789abcdef"


@pytest.fixture(autouse=True)
def _mlflow_goes_here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow's own calls go to `HERE`, where nobody listens."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", HERE)
    contexts = provider.get_context_api()
    # Other tests of this process leave spans that never end; here none is current at first.
    token = contexts.attach(Context())
    yield
    contexts.detach(token)
    InMemoryTraceManager.reset()


def span(number: int) -> Any:
    """A QitOS span, as far as it matters here."""
    return SimpleNamespace(span_id=f"span-{number}")


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


@pytest.fixture
def nesting() -> Nesting:
    """Of a trace that goes where MLflow's own calls go."""
    run = PendingRun()
    run.created(RunRef("r", "7", "run", "", 0))
    return Nesting(TRACE, run, HERE)


def test_the_innermost_span_is_current(nesting: Nesting) -> None:
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


def test_the_callers_own_span_comes_back(nesting: Nesting) -> None:
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


def test_a_trace_without_mlflows_spans_is_forgotten_at_once(nesting: Nesting) -> None:
    """What MLflow was told of the trace does not stay, or reading it would not go to the server."""
    nesting.enter(span(1))
    assert known()
    nesting.leave(span(1))
    assert nesting.end() == {}
    assert not known()


def test_a_span_that_ends_on_another_thread(nesting: Nesting) -> None:
    """It changes nothing there, and the thread it began on is put right by the next one out."""
    nesting.enter(span(1))
    nesting.enter(span(2))
    other = threading.Thread(target=nesting.leave, args=(span(2),))
    other.start()
    other.join()
    nesting.leave(span(1))
    assert current() is None
    nesting.leave(span(2))  # Never twice.
    assert current() is None


@pytest.mark.parametrize("uri", ["http://127.0.0.1:10", "sqlite:////elsewhere.db", None])
def test_traces_that_go_elsewhere_are_left_alone(uri: str | None) -> None:
    """MLflow's spans would not arrive where the trace is: they stay traces of their own."""
    nesting = Nesting(TRACE, PendingRun(), uri)
    nesting.enter(span(1))
    assert current() is None
    assert not known()
    nesting.leave(span(1))
    assert nesting.end() == {}


def test_an_unreachable_server_is_left_alone() -> None:
    """Offline, or while the server is down, nobody could put the spans together."""
    nesting = Nesting(TRACE, PendingRun(lambda: True), HERE)
    nesting.enter(span(1))
    assert current() is None
    nesting.leave(span(1))


def test_a_failure_is_kept_from_the_agent(
    nesting: Nesting, monkeypatch: pytest.MonkeyPatch, swallowed: list[Any]
) -> None:
    """Another MLflow with other insides costs the nesting, and nothing else."""
    monkeypatch.setattr(provider, "get_context_api", None)
    nesting.enter(span(1))
    nesting.leave(span(1))
    assert [where for where, _ in swallowed] == ["nesting.enter"]
    swallowed.clear()
