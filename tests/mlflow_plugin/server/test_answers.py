"""An answer in another form than MLflow's, or about something else, is no answer at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun
from qitos_mlflow.mlflow_plugin.server.answers import NotMlflows
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned
from qitos_mlflow.mlflow_plugin.server.verdict import PROTOBUF
from tests.fakes.requester import FakeRequester

NEW = NewRun("7", "name", 0, [("qitos.trace_id", "mine")])

INFO = {
    "run_id": "r1",
    "experiment_id": "7",
    "run_name": "name",
    "artifact_uri": "mlflow-artifacts:/7/r1/artifacts",
    "start_time": 1_700_000_000_000,
    "end_time": "1700000000001",  # As text, as MLflow's store writes 64-bit integers.
    "status": "FINISHED",
}
DATA = {
    "metrics": [
        {"key": "loss", "value": "NaN", "timestamp": 1},
        {"key": "n", "value": 3, "timestamp": "2"},
    ],
    "tags": [{"key": "qitos.trace_id", "value": "mine"}, {"key": "empty"}],
}
RUN = {"info": INFO, "data": DATA}
TRACE = {
    "trace_id": "tr-1",
    "trace_location": {"mlflow_experiment": {"experiment_id": "7"}},
    "tags": {"mlflow.artifactLocation": "mlflow-artifacts:/7/traces/tr-1/artifacts"},
    "trace_metadata": {"mlflow.sourceRun": "r1"},
    "assessments": [{"assessment_id": "a-1", "metadata": {"k": "v"}}],
}

CALLS: dict[str, tuple[Any, Callable[[RestTransport], Any]]] = {
    "experiment": ({"experiment": {"experiment_id": "7"}}, lambda to: to.experiment_id("n", 1.0)),
    "has": ({"experiment": {"experiment_id": "7"}}, lambda to: to.has_experiment("7", 1.0)),
    "create": ({"run": RUN}, lambda to: to.create_run(NEW, 1.0)),
    "get": ({"run": RUN}, lambda to: to.stored_run("r1", 1.0)),
    "find": ({"runs": [RUN]}, lambda to: to.find_runs("7", "mine", 1.0)),
    "end": ({"run_info": INFO}, lambda to: to.end_run("r1", "FINISHED", 0, 1.0)),
    "trace": ({"trace": {"trace_info": TRACE}}, lambda to: to.trace_info("tr-1", 1.0)),
    "files": ({"trace": {"trace_info": TRACE}}, lambda to: to.artifacts_of_trace("tr-1", 1.0)),
    "write": ({"trace": {"trace_info": TRACE}}, lambda to: to.write_trace({}, 1.0)),
    "cost": ({"data_points": [{"values": {"SUM": 0.5}}]}, lambda to: to.sum_spans({}, 1.0)),
}


def answered(call: str, answer: Any) -> Any:
    """What the call returns for this answer."""
    server = FakeRequester(200, answer if isinstance(answer, bytes) else orjson.dumps(answer))
    return CALLS[call][1](RestTransport("http://host", server))


@pytest.mark.parametrize("call", CALLS)
def test_what_mlflow_answers_is_taken(call: str) -> None:
    """Also its integers and numbers that are texts, and lists that it leaves out."""
    answered(call, CALLS[call][0])


def test_values_have_their_types() -> None:
    """Of whatever form in JSON."""
    run = answered("get", CALLS["get"][0])
    assert run.end_ms == 1_700_000_000_001
    assert run.metrics["n"] == 3.0
    assert run.metrics["loss"] != run.metrics["loss"]
    assert run.metric_times == {"loss": 1, "n": 2}
    assert run.tags == {"qitos.trace_id": "mine", "empty": ""}


IDS = (None, True, 7, -1.5, "", "a/b", "x" * 300, [], {}, [[1]])
OBJECTS = (None, True, 7, "", "abc", [], [{}])
NUMBERS = (None, True, "", "a/b", [], {}, 10**400)
NAMES = (None, True, 7, "", [], {})

FIELDS: list[tuple[str, str, Sequence[Any]]] = [
    *(("create", f"run.info.{name}", IDS) for name in ("run_id", "experiment_id")),
    *(("get", f"run.info.{name}", IDS) for name in ("run_id", "experiment_id")),
    *(("create", path, OBJECTS) for path in ("run", "run.info")),
    ("create", "run.info.artifact_uri", (*NAMES, "x" * 11_000)),
    ("get", "run.data.metrics.0.value", NUMBERS),
    ("get", "run.data.metrics.0.key", NAMES),
    ("get", "run.data.tags.0.key", NAMES),
    ("get", "run.data", (7, "abc", [])),
    ("find", "runs.0.data.tags.0.value", (*NAMES, "abc")),
    ("find", "runs.0.info", OBJECTS),
    ("find", "runs", (7, "abc", {}, [1])),
    ("experiment", "experiment.experiment_id", IDS),
    ("has", "experiment.experiment_id", IDS),
    ("has", "experiment.lifecycle_stage", (7, [], {})),
    ("end", "run_info.run_id", IDS),
    ("trace", "trace.trace_info.trace_id", IDS),
    ("trace", "trace.trace_info.trace_location.mlflow_experiment", (7, [], "abc")),
    ("trace", "trace.trace_info.assessments", (7, {}, [1])),
    ("files", "trace.trace_info.tags", OBJECTS),
    ("write", "trace", OBJECTS),
    ("cost", "data_points.0.values.SUM", (*NUMBERS, "NaN", "Infinity")),
    ("cost", "data_points.0.values", OBJECTS),
]


def damaged(call: str, path: str, value: Any) -> Any:
    """The answer to the call, with another value in one place."""
    answer = orjson.loads(orjson.dumps(CALLS[call][0]))
    holder, steps = answer, path.split(".")
    for step in steps[:-1]:
        holder = holder[int(step) if step.isdecimal() else step]
    holder[steps[-1]] = value
    return answer


@pytest.mark.parametrize(("call", "path", "values"), FIELDS)
def test_a_value_of_another_type_is_tried_again_later(
    call: str, path: str, values: Sequence[Any]
) -> None:
    """Null, a list, a huge number, a text with slashes: nothing is known of the request."""
    for value in values:
        with pytest.raises(RetryLater):
            answered(call, json.dumps(damaged(call, path, value)).encode())
            pytest.fail(f"{path} = {value!r:.40}")


@pytest.mark.parametrize("name", ["start_time", "end_time"])
@pytest.mark.parametrize("value", ["abc", "1e3", -1, 2**60, 1.5, [], "9" * 5000, "١٢"])
def test_a_time_that_is_none_is_tried_again_later(name: str, value: Any) -> None:
    """As of a server that answered ``start_time: "abc"``: all its records were given up."""
    with pytest.raises(NotMlflows, match=name):
        answered("get", damaged("get", f"run.info.{name}", value))


@pytest.mark.parametrize(
    ("call", "path", "value"),
    [
        ("get", "run.info.run_id", "r2"),
        ("end", "run_info.run_id", "r2"),
        ("create", "run.info.experiment_id", "8"),
        ("create", "run.data.tags.0.value", "anothers"),
        ("find", "runs.0.data.tags.0.value", "anothers"),
        ("has", "experiment.experiment_id", "8"),
        ("trace", "trace.trace_info.trace_id", "tr-2"),
        ("files", "trace.trace_info.trace_id", "tr-2"),
    ],
)
def test_an_answer_about_something_else_is_none(call: str, path: str, value: str) -> None:
    """Such as one of a cache, or to another request: no record goes to another run for it."""
    with pytest.raises(NotMlflows):
        answered(call, damaged(call, path, value))


@pytest.mark.parametrize("run_id", ["../r", "a/b", "a b", "a'b", "a\nb", "é", "\x1b[2J", "x" * 300])
def test_an_id_is_no_path_and_no_filter(run_id: str) -> None:
    """Ids of the server go into addresses, filters and headers."""
    with pytest.raises(NotMlflows, match="is no id"):
        answered("create", damaged("create", "run.info.run_id", run_id))


def test_the_reason_names_the_place_and_not_the_value() -> None:
    """It is logged, and what the server sends may be a secret, or anything."""
    with pytest.raises(NotMlflows) as later:
        answered("create", damaged("create", "run.info.run_id", "s3cr3t/"))
    assert str(later.value) == "an answer that is not MLflow's: 'run_id' is no id"


@pytest.mark.parametrize(
    "body",
    [
        b'{"error_code": "UNKNOWN", "error_code": "INVALID_PARAMETER_VALUE"}',
        b'{"error_code": ["INVALID_PARAMETER_VALUE"]}',
        b'{"error_code": "INVALID_PARAMETER_VALUE"',
        b'"INVALID_PARAMETER_VALUE"',
    ],
)
def test_a_refusal_that_is_not_whole_refuses_nothing(body: bytes) -> None:
    """Twice the same key, another type, cut: it is not MLflow's word about the request."""
    with pytest.raises(RetryLater):
        RestTransport("http://host", FakeRequester(400, body)).create_run(NEW, 1.0)


