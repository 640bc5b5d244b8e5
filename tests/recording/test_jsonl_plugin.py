"""A durable plugin that knows no MLflow: `recording` and `delivery` suffice for it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow.delivery import find_segments, waiting_records
from tests.recording import jsonl_plugin
from tests.recording.jsonl_plugin import deliver
from tests.waiting import eventually

ROOT = Path(__file__).parents[2]
STEPS = 20
SECRET = "sk-proj-" + "a1B2c3D4e5F6" * 4

PROGRAM = f"""
import json
import sys
from pathlib import Path
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.tracing import SpanType, StepSpanData, ToolSpanData
from qitos_mlflow.tracing import add_trace_processor, create_trace
from tests.recording.jsonl_plugin import JsonlPlugin

name, file, spool = sys.argv[1:]
processor = PluginTraceProcessor({{"jsonl": JsonlPlugin(Path(file), Path(spool))}})
add_trace_processor(processor)
with create_trace(name) as trace:
    for number in range({STEPS}):
        trace.create_span(SpanType.STEP, StepSpanData(number)).start().finish()
    tool = ToolSpanData(tool_name="login", tool_args={{"api_key": {SECRET!r}}})
    trace.create_span(SpanType.TOOL, tool).start().finish()
print(json.dumps([trace.trace_id, [n for n in sys.modules if "mlflow_plugin" in n]]), flush=True)
sys.stdin.read()
processor.shutdown()
"""


@contextmanager
def program(name: str, file: Path, spool: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that has traced one run, with the trace's id. It goes on until its stdin ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, name, str(file), str(spool)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        trace_id, loaded = json.loads(process.stdout.readline())
        assert loaded == []
        yield process, trace_id
        if process.returncode is None:
            process.communicate(timeout=60)
            assert process.returncode == 0


def lines(file: Path, trace_id: str) -> list[dict[str, Any]]:
    """The records of one trace in the file."""
    text = file.read_text("utf-8") if file.exists() else ""
    records = [json.loads(line) for line in text.splitlines()]
    return [record for record in records if record["trace_id"] == trace_id]


def by_the_next_process(file: Path, spool: Path, arrived: Callable[[], bool]) -> None:
    """The plugin starts again in another process."""
    with program("next", file, spool):
        eventually(arrived)


def by_a_call(file: Path, spool: Path, arrived: Callable[[], bool]) -> None:
    """Another process, without the plugin, calls `deliver`."""
    deliver(spool)


@pytest.mark.parametrize("delivered", [by_the_next_process, by_a_call])
def test_a_killed_process_loses_nothing_that_is_on_disk(
    tmp_path: Path, delivered: Callable[[Path, Path, Callable[[], bool]], None]
) -> None:
    """After SIGKILL every record is in the file once, in order, without its credentials."""
    file, spool = tmp_path / "not there yet" / "records.jsonl", tmp_path / "jsonl-spool"
    count = STEPS + 3
    with program("killed", file, spool) as (process, trace_id):
        eventually(
            lambda: sum(1 for s in find_segments(spool) for _ in waiting_records(s)) == count
        )
        process.kill()
        process.wait()
    assert not file.exists()
    file.parent.mkdir()
    delivered(file, spool, lambda: len(lines(file, trace_id)) >= count)
    deliver(spool)  # The next process may have ended before it deleted the segment.
    found = lines(file, trace_id)
    assert [record["kind"] for record in found] == [
        "trace_start",
        *["span"] * (STEPS + 1),
        "trace_end",
    ]
    steps = [record["data"]["step_number"] for record in found if record.get("type") == "step"]
    assert steps == list(range(STEPS))
    assert all(record["version"] for record in found)
    assert SECRET not in file.read_text("utf-8")
    assert list(find_segments(spool)) == []


def test_it_is_built_on_recording_and_delivery_alone() -> None:
    """The plugin imports nothing else of the package."""
    source = Path(jsonl_plugin.__file__).read_text("utf-8")
    imported = {
        node.module.split(".")[1]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qitos_mlflow")
        if node.module is not None
    }
    assert imported == {"recording", "delivery", "settings"}
