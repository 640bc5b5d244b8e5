"""Each message of a conversation is worked on once, and what is stored is the same as without."""

from __future__ import annotations

import json
import tracemalloc
from base64 import b64encode
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from itertools import chain
from typing import Any

import pluggy
import pytest

from qitos_mlflow import _json, tracing
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import TraceFacts
from qitos_mlflow.mlflow_plugin.sink.reading import RecordReader
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.recording import conversation
from qitos_mlflow.recording.conversation import Conversations
from qitos_mlflow.recording.normalize import normalize, redacted_message
from qitos_mlflow.recording.pictures import TakenPictures
from qitos_mlflow.recording.to_json import encode
from tests.pictures import png

SECRET = "sk-proj-" + "Ab3dEf6hIj9kLm2nOp5q" * 2
FIELD_BYTES = 1024 * 1024
PICTURE_BYTES = 8 * 1024 * 1024

Message = dict[str, Any]


def said(number: int, text: str = "What is to be done next?") -> Message:
    """A message of its own."""
    return {"role": ("user", "assistant")[number % 2], "content": f"{number}: {text} " * 3}


def growing(*, at_a_time: int = 2, turns: int = 6) -> list[list[Message]]:
    """The conversation of each turn, as it grows."""
    return [[said(n) for n in range(at_a_time * turn)] for turn in range(1, turns)]


def call(number: int) -> list[Message]:
    """A tool call and its result, as OpenAI has them."""
    function = {"name": "look", "arguments": json.dumps({"api_key": SECRET, "at": number})}
    asked = {"id": f"c{number}", "type": "function", "function": function}
    result = f"token={SECRET}"
    return [
        {"role": "assistant", "content": None, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": f"c{number}", "content": result},
    ]


def picture(number: int) -> Message:
    """A message with a picture as data URL, larger than what stays inlined."""
    data = "data:image/png;base64," + b64encode(png(number, 200, compressed=False)).decode()
    parts = [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {"url": data}}]
    return {"role": "user", "content": parts}


def with_edit(turns: list[list[Message]]) -> list[list[Message]]:
    """From the fourth turn on, the second message is another."""
    made = deepcopy(turns)
    for messages in made[3:]:
        messages[1]["content"] = "edited in place"
    return made


KEY = [
    {"role": "user", "content": "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg"},
    {"role": "user", "content": "kqhkiG9w0BAQEFAASC\n-----END PRIVATE KEY-----"},
]


def each(made: Callable[[int], Message], turns: int = 4) -> list[list[Message]]:
    """A conversation that grows by one message a turn."""
    return [[made(number) for number in range(turn)] for turn in range(1, turns)]


CONVERSATIONS: dict[str, list[list[Any]]] = {
    "append": growing(),
    "the same again": [growing()[3]] * 3,
    "edit in place": with_edit(growing()),
    "compaction": [*growing(), [said(99, "a summary")], [said(99, "a summary"), said(8)]],
    "a window that moves": [[said(0), *map(said, range(k, k + 4))] for k in range(1, 6)],
    "another order": [turn if len(turn) < 6 else turn[::-1] for turn in growing()],
    "equal messages": [[said(0)] * count for count in range(1, 6)],
    "two at once": [*chain(*zip(growing(), growing(at_a_time=3), strict=True))],
    "1, 1.0 and true": [[{"role": "user", "content": one, "n": one}] for one in (1, 1.0, True)],
    "beyond ASCII": each(lambda n: said(n, 'ü "quoted" \\ \n 日本 \U0001f600')),
    "tool calls with secrets": [[*chain(*map(call, range(k)))] for k in range(1, 5)],
    "a secret in each": each(lambda n: said(n, f"api_key={SECRET}{n}")),
    "a key over two messages": [[said(0), *KEY, said(1)][:k] for k in range(1, 5)],
    "200 KB": each(lambda n: said(n, "x y " * 50_000)),
    "more than a field holds": each(lambda n: said(n, "x y " * 100_000)),
    "pictures": [[said(0), *map(picture, range(k)), said(1)] for k in range(3)],
    "texts and objects": [[said(0), "and", said(1)], ["so", said(0)], []],
    "blocks": each(lambda n: {"role": "user", "content": [{"type": "text", "text": f"{n} a"}]}),
    "its own words": each(lambda n: said(n, '"input_content":[{"role":"user"}]')),
}


