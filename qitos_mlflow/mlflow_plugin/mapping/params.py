"""A run's params: what went into it, from the metadata of its trace and spans. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping.limits import PARAM_CHARS, clean_key, clean_text

MAX_PARAMS = 500
"""Params of one run; metadata beyond is counted as ``too_many_params``."""

MAX_NESTING = 8
"""Levels of nested metadata that become params."""

_NOT_PARAMS = frozenset(
    # How the run went: tags, metrics and status. A param is an input of the run.
    {"stop_reason", "final_result", "success", "status", "error", "qitos.closed", "qitos.killed"}
    # Ties to other traces.
    | {"linked_trace_id", "linked_span_id"}
)


def new_params(
    metadata: Mapping[str, Any], written: list[str], lost: Counter[str]
) -> list[tuple[str, str]]:
    """Scalars of `metadata` as params, nested ones by their path (``a.b``).

    MLflow refuses the whole batch that changes a param or names it twice, so the first value of a
    key is the one that stays.

    Args:
        metadata: any JSON values by name; None says nothing.
        written: keys that the run has; the new ones are added.
        lost: where to count.
    """
    found, too_many = [], 0
    for name, value in _flat(metadata, MAX_NESTING):
        key = clean_key(name)
        if name in _NOT_PARAMS or key in written:
            continue
        if len(written) >= MAX_PARAMS:
            too_many += 1
            continue
        written.append(key)
        found.append((key, clean_text(value, PARAM_CHARS, lost)))
    # Not a sum: a trace's metadata comes again, and more complete, when it ends.
    if too_many > lost["too_many_params"]:
        lost["too_many_params"] = too_many
    return found


def _flat(metadata: Mapping[str, Any], depth: int, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in metadata.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if depth > 1:
                yield from _flat(value, depth - 1, f"{name}.")
        elif isinstance(value, list):
            if value and all(isinstance(item, (str, int, float)) for item in value):
                yield name, ", ".join(map(str, value))
        elif isinstance(value, (str, int, float)):  # bool is an int; None says nothing
            yield name, str(value)
