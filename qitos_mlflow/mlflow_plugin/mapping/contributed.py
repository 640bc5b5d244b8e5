"""What other plugins add to a record, in its field ``added``: checked and read here. Pure.

``{"attributes": {name: JSON}, "metrics": {name: number}, "tags": {name: text}}``, as the hook
``qitos_record`` returns it. Each name is one of its plugin's own: MLflow's and ours are refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_key, clean_metric, clean_text

PARTS = ("attributes", "metrics", "tags")
RESERVED = ("mlflow.", "qitos.")
"""Beginnings of names that mean something to MLflow or to us."""


def checked(said: Any) -> dict[str, dict[str, Any]]:
    """What a plugin said, its metrics in a form that JSON can hold.

    Raises:
        TypeError: it has not the form that the hook asks for; the text says what is wrong.
        ValueError: a name is not its to give.
    """
    if not isinstance(said, Mapping) or not all(isinstance(v, Mapping) for v in said.values()):
        raise TypeError(f"qitos_record returned {said!r:.200}, not a dict of dicts")
    if unknown := set(said) - set(PARTS):
        raise ValueError(f"qitos_record returned {sorted(map(str, unknown))}, not in {PARTS}")
    for part, values in said.items():
        for name in values:
            if not isinstance(name, str) or name.startswith(RESERVED):
                raise ValueError(f"{name!r} cannot be a name among the {part} of a plugin")
    found = {part: dict(values) for part, values in said.items()}
    for name, value in found.get("metrics", {}).items():
        if isinstance(value, float) and not math.isfinite(value):
            found["metrics"][name] = str(value)  # JSON has no NaN; as text it is counted.
    return found


def attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that plugins add to a span."""
    return {clean_key(name): value for name, value in _part(record, "attributes")}


def metrics(record: Mapping[str, Any], lost: Counter[str]) -> Iterator[tuple[str, float]]:
    """Metrics that plugins add to the run, at this record's step and time."""
    for name, value in _part(record, "metrics"):
        number = clean_metric(value, lost, booleans=True)
        if number is not None:
            yield clean_key(name), number


def tags(record: Mapping[str, Any], lost: Counter[str] | None = None) -> list[tuple[str, str]]:
    """Tags that plugins add to the run and its trace."""
    return [
        (clean_key(name), clean_text(value, limits.TAG_CHARS, lost))
        for name, value in _part(record, "tags")
        if value is not None
    ]


def _part(record: Mapping[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    added = record.get("added")
    values = added.get(part) if isinstance(added, Mapping) else None
    if isinstance(values, Mapping):
        yield from values.items()
