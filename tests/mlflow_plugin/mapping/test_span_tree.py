"""A trace's records become the tree, the chat and the verdicts of MLflow's Traces page."""

from __future__ import annotations

import json
import uuid
from typing import Any

import pytest
from mlflow.version import VERSION
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from packaging.version import Version

from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun
from qitos_mlflow.mlflow_plugin.mapping.ids import digest, span_id, trace_id
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import build_span, distinct, set_status, set_value
from qitos_mlflow.mlflow_plugin.mapping.span_tree import locate
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import Poisoned
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState, Waiting
from tests.integration.server import MlflowServer
from tests.mlflow_plugin import folding
from tests.mlflow_plugin.folding import info_of, new_state
from tests.mlflow_plugin.records import MS, START_NS, Records


def fold(
    *records: dict[str, Any], state: TraceState | None = None
) -> tuple[list[Span], TraceState]:
    """All spans of the records, and the state after them, through JSON after each."""
    folded = folding.fold(*records, state=state)
    return folded.waiting.spans, folded


def plain(span: Span) -> dict[str, Any]:
    """The span's attributes as Python values."""
    from mlflow.tracing.utils.otlp import _decode_otel_proto_anyvalue

    return {entry.key: _decode_otel_proto_anyvalue(entry.value) for entry in span.attributes}


def test_ids_follow_from_qitos_ids() -> None:
    """A UUID keeps its digits, any other id is hashed, the same in every process."""
    identity = uuid.uuid4()
    assert trace_id(str(identity)) == f"tr-{identity.hex}"
    assert trace_id("run 7") == f"tr-{digest('trace', 'run 7', size=16).hex()}"
    assert span_id("t", "0123456789abcdef").hex() == "0123456789abcdef"
    assert span_id("t", "a") != span_id("u", "a")
    assert span_id("t", "0" * 16) != bytes(8)
    assert trace_id(str(uuid.UUID(int=0))) != f"tr-{'0' * 32}"


def test_the_begin_is_an_unfinished_root() -> None:
    """A trace begins as a root that ends at once, without a status: the page shows it going."""
    start = Records().start("trace", metadata={"agent_name": "solver", "task": "2+2?"})
    assert fold(start)[0] == []
    (root,), state = fold(start, Records().announced())
    assert root.name == "solver"
    assert root.parent_span_id == b""
    assert root.start_time_unix_nano == root.end_time_unix_nano == START_NS
    assert root.status.code == Status.STATUS_CODE_UNSET
    info = locate(info_of(state), "7", "run-1")
    assert info["state"] == "IN_PROGRESS"
    assert info["request_preview"] == "2+2?"
    assert info["trace_metadata"]["mlflow.sourceRun"] == "run-1"
    assert info["trace_location"]["mlflow_experiment"] == {"experiment_id": "7"}
    assert info["request_time"] == "2026-09-21T14:13:20.000000Z"


def test_an_announced_agent_is_the_root() -> None:
    """The trace of one agent's run has that agent as its root, from the start to the end."""
    make = Records()
    spans, _ = fold(
        make.start("trace"),
        make.announced(),
        make.span("step", step_number=0, parent_id="A"),
        make.span("agent", span_id="A", name="solver", output="4"),
        make.end(),
    )
    assert [span.name for span in spans] == ["solver", "step 0", "solver"]
    assert spans[0].span_id == spans[1].parent_span_id == spans[2].span_id
    assert spans[2].parent_span_id == b""
    assert plain(spans[2])["mlflow.spanOutputs"] == "4"


def test_spans_without_a_parent_hang_below_the_root() -> None:
    """A trace made by hand has one root, whatever number of spans stand at its top."""
    make = Records()
    spans, _ = fold(make.start(), make.span("step"), make.span("tool", tool_name="t"), make.end())
    root, step, tool, end = spans
    assert step.parent_span_id == tool.parent_span_id == root.span_id == end.span_id
    assert end.end_time_unix_nano == START_NS + 1_000 * MS


