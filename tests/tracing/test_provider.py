"""The provider: processors, modes, redacted copies."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, NamedTuple

import pytest

from qitos_mlflow.tracing import redaction
from qitos_mlflow.tracing.models import Trace, TracingMode
from qitos_mlflow.tracing.provider import NoOpTrace, TracingProvider
from qitos_mlflow.tracing.redaction import RedactingSpanData
from qitos_mlflow.tracing.span_data import (
    ActSpanData,
    AgentSpanData,
    CriticSpanData,
    CustomSpanData,
    DecideSpanData,
    GenerationSpanData,
    HandoffSpanData,
    MCPSpanData,
    ReduceSpanData,
    SpanData,
    SpanType,
    StepSpanData,
    ToolSpanData,
)
from tests.fakes.recorder import Recorder

SECRET = "the launch code is 00000000"

FULL_OF_CONTENT: list[SpanData] = [
    AgentSpanData("planner", model="m-1", tools=["grep"], output_type="str"),
    AgentSpanData("planner", tools=[{"name": "grep", "description": SECRET}]),  # type: ignore[list-item]
    StepSpanData(4, observation={"text": SECRET}, decision=[SECRET]),
    DecideSpanData(input_content=SECRET, output_content=SECRET, model_response={"text": SECRET}),
    GenerationSpanData(
        model="m-1",
        input_content=[{"role": "user", "content": SECRET}],
        output_content=SECRET,
        model_response={"text": SECRET},
        token_usage={"prompt_tokens": 12, "note": SECRET},  # type: ignore[dict-item]
    ),
    ActSpanData(action_name="search", tool_args={"q": SECRET}, output_content=SECRET),
    ActSpanData(action_name=f"search\n{SECRET}"),
    ToolSpanData(tool_name="grep", tool_args={SECRET: 1}, output_content={"rows": [SECRET]}),
    ReduceSpanData(input_count=3, output_content=SECRET),
    CriticSpanData(critic_name="judge", input_content=SECRET, output_content=SECRET, score=0.5),
    HandoffSpanData(from_agent="a", to_agent="b", output_content=SECRET, messages_passed=2),
    MCPSpanData(server_name="s", tool_name="t", tool_args={"q": SECRET}, output_content=SECRET),
    CustomSpanData(name="env_step", data={"anything": SECRET}),
]


def everything_in(item: Any, seen: set[int] | None = None) -> str:
    """All text to be found in `item`, down every attribute, key and element."""
    seen = set() if seen is None else seen
    if isinstance(item, (str, bytes, int, float, type(None))):
        return str(item)
    if id(item) in seen:
        return ""
    seen.add(id(item))
    parts: list[Any] = [*getattr(item, "__dict__", {}).values(), *getattr(item, "args", ())]
    parts += [getattr(item, name) for name in getattr(type(item), "__slots__", ())]
    if isinstance(item, dict):
        parts += [*item.keys(), *item.values()]
    elif isinstance(item, (list, tuple, set)):
        parts += item
    if isinstance(item, BaseException):
        parts += [item.__traceback__, item.__cause__, item.__context__]
    return "\n".join(everything_in(part, seen) for part in parts)


def record(mode: TracingMode, data: SpanData) -> Recorder:
    recorder = Recorder()
    provider = TracingProvider([recorder], mode)
    metadata = {"task": SECRET, "agent_name": "planner", "nested": {"x": SECRET}, "max_steps": 3}
    with provider.create_trace("run", "group", metadata) as trace:
        span = trace.create_span(SpanType.CUSTOM, data).start()
        span.set_output(SECRET)
        span.finish(ValueError(SECRET))
        trace.metadata["final_result"] = SECRET
    return recorder


@pytest.mark.parametrize("data", FULL_OF_CONTENT, ids=lambda data: data.type)
def test_without_data_no_content_at_all(data: SpanData) -> None:
    """At every event, down every attribute of what a processor is given, there is no content."""
    recorder = record(TracingMode.ENABLED_WITHOUT_DATA, data)
    assert recorder.names == ["trace_start", "span_start", "span_end", "trace_end"]
    for _, item in recorder.events:
        assert SECRET not in everything_in(item)
        assert SECRET not in json.dumps(item.export())


@pytest.mark.parametrize("data", FULL_OF_CONTENT, ids=lambda data: data.type)
def test_with_data_the_content_is_there(data: SpanData) -> None:
    """The same search finds the content in the default mode: the test above can fail."""
    recorder = record(TracingMode.ENABLED, data)
    assert SECRET in everything_in(recorder.objects("span_end")[0])
    assert SECRET in everything_in(recorder.objects("trace_start")[0])


@pytest.mark.parametrize("data", FULL_OF_CONTENT, ids=lambda data: data.type)
def test_redacted_copies_stay_what_they_are(data: SpanData) -> None:
    """A redacted span has its ids, times and type, and data of its class; the original stays."""
    before = data.export()
    recorder = record(TracingMode.ENABLED_WITHOUT_DATA, data)
    started, ended = recorder.objects("span_start")[0], recorder.objects("span_end")[0]
    for span in (started, ended):
        assert isinstance(span.data, type(data))
        assert isinstance(span.data, RedactingSpanData)
        assert span.data.type == data.type == span.data.export()["type"]
        assert span.data.export().keys() == before.keys()
    assert (started.span_id, started.started_at) == (ended.span_id, ended.started_at)
    assert ended.ended_at is not None
    assert ended.error == ended.output == redaction.REDACTED
    assert started.error is None
    assert type(ended.exception) is ValueError
    assert data.export() == before


def test_numbers_and_names_are_kept() -> None:
    """Tokens, scores, steps and names come through in attributes and exports alike."""
    kept = {}
    for data in FULL_OF_CONTENT:
        exported = (
            record(TracingMode.ENABLED_WITHOUT_DATA, data).objects("span_end")[0].data.export()
        )
        kept.update({k: v for k, v in exported.items() if v not in (None, redaction.REDACTED)})
    assert kept.pop("type") == "custom"
    assert kept == {
        "name": "env_step",
        "model": "m-1",
        "tools": [redaction.REDACTED],
        "output_type": "str",
        "step_number": 4,
        "token_usage": {"prompt_tokens": 12, "note": redaction.REDACTED},
        "action_name": "search",
        "tool_name": "t",
        "server_name": "s",
        "input_count": 3,
        "critic_name": "judge",
        "score": 0.5,
        "from_agent": "a",
        "to_agent": "b",
        "messages_passed": 2,
    }
    assert kept.keys() <= redaction.STRUCTURAL_FIELDS


def test_metadata_keeps_structure_only() -> None:
    """Of the metadata only known keys keep their values, and only scalars, at start and end."""
    recorder = record(TracingMode.ENABLED_WITHOUT_DATA, StepSpanData(1))
    start, end = recorder.objects("trace_start")[0], recorder.objects("trace_end")[0]
    expected = {"task": redaction.REDACTED, "agent_name": "planner", "nested": redaction.REDACTED}
    assert start.metadata == {**expected, "max_steps": 3}
    assert end.metadata["final_result"] == redaction.REDACTED
    assert (end.name, end.group_id, end.mode) == ("run", "group", TracingMode.ENABLED_WITHOUT_DATA)
    assert redaction.redacted_metadata({"task_id": {"x": 1}}) == {"task_id": redaction.REDACTED}
    assert redaction.redacted_metadata({"task": None}) == {"task": None}


def test_the_exception_is_known_by_class_only() -> None:
    """Without data a processor still learns that a run failed or was interrupted, and how."""
    recorder = Recorder()
    provider = TracingProvider([recorder], TracingMode.ENABLED_WITHOUT_DATA)

    class WithArguments(KeyboardInterrupt):
        def __init__(self, code: int, text: str) -> None:
            super().__init__(text)
            self.code = code

        def __str__(self) -> str:
            return f"{self.code} {self.args[0]}"

    for error in (
        KeyError(SECRET),
        WithArguments(1, SECRET),
        UnicodeDecodeError("utf-8", SECRET.encode(), 0, 1, SECRET),
    ):
        with pytest.raises(type(error)), provider.create_trace("run"):
            raise error
    first, second, third = (trace.error for trace in recorder.objects("trace_end"))
    assert type(first) is KeyError
    assert type(second) is KeyboardInterrupt
    assert isinstance(third, UnicodeDecodeError)
    assert SECRET not in everything_in([first, second, third])


@dataclasses.dataclass(frozen=True)
class Frozen(SpanData):
    """Span data as someone may write it: frozen."""

    tool_name: str
    secret: str

    @property
    def type(self) -> str:
        return "frozen"

    def export(self) -> dict[str, Any]:
        return {"type": self.type, "upper": self.secret.upper(), "tool_name": self.tool_name}


class Slotted(SpanData):
    """Span data as someone may write it: with slots, and a type of its own making."""

    __slots__ = ("_kind", "secret")

    def __init__(self) -> None:
        self._kind, self.secret = "slotted", SECRET

    @property
    def type(self) -> str:
        return self._kind

    def export(self) -> dict[str, Any]:
        return {"type": self.type, "length": len(json.loads(self.secret))}


@pytest.mark.parametrize("data", [Frozen("t", SECRET), Slotted()], ids=lambda data: data.type)
def test_span_data_of_ones_own_is_redacted(data: SpanData) -> None:
    """Frozen, slotted and computing span data of the user's own is redacted too, and exports."""
    recorder = record(TracingMode.ENABLED_WITHOUT_DATA, data)
    for span in (*recorder.objects("span_start"), *recorder.objects("span_end")):
        assert isinstance(span.data, type(data))
        assert span.data.type == data.type
        assert SECRET not in everything_in(span)
        assert SECRET.upper() not in json.dumps(span.export())


