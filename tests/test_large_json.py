"""JSON that may be anyone's takes little memory, and what a record of ours may have is read."""

from __future__ import annotations

import tracemalloc
from typing import Any

import pytest

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.mlflow_rest import MlflowRest

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_json, "MOST_PARTS", 1000)


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * MIB,
        b"[" + b"[]," * MIB + b"1]",
        b"[" + b'{"a":1},' * MIB + b"1]",
        b"[" + b"1," * MIB + b"1]",
        b"{" + b",".join(b'"%x":1' % n for n in range(10_000)) + b"}",
        b'["\\\\",' + b'"\\"[",' * 10_000 + b"1]",
    ],
    ids=["depth", "lists", "dicts", "numbers", "keys", "texts"],
)
def test_a_bomb_takes_no_memory(bomb: bytes) -> None:
    """It is refused before it becomes objects."""
    tracemalloc.start()
    try:
        with pytest.raises(_json.JSONDecodeError, match="more than 1000 parts"):
            _json.loads_foreign(bomb)
        assert tracemalloc.get_traced_memory()[1] < 3 * len(bomb) + 32 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    ["[,{" * 5000, '"[' * 5000, "\\" * 4999 + '"[' * 5000, ["[" * 5000, "\\", "]" * 5000]],
    ids=["brackets", "quotes", "backslashes", "several"],
)
def test_a_text_is_one_value(value: Any) -> None:
    """Code is full of brackets, and of quotes that are escaped."""
    assert _json.loads_foreign(_json.dumps({"a": value})) == {"a": value}


def test_a_bomb_is_a_dead_letter_beside_good_records() -> None:
    """In the spool it costs itself alone; an acknowledgement with one is none."""
    server = MlflowRest()
    sink = server.sink()
    bomb = b'{"kind":"span","trace_id":"a","x":[' + b"[]," * 5000 + b"1]}"
    good = b'{"kind":"trace_start","trace_id":"b","name":"n"}'
    sink.prepare([bomb, good])
    [letter] = sink.send(10.0)
    assert letter.record == bomb
    assert "more than 1000 parts" in letter.reason
    assert len(server.runs) == 1
    assert isinstance(sink, MlflowSink)
    sink.close()
