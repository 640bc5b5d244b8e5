"""What other plugins add to a record: asks them, checks what they return. On the spooling thread.

This is the extension point for values that the package does not log itself: docs/extending.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import orjson

from qitos_mlflow import tracing
from qitos_mlflow._guard import report
from qitos_mlflow.recording.to_json import encode

PARTS = ("attributes", "metrics", "tags")
RESERVED = ("mlflow.", "qitos.")
"""Names that begin so have a meaning for MLflow or for this package."""

KINDS = frozenset({"trace_start", "span", "trace_end"})
"""Kinds of records that plugins are asked about."""


def ask_plugins(record: dict[str, Any]) -> dict[str, Any]:
    """What the plugins attached to the global provider add to `record`, as plain JSON.

    If two plugins give the same name, the one that is asked last wins. A plugin that returns
    something wrong adds nothing to this record, and is named in the log.
    """
    found: dict[str, Any] = {}
    if record["kind"] not in KINDS:
        return found
    for processor in tracing.processors():
        on_record = getattr(processor, "on_record", None)
        for plugin, returned in on_record(record) if on_record is not None else ():
            try:
                for part, values in checked(returned).items():
                    found.setdefault(part, {}).update(orjson.loads(encode(values)))
            except Exception as error:  # noqa: BLE001 - a plugin's; the record is kept without
                report(plugin, error)
    return found


def checked(returned: Any) -> dict[str, dict[str, Any]]:
    """What a plugin returned, with its metrics in a form that JSON can hold.

    Raises:
        TypeError: it does not have the form that the hook asks for; the text says what is wrong.
        ValueError: a part is unknown, or a name is reserved.
    """
    if not isinstance(returned, Mapping) or not all(
        isinstance(values, Mapping) for values in returned.values()
    ):
        raise TypeError(f"qitos_record returned {returned!r:.200}, not a dict of dicts")
    if unknown := set(returned) - set(PARTS):
        raise ValueError(f"qitos_record returned {sorted(map(str, unknown))}, not in {PARTS}")
    found = {part: dict(values) for part, values in returned.items()}
    for part, values in found.items():
        for name in values:
            if not isinstance(name, str) or name.startswith(RESERVED):
                raise ValueError(f"{name!r} cannot be a name among the {part} of a plugin")
    for name, value in found.get("metrics", {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            found["metrics"][name] = str(value)  # JSON has no NaN; a text is counted as bad_value.
    return found
