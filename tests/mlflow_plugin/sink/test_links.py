"""The run of an agent inside MLflow's own span is linked to MLflow's trace."""

from __future__ import annotations

from typing import Any

import orjson

from qitos_mlflow.mlflow_plugin.server.transport import Refused
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.transport import FakeTransport
from tests.mlflow_plugin.records import Records

TIMEOUT_S = 10.0
SETTINGS = {"log_traces": False, "tags": {"qitos.mlflow_trace_id": "tr-1"}}


def deliver(server: FakeTransport) -> list[Any]:
    """Log a trace whose spans are in MLflow's own; returns the dead letters."""
    make = Records()
    sink = MlflowSink(b"{}", server)
    records = [make.start(settings=SETTINGS), make.span("tool"), make.end(settings=SETTINGS)]
    sink.prepare([orjson.dumps(record) for record in records])
    return sink.send(TIMEOUT_S)


def test_the_run_is_linked_and_has_no_tree() -> None:
    """When it ends."""
    server = FakeTransport()
    assert deliver(server) == []
    assert server.links == {("tr-1", "run-0")}
    assert server.runs["run-0"]["tags"]["qitos.mlflow_trace_id"] == "tr-1"
    assert not server.spans
    assert not server.traces


def test_a_store_without_links_loses_nothing() -> None:
    """The run ends as ever."""
    server = FakeTransport()
    server.fail = lambda call, what: Refused("NOT_IMPLEMENTED", "") if "link" in call else None
    assert deliver(server) == []
    assert server.runs["run-0"]["status"] == "FINISHED"


def test_another_server_does_not_have_the_trace() -> None:
    """What names it is left out there, with the link."""
    server = FakeTransport()
    header = orjson.dumps({"tracking_uri": "http://another.test"})
    make = Records()
    sink = MlflowSink(header, server, tracking_uri=server.uri)
    records = [make.start(settings=SETTINGS), make.end(settings=SETTINGS)]
    sink.prepare([orjson.dumps(record) for record in records])
    assert sink.send(TIMEOUT_S) == []
    assert server.links == set()
    assert "qitos.mlflow_trace_id" not in server.runs["run-0"]["tags"]