@pytest.mark.parametrize("status", [100, 101, 103, 202, 203, 206, 226])
def test_only_a_plain_success_is_one(status: int) -> None:
    """Not "accepted", "partial", or a proxy's own version of an answer."""
    transport = RestTransport("http://host", FakeRequester(status, b""))
    with pytest.raises(RetryLater):
        transport.write_artifact(transport_run(), "a.txt", b"a", 1.0)


def transport_run() -> Any:
    return answered("create", CALLS["create"][0])


@pytest.mark.parametrize("kind", ["text/html", "text/plain; charset=utf-8", "application/xml"])
def test_json_that_is_not_called_json_is_another_programs(kind: str) -> None:
    """MLflow says what it sends. An empty object is easily said."""
    server = FakeRequester(200, b"{}", **{"Content-Type": kind})
    with pytest.raises(RetryLater):
        RestTransport("http://host", server).delete_run("r1", 1.0)


@pytest.mark.parametrize("body", [b"\xff\xff", b"<html>", b"\n\x7f"])
def test_an_answer_to_spans_that_is_no_protobuf_is_none(body: bytes) -> None:
    """Whatever its type says."""
    server = FakeRequester(200, body, **{"Content-Type": PROTOBUF})
    with pytest.raises(RetryLater):
        RestTransport("http://host", server).write_spans("0", [], 1.0)


