"""How soon a trace can be read on the server: while its agent works, and once it has ended.

The spans of an agent of 100 steps (600 spans), made in a process of their own through QitOS's
tracing and this package, and beside it the same by MLflow's own tracing (`mlflow.start_span`).
From this process the server is asked how many spans it has: reading them would cost it seconds.

    mlflow server --port 5000 &
    python -m benchmarks.visibility --tracking-uri http://127.0.0.1:5000
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import mlflow
import requests
from mlflow import MlflowClient
from mlflow.entities import TraceState

from tests.integration.proxy import Proxy

ROOT = Path(__file__).parents[1]
STEPS = 100
SPANS = 1 + 6 * STEPS
POLL_S = 0.1
"""Between two looks (seconds), and so what the figures may be too large by."""
WAIT_S = 120.0
MESSAGES = [{"role": "user", "content": "What is to be done next? " * 40}]
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}

OpenSpan = Callable[..., AbstractContextManager[None]]


def work(span: OpenSpan, step_s: float) -> None:
    """An agent's spans; `span` opens one: its type, its name, what goes in and what comes out."""
    with span("agent", "worker"):
        for number in range(STEPS):
            with span("step", f"step {number}"):
                with span("decide", "decide"), span("generation", "m", MESSAGES, "Work."):
                    pass
                with span("act", "act"), span("tool", "work", {"a": 1}, "done"):
                    time.sleep(step_s)
                with span("reduce", "reduce"):
                    pass


def by_plugin(uri: str, experiment: str, step_s: float) -> None:
    """Log them with this package's processor."""
    from qitos_mlflow import MlflowTraceProcessor, tracing

    processor = MlflowTraceProcessor(
        experiment, tracking_uri=uri, spool_dir=tempfile.mkdtemp(), exit_timeout_s=WAIT_S
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
    with tracing.create_trace("worker", metadata={"agent_name": "worker"}) as trace:
        above: list[Any] = [None]

        @contextmanager
        def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
            made = data[kind](name, given, got)
            opened = trace.create_span(tracing.SpanType(kind), made, parent=above[-1]).start()
            above.append(opened)
            yield
            above.pop().finish()

        work(span, step_s)
    print(time.time(), flush=True)
    processor.force_flush(WAIT_S)


def by_mlflow(uri: str, experiment: str, step_s: float) -> None:
    """Log them with MLflow's own tracing."""
    from qitos_mlflow.mlflow_plugin.mapping.span_kinds import SPAN_KINDS

    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(experiment)

    @contextmanager
    def span(kind: str, name: str, given: Any = None, got: Any = None) -> Iterator[None]:
        with mlflow.start_span(name, span_type=SPAN_KINDS[kind].mlflow_type) as opened:
            if given is not None:
                opened.set_inputs({"messages": given} if kind == "generation" else given)
                opened.set_outputs(got)
            yield

    work(span, step_s)
    print(time.time(), flush=True)
    mlflow.flush_trace_async_logging(terminate=True)


WAYS = {"plugin": by_plugin, "mlflow": by_mlflow}


def count_spans(uri: str, experiment_id: str) -> int:
    """How many spans the server has of an experiment."""
    question = {
        "experiment_ids": [experiment_id],
        "view_type": "SPANS",
        "metric_name": "span_count",
        "aggregations": [{"aggregation_type": "COUNT"}],
    }
    answer = requests.post(f"{uri}/api/3.0/mlflow/traces/metrics", json=question, timeout=30)
    answer.raise_for_status()
    points = answer.json().get("data_points")
    return int(points[0]["values"]["COUNT"]) if points else 0


def measure(uri: str, way: str, step_s: float) -> tuple[list[float], float, int]:
    """Seconds from each span's end until it was seen, from the agent's end to all; requests."""
    client = MlflowClient(uri)
    experiment = f"visibility {way} {uuid.uuid4().hex[:8]}"
    experiment_id = client.create_experiment(experiment)
    address = urlsplit(uri)
    proxy = Proxy(address.port) if address.hostname in ("127.0.0.1", "localhost") else None
    config = json.dumps([way, proxy.uri if proxy else uri, experiment, step_s])
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.visibility", "--child", config],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    counts, times = [0], [time.time()]
    deadline = time.monotonic() + WAIT_S + STEPS * step_s
    while True:
        counts.append(count_spans(uri, experiment_id))
        times.append(time.time())
        if counts[-1] >= SPANS:
            (trace,) = client.search_traces(locations=[experiment_id], include_spans=False)
            if trace.info.state == TraceState.OK:
                complete = time.time()
                break
        if child.poll() or time.monotonic() > deadline:
            raise SystemExit(f"{way}: {counts[-1]} of {SPANS} spans are there")
        time.sleep(POLL_S)
    output, _ = child.communicate(timeout=WAIT_S)
    seen_requests = len(proxy.requests) if proxy else 0
    if proxy:
        proxy.close()
    (whole,) = client.search_traces(locations=[experiment_id])
    # The root is left out: ours is there from the start, MLflow's own comes last.
    ends = sorted(span.end_time_ns / 1e9 for span in whole.data.spans if span.parent_id)
    early = 1 if way == "plugin" else 0
    delays = [times[bisect_right(counts, number + early)] - end for number, end in enumerate(ends)]
    return delays, complete - float(output.splitlines()[-1]), seen_requests


def main() -> None:
    """Print one row for each way, and the ratio of the two."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tracking-uri")
    arguments.add_argument("--step-s", type=float, default=0.1, help="time a step takes (seconds)")
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        way, *config = json.loads(given.child)
        WAYS[way](*config)
        return
    print(f"{'seconds':8}{'first':>8}{'median':>8}{'worst':>8}{'complete':>10}{'requests':>10}")
    completes = []
    for way in WAYS:
        delays, complete, seen = measure(given.tracking_uri, way, given.step_s)
        completes.append(complete)
        print(
            f"{way:8}{delays[0]:8.1f}{statistics.median(delays):8.1f}{max(delays):8.1f}"
            f"{complete:10.1f}{seen or '?':>10}"
        )
    print(f"from the end to complete, beside MLflow's own: {completes[0] / completes[1]:.2f}")


if __name__ == "__main__":
    main()
