"""Under a limit of memory (``ulimit -v``) the agent goes on, and what is lost is counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("resource")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS")
ROOT = Path(__file__).parents[2]

AGENT = """
import resource, sys, time
from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.tracing import GenerationSpanData, SpanType, TracingProvider

left, size, before, limit = int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
server = {"tracking_uri": sys.argv[5]} if len(sys.argv) > 5 else {"offline": True}
provider = TracingProvider([MlflowTraceProcessor(start_timeout_s=0.2, **server)])
messages = [{"role": "user", "content": "x" * min(size, 2000)} for _ in range(max(1, size // 2000))]
done = 0
with provider.create_trace("an agent") as trace:
    for step in range(20):
        if step == before:
            pages = int(open("/proc/self/statm").read().split()[5 * (limit == "RLIMIT_DATA")])
            most = pages * resource.getpagesize() + left
            resource.setrlimit(getattr(resource, limit), (most, most))
        data = GenerationSpanData(model="m", input_content=messages)
        span = trace.create_span(SpanType.GENERATION, data)
        span.start()
        data.output_content = "done"
        span.finish()
        done += 1
        time.sleep(0.005)  # The background threads take part.
print(done, flush=True)
"""
CASES = [
    (0, 2_000, 0, "RLIMIT_AS"),
    (0, 2_000, 5, "RLIMIT_AS"),
    (300_000, 500_000, 0, "RLIMIT_AS"),
    (4_000_000, 500_000, 5, "RLIMIT_AS"),
    (100_000_000, 500_000, 5, "RLIMIT_AS"),
    (500_000, 500_000, 0, "RLIMIT_DATA"),
    (500_000, 500_000, 5, "RLIMIT_DATA"),
]


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run the agent, its arguments: bytes left, bytes of messages, span before which, limit."""
    command = [sys.executable, "-c", AGENT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize(("left", "size", "before", "limit"), CASES)
def test_the_agent_goes_on(left: int, size: int, before: int, limit: str) -> None:
    """The agent gets its result and exit status, however little memory it has left and when."""
    ended = run(left, size, before, limit)
    assert (ended.returncode, ended.stdout) == (0, "20\n"), ended.stderr


@pytest.mark.parametrize(("left", "size"), [(4_000_000, 1_000_000), (16_000_000, 4_000_000)])
def test_what_is_refused_is_counted(left: int, size: int, tmp_path: Path) -> None:
    """A record that takes too much of what is left is lost as `no_memory`, and the run says so."""
    ended = run(left, size, 0, "RLIMIT_AS")
    assert (ended.returncode, ended.stdout) == (0, "20\n"), ended.stderr
    status = json.loads(cli("status", "--json", str(tmp_path / "spool")))
    assert status["lost"] == {"no_memory": 20}
    [end] = [json.loads(line) for line in records(tmp_path / "spool") if b'"trace_end"' in line]
    assert (end["recorded"], end["dropped"]) == (20, {"no_memory": 20})


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="Python crashes: a frame without memory")
def test_each_allocation_of_a_callback_fails(tmp_path: Path) -> None:
    """Nothing is raised into the agent, and what is not recorded is counted."""
    pytest.importorskip("_testcapi")
    command = [sys.executable, "-m", "tests.recording.no_memory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "losses: True\n"), done


def cli(*arguments: str) -> str:
    """What a command prints."""
    command = [sys.executable, "-m", "qitos_mlflow.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def records(spool: Path) -> list[bytes]:
    """The records that wait in a spool."""
    from qitos_mlflow.delivery import find_segments, waiting_records

    return [record for paths in find_segments(spool) for record in waiting_records(paths)]
