"""JSON near a limit of memory: the same bytes and values as without one, and no crash."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest

import qitos_mlflow
from qitos_mlflow import _json
from qitos_mlflow.recording.to_json import as_json, encode

VALUES: list[Any] = [
    {"kind": "span", "a": [1, -1, 1.5, None, True, "é\u2028\x00\U0001f600\x7f"], "b": {}},
    {"numbers": [2**63, -(2**63), 2**64 - 1, 1e300, 5e-324, -0.0, 0.1]},
    [[[]], {"": ""}],
    "text",
]
NO_JSON = [b"NaN", b"[Infinity]", b'"\\ud800"', b"\xff", b'"\xed\xa0\x80"', b"[" * 9_999, b"", b"{"]


@pytest.fixture(params=[0, 1, _json.SPARE_BYTES])
def _near(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_json, "memory_left", lambda: request.param)


@pytest.mark.usefixtures("_near")
@pytest.mark.parametrize("value", VALUES)
def test_the_same_near_a_limit(value: Any) -> None:
    """Near a limit a value becomes the same JSON as without one, and the JSON the same value."""
    assert orjson.loads(_json.dumps(value)) == value
    assert orjson.loads(_json.dumps(value, option=_json.INDENT)) == value
    assert _json.loads(orjson.dumps(value)) == value


@dataclass
class Inner:
    """Part of a state, with something for `default`."""

    names: dict[str, list[tuple[str, int]]]
    content: bytes = b"content"


@dataclass(slots=True)
class Outer:
    """A state, as the sink's."""

    inner: Inner
    more: list[Inner] = field(default_factory=list)


@pytest.mark.parametrize("left", [0, _json.SPARE_BYTES, 1 << 40])
def test_dataclasses_are_the_same_under_any_limit(
    left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state of a delivery is made of them; without it nothing is delivered."""
    value = {"state": Outer(Inner({"a": [("b", 1)]}), [Inner({})])}
    expected = _json.dumps(value, bytes.decode)
    monkeypatch.setattr(_json, "memory_left", lambda: left)
    assert _json.dumps(value, bytes.decode) == expected
    for default in (None, bytes.decode):
        with pytest.raises(TypeError):
            _json.dumps({"state": Inner, "bytes": b""}, default)


@pytest.mark.usefixtures("_near")
@pytest.mark.parametrize("text", NO_JSON)
def test_what_is_no_json_is_none_near_a_limit(text: bytes) -> None:
    """Near a limit the same texts are refused as without one, with the same class of exception."""
    for loads in (orjson.loads, _json.loads):
        with pytest.raises(_json.JSONDecodeError):
            loads(text)


@pytest.mark.usefixtures("_near")
def test_large_integers_become_floats() -> None:
    """An integer that orjson would not write again is a float, with a limit and without."""
    text = b"[18446744073709551616, -9223372036854775809]"
    assert _json.loads(text) == orjson.loads(text)
    assert orjson.dumps(_json.loads(text))


def test_no_json_encoder_runs_on_the_agents_thread_if_memory_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """orjson may end the process, and to look before whether it may takes as long as orjson."""
    record = {"kind": "span", "values": VALUES, "text": "é" * 40_000}
    monkeypatch.setattr(_json, "is_limited", lambda: False)  # Also if this process is.
    unlimited = as_json(encode(record))
    with monkeypatch.context() as patch:
        for encoder in ("dumps", "dumps_strict"):
            patch.delattr(_json, encoder)
        patch.setattr(_json, "is_limited", lambda: True)
        limited = encode(record)
        patch.setattr(_json, "memory_left", lambda: (_ for _ in ()).throw(AssertionError))
        small = encode({**record, "text": "short"})
    assert [orjson.loads(as_json(one))["values"] for one in (limited, small)] == [VALUES, VALUES]
    assert as_json(limited) == unlimited


class Keyed:
    """A key with a `repr`, like those of libraries."""

    def __repr__(self) -> str:
        return "keyed"


@pytest.mark.parametrize(
    "key", [memoryview(b"password"), 1, 1.5, None, (1, 2), frozenset({1}), b"password", Keyed()]
)
def test_a_key_is_called_the_same_if_memory_is_limited(
    key: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redaction goes by names."""
    record = {"kind": "span", "values": [{"inner": {key: 1}}]}
    monkeypatch.setattr(_json, "is_limited", lambda: False)  # Also if this process is.
    unlimited = as_json(encode(record))
    monkeypatch.setattr(_json, "is_limited", lambda: True)
    assert as_json(encode(record)) == unlimited


def test_what_is_in_many_places_counts_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of the queue and of memory go by the size of the bytes."""
    monkeypatch.setattr(_json, "is_limited", lambda: True)
    assert len(encode({"kind": "span", "values": ["x" * 1000] * 100})) > 100_000


def test_orjson_is_used_in_one_place() -> None:
    """No other module calls orjson, which ends the process if it gets no memory."""
    root = Path(qitos_mlflow.__file__).parent
    users = {
        path.name
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if (isinstance(node, ast.Import) and any(a.name == "orjson" for a in node.names))
        or (isinstance(node, ast.ImportFrom) and node.module == "orjson")
    }
    assert users == {"_json.py"}
