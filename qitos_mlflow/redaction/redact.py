"""Takes credentials out: a decoded record goes in, a copy without them comes out. Pure.

`normalize` calls it on the spooling thread, before disk and network, for the whole record:
metadata, tags, inputs, outputs, errors, URLs. (`tracing.redaction` is something else: what QitOS's
mode `ENABLED_WITHOUT_DATA` leaves out.) Two rules, both always on:

* A value under a key that names a credential (`names`) is replaced, whatever it is.
* In a text, every part is replaced that has a credential's shape (an ``sk-…`` key, a JWT, a private
  key block, ``user:password@`` in a URL) or follows a credential's name (``API_KEY=…``,
  ``"password": "…"``, ``Authorization: …``, ``--token …``): `credentials`.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.redaction import structures
from qitos_mlflow.redaction.credentials import find_credentials
from qitos_mlflow.redaction.literals import is_placeholder
from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.trim import cut_point
from qitos_mlflow.redaction.values import Found

MARKER = "[redacted]"

DEEPEST_LEVEL = 256
"""Deeper levels become `MARKER`. A record has at most 254, because orjson writes no more."""

_NO_TEXT = frozenset({int, float, bool, type(None)})

_SHORTEST = 8
"""Shorter texts have no room for a name and a value, or for a shape (characters)."""

_REMEMBERED_CHARS = 4096
"""Longer texts are not remembered, so that the cache takes a few MB, at most 16 (characters)."""

_SHORTEST_SHAPE = 16
"""Shorter keys of a mapping hold no credential, unless they have a ``=`` (characters)."""


_USER_INFO = re.compile(
    # Up to the "@" before the host. A password may hold a slash, because SQLAlchemy takes it as it
    # is; so the match goes beyond a slash if the text after the colon cannot be a port.
    r"\A(?P<scheme>[^:/?#]+:?//)(?:[^/?#]*@|[^@:/?#]*:(?!\d+(?:[/?#]|$))[^@]*@)"
    # Without the two slashes the URI is not valid, but it has a password all the same.
    r"|\A(?!file:)[\w.+-]{2,}:/?[^@/\\]+@"
)
_ON_DISK = re.compile(r"(?s)(?:sqlite(?:\+\w+)?|file):[^?]*|(?:[/\\]|[A-Za-z]:[/\\]).*")
"""A path on this machine, up to the query if it is in a URI."""


def redact_text(text: str) -> str:
    """`text` with `MARKER` in the place of each credential; the same object if there is none."""
    if len(text) < _SHORTEST:
        return text
    return _remembered(text) if len(text) <= _REMEMBERED_CHARS else _redacted(text)


def _redacted(text: str) -> str:
    if (cut_at := cut_point(text)) is not None:
        return _redacted_and_cut(text, *cut_at)
    data = text.encode("utf-8", "surrogatepass")
    spans = find_credentials(data)
    return _without(data, spans, len(data)) if spans else text


def _redacted_and_cut(text: str, length: int, margin_end: int, note: str) -> str:
    """The first `length` characters, after the search has seen those in the margin, too."""
    data = text[:margin_end].encode("utf-8", "surrogatepass")
    size = len(text[: min(length, margin_end)].encode("utf-8", "surrogatepass"))
    return _without(data, find_credentials(data), size) + note


def _without(data: bytes, spans: list[Found], size: int) -> str:
    """The first `size` bytes of `data` with the marker in the place of each span."""
    parts: list[bytes] = []
    kept = 0
    for start, end, quote in spans:
        if start >= size:
            break
        if start >= kept:
            parts += (data[kept:start], quote, MARKER.encode(), quote)
        kept = max(kept, end)
    parts.append(data[kept:size])
    return b"".join(parts).decode("utf-8", "surrogatepass")


# An agent sends its whole conversation again with every step, so most texts come many times.
_remembered = lru_cache(maxsize=512)(_redacted)


def redact(value: Any, _depth: int = 0) -> Any:
    """A copy of `value` (JSON types, any nesting) without the credentials in it. Never raises."""
    if isinstance(value, str):
        return redact_text(value)
    if not isinstance(value, (dict, list, tuple)):
        return value
    if _depth >= DEEPEST_LEVEL:
        return MARKER
    if isinstance(value, dict):
        return _redact_mapping(value, _depth)
    return _redact_list(value, _depth)


def _redact_mapping(value: dict[Any, Any], depth: int) -> dict[Any, Any]:
    kept: dict[Any, Any] = {}
    hidden = structures.hidden_fields(value)
    for key, item in value.items():
        if isinstance(key, str):
            if len(key) >= _SHORTEST_SHAPE or "=" in key:
                key = redact_text(key)
            if key in hidden or (names_credential(key) and not structures.is_schema(item)):
                kept[key] = _hidden(item)
                continue
        kept[key] = item if type(item) in _NO_TEXT else redact(item, depth + 1)
    if (rows := structures.rows(value)) is not None:
        name, columns = rows
        kept[name] = _redact_columns(kept[name], columns)
    return kept


def _hidden(item: Any) -> Any:
    """The marker, or `item` if it is empty or says where the credential is, as ``${API_KEY}``."""
    if isinstance(item, (dict, list)) and not item:
        return item
    if isinstance(item, str) and item and is_placeholder(item.encode("utf-8", "surrogatepass")):
        return item
    return MARKER


def _redact_columns(rows: list[Any], columns: frozenset[int]) -> list[Any]:
    return [
        [MARKER if index in columns else cell for index, cell in enumerate(row)]
        if isinstance(row, list)
        else row
        for row in rows
    ]


def _redact_list(value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
    kept: list[Any] = []
    hide_next = in_key = False
    pairs = all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value)
    for item in value:
        if hide_next:
            kept.append(_hidden(item))
        elif in_key:
            kept.append(structures.map_texts(item, lambda text: MARKER))
        elif pairs and isinstance(item[0], str) and names_credential(item[0]):
            kept.append([redact_text(item[0]), _hidden(item[1])])  # [["Cookie", "…"], …]
        else:
            kept.append(redact(item, depth + 1))
        # ["--api-key", "…"]: a command line split into words.
        hide_next = isinstance(item, str) and item.startswith("--") and names_credential(item[2:])
        in_key = structures.is_in_key(item, in_key)
    if (columns := structures.head_columns(value)) is not None:
        return kept[:1] + _redact_columns(kept[1:], columns)
    return structures.redact_command(kept, redact_text)


def redact_json(text: str) -> str:
    """`text`, a JSON document, without credentials and still JSON; unchanged if it has none.

    If it is not JSON, such as the torn last line of a file, it is redacted as text.
    """
    try:
        value = _json.loads(text)
        kept = redact(value)
        # The text too: if a key is there twice, `value` has only its last value.
        if kept == value and redact_text(text) == text:
            return text
        kept = redact(json.loads(text))  # orjson makes floats of integers above 64 bits.
    except (_json.JSONDecodeError, RecursionError):
        return redact_text(text)
    body = text.strip()
    # QitOS writes a manifest in many lines, and an event in one.
    hidden = json.dumps(kept, ensure_ascii=False, indent=2 if "\n" in body else None)
    return text.replace(body, hidden)


def without_credentials(uri: str) -> str:
    """`uri`, of a server or store, without user and password, and without secrets in its query.

    Fit for disk and screen. Takes any text, also one that is no valid URI. A path on this machine
    stays as it is: it says where the data is, whatever it is called (``token=1/mlflow.db``).
    """
    known = _USER_INFO.sub(lambda found: found["scheme"] or "", uri)
    path = _ON_DISK.match(known)
    end = path.end() if path else 0
    query = _QUERY.sub(_without_value, known[end:])
    return _PROFILE.sub(rf"\1{MARKER}", known[:end] + redact_text(query))


_QUERY = re.compile(r"([?&;#])([\w.-]+)=([^&;#]+)")
"""Name and value in a query: a value may be too short for `redact_text`."""
_PROFILE = re.compile(r"(?s)\A(databricks(?:-uc)?://[^:/?#]*:).+")
"""MLflow takes a profile's secrets in a URI (``databricks://scope:prefix``)."""
_OF_QUERIES = frozenset({"pw", "key", "sig", "signature", "sas", "x-amz-signature"})


def _without_value(found: re.Match[str]) -> str:
    mark, name, value = found.groups()
    secret = name.lower() in _OF_QUERIES or names_credential(name)
    return f"{mark}{name}={MARKER if secret else value}"
