"""Snapshots: events to bytes on the agent's thread, whatever they hold."""

from __future__ import annotations

import enum
import ipaddress
import math
import re
import subprocess
import sys
import uuid
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from decimal import Decimal
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import attrs
import numpy as np
import orjson
import pandas
import pydantic
import pydantic.v1
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow import tracing
from qitos_mlflow.recording import simpler, snapshot
from qitos_mlflow.recording.simpler import MAX_SLOW, SLOW_CLASS_S, SLOW_REPR_S, SlowTexts
from qitos_mlflow.recording.snapshot import describe, span_record
from qitos_mlflow.redaction.redact import redact
from qitos_mlflow.redaction.trim import MARGIN_CHARS
from qitos_mlflow.tracing import SpanType, create_trace
from tests.fakes.lazy import (
    Cursor,
    LazyUser,
    Patience,
    RemotePath,
    Report,
    Rows,
    Slow,
    SlowAndRaises,
    SlowSlots,
    Table,
    Watched,
)
from tests.recording.changing import encode

ROOT = Path(__file__).parents[2]
ROOM = 1_000_000


class Recorded(tracing.NoOpTraceProcessor):
    """Keeps the record of every span that ends."""

    def __init__(self, content: bool = True, field_chars: int = ROOM) -> None:
        self.content, self.field_chars = content, field_chars
        self.records: list[dict[str, Any]] = []

    def on_span_end(self, span: Any) -> None:
        payload = encode(span_record(span, self.content, self.field_chars))
        self.records.append(orjson.loads(payload))


def record_of(data: Any, output: Any = None, error: Any = None, **options: Any) -> dict[str, Any]:
    """The record of one span with this data, output and error."""
    recorded = Recorded(**options)
    tracing.add_trace_processor(recorded)
    try:
        with create_trace("one") as trace:
            span = trace.create_span(SpanType(data.type), data).start()
            span.set_output(output)
            span.finish(error)
    finally:
        tracing.remove_trace_processor(recorded)
    return recorded.records[0]


def through(value: Any) -> Any:
    """`value` as it is read back."""
    return orjson.loads(encode({"value": value}))["value"]


class Colour(enum.Enum):
    RED = "red"


class Shade(str, enum.Enum):
    RED = "dark red"


class Size(enum.IntEnum):
    SMALL = 1


class Ratio(float):
    """A number of a user's class."""

    def __repr__(self) -> str:
        return "a ratio"


@dataclass
class Point:
    x: int
    y: Any


class Call(pydantic.BaseModel):
    """As the clients of OpenAI and Anthropic return them; none of its code is run."""

    model_config = pydantic.ConfigDict(extra="allow")
    name: str
    arguments: Any = None
    password: str = "hunter2"
    _client: Any = None

    def raises(self, *_: Any) -> Any:
        raise RuntimeError("its own code")

    __repr__ = __str__ = __iter__ = __getattr__ = __hash__ = raises  # type: ignore[assignment]
    model_dump = dict = raises

    @property
    def length(self) -> int:
        raise RuntimeError("its own code")


class OldCall(pydantic.v1.BaseModel):
    """The same, of pydantic 1."""

    name: str
    shape: Any = None


class Hostile:
    """Raises at every access."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


class HostileMapping(Mapping[str, Any], Hostile):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no item")

    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("no keys")

    def __len__(self) -> int:
        return 1


class HostileSequence(Sequence[Any], Hostile):
    def __getitem__(self, index: Any) -> Any:
        raise RuntimeError("no item")

    def __len__(self) -> int:
        raise RuntimeError("no length")


class HostileKey(Hostile):
    """A key without a text."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


class HostileDict(dict[str, Any]):
    """A dict whose own methods raise."""

    def items(self) -> Any:
        raise RuntimeError("no items")


class Endless:
    """Its repr never ends, or so it seems."""

    def __repr__(self) -> str:
        return "x" * 1_000_000


class HostileError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


class HostilePath:
    def __fspath__(self) -> str:
        raise RuntimeError("no path")


