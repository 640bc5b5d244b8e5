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

from qitos_mlflow.redaction.credentials import find_credentials, names_credential

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
