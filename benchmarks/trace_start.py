"""How long the start of a trace holds the agent's thread, beside OpenTelemetry's root span.

First without the wait for the run (`start_timeout_s` 0, a server that accepts and never answers):
all callbacks of a trace's start and of its end, on one thread, and on eight that start at the same
moment; in a process without mlflow, in one that has imported it, and in one whose own MLflow calls
go elsewhere. OpenTelemetry starts a root span with the same two attributes in turn. There is a
pause before each start, as between an agent's runs, in which the background threads become idle and
the caches cold.

With --tracking-uri, also with the wait: mlflow imported in the process, so that the run is to
become the active run, against a server that answers, one that refuses connections, and one that
accepts and never answers. The bound is `start_timeout_s`; once the server is known to be away,
traces start without waiting.

    python benchmarks/trace_start.py
    mlflow server --port 5000 &
    python benchmarks/trace_start.py --tracking-uri http://127.0.0.1:5000
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import requests
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.tracing import TracingProvider

TRACES = 15
PAUSE_S = 0.5
"""Between two traces (seconds): an agent that does nothing at all is none."""

ROUNDS, THREADS, ROUND_S = 60, 8, 0.05
"""Without the wait: starts on each thread, threads, and the time from one start to the next (s)."""

METADATA = {"agent_name": "bench", "task": "nothing"}


class NoOpExporter(SpanExporter):
    """Takes everything, does nothing."""

    def export(self, spans: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


class Cost:
    """Of one kind of call: wall time and CPU time of its thread (ms)."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def of(self, call: Callable[[], Any]) -> Any:
        """What `call` returns."""
        wall, cpu = time.perf_counter(), time.thread_time()
        result = call()
        self.cpu.append((time.thread_time() - cpu) * 1e3)
        self.wall.append((time.perf_counter() - wall) * 1e3)
        return result

    def __str__(self) -> str:
        ninth = statistics.quantiles(self.wall, n=10)[-1]
        return (
            f"{statistics.median(self.wall):.3f} ms (CPU {statistics.median(self.cpu):.3f}, "
            f"best {min(self.wall):.3f}, 90 % {ninth:.3f})"
        )


def without_wait(threads: int, processor: MlflowTraceProcessor) -> dict[str, Cost]:
    """What each kind of start costs if so many threads start at the same moment."""
    provider = TracingProvider([processor])
    theirs = TracerProvider()
    theirs.add_span_processor(BatchSpanProcessor(NoOpExporter()))
    tracer = theirs.get_tracer("bench")
    costs = {name: Cost() for name in ("trace start", "trace end", "OpenTelemetry's root span")}

    def ours() -> None:
        trace = provider.create_trace("bench", metadata=METADATA)
        costs["trace start"].of(trace.__enter__)
        costs["trace end"].of(lambda: trace.__exit__(None, None, None))

    def other() -> None:
        start = costs["OpenTelemetry's root span"]
        start.of(lambda: tracer.start_span("bench", Context(), attributes=METADATA)).end()

    def work(began: float) -> None:
        for number in range(2 * ROUNDS):
            time.sleep(max(0.0, began + number * ROUND_S - time.perf_counter()))
            (ours, other)[number % 2]()

    began = time.perf_counter() + ROUND_S
    workers = [threading.Thread(target=work, args=(began,)) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return costs


KINDS = {
    "without": "mlflow is not imported",
    "with": "mlflow is imported",
    "elsewhere": "mlflow is imported, and its own calls go elsewhere",
}
"""The processes in which a start does not wait."""


def print_without_wait(kind: str) -> None:
    """One table for this process."""
    if kind != "without":
        import mlflow  # noqa: F401
    with socket.create_server(("127.0.0.1", 0)) as hanging:
        uri = f"http://127.0.0.1:{hanging.getsockname()[1]}"
        if kind != "elsewhere":
            os.environ["MLFLOW_TRACKING_URI"] = uri
        processor = MlflowTraceProcessor(
            spool_dir=tempfile.mkdtemp(), start_timeout_s=0, exit_timeout_s=0.1, tracking_uri=uri
        )
        without_wait(1, processor)
        for threads in (1, THREADS):
            for name, cost in without_wait(threads, processor).items():
                who = f"{threads} thread" + "s" * (threads > 1)
                print(f"  {who:9} {name:26} {cost}", flush=True)
        sys.stdout.flush()
        os._exit(0)  # Nothing can be delivered.


def request_ms(uri: str) -> float:
    """Milliseconds of one small request, for scale."""
    session = requests.Session()
    taken = []
    for _ in range(TRACES):
        began = time.perf_counter()
        session.get(f"{uri}/api/2.0/mlflow/experiments/get?experiment_id=0", timeout=10)
        taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken)


def starts_ms(uri: str) -> list[float]:
    """Milliseconds of each of `TRACES` starts."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    processor = MlflowTraceProcessor(
        tracking_uri=uri, spool_dir=tempfile.mkdtemp(), exit_timeout_s=0.1
    )
    provider = TracingProvider([processor])
    taken = []
    for _ in range(TRACES):
        trace = provider.create_trace("bench")
        began = time.perf_counter()
        trace.__enter__()
        taken.append((time.perf_counter() - began) * 1e3)
        trace.__exit__(None, None, None)
        time.sleep(PAUSE_S)
    processor.force_flush(timeout_s=0.5 if taken[0] > 1000 else None)
    return taken


def print_with_wait(tracking_uri: str) -> None:
    """The first, the median and the worst start for each kind of server."""
    print(f"one request to the healthy server takes {request_ms(tracking_uri):.1f} ms")
    with socket.create_server(("127.0.0.1", 0)) as hanging, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Bound, but without a listener.
        for name, uri in (
            ("healthy", tracking_uri),
            ("refusing", f"http://127.0.0.1:{closed.getsockname()[1]}"),
            ("hanging", f"http://127.0.0.1:{hanging.getsockname()[1]}"),
        ):
            taken = starts_ms(uri)
            print(
                f"{name:9} first {taken[0]:7.1f} ms, median {statistics.median(taken):7.1f} ms, "
                f"worst {max(taken):7.1f} ms"
            )


def main() -> None:
    """Print all of it; each table without the wait is from a process of its own."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tracking-uri")
    arguments.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.kind:
        print_without_wait(given.kind)
        return
    for kind, text in KINDS.items():
        print(f"no wait for the run; {text}", flush=True)
        subprocess.run([sys.executable, __file__, "--kind", kind], check=True)
    if given.tracking_uri:
        print_with_wait(given.tracking_uri)


if __name__ == "__main__":
    main()