# -- encode ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ({"a": [1, 2.5, None, True, "ä"]}, {"a": [1, 2.5, None, True, "ä"]}),
        ((1, 2), [1, 2]),
        ({1: "a", None: "b", 1.5: "c"}, {"1": "a", "null": "b", "1.5": "c"}),
        ({True: "a", math.nan: "b"}, {"true": "a", "NaN": "b"}),
        ({Colour.RED: 1, Shade.RED: {Size.SMALL: 2}}, {"red": 1, "dark red": {"1": 2}}),
        ({date(2026, 1, 2): 1}, {"2026-01-02": 1}),
        ({uuid.UUID(int=7): 1}, {"00000000-0000-0000-0000-000000000007": 1}),
        ({("a", 1): [{("b",): 2}]}, {'["a",1]': [{'["b"]': 2}]}),
        ({b"a": 1, b"b": b"c"}, {"b'a'": 1, "b'b'": "<1 bytes>"}),
        ([Colour.RED, Shade.RED, Size.SMALL], ["red", "dark red", 1]),
        (OrderedDict(a=(1,)), {"a": [1]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
        (datetime(2026, 1, 2, 3, 4, 5, 6), "2026-01-02T03:04:05.000006"),
        ([date(2026, 1, 2), time(3, 4)], ["2026-01-02", "03:04:00"]),
        (Point(1, Point(2, None)), {"x": 1, "y": {"x": 2, "y": None}}),
        (datetime(2026, 1, 2, tzinfo=timezone.utc), "2026-01-02T00:00:00+00:00"),
        (Path("/a/b"), "/a/b"),
        (b"abc", "<3 bytes>"),
        (np.array([1, 2]), [1, 2]),
        (np.float64(1.5), 1.5),
        ([Ratio(1.5), {1: Ratio(0.5)}], [1.5, {"1": 0.5}]),
        (np.float32(1.5), 1.5),
        (np.int64(7), 7),
        (np.bool_(True), True),
        (np.array([[1], [2]]), [[1], [2]]),
        (np.array(3), 3),
        (np.datetime64("2026-01-02"), "np.datetime64('2026-01-02')"),
        (np.zeros((1080, 1920, 3), np.uint8), "<ndarray (1080, 1920, 3) uint8>"),
        (np.array([{"a": b"b"}], object), [{"a": "<1 bytes>"}]),
        ({"a": 1}.values(), [1]),
        (Decimal("1.5"), "Decimal('1.5')"),
        (ValueError("why"), "why"),
        (range(3), [0, 1, 2]),
        (frozenset({7}), [7]),
        ({"a": (b"b", (datetime(2026, 1, 2),))}, {"a": ["<1 bytes>", ["2026-01-02T00:00:00"]]}),
        (int, "<class 'int'>"),
    ],
)
def test_values_keep_their_form(value: Any, wanted: Any) -> None:
    """JSON values stay, similar values become JSON, anything else becomes its text."""
    assert through(value) == wanted


class Lazy(Sequence[int]):
    """Larger than any memory; each item is one of its own."""

    def __getitem__(self, index: Any) -> Any:
        return Lazy()

    def __len__(self) -> int:
        return 10**15


class LazyMapping(Mapping[int, int]):
    """The same, by key."""

    def __getitem__(self, key: int) -> int:
        return key

    def __iter__(self) -> Iterator[int]:
        return iter(range(10**15))

    def __len__(self) -> int:
        return 10**15


@pytest.mark.parametrize("value", [range(10**15), Lazy(), LazyMapping()], ids=type)
@pytest.mark.parametrize("beside", [1, 2**70], ids=["orjson", "slow path"])
def test_what_is_endless_is_cut(value: Any, beside: int) -> None:
    """The agent's thread writes out a bounded part of it, and a note of what it was."""
    payload = encode({"value": value, "beside": beside})
    assert len(payload) < 5_000_000
    assert b"items in all]" in payload or b"cut" in payload
    if not isinstance(value, Lazy):
        assert orjson.loads(payload)["beside"] in (beside, str(beside))


def test_a_large_array_becomes_its_shape() -> None:
    """A small one is its text; the text of a large one may cost any amount of time."""
    small = pandas.DataFrame({"a": [1.5, 2.5]})
    assert through(small) == repr(small)
    assert through(pandas.DataFrame({"a": range(10**6), "b": 0})) == "<DataFrame (1000000, 2)>"
    assert through(pandas.Series(range(10**6))) == "<Series (1000000,) int64>"
    assert through(np.zeros(5_000).view(Own)) == "<Own (5000,) float64>"
    assert through(np.arange(3).view(Own)) == [0, 1, 2]


