"""The ways to record an agent's spans that the suite compares, each as its users would write it.

A contender is made in the process that is measured. Its `trace` is one agent's trace; that yields
what opens a span: given its kind, its name, what goes in and what comes out. `flush` returns once
all is delivered, or on the disk for those that send nothing.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import orjson

from qitos_mlflow import tracing

WAIT_S = 600.0
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
MLFLOW_TYPES = {"agent": "AGENT", "generation": "CHAT_MODEL", "tool": "TOOL"}

OpenSpan = Callable[..., AbstractContextManager[None]]


class Server(NamedTuple):
    """Where a contender sends to: an experiment that is there already."""

    uri: str
    name: str
    experiment_id: str


class Contender(NamedTuple):
    """How spans are recorded."""

    trace: Callable[[], AbstractContextManager[OpenSpan]]
    flush: Callable[[], Any]


SPAN_DATA: dict[str, Callable[[str, Any, Any], Any]] = {
    "agent": lambda name, given, got: tracing.AgentSpanData(name=name),
    "step": lambda name, given, got: tracing.StepSpanData(int(name.split()[1])),
    "decide": lambda name, given, got: tracing.DecideSpanData(),
    "generation": lambda name, given, got: tracing.GenerationSpanData(
        model=name, input_content=given, output_content=got, token_usage=USAGE
    ),
    "act": lambda name, given, got: tracing.ActSpanData(),
    "tool": lambda name, given, got: tracing.ToolSpanData(
        tool_name=name, tool_args=given, output_content=got
    ),
    "reduce": lambda name, given, got: tracing.ReduceSpanData(),
}


@contextmanager
def qitos_trace() -> Iterator[OpenSpan]:
    """A trace of QitOS's tracing, for the processors that are registered."""
    with tracing.create_trace("worker", metadata={"agent_name": "worker"}) as trace:
        above: list[Any] = [None]

        @contextmanager
        def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
            data = SPAN_DATA[kind](name, given, got)
            opened = trace.create_span(tracing.SpanType(kind), data, parent=above[-1]).start()
            above.append(opened)
            yield
            above.pop().finish()

        yield span


def nothing(server: Server) -> Contender:
    """The agent's own work."""

    @contextmanager
    def trace() -> Iterator[OpenSpan]:
        yield lambda *args: nullcontext()

    return Contender(trace, lambda: True)


def host(server: Server) -> Contender:
    """QitOS's tracing without a processor; a trace keeps its spans until it ends."""
    return Contender(qitos_trace, lambda: True)


def plugin(server: Server) -> Contender:
    """This package."""
    from qitos_mlflow import MlflowTraceProcessor

    processor = MlflowTraceProcessor(
        server.name,
        tracking_uri=server.uri,
        spool_dir=tempfile.mkdtemp(),
        queue_bytes=1 << 30,  # So that a burst that no agent makes loses nothing.
    )
    tracing.add_trace_processor(processor)
    return Contender(qitos_trace, lambda: processor.force_flush(WAIT_S))


def blocking(server: Server) -> Contender:
    """A processor that works on the agent's thread, as those that come with QitOS do.

    A line of JSON for each span, and one request with its numbers.
    """
    import requests

    session = requests.Session()
    log = Path(tempfile.mkdtemp(), "trace.jsonl").open("a")  # noqa: SIM115 - until the process ends
    api = f"{server.uri}/api/2.0/mlflow/runs"
    lock = threading.Lock()
    runs: dict[str, str] = {}

    def post(path: str, **body: Any) -> Any:
        with lock:
            response = session.post(f"{api}/{path}", json=body, timeout=60)
        response.raise_for_status()
        return response.json()

    class Blocking(tracing.TraceProcessor):
        def on_trace_start(self, trace: Any) -> None:
            made = post("create", experiment_id=server.experiment_id)
            runs[trace.trace_id] = made["run"]["info"]["run_id"]

        def on_span_start(self, span: Any) -> None: ...

        def on_span_end(self, span: Any) -> None:
            log.write(json.dumps(span.export()) + "\n")
            log.flush()
            metric = {"key": f"{span.data.type}.spans", "value": 1, "step": 0}
            metric["timestamp"] = int(time.time() * 1000)
            post("log-batch", run_id=runs[span.trace_id], metrics=[metric])

        def on_trace_end(self, trace: Any) -> None:
            post("update", run_id=runs[trace.trace_id], status="FINISHED")

    tracing.add_trace_processor(Blocking())
    return Contender(qitos_trace, lambda: True)