class Pair(NamedTuple):
    """Span data as someone may write it: a tuple."""

    secret: str
    type: str = "pair"

    def export(self) -> dict[str, Any]:
        return self._asdict()


class Table(dict[str, Any]):
    """Span data as someone may write it: a dict."""

    type = "table"

    def export(self) -> dict[str, Any]:
        return dict(self)


class Sealed(SpanData):
    """Span data as someone may write it: no class can be derived from it in the usual way."""

    type = "sealed"

    def __init__(self) -> None:
        self.secret = SECRET

    def __init_subclass__(cls, *, kind: str) -> None:
        raise ValueError(kind)

    def export(self) -> dict[str, Any]:
        return {"secret": self.secret}


@pytest.mark.parametrize("data", [Pair(SECRET), Table(x=SECRET), Sealed()])
def test_span_data_that_cannot_be_derived_from(data: Any) -> None:
    """The span and the end of its trace arrive all the same, without content."""
    recorder = record(TracingMode.ENABLED_WITHOUT_DATA, data)
    assert len(recorder.objects("trace_end")) == 1
    (span,) = recorder.objects("span_end")
    assert span.data.export() == {"type": data.type}
    assert SECRET not in everything_in(span)


@pytest.mark.parametrize("data", [None, {"x": SECRET}, 7])
def test_what_is_no_span_data_is_redacted_too(data: Any) -> None:
    """Objects that are no span data show no content, and raise nothing."""
    copy = RedactingSpanData(data)
    assert copy.type == "custom"
    assert copy.export() == {"type": "custom"}
    assert SECRET not in everything_in(copy)