class Own(np.ndarray[Any, Any]):
    """A user's array is an array, too."""


# -- numbers that are none -------------------------------------------------------------------

NAN, INFINITY = math.nan, math.inf


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (NAN, "NaN"),
        (INFINITY, "Infinity"),
        (-INFINITY, "-Infinity"),
        ([1.5, NAN], [1.5, "NaN"]),
        ([NAN, "a", None, True, 2], ["NaN", "a", None, True, 2]),
        ((INFINITY, 1.0), ["Infinity", 1.0]),
        ({"a": NAN, "b": 1.5}, {"a": "NaN", "b": 1.5}),
        ({"rows": [{"a": 1.0}, {"a": NAN}]}, {"rows": [{"a": 1.0}, {"a": "NaN"}]}),
        ({"deep": {"er": ({"x": [NAN]},)}}, {"deep": {"er": [{"x": ["NaN"]}]}}),
        ({NAN: INFINITY}, {"NaN": "Infinity"}),
        (Ratio(NAN), "NaN"),
        ({"a": Ratio(INFINITY)}, {"a": "Infinity"}),
        (np.float64(NAN), "NaN"),
        (np.float32(-INFINITY), "-Infinity"),
        (np.array([1.0, NAN]), [1.0, "NaN"]),
        ({"a": np.array([[INFINITY]])}, {"a": [["Infinity"]]}),
        (Point(1, NAN), {"x": 1, "y": "NaN"}),
        (deque([NAN]), ["NaN"]),
        ({NAN}, ["NaN"]),
        (MappingProxyType({"a": NAN}), {"a": "NaN"}),
    ],
)
@pytest.mark.parametrize("beside", [1, 2**70], ids=["orjson", "slow path"])
def test_numbers_that_json_has_not_are_texts(value: Any, wanted: Any, beside: int) -> None:
    """NaN and infinity are readable, wherever they stand and whatever stands beside them."""
    given = {"value": value, "again": [value]}
    assert orjson.loads(encode({**given, "beside": beside})) == {
        "value": wanted,
        "again": [wanted],
        "beside": beside if beside == 1 else str(beside),
    }
    assert given["value"] is value


# -- objects that are more than they seem ----------------------------------------------------


@pytest.mark.parametrize("kind", [Rows, Table, Cursor, LazyUser])
@pytest.mark.parametrize("beside", [1, 2**70], ids=["orjson", "slow path"])
def test_what_may_fetch_is_its_type(kind: type[Watched], beside: int) -> None:
    """Nothing is asked of an object that may fetch what it stands for."""
    value = kind()
    held = [value, {"a": value}, (value,), Point(1, value), SimpleNamespace(a=value), {1: [value]}]
    payload = encode({"value": value, "held": held, "beside": beside})
    assert value.asked == {}
    assert orjson.loads(payload)["value"] == f"<{kind.__qualname__}>"
    assert payload.count(f"<{kind.__qualname__}>".encode()) == 1 + len(held)


@pytest.mark.parametrize("beside", [1, 2**70], ids=["orjson", "slow path"])
@pytest.mark.parametrize("kind", [Report, RemotePath])
def test_a_plain_object_is_asked_once(kind: type[Watched], beside: int) -> None:
    """The `repr` of an object runs once, however often a record has the object."""
    value, other = kind(), kind()
    record = {"value": value, "held": [value, {"a": [value]}], "other": other, "beside": beside}
    read = orjson.loads(encode(record))
    assert (value.asked, other.asked) == ({"repr": 1}, {"repr": 1})
    text = "<QuerySet [1, 2]>"
    assert (read["value"], read["held"], read["other"]) == (text, [text, {"a": [text]}], text)


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> Patience:
    """The clock of slow objects."""
    patience = Patience(SLOW_REPR_S * 2)
    monkeypatch.setattr(simpler, "perf_counter", patience)
    return patience


def texts_of(slow: SlowTexts, *values: Any) -> list[Any]:
    """What `values`, each in a record of its own, are in these records of one trace."""
    return [orjson.loads(encode({"value": value}, slow))["value"] for value in values]


