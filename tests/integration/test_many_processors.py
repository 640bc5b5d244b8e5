"""A processor for each task of a benchmark costs no more than one for all of them."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

import qitos_mlflow
from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.mlflow_plugin.plugin import MlflowPlugin
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.tracing import SpanType, StepSpanData, create_trace
from tests.integration.logged import runs_of
from tests.integration.server import MlflowServer
from tests.waiting import eventually

LONG_S = 60.0


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has nothing to do goes to rest as soon as it can."""
    monkeypatch.setattr("qitos_mlflow.delivery.spooling_thread.REST_S", 0.05)
    monkeypatch.setattr("qitos_mlflow.delivery.leftovers.FIRST_LOOK_S", 0.01)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No processor is left behind."""
    before = tracing.processors()
    yield
    qitos_mlflow.autolog(disable=True)
    tracing.set_trace_processors(before)


def task(number: int) -> None:
    """What a benchmark does for each task."""
    with create_trace(f"task-{number}") as trace:
        trace.create_span(SpanType.STEP, StepSpanData(number)).start().finish()


def ours() -> int:
    """How many threads of ours there are."""
    return sum(thread.name.startswith("qitos-mlflow") for thread in threading.enumerate())


@pytest.mark.skipif(sys.platform != "linux", reason="counts in /proc")
@pytest.mark.parametrize(("way", "tasks"), [("set_trace_processors", 10), ("autolog", 5)])
def test_one_processor_a_task(
    way: str, tasks: int, mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """Threads, files and memory of each go once its run is logged, closed or not."""
    client: MlflowClient = mlflow_server.client
    plugins: weakref.WeakSet[MlflowPlugin] = weakref.WeakSet()
    files: list[int] = []
    for number in range(tasks):
        if way == "autolog":
            qitos_mlflow.autolog(
                experiment_name=experiment_name,
                run_name=f"task-{number}",
                tracking_uri=mlflow_server.uri,
            )
            [processor] = tracing.processors()
        else:
            processor = MlflowTraceProcessor(experiment_name, f"task-{number}", mlflow_server.uri)
            tracing.set_trace_processors([processor])
        plugins.add(processor.mlflow_plugin)  # type: ignore[attr-defined]
        task(number)
        eventually(lambda: ours() == 0)
        files.append(len(list(Path("/proc/self/fd").iterdir())))
    assert max(files) - files[0] < 5
    del processor
    gc.collect()
    assert len(plugins) <= 2
    runs = runs_of(client, experiment_name)
    assert [run.status for run in runs] == ["FINISHED"] * tasks


def test_a_trace_that_goes_on_keeps_its_pipeline(
    mlflow_server: MlflowServer, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long an agent thinks, its run is one, with totals over all of it."""
    client: MlflowClient = mlflow_server.client
    processor = MlflowTraceProcessor(experiment_name, tracking_uri=mlflow_server.uri)
    tracing.set_trace_processors([processor])
    asked = threading.Semaphore(0)
    is_quiet = TraceRecorder.is_quiet.fget

    def asked_and_answered(trace: TraceRecorder) -> bool:
        asked.release()
        return is_quiet(trace)

    monkeypatch.setattr(TraceRecorder, "is_quiet", property(asked_and_answered))
    with create_trace("agent") as trace:
        for number in range(3):
            trace.create_span(SpanType.STEP, StepSpanData(number)).start().finish()
            assert processor.force_flush(LONG_S)
            for _ in range(2):
                assert asked.acquire(timeout=LONG_S)
        assert ours() > 0
    eventually(lambda: ours() == 0)
    [run] = runs_of(client, experiment_name)
    assert run.metrics["total_steps"] == 3
