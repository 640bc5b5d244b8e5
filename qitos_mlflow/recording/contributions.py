"""Asks the other plugins of the process what they add to a record. On the worker.

The extension point for those who want more in MLflow than we log: docs/extending.md.
"""

from __future__ import annotations

from typing import Any

import orjson

from qitos_mlflow import tracing
from qitos_mlflow._guard import report
from qitos_mlflow.mlflow_plugin.mapping.contributed import checked
from qitos_mlflow.recording.snapshot import encode

KINDS = frozenset({"trace_start", "span", "trace_end"})


def ask_plugins(record: dict[str, Any]) -> dict[str, Any]:
    """What the plugins attached to the global provider add to `record`, as plain JSON.

    Where two say the same name, the one asked later stays. What one says wrongly is left out as a
    whole, and logged under its name.
    """
    found: dict[str, Any] = {}
    if record["kind"] not in KINDS:
        return found
    for processor in tracing.processors():
        on_record = getattr(processor, "on_record", None)
        for who, said in on_record(record) if on_record is not None else ():
            try:
                for part, values in checked(said).items():
                    found.setdefault(part, {}).update(orjson.loads(encode(values)))
            except Exception as error:  # noqa: BLE001 - a plugin's; the record is kept without
                report(who, error)
    return found