@pytest.mark.parametrize(
    ("record", "name", "kind", "inputs", "outputs"),
    [
        (("step", {"step_number": 3, "observation": {"o": 1}, "decision": {"d": 2}}),
         "step 3", "CHAIN", {"o": 1}, {"d": 2}),
        (("decide", {"input_content": "i", "output_content": "o"}), "decide", "CHAIN", "i", "o"),
        (("tool", {"tool_name": "add", "tool_args": {"a": 1}, "output_content": 2}),
         "add", "TOOL", {"a": 1}, 2),
        (("mcp", {"server_name": "s", "tool_name": "t", "tool_args": {}}), "s/t", "TOOL", {}, None),
        (("act", {"action_name": "go", "tool_args": {"x": 1}}), "go", "CHAIN", {"x": 1}, None),
        (("reduce", {"input_count": 2, "output_content": "o"}), "reduce", "CHAIN", None, "o"),
        (("critic", {"critic_name": "C", "input_content": "i"}), "C", "EVALUATOR", "i", None),
        (("handoff", {"from_agent": "a", "to_agent": "b"}),
         "a → b", "AGENT", {"from_agent": "a", "to_agent": "b"}, None),
        (("custom", {"name": "cache", "data": {"k": 1}}), "cache", "UNKNOWN", {"k": 1}, None),
        (("parse", {"x": 1}), "parse", "PARSER", {"x": 1}, None),
        (("guardrail", {}), "guardrail", "GUARDRAIL", None, None),
        (("brand_new", {"x": 1}), "brand_new", "BRAND_NEW", {"x": 1}, None),
        (("agent", {"name": "helper", "output": "done"}), "helper", "AGENT", None, "done"),
        (("agent", {"name": "helper", "task": "t"}), "helper", "AGENT", {"task": "t"}, None),
    ],
)  # fmt: skip
def test_each_span_type_has_its_place(
    record: tuple[str, dict[str, Any]], name: str, kind: str, inputs: Any, outputs: Any
) -> None:
    """Name, MLflow's type, inputs and outputs of every QitOS span type."""
    (_, span), _ = fold(Records().start(), Records().span(record[0], **record[1]))
    found = plain(span)
    assert (span.name, found["mlflow.spanType"]) == (name, kind)
    assert (found.get("mlflow.spanInputs"), found.get("mlflow.spanOutputs")) == (inputs, outputs)
    assert span.status.code == Status.STATUS_CODE_OK


def test_a_failure_is_an_event() -> None:
    """A failed span has status ERROR and its exception with type, message and stack."""
    exception = {"type": "ValueError", "message": "no", "stacktrace": "Traceback…"}
    make = Records()
    for record, stack in (
        (
            make.span("tool", tool_name="t", error="ValueError: no", exception=exception),
            "Traceback…",
        ),
        (make.span("tool", tool_name="t", error="ValueError: no"), ""),
    ):
        (_, span), _ = fold(make.start(), record)
        assert (span.status.code, span.status.message) == (
            Status.STATUS_CODE_ERROR,
            "ValueError: no",
        )
        (event,) = span.events
        assert {a.key: a.value.string_value for a in event.attributes} == {
            "exception.type": "ValueError",
            "exception.message": "no",
            "exception.stacktrace": stack,
        }


def test_batches_have_no_double_and_no_circle() -> None:
    """An id that comes twice is sent once, and parents never lead back: servers choke on both."""
    trace, a, b, c = bytes(15) + b"t", bytes(7) + b"a", bytes(7) + b"b", bytes(7) + b"c"
    one = build_span(trace, a, b, "first", 1, 2, {})
    two = build_span(trace, b, a, "second", 1, 2, {})
    late = build_span(trace, c, a, "old", 1, 2, {})
    again = build_span(trace, c, a, "new", 1, 2, {})
    found = distinct([one, two, late, again])
    assert [span.name for span in found] == ["first", "second", "new"]
    parents = {span.span_id: span.parent_span_id for span in found}
    for start in parents:
        seen, at = set(), start
        while at in parents:
            assert at not in seen
            seen.add(at)
            at = parents[at]
    assert build_span(trace, a, a, "self", 1, 2, {}).parent_span_id == b""


