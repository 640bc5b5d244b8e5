"""How much memory a process with the plugin takes, beside one whose processor does nothing.

The host keeps all spans of a trace, in both. The peak is the kernel's (VmHWM), so Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import environment
from tests.fakes.mlflow_rest import MlflowRest
from tests.fakes.raw_server import raw_server

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")

PEAK_MIB = 33
"""Most at once for a trace of 100 steps; 24 to 25 were seen, and 40 with batches of 4 MiB."""
SPANS = 100_000
REST_MIB, GROWTH_MIB = 40, 10
"""Most that is left after a trace of so many spans, and what of it is not there after a tenth of
them; 10 and 1 were seen."""

PROCESS = """
import json, sys
import requests  # As QitOS does.
from pathlib import Path
from qitos_mlflow import MlflowTraceProcessor, tracing as t

way, work, uri, spool = sys.argv[1:]

class Nothing(t.TraceProcessor):
    def on_trace_start(self, trace): pass
    def on_trace_end(self, trace): pass
    def on_span_start(self, span): pass
    def on_span_end(self, span): pass
    def shutdown(self): pass
    def force_flush(self, timeout_s=0): return True

if way == "plugin":
    processor = MlflowTraceProcessor(tracking_uri=uri, spool_dir=spool)
else:
    processor = Nothing()
t.add_trace_processor(processor)

def conversation(trace):
    messages = []
    for index in range(100):
        messages += [{"role": "user", "content": f"{index} " + "What is next? " * 100}] * 2
        usage = {"prompt_tokens": 100, "completion_tokens": 10}
        data = t.GenerationSpanData(model="m", input_content=[*messages], token_usage=usage)
        trace.create_span(t.SpanType.GENERATION, data).start().finish()
        for _ in range(5):
            trace.create_span(t.SpanType.STEP, t.StepSpanData(index)).start().finish()
        if index % 20 == 19:
            assert processor.force_flush(60)

def many(trace, spans):
    for index in range(spans):
        data = t.ToolSpanData(tool_name="work", tool_args={"a": index}, output_content="done " * 40)
        trace.create_span(t.SpanType.TOOL, data).start().finish()
        if index % 2000 == 0:
            assert processor.force_flush(60)

with t.create_trace("run") as trace:
    conversation(trace) if work == "conversation" else many(trace, int(work))
assert processor.force_flush(60)
assert "mlflow" not in sys.modules
lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
print(json.dumps({line[0]: int(line[1]) / 1024 for line in lines if "kB" in line}))
"""


def memory_mib(way: str, work: str, spool: Path, mlflow: MlflowRest) -> dict[str, float]:
    """Peak and rest of a new process."""
    with raw_server(mlflow.over_http) as server:
        done = subprocess.run(
            [sys.executable, "-c", PROCESS, way, work, server.uri, str(spool)],
            env=environment(QITOS_TRACE_PLUGINS="none"),
            stdout=subprocess.PIPE,
            check=True,
        )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_a_conversation_that_grows_has_a_low_peak(tmp_path: Path) -> None:
    """28 MB of messages in 600 spans, delivered in batches that are small in memory, too."""
    mlflow = MlflowRest()
    with_it = memory_mib("plugin", "conversation", tmp_path, mlflow)
    assert len(mlflow.spans) == 601
    without = memory_mib("nothing", "conversation", tmp_path, mlflow)
    assert with_it["VmHWM:"] - without["VmHWM:"] < PEAK_MIB


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_huge_trace_takes_no_more_memory_than_a_small_one(tmp_path: Path) -> None:
    """What grows is the list of the trace's spans, which is the host's."""
    more = []
    for spans in (SPANS // 10, SPANS):
        mlflow = MlflowRest()
        with_it = memory_mib("plugin", str(spans), tmp_path / str(spans), mlflow)
        assert len(mlflow.spans) == spans + 1
        more.append(
            with_it["VmRSS:"] - memory_mib("nothing", str(spans), tmp_path, mlflow)["VmRSS:"]
        )
    assert more[1] < REST_MIB
    assert more[1] - more[0] < GROWTH_MIB
