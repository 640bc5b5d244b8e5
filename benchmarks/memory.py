"""Peak memory of a process that makes and delivers one trace, over one that delivers nothing.

One trace of 100 steps (601 spans) and a conversation that grows, in fresh processes: without a
processor, with ours, and with OpenTelemetry's BatchSpanProcessor and OTLP/HTTP exporter if
that is installed. The server is a stub here. mlflow is not imported. Linux only: VmHWM.

    python -m benchmarks.memory [--steps 100] [--step-s 0.005] [--rounds 5]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAIT_S = 120.0
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
ANSWER = "Next, I look into the file that the last answer named. " * 12
RESULT = "def parse(line: str) -> int:  # as the file has it\n" * 26
"""2 KB for each step, which all later model calls have again."""


def work(steps: int, step_s: float, chars: int) -> None:
    """An agent's trace: six spans a step."""
    from qitos_mlflow import tracing as t

    messages: list[dict[str, str]] = [{"role": "user", "content": "What is to be done?"}]
    with t.create_trace("bench", metadata={"agent_name": "bench"}) as trace:
        agent = trace.create_span(t.SpanType.AGENT, t.AgentSpanData(name="bench")).start()

        def span(kind: str, data: Any, above: Any) -> Any:
            return trace.create_span(t.SpanType(kind), data, parent=above).start()

        for index in range(steps):
            step = span("step", t.StepSpanData(index), agent)
            decide = span("decide", t.DecideSpanData(), step)
            asked = t.GenerationSpanData(
                model="gpt-4o",
                input_content=[*messages],
                output_content=ANSWER,
                token_usage=USAGE,
            )
            span("generation", asked, decide).finish()
            decide.finish()
            act = span("act", t.ActSpanData(), step)
            result = RESULT[:chars]
            called = t.ToolSpanData(tool_name="read", tool_args={"a": index}, output_content=result)
            tool = span("tool", called, act)
            time.sleep(step_s)
            tool.finish()
            act.finish()
            span("reduce", t.ReduceSpanData(), step).finish()
            step.finish()
            messages += [
                {"role": "assistant", "content": f"{index} {ANSWER}"[:chars]},
                {"role": "user", "content": f"{index} {result}"},
            ]
        agent.finish()


def peak_mb() -> dict[str, float]:
    """Peak and present memory of this process (MiB)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return {key: int(found[key]) / 1024 for key in ("VmHWM", "VmRSS")}


def child(way: str, uri: str, steps: int, step_s: float, chars: int) -> None:
    """Make the trace by one of the ways; print what memory it took."""
    import qitos  # noqa: F401 - as any agent does

    from qitos_mlflow import tracing

    flush: Callable[[], Any] = lambda: True  # noqa: E731
    if way == "plugin":
        from qitos_mlflow import MlflowTraceProcessor

        processor = MlflowTraceProcessor("bench", tracking_uri=uri, spool_dir=tempfile.mkdtemp())
        tracing.add_trace_processor(processor)
        flush = lambda: processor.force_flush(WAIT_S)  # noqa: E731
    elif way == "otlp":
        flush = otlp(uri)
    work(steps, step_s, chars)
    assert flush()
    assert "mlflow" not in sys.modules
    print(json.dumps(peak_mb()))


def otlp(uri: str) -> Callable[[], Any]:
    """A processor that hands the spans to OpenTelemetry."""
    import orjson
    from opentelemetry.exporter.otlp.proto.http import Compression
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    from qitos_mlflow import tracing

    headers = {"x-mlflow-experiment-id": "1"}
    exporter = OTLPSpanExporter(
        f"{uri}/v1/traces", headers=headers, compression=Compression.NoCompression
    )
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    tracer = provider.get_tracer("bench")

    class Forward(tracing.TraceProcessor):
        def on_span_end(self, span: Any) -> None:
            made = tracer.start_span(str(span.data.type))
            for key, value in vars(span.data).items():
                if value is not None:
                    made.set_attribute(key, orjson.dumps(value, default=str).decode())
            made.end()

        def on_trace_start(self, trace: Any) -> None: ...
        def on_trace_end(self, trace: Any) -> None: ...
        def on_span_start(self, span: Any) -> None: ...
        def shutdown(self) -> None: ...
        def force_flush(self) -> None: ...

    tracing.add_trace_processor(Forward())
    return provider.force_flush


def main() -> None:
    """Print a row for each way."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=100)
    arguments.add_argument("--step-s", type=float, default=0.005)
    arguments.add_argument("--chars", type=int, default=1300, help="longest message")
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        child(*json.loads(given.child))
        return
    from tests.fakes.mlflow_rest import MlflowRest
    from tests.fakes.raw_server import raw_server

    ways = ["none", "plugin"]
    if importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http"):
        ways.append("otlp")
    environment = {**os.environ, "QITOS_TRACE_PLUGINS": "none"}
    peaks: dict[str, list[float]] = {way: [] for way in ways}
    with raw_server(MlflowRest().over_http) as server:
        for _ in range(given.rounds):
            for way in ways:
                config = [way, server.uri, given.steps, given.step_s, given.chars]
                command = [sys.executable, "-m", "benchmarks.memory", "--child", json.dumps(config)]
                out = subprocess.run(
                    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True
                ).stdout
                peaks[way].append(json.loads(out)["VmHWM"])
    least = statistics.median(peaks["none"])
    for way in ways:
        peak = statistics.median(peaks[way])
        print(f"{way:8} peak {peak:6.1f} MiB, over none {peak - least:5.1f} MiB")


if __name__ == "__main__":
    main()