def test_only_the_circle_is_opened() -> None:
    """What hangs on a circle keeps its parent, and a chain as long as any is soon walked."""
    trace, ids = bytes(15) + b"t", [n.to_bytes(8, "big") for n in range(1, 50_001)]
    above = [None, *ids[:-1]]
    made = [
        build_span(trace, own, parent, "s", 1, 2, {})
        for own, parent in zip(ids, above, strict=True)
    ]
    made.reverse()  # From the bottom: the longest way for each.
    assert all(span.parent_span_id for span in distinct(made)[:-1])
    made[-1].parent_span_id = ids[1]  # The top two are a circle, all others hang on it.
    cut = [span.span_id for span in distinct(made) if not span.parent_span_id]
    assert cut in ([ids[0]], [ids[1]])


@pytest.mark.parametrize(
    "value", [2**63, -(2**70), "\ud800", float("nan"), b"x", object(), {1: [None]}, {"a": "\0"}]
)
def test_any_value_can_be_sent(value: Any) -> None:
    """What protobuf cannot hold as it is arrives as text, and nothing raises."""
    span = build_span(b"t" * 16, b"s" * 8, None, "n", 1, 2, {"v": value})
    assert Span.FromString(span.SerializeToString()) is not None


def test_deep_values_can_be_sent() -> None:
    """AutologSpans beyond protobuf's own limit, up to JSON's, arrives as JSON text."""
    deep: Any = "end"
    for _ in range(100):
        deep = {"k": [deep]}
    span = build_span(b"t" * 16, b"s" * 8, None, "n", 1, 2, {"v": deep})
    assert "end" in str(Span.FromString(span.SerializeToString()))


@pytest.mark.parametrize(
    ("start", "end"), [(None, 5), (5, None), (9, 5), (2**70, 2**80), (-1, 1.5)]
)
def test_odd_times_are_put_right(start: Any, end: Any) -> None:
    """A span never ends before it starts, nor beyond 64 bits."""
    span = build_span(b"t" * 16, b"s" * 8, None, "n", start, end, {})
    assert 0 <= span.start_time_unix_nano <= span.end_time_unix_nano < 2**63


def test_a_linked_trace_points_to_its_parent() -> None:
    """A child that outlived its parent's trace carries a link to the span that started it."""
    metadata = {"linked_trace_id": "other", "linked_span_id": "x"}
    (root,), state = fold(Records().start(metadata=metadata), Records().announced())
    (link,) = root.links
    assert f"tr-{link.trace_id.hex()}" == trace_id("other")
    assert link.span_id == span_id("other", "x")
    assert info_of(state)["tags"]["qitos.linked_trace_id"] == "other"


def test_an_abandoned_trace_is_an_error() -> None:
    """A trace whose process died ends with state ERROR at the last sign of life."""
    _, state = fold(Records().start(), Records().span("step"))
    state.kill(START_NS + 2_000 * MS, "killed by signal 9")
    root = state.waiting.spans[-1]
    assert root.status.message == "killed by signal 9"
    info = info_of(state)
    assert (info["state"], info["execution_duration"]) == ("ERROR", "2.000s")


def test_a_trace_without_its_start_has_no_root() -> None:
    """Its name and its start are not known: there is no root of 1970."""
    make = Records()
    spans, state = fold(make.span("step"), make.end(), state=new_state(late=True))
    (span,) = spans
    assert span.name == "step"
    info = info_of(state)
    assert (info["state"], info["request_time"]) == ("OK", "2026-09-21T14:13:20.000000Z")
    assert info["tags"]["qitos.trace_id"] == "trace-1"


def test_long_texts_keep_to_the_columns() -> None:
    """Previews, session, names and tags fit what PostgreSQL takes, without NUL."""
    long = "x\0" * 20_000
    metadata = {"task": long, "agent_name": long, "task_id": long, "linked_trace_id": long}
    make = Records("id" * 500)
    _, state = fold(
        make.start(long, group_id=long, settings={"user": long, "source": long}, metadata=metadata),
        make.end(metadata={"final_result": long, "stop_reason": long}),
    )
    info = info_of(state)
    assert len(info["request_preview"]) <= 1000
    assert len(info["response_preview"]) <= 1000
    assert len(info["client_request_id"]) <= 50
    assert len(info["trace_id"]) <= 50
    assert all(len(value) <= 8000 for value in info["tags"].values())
    assert len(info["trace_metadata"]["mlflow.trace.session"]) <= 250
    assert "\0" not in json.dumps(info, ensure_ascii=False)


