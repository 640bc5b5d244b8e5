"""Pictures of spans as attachments of their trace, on servers that have them and on others."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from qitos_mlflow.delivery import DeadLetter, RetryLater
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.mapping.shorter import texts_in
from qitos_mlflow.mlflow_plugin.server.http import Request
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import PutOff, Refused
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from qitos_mlflow.redaction.pictures import reference
from tests.fakes.requester import FakeRequester
from tests.fakes.transport import FakeTransport
from tests.mlflow_plugin.records import Records
from tests.pictures import base64, data_url, png

TIMEOUT_S = 10.0
SMALL, LARGE = png(1), png(2, 400, compressed=False)
REFERENCE = reference(LARGE, "image/png")
ID = REFERENCE[8:44]


def look(records: Records, *addresses: str, **fields: Any) -> dict[str, Any]:
    """A model call with pictures."""
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    messages = [{"role": "user", "content": parts}]
    return {**records.span("generation", model="m", input_content=messages), **fields}


def sent(sink: MlflowSink, *records: dict[str, Any]) -> list[DeadLetter]:
    sink.prepare([orjson.dumps(record) for record in records])
    return sink.send(TIMEOUT_S)


def shown(server: FakeTransport) -> list[list[str]]:
    """The addresses, or the notes, in each model call on the server."""
    calls = [span for span in server.spans.values() if span.name == "m"]
    calls.sort(key=lambda span: span.start_time_unix_nano)
    starts = ("mlflow-attachment:", "data:", "[")
    return [
        [
            text.string_value
            for text in texts_in(one.value for one in call.attributes)
            if text.string_value.startswith(starts)
        ]
        for call in calls
    ]


def test_each_picture_is_written_once_for_its_trace() -> None:
    """Also by the next process, which goes on with the state of the one before."""
    server, records = FakeTransport(), Records()
    sink = MlflowSink(b"{}", server)
    small = data_url(SMALL)
    first = look(records, small, REFERENCE, pictures={ID: base64(LARGE)})
    assert sent(sink, records.start(), first) == []
    again = MlflowSink(b"{}", server)
    again.restore(sink.state())
    assert sent(again, look(records, small, REFERENCE), records.end()) == []
    assert sorted(server.artifacts.values(), key=len) == [SMALL, LARGE]
    assert f"attachments/{ID}" in server.artifacts
    assert server.calls.count("write_artifact") == 2
    assert server.calls.count("has_attachments") == 2
    one, two = shown(server)
    assert one == two
    assert one[1] == (
        f"mlflow-attachment://{ID}?content_type=image%2Fpng&trace_id={trace_id('trace-1')}"
        f"&size={len(LARGE)}"
    )


def test_a_server_without_attachments_has_them_inlined() -> None:
    """Small ones as they were, large ones as notes of their size."""
    server, records = FakeTransport(), Records()
    server.attachments = False
    first = look(records, data_url(SMALL), REFERENCE, pictures={ID: base64(LARGE)})
    assert sent(MlflowSink(b"{}", server), records.start(), first, records.end()) == []
    note = f"[image/png, {len(LARGE) * 4 // 3} characters]"
    assert shown(server) == [[data_url(SMALL), note]]
    assert server.artifacts == {}


@pytest.mark.parametrize("settings", [{"log_traces": False}, {"attachments": False}])
def test_those_that_are_not_wanted_are_not_written(settings: dict[str, Any]) -> None:
    server, records = FakeTransport(), Records()
    start = records.start(settings=settings)
    assert sent(MlflowSink(b"{}", server), start, look(records, data_url(SMALL))) == []
    assert server.artifacts == {}
    assert "has_attachments" not in server.calls


def test_one_that_cannot_be_stored_now_is_sent_again_later() -> None:
    """The run says that it is missing; `sync` sends it where it belongs."""
    server, records = FakeTransport(), Records()
    server.fail = lambda call, _: (
        PutOff("NO_ARTIFACTS", "full") if call == "write_artifact" else None
    )
    sink = MlflowSink(b"{}", server)
    first = look(records, REFERENCE, pictures={ID: base64(LARGE)})
    [letter] = sent(sink, records.start(), first, records.end())
    [run] = server.runs.values()
    assert run["tags"]["qitos.values.dropped"] == "artifact_put_off=1"
    server.fail = lambda *_: None
    assert sent(MlflowSink(letter.header, server, resumed=True), orjson.loads(letter.record)) == []
    assert server.artifacts == {f"attachments/{ID}": LARGE}
    assert len(server.runs) == 1


def test_one_that_the_server_refuses_costs_no_span() -> None:
    server, records = FakeTransport(), Records()
    server.fail = lambda call, _: Refused("BAD_REQUEST", "no") if call == "write_artifact" else None
    first = look(records, REFERENCE, pictures={ID: base64(LARGE)})
    assert len(sent(MlflowSink(b"{}", server), records.start(), first, records.end())) == 1
    assert len(shown(server)) == 1


@pytest.mark.parametrize("damaged", ["?", "A", None, 7, base64(b"")])
def test_a_damaged_picture_costs_no_span(damaged: Any) -> None:
    server, records = FakeTransport(), Records()
    first = look(records, REFERENCE, pictures={ID: damaged})
    assert sent(MlflowSink(b"{}", server), records.start(), first) == []
    assert len(shown(server)) == 1
    assert server.artifacts == {}


def test_a_server_that_is_away_is_asked_again() -> None:
    """Nothing is decided before it has answered."""
    server, records = FakeTransport(), Records()
    server.fail = lambda call, _: RetryLater("away") if call == "has_attachments" else None
    sink = MlflowSink(b"{}", server)
    with pytest.raises(RetryLater):
        sent(sink, records.start(), look(records, data_url(SMALL)))
    server.fail = lambda *_: None
    assert sink.send(TIMEOUT_S) == []
    assert [*server.artifacts.values()] == [SMALL]


@pytest.mark.parametrize(
    ("status", "version", "expected"),
    [
        (200, b"3.17.2", True),
        (200, b"3.12.0", True),
        (200, b"4.0.0", True),
        (200, b"3.11.1", False),
        (200, b"2.22.0.dev0", False),
        (200, b"<html>3.1.0</html>", True),
        (404, b"3.1.0", True),
    ],
)
def test_servers_have_attachments_from_3_12_on(status: int, version: bytes, expected: bool) -> None:
    """One that does not say its version is taken for one of today."""
    transport = RestTransport("http://server", FakeRequester(status, version))
    assert transport.has_attachments(TIMEOUT_S) is expected


def test_where_a_trace_has_its_files() -> None:
    info = {"trace_id": "tr-1", "tags": {"mlflow.artifactLocation": "s3://bucket/a"}}
    answer = {"trace": {"trace_info": info}}
    requester = FakeRequester(200, orjson.dumps(answer))
    assert RestTransport("http://s", requester).artifacts_of_trace("tr-1", 9.0) == "s3://bucket/a"
    assert requester.paths == [Request("GET", "/api/3.0/mlflow/traces/tr-1", 9.0).path]
