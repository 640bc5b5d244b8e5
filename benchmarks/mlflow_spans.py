"""What a model call costs the agent's thread inside a span of MLflow, beside MLflow's autologging.

Ours is the span of a model call below a current span of `mlflow.start_span`: a QitOS span with its
record. Redaction and mapping are the work of a thread in the background, which is not measured.
Theirs is what `mlflow.openai.autolog()` adds to a call of the OpenAI client with the same chat,
which is answered from memory. MLflow's exporter does nothing. CPU time of the calling thread, in
interleaved bursts with pauses; medians. Needs `openai<2.48`.

    python -m benchmarks.mlflow_spans [--payload BYTES] [--spans N]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import mlflow
from mlflow.tracing.export.mlflow_v3 import MlflowV3SpanExporter

from qitos_mlflow.mlflow_plugin.fluent.mlflow_tree import MlflowTree
from qitos_mlflow.mlflow_plugin.plugin import OpenTrace
from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.tracing import GenerationSpanData, SpanType, TracingProvider

PAUSE_S, PAUSE_S_PER_BYTE = 0.05, 60e-9
"""A pause between two bursts (seconds), at least: until the one before is on the disk."""

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 0,
    "model": "m",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "done"}}
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
}


def messages_of(size: int) -> list[dict[str, str]]:
    """Chat messages of `size` bytes in all."""
    return [{"role": "user", "content": "x" * min(2000, size)} for _ in range(max(1, size // 2000))]


def ours(spans: int, size: int) -> Callable[[], float]:
    """A round of QitOS spans below MLflow's current span; returns seconds a span."""
    processor = MlflowTraceProcessor(spool_dir=tempfile.mkdtemp())
    provider = TracingProvider([processor])
    messages = messages_of(size)
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

    def round_() -> float:
        with mlflow.start_span("top"), provider.create_trace("bench") as trace:
            open_trace = processor.mlflow_plugin.recorder.get(trace.trace_id)
            assert isinstance(open_trace, OpenTrace), "the trace is recorded"
            assert isinstance(open_trace.tree, MlflowTree), "below MLflow's span"
            began = time.thread_time()
            for _ in range(spans):
                data = GenerationSpanData(model="m", input_content=messages, token_usage=usage)
                span = trace.create_span(SpanType.GENERATION, data)
                span.start()
                data.output_content = "done"
                span.finish()
            return (time.thread_time() - began) / spans

    return round_


def theirs(spans: int, size: int) -> Callable[[bool], float]:
    """A round of calls of a client, with autologging or without; returns seconds a call."""
    import httpx
    import openai

    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=ANSWER))
    client = openai.OpenAI(api_key="none", http_client=httpx.Client(transport=transport))
    messages: Any = messages_of(size)

    def round_(logged: bool) -> float:
        mlflow.openai.autolog(disable=not logged)
        with mlflow.start_span("top"):
            began = time.thread_time()
            for _ in range(spans):
                client.chat.completions.create(model="m", messages=messages)
            return (time.thread_time() - began) / spans

    return round_


def main() -> None:
    """Print both medians and their ratio."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--payload", type=int, default=4_000)
    arguments.add_argument("--spans", type=int, default=20)
    arguments.add_argument("--rounds", type=int, default=30)
    given = arguments.parse_args()
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tempfile.mkdtemp()}/mlflow.db"
    MlflowV3SpanExporter.export = lambda exporter, spans: None
    mlflow.set_experiment("bench")  # The store is there before anything is measured.
    our_round, their_round = ours(given.spans, given.payload), theirs(given.spans, given.payload)
    pause_s = max(PAUSE_S, given.spans * given.payload * PAUSE_S_PER_BYTE)
    mine, other, bare = [], [], []
    for _ in range(given.rounds + 1):  # The first warms up.
        for found, measured in (
            (mine, our_round()),
            (other, their_round(True)),
            (bare, their_round(False)),
        ):
            found.append(measured)
            time.sleep(pause_s)
    a, b, c = (statistics.median(found[1:]) * 1e6 for found in (mine, other, bare))
    print(f"payload {given.payload} B: qitos-mlflow {a:.0f} us a call, "
          f"MLflow's autologging {b - c:.0f} us, ratio {a / (b - c):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