def test_content_off_leaves_no_content() -> None:
    """Records without content give spans and info without previews, inputs and outputs."""
    make = Records()
    spans, state = fold(
        make.start(metadata={"agent_name": "a"}),
        make.span(
            "generation", model="m", token_usage={"prompt_tokens": 1, "completion_tokens": 2}
        ),
        make.end(metadata={"stop_reason": "final"}),
    )
    for span in spans:
        assert not {"mlflow.spanInputs", "mlflow.spanOutputs"} & set(plain(span))
    info = info_of(state)
    assert "request_preview" not in info
    assert "response_preview" not in info
    assert json.loads(info["trace_metadata"]["mlflow.trace.tokenUsage"])["total_tokens"] == 3


# -- on a real server ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(shared_server: MlflowServer) -> MlflowServer:
    """A real MLflow server."""
    return shared_server.ensure_running()


def agent_run(trace: str) -> list[dict[str, Any]]:
    """A run of two steps: a tool call and its error, a verdict, an answer."""
    make = Records(trace)
    calls = [{"id": "c1", "function": {"name": "add", "arguments": {"a": 3, "b": 5}}}]
    failure = {"type": "ValueError", "message": "nope", "stacktrace": "Traceback…"}
    return [
        make.start(
            "calculator",
            group_id="session-1",
            settings={"user": "ada"},
            metadata={"agent_name": "calculator", "task": "3+5?", "tools": ["add"]},
        ),
        make.span(
            "generation",
            span_id="g0",
            parent_id="s0",
            model="gpt-4o",
            input_content=[{"role": "user", "content": "3+5?"}],
            output_content="",
            model_response={"tool_calls": calls},
            token_usage={"prompt_tokens": 100, "completion_tokens": 20},
        ),
        make.span(
            "tool",
            span_id="t0",
            parent_id="s0",
            tool_name="add",
            tool_args={"a": 3, "b": 5},
            output_content={"sum": 8, "list": [1, None, "x"]},
        ),
        make.span("tool", span_id="t1", parent_id="s0", tool_name="boom", error="ValueError: nope",
                  exception=failure),
        make.span("critic", span_id="c0", parent_id="s0", critic_name="Exact", score=0.75,
                  output_content={"action": "continue", "reason": "looks good"}),
        make.span("step", span_id="s0", parent_id="a", step_number=0),
        make.span("generation", span_id="g1", parent_id="a", model="gpt-4o", output_content="8",
                  step=1, token_usage={"input_tokens": 50, "output_tokens": 5}),
        make.span("agent", span_id="a", name="calculator", output="8"),
        make.end(metadata={"stop_reason": "final", "final_result": "8"}),
    ]  # fmt: skip


def write(
    transport: RestTransport, experiment: str, run: str, records: list[dict[str, Any]]
) -> None:
    """Send what the records say, one by one, as a live run does."""
    state = new_state(trace_id=records[0]["trace_id"])
    assert state.tree is not None
    for record in records:
        state.take(record, b"")
        if state.waiting.spans:
            transport.write_spans(experiment, distinct(state.waiting.spans), 30)
        if state.tree.changed:
            info = locate(info_of(state), experiment, run)
            state.tree.info_made()
            try:
                transport.write_trace(info, 30)
            except Poisoned:  # MLflow before 3.17 takes nothing away from a trace that has ended.
                assert info["state"] == "IN_PROGRESS"
        state.waiting = Waiting()