def opentelemetry(exporter: Any) -> Contender:
    """OpenTelemetry's `BatchSpanProcessor`; the attributes are those that MLflow shows."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=100_000))
    tracer = provider.get_tracer("benchmark")

    @contextmanager
    def trace() -> Iterator[OpenSpan]:
        step = 0

        @contextmanager
        def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
            nonlocal step
            step += kind == "step"
            with tracer.start_as_current_span(name) as opened:
                opened.set_attribute("mlflow.spanType", MLFLOW_TYPES.get(kind, "CHAIN"))
                opened.set_attribute("qitos.type", kind)
                opened.set_attribute("qitos.step", step)
                if given is not None:
                    inputs = given if kind == "tool" else {"messages": given, "model": name}
                    opened.set_attribute("mlflow.spanInputs", orjson.dumps(inputs).decode())
                    opened.set_attribute("mlflow.spanOutputs", got)
                if kind == "generation":
                    opened.set_attribute("mlflow.message.format", "openai")
                    opened.set_attribute("mlflow.llm.model", name)
                    opened.set_attribute("mlflow.chat.tokenUsage", orjson.dumps(USAGE).decode())
                yield

        with tracer.start_as_current_span("trace"):
            yield span

    return Contender(trace, lambda: provider.force_flush(int(WAIT_S * 1000)))


def batch(server: Server) -> Contender:
    """OpenTelemetry with an exporter that does nothing."""
    from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

    class NoOp(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    return opentelemetry(NoOp())


def otlp(server: Server) -> Contender:
    """OpenTelemetry with its OTLP/HTTP exporter, to the same server."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    headers = {"x-mlflow-experiment-id": server.experiment_id}
    return opentelemetry(OTLPSpanExporter(f"{server.uri}/v1/traces", headers=headers, timeout=60))


def mlflow_tracing(server: Server) -> Contender:
    """MLflow's own tracing."""
    import mlflow

    mlflow.set_tracking_uri(server.uri)
    mlflow.set_experiment(experiment_id=server.experiment_id)

    @contextmanager
    def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
        with mlflow.start_span(name, span_type=MLFLOW_TYPES.get(kind, "CHAIN")) as opened:
            if given is not None:
                opened.set_inputs({"messages": given} if kind == "generation" else given)
                opened.set_outputs(got)
            yield

    @contextmanager
    def trace() -> Iterator[OpenSpan]:
        with mlflow.start_span("trace"):
            yield span

    return Contender(trace, mlflow.flush_trace_async_logging)


def wandb_offline(server: Server) -> Contender:
    """Weights & Biases, offline: a row for each span. It has a process of its own."""
    os.environ |= {"WANDB_SILENT": "true", "WANDB_MODE": "offline", "WANDB_DIR": tempfile.mkdtemp()}
    import wandb

    lock = threading.Lock()

    @contextmanager
    def trace() -> Iterator[OpenSpan]:
        with lock:
            run = wandb.run or wandb.init(project="benchmark")

        @contextmanager
        def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
            began = time.perf_counter()
            yield
            row = {"kind": kind, "name": name, "duration_s": time.perf_counter() - began}
            if given is not None:
                row |= {"inputs": orjson.dumps(given).decode(), "outputs": got}
            run.log(row)

        yield span

    return Contender(trace, wandb.finish)


class Kind(NamedTuple):
    """A way to record spans."""

    title: str
    make: Callable[[Server], Contender]
    base: str = "nothing"
    """What it adds is told by this one: the agent's own work, for a processor QitOS's tracing."""


CONTENDERS: dict[str, Kind] = {
    "nothing": Kind("no tracing", nothing),
    "host": Kind("QitOS, no processor", host),
    "plugin": Kind("this package", plugin, "host"),
    "batch": Kind("OpenTelemetry, no-op", batch),
    "otlp": Kind("OpenTelemetry, OTLP/HTTP", otlp),
    "mlflow": Kind("MLflow's tracing", mlflow_tracing),
    "wandb": Kind("wandb offline", wandb_offline),
    "blocking": Kind("blocking processor", blocking, "host"),
}

STORES_SPANS = ("plugin", "otlp", "mlflow")
"""Those after which every span is on the server; `otlp` and `mlflow` add one for the trace."""
