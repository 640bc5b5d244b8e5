"""What one span costs the agent's thread, beside OpenTelemetry's BatchSpanProcessor.

Both sides do the same: start a span with a 4 KB payload, end it, hand it to the processor. Ours
goes through Trace, Span, provider, pluggy and snapshot into the queue, offline; theirs through a
tracer with a no-op exporter. Bursts of spans with pauses between, as between an agent's model
calls, so that neither side's background thread is measured; medians of interleaved rounds.

    python benchmarks/agent_thread.py [--payload BYTES] [--spans N]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import orjson
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.tracing import GenerationSpanData, SpanType, TracingProvider

PAUSE_S, PAUSE_S_PER_BYTE = 0.05, 60e-9
"""A pause between two bursts (seconds), at least: until the one before is on the disk."""


class NoOpExporter(SpanExporter):
    """Takes everything, does nothing."""

    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def messages_of(size: int) -> list[dict[str, str]]:
    """Chat messages of `size` bytes in all."""
    return [{"role": "user", "content": "x" * min(2000, size)} for _ in range(max(1, size // 2000))]


def ours(spans: int, size: int) -> tuple[Callable[[], float], Callable[[], None]]:
    """A round of `spans` spans through this package; returns seconds a span."""
    processor = MlflowTraceProcessor(offline=True, spool_dir=tempfile.mkdtemp())
    provider = TracingProvider([processor])
    messages = messages_of(size)
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

    trace = provider.create_trace("bench").__enter__()

    def round_() -> float:
        began = time.perf_counter()
        for _ in range(spans):
            data = GenerationSpanData(model="m", input_content=messages, token_usage=usage)
            span = trace.create_span(SpanType.GENERATION, data)
            span.start()
            data.output_content = "done"
            span.finish()
        return (time.perf_counter() - began) / spans

    return round_, processor.shutdown


def theirs(spans: int, size: int) -> tuple[Callable[[], float], Callable[[], None]]:
    """The same round through OpenTelemetry, which takes text for an attribute."""
    provider = TracerProvider()
    batch = BatchSpanProcessor(NoOpExporter(), max_queue_size=max(2048, spans * 2))
    provider.add_span_processor(batch)
    tracer = provider.get_tracer("bench")
    messages = messages_of(size)

    def round_() -> float:
        began = time.perf_counter()
        for _ in range(spans):
            span = tracer.start_span("generation")
            span.set_attribute("inputs", orjson.dumps(messages).decode())
            span.set_attribute("model", "m")
            span.set_attribute("prompt_tokens", 10)
            span.set_attribute("completion_tokens", 5)
            span.set_attribute("outputs", "done")
            span.end()
        return (time.perf_counter() - began) / spans

    return round_, provider.shutdown


def main() -> None:
    """Print both medians and their ratio."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--payload", type=int, default=4_000)
    arguments.add_argument("--spans", type=int, default=100)
    arguments.add_argument("--rounds", type=int, default=60)
    given = arguments.parse_args()
    (our_round, our_end), (their_round, their_end) = (
        ours(given.spans, given.payload),
        theirs(given.spans, given.payload),
    )
    pause_s = max(PAUSE_S, given.spans * given.payload * PAUSE_S_PER_BYTE)
    mine, other = [], []
    for _ in range(given.rounds):
        mine.append(our_round())
        time.sleep(pause_s)
        other.append(their_round())
        time.sleep(pause_s)
    our_end(), their_end()
    a, b = statistics.median(mine) * 1e6, statistics.median(other) * 1e6
    print(f"payload {given.payload} B: qitos-mlflow {a:.1f} us a span, "
          f"OpenTelemetry BatchSpanProcessor {b:.1f} us, ratio {a / b:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
