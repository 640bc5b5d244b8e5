"""How long the start of a trace holds the agent's thread, where it may wait for its run.

With mlflow imported in the process, so that the run is to become the active run: against a server
that answers, one that refuses connections, and one that accepts and never answers. The bound is
`start_timeout_s`; once the server is known to be away, traces start without waiting.

    mlflow server --port 5000 &
    python benchmarks/trace_start.py --tracking-uri http://127.0.0.1:5000
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
import time

import mlflow
import requests

from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.tracing import TracingProvider

TRACES = 15
PAUSE_S = 0.5
"""Between two traces (seconds): an agent that does nothing at all is none."""


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


def main() -> None:
    """Print the first, the median and the worst start for each kind of server."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--tracking-uri", required=True)
    given = arguments.parse_args()
    print(f"one request to the healthy server takes {request_ms(given.tracking_uri):.1f} ms")
    with socket.create_server(("127.0.0.1", 0)) as hanging, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # Bound, but without a listener.
        for name, uri in (
            ("healthy", given.tracking_uri),
            ("refusing", f"http://127.0.0.1:{closed.getsockname()[1]}"),
            ("hanging", f"http://127.0.0.1:{hanging.getsockname()[1]}"),
        ):
            taken = starts_ms(uri)
            print(
                f"{name:9} first {taken[0]:7.1f} ms, median {statistics.median(taken):7.1f} ms, "
                f"worst {max(taken):7.1f} ms"
            )


if __name__ == "__main__":
    main()
