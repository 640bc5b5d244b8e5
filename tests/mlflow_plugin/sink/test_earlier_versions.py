"""What an earlier version left in an acknowledgement is taken up completely."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest

from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.sink.sink import STATE_VERSION, MlflowSink
from tests.fakes.transport import FakeTransport

DATA = Path(__file__).parents[2] / "data"
SPOOL = DATA / "spool_v1"


def judged(state: bytes) -> bytes:
    """Earlier versions took the critic named "judge" for a model; its feedback stays as it is."""
    assert b'"LLM_JUDGE"' in state
    return state.replace(b'"LLM_JUDGE"', b'"CODE"')


def server_of(header: dict[str, Any]) -> FakeTransport:
    """The server that the header names."""
    server = FakeTransport()
    server.uri = header["tracking_uri"]
    return server


def acknowledged() -> tuple[dict[str, Any], list[bytes], list[bytes], bytes]:
    """Header, acknowledged and further records of the killed process, and the sink's state."""
    (ack,) = SPOOL.glob("*.ack")
    *_, offset, state = ack.read_bytes().rstrip(b"\n").split(b" ", 5)
    lines = ack.with_suffix(".0000000000000000.seg").read_bytes().splitlines(keepends=True)
    header, done, rest = {}, [], []
    end = 0
    for line in lines:
        end += len(line)
        kind, *_, payload = line.rstrip(b"\n").split(b" ", 4)
        if kind == b"1c":
            header = orjson.loads(payload)
        elif kind == b"1r":
            (done if end <= int(offset, 16) else rest).append(payload)
    return header, done, rest, judged(state)


def plain(sink: MlflowSink) -> dict[str, Any]:
    """The state of the one trace, without what follows from how it was delivered."""
    (trace,) = orjson.loads(sink.state())["traces"]
    trace["totals"]["groups"].sort()
    # Earlier versions took a task for a conversation.
    trace["tree"]["metadata"].pop("mlflow.trace.session", None)
    return {key: trace[key] for key in ("facts", "totals", "tree", "has_info")}


@pytest.mark.parametrize("version", [1, 2])
def test_a_state_of_an_earlier_version_is_restored_completely(version: int) -> None:
    """It becomes the state that today's sink has after the same records."""
    header, done, _, state = acknowledged()
    if version == 2:
        state = judged((DATA / "state_v2.json").read_bytes())
        assert orjson.loads(state)["version"] == version
    fresh = MlflowSink(orjson.dumps(header), server_of(header))
    fresh.prepare(done)
    assert fresh.send(10.0) == []
    restored = MlflowSink(orjson.dumps(header), server_of(header))
    restored.restore(state)
    assert len(done) == 14
    assert plain(restored) == plain(fresh)


def test_a_trace_that_the_first_version_began_is_finished() -> None:
    """Totals, run and tree go on where they were, whatever server the rest goes to."""
    header, done, rest, state = acknowledged()
    whole = MlflowSink(orjson.dumps(header), straight := FakeTransport())
    whole.prepare(done + rest)
    whole.send(10.0)
    (ref,) = orjson.loads(state)["traces"]
    server = server_of(header)
    server.runs[ref["run"]["run_id"]] = {
        "name": RunRef(**ref["run"]).run_name,
        "tags": {},
        "metrics": type(straight.runs["run-0"]["metrics"])(),
        "params": {},
        "status": "RUNNING",
    }
    sink = MlflowSink(orjson.dumps(header), server, resumed=True)
    sink.restore(state)
    sink.prepare(rest)
    assert sink.send(10.0) == []
    for one in (whole, sink):
        assert one.abandoned(1_795_926_005_000_000_000)
        assert one.send(10.0) == []
    (run,) = server.runs.values()
    (wanted,) = straight.runs.values()
    assert "create_run" not in server.calls
    assert run["status"] == wanted["status"] == "KILLED"
    totals = [{m.key: m.value for m in found["metrics"]} for found in (run, wanted)]
    assert totals[0] == totals[1]
    for key in ("qitos.spans.recorded", "qitos.spans.delivered", "qitos.killed"):
        assert run["tags"][key] == wanted["tags"][key]
    (info,), (other,) = server.traces.values(), straight.traces.values()
    for found in (info, other):
        del found["trace_metadata"]["mlflow.sourceRun"], found["trace_location"]
        found["trace_metadata"].pop("mlflow.trace.session", None)
    assert info == other


def test_a_state_of_a_later_version_costs_the_totals_only(
    swallowed: list[tuple[str, BaseException]],
) -> None:
    """It is not misread: the run is found again, and the totals begin anew."""
    header, _, rest, _ = acknowledged()
    sink = MlflowSink(orjson.dumps(header), server := FakeTransport())
    sink.restore(
        orjson.dumps({"version": STATE_VERSION + 1, "uri": "x", "traces": [], "refused": {}})
    )
    assert [where for where, _ in swallowed] == ["sink.restore"]
    swallowed.clear()
    sink.prepare(rest)
    assert server.calls == []