@pytest.mark.parametrize("kind", [Slow, SlowSlots])
def test_the_copies_of_an_object_share_an_allowance(
    patience: Patience, kind: type[SlowSlots]
) -> None:
    """Of a class whose `repr` is slow, new objects are a few words when its time is used up."""
    patience.takes_s, slow = SLOW_CLASS_S * 0.4, SlowTexts()
    texts = texts_of(slow, *(kind(patience) for _ in range(5)))
    assert texts == ["<slow 1>", "<slow 2>", "<slow 3>", *2 * [f"<{kind.__name__}, slow repr>"]]
    assert texts_of(slow, SlowAndRaises(patience)) == ["<SlowAndRaises without a repr>"]
    assert texts_of(SlowTexts(), kind(patience)) == ["<slow 5>"]  # Another trace.


def test_a_quick_repr_is_asked_in_each_record(patience: Patience) -> None:
    """What an object that changes says stays true."""
    patience.takes_s = SLOW_REPR_S / 2
    assert texts_of(SlowTexts(), *3 * [Slow(patience)]) == ["<slow 1>", "<slow 2>", "<slow 3>"]


def test_a_slow_text_goes_with_its_object(patience: Patience) -> None:
    """A trace keeps no object alive, few texts, and takes no later object for an earlier one."""
    slow, value, other = SlowTexts(), Slow(patience), Slow(patience)
    assert texts_of(slow, value, value) == 2 * ["<slow 1>"]
    slow.texts[id(other)] = slow.texts[id(value)]  # As if it had got the other one's place.
    gone = weakref.ref(value)
    del value
    assert gone() is None
    assert texts_of(slow, other, other) == 2 * ["<slow 2>"]
    texts_of(slow, *(type(f"Slow{number}", (Slow,), {})(patience) for number in range(MAX_SLOW)))
    assert len(slow.texts) + len(slow.spent_s) <= MAX_SLOW + 2


def test_objects_that_come_and_go_are_not_mixed_up() -> None:
    """An object made on the way, and gone again, does not lend its text to the next one."""
    read = through(Made())
    assert read == [f"item {number}" for number in range(100)]