def test_the_server_shows_what_the_agent_did(server: MlflowServer) -> None:
    """Tree, times, chat, tokens, feedback, session and run link: once, after a replay too."""
    transport = RestTransport(server.uri)
    experiment = transport.experiment_id("spans", 30)
    run = transport.create_run(NewRun(experiment, "r", START_NS // MS), 30).run_id
    name = str(uuid.uuid4())
    for _ in range(2):
        write(transport, experiment, run, agent_run(name))

    (trace,) = server.client.search_traces(
        locations=[experiment], filter_string=f"attributes.run_id = '{run}'"
    )
    info = trace.info
    assert info.trace_id == trace_id(name)
    assert info.state.value == "OK"
    assert info.request_time == START_NS // MS
    assert info.execution_duration == 1_000
    assert (info.request_preview, info.response_preview) == ("3+5?", "8")
    assert info.trace_metadata["mlflow.trace.session"] == "session-1"
    assert info.trace_metadata["mlflow.trace.user"] == "ada"
    assert info.tags["stop_reason"] == "final"
    assert info.token_usage == {"input_tokens": 150, "output_tokens": 25, "total_tokens": 175}

    (feedback,) = info.assessments
    assert (feedback.name, feedback.feedback.value) == ("Exact", 0.75)
    assert feedback.rationale == "looks good"
    assert feedback.span_id == span_id(name, "c0").hex()

    spans = {span.attributes.get("qitos.span_id", "root"): span for span in trace.data.spans}
    assert len(spans) == len(trace.data.spans) == 8
    by_id = {span.span_id: key for key, span in spans.items()}
    tree = {key: by_id.get(span.parent_id) for key, span in spans.items()}
    assert tree == {"root": None, "a": "root", "s0": "a", "g0": "s0", "t0": "s0", "t1": "s0",
                    "c0": "s0", "g1": "a"}  # fmt: skip
    types = {key: span.span_type for key, span in spans.items()}
    assert types == {"root": "AGENT", "a": "AGENT", "s0": "CHAIN", "g0": "CHAT_MODEL", "t0": "TOOL",
                     "t1": "TOOL", "c0": "EVALUATOR", "g1": "CHAT_MODEL"}  # fmt: skip
    assert spans["t0"].start_time_ns == START_NS + 10 * MS
    assert spans["t0"].end_time_ns == START_NS + 15 * MS
    assert spans["t0"].inputs == {"a": 3, "b": 5}
    assert spans["t0"].outputs == {"sum": 8, "list": [1, None, "x"]}
    assert spans["t1"].status.status_code.value == "ERROR"
    assert spans["t1"].events[0].attributes["exception.message"] == "nope"
    assert spans["g0"].inputs["messages"] == [{"role": "user", "content": "3+5?"}]
    (call,) = spans["g0"].outputs["choices"][0]["message"]["tool_calls"]
    assert call["function"] == {"name": "add", "arguments": '{"a":3,"b":5}'}
    assert spans["g0"].attributes["mlflow.chat.tools"][0]["function"]["name"] == "add"
    assert spans["g1"].attributes["mlflow.message.format"] == "openai"

    # MLflow 3.12 compares feedback with texts only.
    by_score = "feedback.Exact > 0.5" if Version(VERSION) >= Version("3.17") else "span.name != ''"
    for found in ("span.type = 'TOOL'", by_score):
        assert server.client.search_traces(locations=[experiment], filter_string=found)


def test_a_running_trace_is_on_the_server(server: MlflowServer) -> None:
    """Before its end a trace is there, IN_PROGRESS, with the spans so far and its run."""
    transport = RestTransport(server.uri)
    experiment = transport.experiment_id("live", 30)
    run = transport.create_run(NewRun(experiment, "r", START_NS // MS), 30).run_id
    write(transport, experiment, run, agent_run("live-trace")[:4])
    trace = server.client.get_trace(trace_id("live-trace"))
    assert trace.info.state.value == "IN_PROGRESS"
    assert len(trace.data.spans) == 4
    assert trace.info.trace_metadata["mlflow.sourceRun"] == run
    assert trace.info.token_usage["total_tokens"] == 120


def test_a_status_without_details_still_shows() -> None:
    """An exception without a text, and an error without a type, both show."""
    span = build_span(b"t" * 16, b"s" * 8, None, "n", 1, 2, {})
    set_status(span, None, {"type": "KeyboardInterrupt", "message": ""})
    assert span.status.message == "KeyboardInterrupt"
    other = build_span(b"t" * 16, b"s" * 8, None, "n", 1, 2, {})
    set_status(other, "something odd", None)
    assert other.events[0].attributes[0].value.string_value == "Error"
    for error, exception, text in [("", None, "Error"), (None, {"message": "no"}, "Error: no")]:
        set_status(span, error, exception)
        assert span.status.message == text


def test_values_keep_their_types() -> None:
    """Booleans, integers, floats, lists and maps arrive as what they were."""
    from mlflow.tracing.utils.otlp import _decode_otel_proto_anyvalue
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue

    value = {"b": True, "i": 1, "f": 1.5, "l": [], "d": {}, "n": None, "s": "größe"}
    target = AnyValue()
    set_value(target, value)
    assert _decode_otel_proto_anyvalue(target) == value
