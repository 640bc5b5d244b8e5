"""How fast records get from the spool to a server, beside the bare requests that this takes.

A spool is filled offline, then delivered as `qitos-mlflow sync` does. Every request is kept, and
sent once more on its own by the same HTTP client, with other ids, so that the server has the same
work: what that takes is the server's share. The ratio of the two is what reading, mapping, state
and acknowledging cost on top.

    mlflow server --port 5000 --workers 1 --backend-store-uri sqlite:///bench.db &
    python benchmarks/delivery_throughput.py --tracking-uri http://127.0.0.1:5000
"""

from __future__ import annotations

import argparse
import re
import statistics
import tempfile
import time
import uuid
from collections import Counter
from contextlib import closing
from pathlib import Path

import orjson
import requests

from qitos_mlflow.delivery import Counts, Delivery, find_segments, take
from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.mlflow_plugin.server.http import Request, SessionRequester
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from qitos_mlflow.tracing import (
    ActSpanData,
    AgentSpanData,
    GenerationSpanData,
    SpanType,
    StepSpanData,
    ToolSpanData,
    TracingProvider,
)

TIMEOUT_S = 60.0
PAYLOAD_CHARS = 2000
"""Length of a model's input, and of a tool's result."""


def fill(directory: Path, given: argparse.Namespace) -> None:
    """Record agent runs offline: an agent span, and for each step four more."""
    processor = MlflowTraceProcessor(
        "throughput",
        tracking_uri=given.tracking_uri,
        offline=True,
        spool_dir=directory,
        log_traces=not given.without_traces,
    )
    provider = TracingProvider([processor])
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    for number in range(given.traces):
        with provider.create_trace(f"run {number}", metadata={"agent_name": "bench"}) as trace:
            data = AgentSpanData(name="bench", model="m")
            agent = trace.create_span(SpanType.AGENT, data).start()
            for step in range(given.steps):
                data = StepSpanData(step_number=step)
                outer = trace.create_span(SpanType.STEP, data).start()
                for data in (
                    GenerationSpanData(
                        model="m",
                        input_content=[{"role": "user", "content": "x" * PAYLOAD_CHARS}],
                        output_content="y",
                        token_usage=usage,
                    ),
                    ActSpanData(),
                    ToolSpanData(tool_name="search", output_content="w" * PAYLOAD_CHARS),
                ):
                    trace.create_span(SpanType(data.type), data).start().finish()
                outer.finish()
            agent.finish()
    processor.shutdown()


class Recorder:
    """A `Requester` that keeps what it sends and is answered."""

    def __init__(self, uri: str) -> None:
        self._send = SessionRequester(uri)
        self.kept: list[tuple[Request, bytes]] = []

    def __call__(self, request: Request) -> requests.Response:
        response = self._send(request)
        self.kept.append((request, response.content))
        return response


def deliver(directory: Path, uri: str) -> tuple[float, int, Recorder]:
    """Deliver the spool; returns seconds, records and the requests it took."""
    recorder, stats = Recorder(uri), Counts()

    def open_sink(header: bytes) -> MlflowSink:
        return MlflowSink(header, RestTransport(uri, recorder))

    began = time.perf_counter()
    for paths in find_segments(directory):
        delivery = take(paths, open_sink, stats)
        assert isinstance(delivery, Delivery)
        with closing(delivery):
            while delivery.step() is None:
                time.sleep(delivery.circuit.delay_s)
    taken = time.perf_counter() - began
    assert not stats.dead_letters
    return taken, stats.delivered, recorder


def send_again(uri: str, recorder: Recorder) -> Counter[str]:
    """Send the same requests about other runs and traces; returns seconds by endpoint."""
    send = SessionRequester(uri)
    bodies = [request.body or b"" for request, _ in recorder.kept]
    for trace in set(re.findall(rb"tr-([0-9a-f]{32})", b"".join(bodies))):
        other = uuid.uuid4().hex.encode()
        for form in (bytes, _packed, _dashed):
            bodies = [body.replace(form(trace), form(other)) for body in bodies]
    runs: dict[bytes, bytes] = {}
    taken: Counter[str] = Counter()
    for (request, answer), body in zip(recorder.kept, bodies, strict=True):
        for old, new in runs.items():
            body = body.replace(old, new)
        began = time.perf_counter()
        response = send(request._replace(body=body or None, timeout_s=TIMEOUT_S))
        taken[_endpoint(request.path)] += time.perf_counter() - began
        response.raise_for_status()
        if request.path.endswith("runs/create"):
            before = orjson.loads(answer)["run"]["info"]["run_id"].encode()
            runs[before] = response.json()["run"]["info"]["run_id"].encode()
    return taken


def _packed(trace: bytes) -> bytes:
    return bytes.fromhex(trace.decode())


def _dashed(trace: bytes) -> bytes:
    return str(uuid.UUID(trace.decode())).encode()


def _endpoint(path: str) -> str:
    return path.split("?")[0].replace("/api/2.0/mlflow/", "").replace("/api/3.0/mlflow/", "")


def main() -> None:
    """Print records a second of both ways, and their ratio."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tracking-uri", required=True)
    arguments.add_argument("--traces", type=int, default=20)
    arguments.add_argument("--steps", type=int, default=30)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--without-traces", action="store_true", help="runs only, no span trees")
    given = arguments.parse_args()
    RestTransport(given.tracking_uri).experiment_id("throughput", TIMEOUT_S)
    ours, bare = [], []
    by_endpoint: Counter[str] = Counter()
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as spool:
            fill(Path(spool), given)
            taken, records, recorder = deliver(Path(spool), given.tracking_uri)
        ours.append(taken)
        by_endpoint = send_again(given.tracking_uri, recorder)
        bare.append(sum(by_endpoint.values()))
    a, b = statistics.median(ours), statistics.median(bare)
    print(f"{records} records of {given.traces} traces, median of {given.rounds} rounds")
    print(f"delivered in {a:.2f} s: {records / a:.0f} records/s")
    print(f"the same {len(recorder.kept)} requests alone {b:.2f} s: {records / b:.0f} records/s")
    print(f"ratio {a / b:.2f}; of the requests alone, in the last round:")
    calls = Counter(_endpoint(request.path) for request, _ in recorder.kept)
    for name, seconds in by_endpoint.most_common():
        print(f"  {seconds:6.2f} s for {calls[name]:4} x {name}")


if __name__ == "__main__":
    main()