class Item:
    """Made when it is asked for."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"item {self.number}"


class Made(Sequence[Item]):
    def __getitem__(self, index: Any) -> Item:
        if index >= 100:
            raise IndexError
        return Item(index)

    def __len__(self) -> int:
        return 100


@attrs.define
class Order:
    """Of attrs, with slots."""

    number: int
    rows: Any


def test_values_of_other_libraries_read_as_ever() -> None:
    """Objects that have their data at hand are their fields or their text."""
    assert through(Order(1, Rows())) == {"number": 1, "rows": "<Rows>"}
    assert through(SimpleNamespace(a=1, b=[NAN])) == {"a": 1, "b": ["NaN"]}
    match = re.match("a", "a")
    for value in (match, ipaddress.ip_network("10.0.0.0/8"), Colour, pandas.NaT, np.float64):
        assert through(value) == repr(value)
    assert through(requests.Response()) == "<Response [None]>"


def test_a_snapshot_stays_as_it_was() -> None:
    """Changing a value afterwards does not change its snapshot."""
    value = {"messages": [{"role": "user"}]}
    payload = encode(value)
    value["messages"].append({"role": "assistant"})
    value["messages"][0]["role"] = "someone else"
    assert orjson.loads(payload) == {"messages": [{"role": "user"}]}


@pytest.mark.parametrize(
    "value",
    [
        Hostile(),
        HostileMapping(),
        HostileSequence(),
        {HostileKey(): 1},
        HostileDict(a=1),
        {"a": HostileDict(a=2**70)},
        HostilePath(),
        HostileError(),
        Point(1, Hostile()),
        {("a", 1): HostileMapping()},
        {"deep": [[[HostileSequence()]]], "big": 2**70},
    ],
    ids=lambda value: type(value).__name__,
)
def test_hostile_objects_cost_only_themselves(value: Any) -> None:
    """An object that raises at every access becomes a few words; all beside it is intact."""
    assert orjson.loads(encode({"value": value, "beside": [1, {"a": "b"}]}))["beside"] == [
        *(1, {"a": "b"}),
    ]


def test_what_json_cannot_hold() -> None:
    """Huge numbers, halves of characters, cycles and great depth come out readable, and bounded."""
    cycle: dict[str, Any] = {"name": "cycle"}
    cycle["self"] = cycle
    deep: Any = "bottom"
    for _ in range(5_000):
        deep = [deep]
    assert through(2**70) == str(2**70)
    assert through("half \ud83d") == "half ?"
    assert through({"half \ud83d": 1}) == {"half ?": 1}
    assert through(cycle)["self"]["name"] == "cycle"
    assert len(encode({"deep": deep})) < 1_000
    assert len(encode({"wide": [cycle] * 100})) < 3_000_000
    assert len(through(Endless())) < 3_000 + MARGIN_CHARS


def test_models_keep_their_fields() -> None:
    """A pydantic model becomes its fields, extra ones too, whatever its own methods return."""
    inner = Call(name="inner", arguments=[Path("/a")])
    call = Call.model_construct(name="f", arguments={"x": inner}, more=(1, OldCall(name="g")))
    call._client = Hostile()
    assert through(call) == {
        "name": "f",
        "arguments": {"x": {"name": "inner", "arguments": ["/a"], "password": "hunter2"}},
        "password": "hunter2",
        "more": [1, {"name": "g", "shape": None}],
    }
    unset = object.__new__(Call)
    assert through(unset) == {}
    assert len(through(Call(name="x" * 50_000))["name"]) == 50_000


def test_models_share_the_bounds_of_containers() -> None:
    """Many models are cut as much as many mappings are."""
    record = through([Call(name="f") for _ in range(30_000)])
    assert record[0]["name"] == "f"
    assert record[-1] == {"…": "… [cut: 3 items in all]"}


def test_what_holds_itself_twice_at_each_level_is_bounded() -> None:
    """A value that holds one list in many places is cut: its JSON would be too large."""
    level: Any = ["bottom"]
    for _ in range(60):
        level = [level, level]
    assert len(encode({"levels": level, "beside": 1})) < 1_000_000


class Bare:
    """Something with attributes."""


def test_rows_with_times_are_not_cut() -> None:
    """Values that orjson refuses cost a long table nothing."""
    rows = [{"at": datetime(2026, 1, 2), "n": number} for number in range(20_000)]
    assert through(rows)[-1] == {"at": "2026-01-02T00:00:00", "n": 19_999}


def test_a_flat_dict_is_known_as_such_only_while_it_is() -> None:
    """A container in a dict is found, whichever way it came into the dict."""
    bare = Bare()
    bare.a = bare.b = 1  # type: ignore[attr-defined]
    attributes = vars(bare)
    bare.a = Colour.RED  # type: ignore[attr-defined]
    copied, added, merged, kept = {"a": 1}, {"a": 1}, {"a": 1}, {"a": b"b", "at": (1, b"b")}
    copied = {**copied, "a": Colour.RED}  # type: ignore[dict-item]
    added.setdefault("b", Colour.RED)  # type: ignore[arg-type]
    merged |= {"a": Colour.RED}  # type: ignore[dict-item]
    for value in (attributes, copied, added, merged, dict.fromkeys("a", Colour.RED)):
        assert Colour.RED.value in through([value])[0].values()
    assert through([kept]) == [{"a": "<1 bytes>", "at": [1, "<1 bytes>"]}]


@pytest.mark.parametrize("who", ["alone", "threads"])
def test_a_payload_that_changes_meanwhile_does_no_harm(who: str) -> None:
    """The process survives if a payload's own code or another thread changes the payload."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.recording.changing", who]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "no crash"), done


ODD = st.one_of(
    *(st.builds(made) for made in (Hostile, HostileMapping, HostileSequence, HostileError))
)
ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters())
    | st.binary()
    | ODD,
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner)
        | st.dictionaries(st.text(st.characters()) | st.integers() | st.tuples(st.text()), inner)
    ),
    max_leaves=20,
)


@given(value=ANYTHING)
def test_anything_has_a_snapshot(value: Any) -> None:
    """Every value becomes JSON."""
    assert "value" in orjson.loads(encode({"value": value}))


# -- spans -----------------------------------------------------------------------------------