def span(number: int, content: Any, **more: Any) -> dict[str, Any]:
    """The snapshot of a model call's span."""
    return {
        "kind": "span",
        "trace_id": "t1",
        "span_id": f"s{number}",
        "parent_id": None,
        "type": "generation",
        "started_at": "2026-01-01T00:00:00+00:00",
        "ended_at": "2026-01-01T00:00:01.5+00:00",
        "error": None,
        "output": "done",
        "step": number,
        "data": {"model": "m", "input_content": content, "output_content": "done"},
        **more,
    }


def in_form(form: str, messages: list[Any]) -> Any:
    """What a host gives as the input of a model call."""
    if form == "list":
        return messages
    rest = {"model": "m", "system": "Be brief.", "tools": [{"name": "look"}]}
    return {"messages": messages, **rest} if form == "first" else {**rest, "messages": messages}


def conversations() -> Conversations:
    """As the spooling thread has them."""
    return Conversations(partial(redacted_message, max_picture_bytes=PICTURE_BYTES), b",")


def stored(snapshots: list[dict[str, Any]], known: Conversations | None) -> list[bytes | None]:
    """The records, as they go to disk."""
    pictures = TakenPictures(PICTURE_BYTES)
    return [
        normalize(encode(one), FIELD_BYTES, lambda record: None, pictures, known)
        for one in snapshots
    ]


def sent(records: list[bytes | None], reader: RecordReader | None) -> list[Any]:
    """The spans and attachments that the records become."""
    trace = TraceState.begin("t1", {}, tree=True, late=False, resumed=False)
    for data in filter(None, records):
        record, rest = (_json.loads(data), data) if reader is None else reader.read(data)
        trace.take(record, data, rest)
    spans = [one.SerializeToString(deterministic=True) for one in trace.waiting.spans]
    return [spans, trace.waiting.artifacts, trace.waiting.metrics, trace.tree]


