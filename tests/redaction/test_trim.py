"""Long texts and fields are cut to their limit, and say how long they were."""

from __future__ import annotations

import orjson

from qitos_mlflow.redaction.trim import cut, trim, trim_fields


def test_trim_says_how_long_it_was() -> None:
    """A text that is too long is cut within the limit, between characters, with its size."""
    assert trim("größe", 100) == "größe"
    trimmed = trim("ö" * 1000, 101)
    assert len(trimmed.encode()) <= 101
    assert trimmed.endswith("[cut: 1000 characters in all]")
    assert trimmed.startswith("öö")
    twice = trim(trim(cut("ö" * 5000, 1000), 1500), 500)
    assert len(twice.encode()) <= 500
    assert twice.endswith("[cut: 5000 characters in all]")


def test_a_chat_that_is_trimmed_stays_a_chat() -> None:
    """A field above the limit keeps its form while cutting its longest texts is enough."""
    messages = [{"role": "user", "content": "short"}, {"role": "tool", "content": "x" * 50_000}]
    record = {
        "kind": "span",
        "data": {"input_content": messages, "model": "m"},
        "output": "y" * 50_000,
    }
    trimmed = trim_fields(record, 10_000)
    kept = trimmed["data"]["input_content"]
    assert kept[0] == messages[0]
    assert kept[1]["content"].endswith("[cut: 50000 characters in all]")
    assert len(orjson.dumps(kept)) <= 10_000
    assert len(trimmed["output"].encode()) <= 10_000
    assert trimmed["data"]["model"] == "m"


def test_a_field_of_many_small_things_is_cut_as_text() -> None:
    """If cutting texts is not enough, the field becomes the beginning of its JSON."""
    trimmed = trim_fields({"data": {"tool_args": {"rows": list(range(10_000))}}}, 2_000)
    assert trimmed["data"]["tool_args"].startswith('{"rows":[0,1')
    assert len(trimmed["data"]["tool_args"].encode()) <= 2_000