def test_the_record_of_a_span() -> None:
    """A record has the span's ids, times, data, output and error."""
    data = tracing.ToolSpanData(tool_name="add", tool_args={"a": 1}, output_content=3)
    record = record_of(data, output={"sum": 3}, error=ValueError("too much"))
    exception = record.pop("exception")
    assert (exception["type"], exception["message"]) == ("ValueError", "too much")
    assert record.pop("started_at") <= record.pop("ended_at")
    assert record.pop("span_id")
    assert record == {
        "kind": "span",
        "parent_id": None,
        "type": "tool",
        "error": "ValueError: too much",
        "data": {"tool_name": "add", "tool_args": {"a": 1}, "output_content": 3},
        "output": {"sum": 3},
    }


def test_numbers_that_are_none_stay_visible() -> None:
    """JSON has no NaN. As texts, such numbers can be dropped and counted later."""
    record = record_of(tracing.CriticSpanData(score=math.nan))
    assert record["data"]["score"] == "NaN"
    usage = {"prompt_tokens": math.inf, "completion_tokens": 1.0}
    record = record_of(tracing.GenerationSpanData(token_usage=usage))
    assert record["data"]["token_usage"] == {"prompt_tokens": "Infinity", "completion_tokens": 1.0}


def test_long_texts_are_cut_on_the_spot() -> None:
    """A text longer than a field is cut in the snapshot, with a margin until it is redacted."""
    data = tracing.ToolSpanData(tool_name="read", output_content="x" * 5_000)
    record = record_of(data, output="y" * 7_000, field_chars=100)
    assert len(record["output"]) < 100 + MARGIN_CHARS + 80
    record = redact(record)
    assert record["data"]["output_content"] == "x" * 100 + "… [cut: 5000 characters in all]"
    assert record["output"] == "y" * 100 + "… [cut: 7000 characters in all]"
    assert record["data"]["tool_name"] == "read"


def test_without_content_numbers_and_names_stay() -> None:
    """Inputs, outputs and error texts are gone; names, tokens, scores and types are not."""
    data = tracing.GenerationSpanData(
        model="m", input_content=["hello"], token_usage={"prompt_tokens": 3}
    )
    record = record_of(data, output="secret", error=ValueError("secret"), content=False)
    assert record["data"]["model"] == "m"
    assert record["data"]["token_usage"] == {"prompt_tokens": 3}
    assert record["error"] == snapshot.WITHHELD
    assert record["exception"] == {"type": "ValueError", "message": snapshot.WITHHELD}
    assert "output" not in record
    assert "hello" not in str(record)
    record = record_of(tracing.CriticSpanData(critic_name="c", score=0.5), content=False)
    assert record["data"]["critic_name"] == "c"
    assert record["data"]["score"] == 0.5


class LiveData(tracing.SpanData):
    """Data of a user's class whose export is not a copy."""

    def __init__(self) -> None:
        self.fields = {"type": "custom", "text": "x" * 500}

    @property
    def type(self) -> str:
        return "custom"

    def export(self) -> dict[str, Any]:
        return self.fields


def test_the_spans_own_data_is_not_touched() -> None:
    """A snapshot changes nothing of the span, also if its export is not a copy."""
    data = LiveData()
    record = record_of(data, field_chars=100)
    assert record["type"] == "custom"
    assert data.fields == {"type": "custom", "text": "x" * 500}


# -- exceptions ------------------------------------------------------------------------------


def recurse(depth: int) -> None:
    if depth == 0:
        raise KeyError("at the bottom")
    recurse(depth - 1)


def test_an_exception_brings_its_innermost_frames() -> None:
    """Type, text and the last frames of the stack, however deep it was."""
    with pytest.raises(KeyError) as raised:
        recurse(200)
    described = describe(raised.value, True)
    assert (described["type"], described["message"]) == ("KeyError", "'at the bottom'")
    assert len(described["frames"]) == snapshot.MAX_FRAMES
    file, line, function = described["frames"][-1]
    assert (Path(file).name, function) == (Path(__file__).name, "recurse")
    assert line > 0


def test_an_exception_without_a_text() -> None:
    """An exception whose text cannot be read still has its type."""
    assert describe(HostileError(), True)["message"] == "<HostileError without a repr>"
    assert describe(KeyboardInterrupt(), True) == {
        "type": "KeyboardInterrupt",
        "message": "",
        "frames": [],
    }
