"""What other plugins add to a record, in its field ``added``: read here. Pure.

``{"attributes": {name: JSON}, "metrics": {name: number}, "tags": {name: text}}``, as
`recording.normalize` has checked what the hook ``qitos_record`` returned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_key, clean_metric, clean_text, mapping


def attributes(record: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that plugins add to a span."""
    return {clean_key(name): value for name, value in _part(record, "attributes")}


def metrics(record: Mapping[str, Any], lost: Counter[str]) -> Iterator[tuple[str, float]]:
    """Metrics that plugins add to the run, at this record's step and time."""
    for name, value in _part(record, "metrics"):
        number = clean_metric(value, lost, booleans=True)
        if number is not None:
            yield clean_key(name), number


def tags(record: Mapping[str, Any], lost: Counter[str]) -> list[tuple[str, str]]:
    """Tags that plugins add to the run and its trace."""
    return [
        (clean_key(name), clean_text(value, limits.TAG_CHARS, lost))
        for name, value in _part(record, "tags")
        if value is not None
    ]


def _part(record: Mapping[str, Any], part: str) -> Iterator[tuple[str, Any]]:
    yield from mapping(mapping(record.get("added")).get(part)).items()
