"""Credentials that the structure of a value shows: two fields, columns, lines of a key. Pure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from qitos_mlflow.redaction.names import names_credential
from qitos_mlflow.redaction.patterns import lazily

_NAME_FIELDS = ("name", "key", "header", "field", "variable", "parameterkey", "outputkey", "id")
_VALUE_FIELDS = frozenset(
    {"value", "val", "parametervalue", "outputvalue", "Value", "Val", "ParameterValue"}
    | {"OutputValue", "VALUE"}
)
_OTHER_VALUE_FIELDS = frozenset({"content", "data", "text"})
"""Beside a `header` or a `field` only: a message of a chat has these, too."""
_NO_FIELDS: frozenset[str] = frozenset()
_SCHEMA_FIELDS = frozenset({"$ref", "anyOf", "oneOf", "allOf"})
_SCHEMA_TYPES = frozenset({"string", "object", "array", "number", "integer", "boolean", "null"})
_KEY_BEGINS = lazily(r"(?s)-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----(?!.*-----END )")
_OPTION = lazily(r"-[A-Za-z-]")
_MOST_WORDS = 64
_INNER_SPACE = "\x1f"


def hidden_fields(value: dict[Any, Any]) -> frozenset[str]:
    """The fields of `value` that hold the value of a credential which another field names.

    ``{"name": "Authorization", "value": "…"}``: HAR files and Kubernetes write headers and
    variables in this form. ``{"op": "add", "path": "/token", "value": "…"}`` is a JSON patch.
    """
    present = _VALUE_FIELDS.intersection(value)
    if not present and not ("header" in value or "field" in value):
        return _NO_FIELDS
    for field, name in value.items():
        if not isinstance(name, str) or not isinstance(field, str):
            continue
        low = field.lower()
        if low == "path" and "op" in value:
            name = name.rpartition("/")[2]
        elif low not in _NAME_FIELDS:
            continue
        if names_credential(name):
            others = _OTHER_VALUE_FIELDS if low in ("header", "field") else _NO_FIELDS
            return present | others
    return _NO_FIELDS


def is_schema(item: Any) -> bool:
    """Whether `item` is JSON Schema: it says what a credential looks like, and holds none."""
    if not isinstance(item, dict):
        return False
    kind = item.get("type")
    return (isinstance(kind, str) and kind in _SCHEMA_TYPES) or not _SCHEMA_FIELDS.isdisjoint(item)


def rows(value: dict[Any, Any]) -> tuple[str, frozenset[int]] | None:
    """The field with the rows of a table, and its columns with credentials, if there are any."""
    columns = value.get("columns")
    if not isinstance(columns, list):
        return None
    for name in ("rows", "data", "values"):
        if isinstance(value.get(name), list):
            found = _columns(columns)
            return (name, found) if found else None
    return None


def _columns(names: Sequence[Any]) -> frozenset[int]:
    texts = [name.get("name") if isinstance(name, dict) else name for name in names]
    hidden = (isinstance(text, str) and names_credential(text) for text in texts)
    return frozenset(index for index, is_hidden in enumerate(hidden) if is_hidden)


def head_columns(value: Sequence[Any]) -> frozenset[int] | None:
    """The columns with credentials of a list of rows whose first row is the head."""
    if len(value) < 2 or not isinstance(value[0], (list, tuple)) or len(value[0]) < 2:
        return None
    head = value[0]
    if not all(isinstance(row, (list, tuple)) and len(row) == len(head) for row in value):
        return None
    if not all(isinstance(name, str) for name in head):
        return None
    found = _columns(head)
    return None if len(head) == 2 and 0 in found else found or None  # [["Cookie", "…"], …]


def is_in_key(item: Any, before: bool) -> bool:
    """Whether the lines of a private key go on behind `item`, a line or an object with one."""
    if before:
        return not any("-----END " in text for text in _texts(item))
    return any("-----BEGIN " in text and _KEY_BEGINS.search(text) for text in _texts(item))


def _texts(item: Any) -> list[str]:
    if isinstance(item, str):
        return [item]
    values = item.values() if isinstance(item, dict) else ()
    return [value for value in values if isinstance(value, str)]


def map_texts(item: Any, change: Callable[[str], str]) -> Any:
    """`item` with each text changed that it is or has."""
    if isinstance(item, str):
        return change(item)
    if isinstance(item, dict):
        return {key: change(one) if isinstance(one, str) else one for key, one in item.items()}
    return item


def redact_command(words: list[Any], redact_text: Callable[[str], str]) -> list[Any]:
    """A command line that is split into words, without the credentials that its options show."""
    if not 2 <= len(words) <= _MOST_WORDS or not all(isinstance(word, str) for word in words):
        return words
    if not any(_OPTION.match(word) for word in words) or any("\n" in word for word in words):
        return words
    line = redact_text(" ".join(word.replace(" ", _INNER_SPACE) for word in words))
    kept = [word.replace(_INNER_SPACE, " ") for word in line.split(" ")]
    return kept if len(kept) == len(words) else words