@pytest.mark.parametrize("form", ["list", "first", "last"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_stored_is_the_same_as_without(name: str, form: str) -> None:
    """Byte for byte, on the disk and on the server."""
    turns = CONVERSATIONS[name]
    snapshots = [span(n, in_form(form, turn)) for n, turn in enumerate(turns)]
    plain = stored(snapshots, None)
    assert stored(snapshots, conversations()) == plain
    assert sent(plain, RecordReader()) == sent(plain, None)
    assert SECRET.encode() not in b"".join(filter(None, plain))


def test_each_message_is_worked_on_once() -> None:
    """However often it is sent again, in whatever order, and if another one is edited."""
    worked: list[bytes] = []

    def work(message: Message, text: bytes) -> bytes:
        worked.append(text)
        return text.upper()

    known = Conversations(work, b",")
    turns = [*growing(), growing()[-1][::-1], with_edit(growing())[-1], growing()[-1][3:]]
    for number, turn in enumerate(turns):
        found = known.read(_json.dumps(span(number, turn)))
        assert found is not None
        assert found.result == b",".join(_json.dumps(message).upper() for message in turn)
    assert len(worked) == len(set(worked)) == len(growing()[-1]) + 1


def test_only_what_is_new_is_parsed() -> None:
    """The rest of a long conversation costs no more than to compare its bytes."""
    parsed: list[int] = []

    def loads(data: bytes) -> Any:
        parsed.append(len(data))
        return _json.loads(data)

    known = Conversations(lambda message, text: text, b",")
    for number, turn in enumerate(growing(turns=40)):
        assert known.read(_json.dumps(span(number, turn)), loads) is not None
    assert max(parsed[2:]) < 2 * parsed[0]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bytes and in number; what is forgotten is worked on once more."""
    monkeypatch.setattr(conversation, "LISTS_BYTES", 20_000)
    monkeypatch.setattr(conversation, "MESSAGES_BYTES", 5_000)
    known = Conversations(lambda message, text: text, b",")
    for other in range(100):
        for turn in growing():
            content = [{**message, "other": other} for message in turn]
            found = known.read(_json.dumps(span(0, content)))
            assert found is not None
            assert found.result == _json.dumps(content)[1:-1]
    assert known.held_bytes <= 25_000


def test_what_is_remembered_takes_no_more_than_its_bytes() -> None:
    """orjson reserves eight bytes for each of a text, and keeps them with what it returns."""
    known = Conversations(lambda message, text: _json.dumps(message), b",")
    records = [_json.dumps(span(0, [said(n, "x" * 1000)])) for n in range(100)]
    tracemalloc.start()
    try:
        for record in records:
            known.read(record)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 1.5 * known.held_bytes


@pytest.mark.parametrize(
    "data",
    [
        {"input_content": 5, "other": {"input_content": [said(0)]}},
        {"other": {"input_content": [said(0)]}, "input_content": []},
        {"other": {"input_content": [said(0)]}, "input_content": [said(1)]},
        {"input_content": {"messages": [said(0)], "input_content": [said(1)]}},
        {"input_content": [{"input_content": [said(0)]}]},
        {"input_content": None},
        {},
    ],
)
def test_another_list_is_no_conversation(data: Any) -> None:
    """It is read as a whole, or not taken for the one that it is not."""
    snapshots = [{**span(n, None), "data": data} for n in range(3)]
    plain = stored(snapshots, None)
    assert stored(snapshots, conversations()) == plain
    assert sent(plain, RecordReader()) == sent(plain, None)


@pytest.mark.parametrize(
    "damage", [lambda line: line[:-9], lambda line: line.replace(b'"role"', b'"role', 1)]
)
def test_a_damaged_record_is_no_other_one(damage: Any) -> None:
    """It is refused as it is without."""
    reader = RecordReader()
    first, second = (_json.dumps(span(n, turn)) for n, turn in enumerate(growing()[:2]))
    reader.read(first)
    with pytest.raises(_json.JSONDecodeError):
        reader.read(damage(second))
    assert reader.read(second).record["span_id"] == "s1"


class Looks:
    """A plugin that changes what it is shown."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    @pluggy.HookimplMarker("qitos")
    def qitos_record(self, record: dict[str, Any]) -> dict[str, Any]:
        """Note the messages, and spoil them."""
        messages = record["data"]["input_content"]
        self.seen.append(deepcopy(messages))
        for message in messages:
            message.clear()
        return {"attributes": {"count": len(messages)}}


@pytest.fixture
def looks() -> Iterator[Looks]:
    """A plugin that is asked about records."""
    plugin = Looks()
    processor = PluginTraceProcessor({"looks": plugin})
    tracing.add_trace_processor(processor)
    yield plugin
    tracing.remove_trace_processor(processor)


def test_plugins_see_all_messages(looks: Looks) -> None:
    """Copies of their own: what a plugin does to them changes nothing."""
    turns = [[said(0), said(1)], [said(0), said(1), said(2)], [said(0), said(1), said(2)]]
    known = conversations()
    records = stored([span(n, turn) for n, turn in enumerate(turns)], known)
    assert looks.seen == turns
    found = [_json.loads(record or b"") for record in records]
    assert [record["data"]["input_content"] for record in found] == turns
    assert [record["added"]["attributes"]["count"] for record in found] == [2, 3, 3]


def test_a_shared_record_is_no_field_of_the_stored_one() -> None:
    """What two threads ask plugins about is marked only on its way."""
    (record,) = stored([span(0, [said(0)], shared=True)], conversations())
    assert "shared" not in _json.loads(record or b"")


def test_the_facts_are_those_of_the_whole_record() -> None:
    """A reader that knows the messages gives a trace the same facts."""
    facts = TraceFacts("t1", {})
    data = _json.dumps({**span(0, [said(0)]), "start_ns": 5, "end_ns": 7})
    facts.fold(RecordReader().read(data).record)
    assert facts.last_ns == 7
