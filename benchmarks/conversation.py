"""What a conversation that grows costs the whole process, beside OpenTelemetry's OTLP exporter.

An agent sends all messages so far with each model call. Its spans (6 a step) are made at once, in a
process of their own, and delivered to the same `mlflow server`: by this package, and by
OpenTelemetry's `BatchSpanProcessor` with its OTLP/HTTP exporter, which gets the same attributes,
the messages as one JSON text. Figures are CPU time of the process, all threads, from the first span
until all is delivered, without imports: a small trace goes before.

    mlflow server --port 5000 &
    python -m benchmarks.conversation --tracking-uri http://127.0.0.1:5000
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).parents[1]
WAIT_S = 600.0
MESSAGE_CHARS = 300
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
WARM_UP_STEPS = 5
MLFLOW_TYPES = {"agent": "AGENT", "generation": "CHAT_MODEL", "tool": "TOOL"}

OpenSpan = Callable[..., AbstractContextManager[None]]
Agent = Callable[[int], None]


def text(number: int) -> str:
    """A text of its own for each number."""
    return f"{number}: " + "What is to be done next? " * (MESSAGE_CHARS // 25)


def work(span: OpenSpan, steps: int) -> None:
    """An agent's spans; `span` opens one: its type, its name, what goes in and what comes out."""
    messages: list[dict[str, str]] = []
    with span("agent", "worker"):
        for number in range(steps):
            with span("step", f"step {number}"):
                messages.append({"role": "user", "content": text(2 * number)})
                answer = text(2 * number + 1)
                with span("decide", "decide"), span("generation", "m", messages, answer):
                    pass
                messages.append({"role": "assistant", "content": answer})
                with span("act", "act"), span("tool", "work", {"a": 1}, "done"):
                    pass
                with span("reduce", "reduce"):
                    pass


def by_plugin(uri: str, experiment_id: str) -> tuple[Agent, Callable[[], Any]]:
    """Runs an agent, and waits until all is delivered, with this package."""
    from qitos_mlflow import MlflowTraceProcessor, tracing

    processor = MlflowTraceProcessor(
        experiment_id, tracking_uri=uri, spool_dir=tempfile.mkdtemp(), queue_bytes=1 << 30
    )
    tracing.add_trace_processor(processor)
    data: dict[str, Callable[[str, Any, Any], Any]] = {
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

    def agent(steps: int) -> None:
        with tracing.create_trace("worker", metadata={"agent_name": "worker"}) as trace:
            above: list[Any] = [None]

            @contextmanager
            def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
                made = data[kind](name, given, got)
                opened = trace.create_span(tracing.SpanType(kind), made, parent=above[-1]).start()
                above.append(opened)
                yield
                above.pop().finish()

            work(span, steps)

    return agent, lambda: processor.force_flush(WAIT_S)


def by_otlp(uri: str, experiment_id: str) -> tuple[Agent, Callable[[], Any]]:
    """The same with OpenTelemetry."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    headers = {"x-mlflow-experiment-id": experiment_id}
    exporter = OTLPSpanExporter(f"{uri}/v1/traces", headers=headers, timeout=60)
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=100_000))
    tracer = provider.get_tracer("benchmark")

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

    return lambda steps: work(span, steps), lambda: provider.force_flush(int(WAIT_S * 1000))


WAYS = {"plugin": by_plugin, "otlp": by_otlp}


def measure_here(way: str, uri: str, experiment_id: str, steps: int) -> None:
    """Print CPU seconds, those of the agent's thread, and wall-clock seconds."""
    agent, flush = WAYS[way](uri, experiment_id)
    agent(WARM_UP_STEPS)
    flush()
    cpu_s, own_s, wall_s = time.process_time(), time.thread_time(), time.monotonic()
    agent(steps)
    own_s = time.thread_time() - own_s
    flush()
    print(json.dumps([time.process_time() - cpu_s, own_s, time.monotonic() - wall_s]), flush=True)
    os._exit(0)


def measure(way: str, uri: str, experiment_id: str, steps: int) -> list[float]:
    """`measure_here` in a new process."""
    command = [sys.executable, "-m", "benchmarks.conversation", "--tracking-uri", uri]
    command += ["--here", way, experiment_id, str(steps)]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, text=True).stdout
    found: list[float] = json.loads(output)
    return found


def main() -> None:
    """Print a table of both ways for each number of steps."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tracking-uri", required=True)
    arguments.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400])
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--here", nargs=3, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.here:
        way, experiment_id, steps = given.here
        measure_here(way, given.tracking_uri, experiment_id, int(steps))
    from mlflow import MlflowClient

    client = MlflowClient(given.tracking_uri)
    name = f"conversation-{uuid.uuid4().hex[:8]}"
    experiment_id = client.create_experiment(name)
    print("| steps | this package | OTLP/HTTP exporter | ratio | agent's thread | exporter's |")
    print("|---|---|---|---|---|---|", flush=True)
    for steps in given.steps:
        found: dict[str, list[list[float]]] = {"plugin": [], "otlp": []}
        for _ in range(given.rounds):
            found["plugin"].append(measure("plugin", given.tracking_uri, name, steps))
            found["otlp"].append(measure("otlp", given.tracking_uri, experiment_id, steps))
        spans = 1 + 6 * steps
        us = {
            way: [statistics.median(column) / spans * 1e6 for column in zip(*rows, strict=True)]
            for way, rows in found.items()
        }
        mine, other = us["plugin"], us["otlp"]
        print(
            f"| {steps} | {mine[0]:.0f} us | {other[0]:.0f} us | {mine[0] / other[0]:.2f} "
            f"| {mine[1]:.0f} us | {other[1]:.0f} us |",
            flush=True,
        )


if __name__ == "__main__":
    main()