def test_spans_that_are_rejected_are_no_success() -> None:
    """A collector before MLflow may take some of them; which ones is found by sending fewer."""
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp

    partial = otlp.ExportTracePartialSuccess(rejected_spans=2, error_message="too odd")
    body = otlp.ExportTraceServiceResponse(partial_success=partial).SerializeToString()
    server = FakeRequester(200, body, **{"Content-Type": PROTOBUF})
    with pytest.raises(Poisoned, match="2 spans are rejected: too odd"):
        RestTransport("http://host", server).write_spans("0", [], 1.0)


@pytest.mark.parametrize("version", [b"3.1 of another program", b"2.0.1" + b"x" * 99, b"99999.1.1"])
def test_a_version_is_one_of_mlflows(version: bytes) -> None:
    """A page that begins with numbers takes no pictures from traces."""
    assert RestTransport("http://host", FakeRequester(200, version)).has_attachments(1.0)
    assert not RestTransport("http://host", FakeRequester(200, b"3.11.1\n")).has_attachments(1.0)


def test_json_of_many_small_parts_is_not_unpacked() -> None:
    """As objects of Python it would take thirty times its size."""
    with pytest.raises(RetryLater, match="too many parts"):
        answered("create", b"[" + b"{}," * 100_001 + b"{}]")
