"""What a trace takes on disk by span type and field, and what its records cost the agent's thread.

An agent of `--steps` steps reads a page in each; its state keeps all of them. Offline, in a spool
of its own. The time is that of `TraceRecorder.end_span`, the smallest of several runs.

    python -m benchmarks.step_state [--steps 39] [--result-bytes 3400]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, act, answer
from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.tracing import set_trace_processors

ROUNDS = 5
spent_s: Counter[str] = Counter()


def timed(end_span: Any) -> Any:
    """`end_span` with its time added to `spent_s`, by the span's type."""

    def timed_end_span(self: TraceRecorder, span: Any) -> None:
        began_s = time.thread_time()
        try:
            end_span(self, span)
        finally:
            spent_s[span.data.type] += time.thread_time() - began_s

    return timed_end_span


def run(steps: int, result_bytes: int) -> Path:
    """Run the agent; returns the directory with its spool."""

    def read_page(number: int) -> str:
        """Read a page."""
        return f"page {number}: {'some words ' * result_bytes}"[:result_bytes]

    pages = [act(f"Page {n}.", ("read_page", {"number": n})) for n in range(steps - 1)]
    model = ScriptedModel("scripted", [*pages, answer("Done.", "All read.")])
    model.context_window = 10**9
    directory = tempfile.mkdtemp()
    processor = MlflowTraceProcessor(offline=True, spool_dir=directory)
    set_trace_processors([processor])
    DeskAgent("reader", model, [read_page]).run(
        task="Read all pages.", max_steps=steps + 1, trace=False, render=False
    )
    processor.shutdown()
    return Path(directory)


def sizes(directory: Path) -> Counter[str]:
    """Bytes of JSON in the spool, by span type and field of its data."""
    found: Counter[str] = Counter()
    for segment in directory.rglob("*.seg"):
        for line in segment.read_bytes().splitlines():
            if not line.startswith(b"{"):
                line = line[line.find(b"{") :]
            if b'"kind":"span"' not in line:
                continue
            record = json.loads(line)
            for name, value in record["data"].items():
                parts = value if isinstance(value, dict) else {"": value}
                for part, held in parts.items():
                    field = f"{record['type']}.{name}.{part}".rstrip(".")
                    found[field] += len(json.dumps(held))
    return found


def main() -> None:
    """Print both tables."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=39)
    arguments.add_argument("--result-bytes", type=int, default=3_400)
    given = arguments.parse_args()
    TraceRecorder.end_span = timed(TraceRecorder.end_span)  # type: ignore[method-assign]
    best_s: dict[str, float] = {}
    for _ in range(ROUNDS):
        spent_s.clear()
        directory = run(given.steps, given.result_bytes)
        best_s = {kind: min(took, best_s.get(kind, took)) for kind, took in spent_s.items()}
    found = sizes(directory)
    for field, size in found.most_common(12):
        print(f"{size:>12,} {field}")
    print(f"{sum(found.values()):>12,} in all")
    for kind, took in best_s.items():
        print(f"{took * 1e3:>12.1f} ms {kind}")


if __name__ == "__main__":
    main()
