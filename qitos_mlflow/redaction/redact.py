"""Takes credentials out: a decoded record goes in, a copy without them comes out.

Called by `refine` on the worker, before the disk and the network, over the record as a whole:
metadata, tags, inputs, outputs, errors, URLs. (What QitOS's `ENABLED_WITHOUT_DATA` leaves out is
another matter: `tracing.redaction`.) Two rules, both always on:

* A key that names a credential loses its value, whatever the value is.
* A text loses every part that has a credential's shape (an ``sk-…`` key, a JWT, a private key
  block, ``user:password@`` in a URL) or stands beside a credential's name (``API_KEY=…``,
  ``"password": "…"``, ``Authorization: …``, ``--token …``).

What counts as either: `credentials`.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import orjson

from qitos_mlflow.mlflow_plugin.mapping.limits import CUT_HERE
from qitos_mlflow.redaction.credentials import find_credentials, names_credential
from qitos_mlflow.redaction.inlined import note_large

MARKER = "[redacted]"

MAX_DEPTH = 256
"""Deeper levels become `MARKER`. orjson writes no more than 254, so no record of ours has them."""

_SHORTEST = 8
"""Texts below this many characters have no room for a name and a value, or for a key's shape."""

_REMEMBERED_CHARS = 4096
"""Longer texts are not remembered: a few MB in all, 16 at the very worst."""

_SHORTEST_SHAPE = 16
"""Keys of a mapping below this many characters, and without ``=``, hold no credential."""


def redact_text(text: str) -> str:
    """`text` with `MARKER` in the place of every credential in it; the same object if none."""
    if len(text) < _SHORTEST:
        return text
    return _remembered(text) if len(text) <= _REMEMBERED_CHARS else _redacted(text)


def _redacted(text: str) -> str:
    data = text.encode("utf-8", "surrogatepass")
    spans = find_credentials(data)
    if not spans:
        return text
    parts: list[bytes] = []
    kept = 0
    for start, end, quote in spans:
        if start >= kept:
            parts += (data[kept:start], quote, MARKER.encode(), quote)
        kept = max(kept, end)
    parts.append(data[kept:])
    return b"".join(parts).decode("utf-8", "surrogatepass")


# An agent sends its whole conversation again with every step: most texts have been seen before.
_remembered = lru_cache(maxsize=512)(_redacted)


def redact(value: Any, _depth: int = 0) -> Any:
    """A copy of `value` (JSON types, any nesting) in which no credential is left.

    Never raises and never changes `value`. Pure; any thread.
    """
    if isinstance(value, str):
        return redact_text(value)
    if not isinstance(value, (dict, list, tuple)):
        return value
    if _depth >= MAX_DEPTH:
        return MARKER
    if isinstance(value, dict):
        return _redact_mapping(value, _depth)
    return _redact_list(value, _depth)


def _redact_mapping(value: dict[Any, Any], depth: int) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    for key, item in value.items():
        if isinstance(key, str):
            if len(key) >= _SHORTEST_SHAPE or "=" in key:
                key = redact_text(key)
            if names_credential(key):
                kept[key] = MARKER
                continue
        kept[key] = redact(item, depth + 1)
    # {"name": "Authorization", "value": "…"}: headers and variables, as HAR files and Kubernetes
    # write them.
    name = value.get("name", value.get("key"))
    if "value" in kept and isinstance(name, str) and names_credential(name):
        kept["value"] = MARKER
    return kept


def _redact_list(value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
    kept: list[Any] = []
    hide_next = False
    pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value)
    for item in value:
        if hide_next:
            kept.append(MARKER)
        elif pairs and isinstance(item[0], str) and names_credential(item[0]):
            kept.append([redact_text(item[0]), MARKER])  # [["Cookie", "…"], …]
        else:
            kept.append(redact(item, depth + 1))
        # ["--api-key", "…"]: a command line split into words.
        hide_next = isinstance(item, str) and item.startswith("--") and names_credential(item[2:])
    return kept


def redact_json(text: str) -> str:
    """`text`, a JSON document, without credentials and still JSON; unchanged if it has none.

    What is no JSON, like the torn last line of a file, is redacted as text.
    """
    try:
        value = orjson.loads(text)
        kept = redact(value)
        # Both rules: of a key that is there twice, only the last value was looked at.
        if kept == value and redact_text(text) == text:
            return text
        kept = redact(json.loads(text))  # orjson makes floats of integers above 64 bits.
    except (orjson.JSONDecodeError, RecursionError):
        return redact_text(text)
    body = text.strip()
    # As QitOS writes it: a manifest in many lines, an event in one.
    hidden = json.dumps(kept, ensure_ascii=False, indent=2 if "\n" in body else None)
    return text.replace(body, hidden)


def trim(text: str, max_bytes: int) -> str:
    """`text` if it has at most `max_bytes` of UTF-8, else its beginning and a marker with its size.

    The result stays within `max_bytes` as long as the marker itself does (40 bytes).
    """
    if len(text) * 4 <= max_bytes:
        return text
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= max_bytes:
        return text
    # A text that was cut before says how long it was in the first place.
    cut = text.rfind(CUT_HERE, -_MARKER_CHARS)
    marker = text[cut:] if cut >= 0 else f"… [trimmed, {len(data)} bytes in all]"
    room = max(0, max_bytes - len(marker.encode()))
    return data[:room].decode("utf-8", "ignore") + marker


_MARKER_CHARS = 60
_FIELDS = ("data", "metadata")


def trim_fields(record: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """A copy of `record` in which no input, output or other field is larger than `max_bytes`.

    A field that is too large keeps its form while cutting its longest texts is enough, so that a
    chat stays a chat; else it becomes the beginning of its JSON text. Call it when the whole
    record is larger than `max_bytes`; nothing can be too large before.
    """
    kept = dict(record)
    for name, value in record.items():
        if name in _FIELDS and isinstance(value, dict):
            kept[name] = {key: _fit(item, max_bytes) for key, item in value.items()}
        else:
            kept[name] = _fit(value, max_bytes)
    return kept


def _fit(value: Any, max_bytes: int) -> Any:
    if isinstance(value, str):
        return trim(note_large(value, max_bytes), max_bytes)
    if not isinstance(value, (dict, list)):
        return value
    size = len(orjson.dumps(value))
    if size <= max_bytes:
        return value
    each = max_bytes // 2
    while each >= 256:
        smaller = _trim_all(note_large(value, each), each)
        if len(orjson.dumps(smaller)) <= max_bytes:
            return smaller
        each //= 4
    return trim(orjson.dumps(value).decode(), max_bytes)


def _trim_all(value: Any, max_bytes: int) -> Any:
    if isinstance(value, str):
        return trim(value, max_bytes)
    if isinstance(value, dict):
        return {key: _trim_all(item, max_bytes) for key, item in value.items()}
    if isinstance(value, list):
        return [_trim_all(item, max_bytes) for item in value]
    return value