def test_disabled_traces_nothing() -> None:
    """Disabled, a trace and its spans do nothing and reach no processor."""
    recorder = Recorder()
    trace = TracingProvider([recorder], TracingMode.DISABLED).create_trace("run")
    assert isinstance(trace, NoOpTrace)
    with trace:
        trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
    assert recorder.events == []


def test_a_trace_keeps_the_mode_it_was_made_with() -> None:
    """Switching the mode while a trace is going changes later traces only."""
    recorder = Recorder()
    provider = TracingProvider([recorder])
    with provider.create_trace("run") as trace:
        provider.set_mode(TracingMode.DISABLED)
        assert isinstance(trace, Trace)
    assert recorder.names == ["trace_start", "trace_end"]
    assert trace.mode is TracingMode.ENABLED


@pytest.mark.parametrize("mode", [TracingMode.ENABLED, TracingMode.ENABLED_WITHOUT_DATA])
def test_turning_on_again_adds_no_content(mode: TracingMode) -> None:
    """Off and on again is the mode it was, also where it was never turned off."""
    provider = TracingProvider(mode=mode)
    provider.set_disabled(False)
    assert provider.mode is mode
    provider.set_disabled(True)
    provider.set_disabled(True)
    assert provider.mode is TracingMode.DISABLED
    provider.set_disabled(False)
    assert provider.mode is mode


def test_modes_by_value() -> None:
    """A mode may be given by its value; a word that is none is refused."""
    provider = TracingProvider()
    provider.set_mode("disabled")  # type: ignore[arg-type]
    assert provider.mode is TracingMode.DISABLED
    with pytest.raises(ValueError, match="quiet"):
        provider.set_mode("quiet")  # type: ignore[arg-type]


def test_processors_of_a_trace_under_way() -> None:
    """Replacing the processors leaves traces under way with theirs; adding one joins them in."""
    old, joined, new = Recorder(), Recorder(), Recorder()
    provider = TracingProvider([old])
    with provider.create_trace("run"):
        provider.add_processor(joined)
        provider.set_processors([new])
    assert old.names == ["trace_start", "trace_end"]
    assert joined.names == ["trace_end"]
    assert new.names == []
    assert provider.processors == [new]


def test_ids_are_uuids() -> None:
    """Generated ids are different UUIDs with hyphens; a given trace id is used."""
    ids = {TracingProvider.gen_trace_id(), TracingProvider.gen_span_id()}
    assert len(ids) == 2
    assert all(re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", i) for i in ids)
    assert TracingProvider().create_trace("run", trace_id="mine").trace_id == "mine"


def test_flush_and_shutdown_reach_the_processors() -> None:
    """The provider flushes and shuts down what is attached to it."""
    called: list[str] = []

    class Closing(Recorder):
        def shutdown(self) -> None:
            called.append("shutdown")

        def force_flush(self) -> bool:
            called.append("force_flush")
            return False

    provider = TracingProvider([Closing()])
    assert provider.force_flush() is False
    provider.shutdown()
    assert called == ["force_flush", "shutdown"]
