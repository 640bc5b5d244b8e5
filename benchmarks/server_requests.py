"""What traces that run at once ask of the server: requests by endpoint, their bytes, the time.

A process of its own makes traces in as many threads, each of some steps with six spans, and a
conversation that grows. The server has four workers, as `mlflow server` has by default. CPU time is
that of the whole process, from its first trace until everything is delivered.

    python -m benchmarks.server_requests [--traces 8] [--steps 25] [--step-s 0.02]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
WAIT_S = 120.0
USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
ANSWER = "Next, I look into the file that the last answer named. " * 4


def trace_of(provider: Any, number: int, steps: int, step_s: float) -> None:
    """One agent's trace: a span for the agent, and six for each step."""
    from qitos_mlflow import tracing as t

    messages: list[dict[str, str]] = [{"role": "user", "content": "What is to be done?"}]
    with provider.create_trace(f"agent {number}", metadata={"agent_name": "bench"}) as trace:
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
            called = t.ToolSpanData(tool_name="work", tool_args={"a": index}, output_content="done")
            tool = span("tool", called, act)
            time.sleep(step_s)
            tool.finish()
            act.finish()
            span("reduce", t.ReduceSpanData(), step).finish()
            step.finish()
            messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": "?"}]
        agent.finish()


def work(uri: str, experiment: str, traces: int, steps: int, step_s: float) -> None:
    """Make the traces, then print when the last one ended and what the process took."""
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.mlflow_plugin.server.http import Request, SessionRequester
    from qitos_mlflow.tracing import TracingProvider

    seen: list[tuple[float, str, int]] = []
    send = SessionRequester.__call__

    def counted(requester: SessionRequester, request: Request) -> Any:
        endpoint = f"{request.method} {request.path.split('?')[0]}"
        seen.append((time.time(), endpoint, len(request.body or b"")))
        return send(requester, request)

    SessionRequester.__call__ = counted  # type: ignore[method-assign]
    processor = MlflowTraceProcessor(experiment, tracking_uri=uri, spool_dir=tempfile.mkdtemp())
    provider = TracingProvider([processor])
    began = time.process_time()
    threads = [
        threading.Thread(target=trace_of, args=(provider, number, steps, step_s))
        for number in range(traces)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended_s = time.time()
    if not processor.force_flush(WAIT_S):
        raise SystemExit("not delivered in time")
    flushed_s, cpu_s = time.time(), time.process_time() - began
    processor.shutdown()
    print(json.dumps([ended_s, flushed_s, cpu_s, seen]), flush=True)


def check(client: Any, experiment: str, traces: int) -> None:
    """Everything has to be there, and ended."""
    from mlflow.entities import TraceState

    made = client.get_experiment_by_name(experiment)
    where = [made.experiment_id]
    infos = client.search_traces(locations=where, include_spans=False, max_results=traces)
    runs = client.search_runs(where, max_results=traces)
    assert [one.info.state for one in infos] == [TraceState.OK] * traces
    assert [one.info.status for one in runs] == ["FINISHED"] * traces
    assert all(one.data.metrics["total_cost"] > 0 for one in runs)


def main() -> None:
    """Print a row for each endpoint, then the times."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tracking-uri", help="of a server; else one is started")
    arguments.add_argument("--workers", default="4", help="of that server")
    arguments.add_argument("--traces", type=int, default=8)
    arguments.add_argument("--steps", type=int, default=25)
    arguments.add_argument("--step-s", type=float, default=0.02)
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--show", action="store_true", help="each request, in order")
    arguments.add_argument("--child", help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.child:
        work(*json.loads(given.child))
        return
    from tests.integration.server import MlflowServer

    with ExitStack() as undo:
        uri = given.tracking_uri
        if not uri:
            directory = Path(undo.enter_context(tempfile.TemporaryDirectory()))
            server = MlflowServer(directory, "--workers", given.workers)
            undo.callback(server.stop)
            server.start()
            uri = server.uri
        for _ in range(given.rounds):
            measure(uri, given)


def measure(uri: str, given: argparse.Namespace) -> None:
    """One round: its own experiment and process."""
    from mlflow import MlflowClient

    experiment = f"requests {uuid.uuid4().hex[:8]}"
    config = json.dumps([uri, experiment, given.traces, given.steps, given.step_s])
    command = [sys.executable, "-m", "benchmarks.server_requests", "--child", config]
    output = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout
    ended_s, flushed_s, cpu_s, seen = json.loads(output)
    check(MlflowClient(uri), experiment, given.traces)
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for at_s, endpoint, size in seen:
        counts[endpoint] += 1
        sizes[endpoint] += size
        if given.show:
            print(f"{at_s - ended_s:7.3f} {size:9,d} {endpoint}")
    for endpoint, count in counts.most_common():
        print(f"{count:5d} {sizes[endpoint] / 1000:10,.1f} KB  {endpoint}")
    print(
        f"{sum(counts.values()):5d} {sum(sizes.values()) / 1000:10,.1f} KB  in all; delivered "
        f"{flushed_s - ended_s:.2f} s after the end, CPU {cpu_s * 1000:.0f} ms"
    )


if __name__ == "__main__":
    main()
