"""An evaluation as one plugin logs it: its records, and what its children say of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any
from uuid import uuid4

from qitos_mlflow.mlflow_plugin.destination import pipeline_of, placed, run_settings
from qitos_mlflow.mlflow_plugin.fluent.surroundings import surroundings
from qitos_mlflow.mlflow_plugin.mapping.ids import digest
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.record import RunSettings
from qitos_mlflow.recording.to_json import encode

PLACES = ("experiment_name", "experiment_id")
"""What the settings of a run say of its experiment."""


class Logger:
    """An evaluation as one plugin logs it.

    Attributes:
        id: its name among the pipeline's traces; the pipeline does not rest before it has ended.
        plugin: logs it.
        pipeline: where its records go.
        uri: the place that they are for.
        settings: how its run is logged; by their item `evaluation` its children name it.
        own: fields of each of its own records.
        ended: its end is recorded.
    """

    def __init__(self, plugin: Any, of: Any) -> None:
        self.id = ""
        self.ended = not of.owner
        self.plugin = plugin
        to, self.pipeline = pipeline_of(plugin.recorder)
        self.uri = to.uri
        around = surroundings(to.uri, of.parent_run_id or plugin.settings.parent_run_id)
        settings: Any = placed(run_settings(plugin.settings), plugin.settings, around)
        reference = {"name": of.name, **of.place, "id": of.id}
        reference |= {k: settings[k] for k in PLACES if k in settings and k not in of.place}
        if around.parent_run_id:
            reference.setdefault("run_id", around.parent_run_id)
        for name in ("inherited_run_id", "experiment_of"):
            settings.pop(name, None)
        self.settings: RunSettings = settings | {"evaluation": reference, "log_traces": False}
        self.own = {"trace_id": f"evaluation {of.id}", "settings": self.settings}
        if of.owner:
            self.pipeline.add(self, f"evaluation {uuid4().hex}")

    @property
    def is_quiet(self) -> bool:
        """Whether nothing more is to come from it."""
        return self.ended

    def start(self, tags: Mapping[str, str], **fields: Any) -> None:
        """Record its start."""
        name = self.settings["evaluation"]["name"]
        self.settings["tags"] = {**self.settings.get("tags", {}), **tags}
        self.settings["run_name"] = name
        self.record(kind="evaluation_start", name=name, **self.own, **fields)

    def end(self, status: str) -> None:
        """Record its end, once."""
        if not self.ended:
            self.ended = True
            self.record(kind="evaluation_end", status=status, **self.own)

    def end_early(self, status: str, why: str) -> None:
        """Record the end if the process ends before the evaluation does."""
        self.end(status)

    def record(self, **fields: Any) -> None:
        """Hand over a record. Never waits."""
        process_exit.register()  # A forked process may record nothing else.
        self.pipeline.offer(encode({"time_ns": time.time_ns(), **fields}), keep=True, urgent=True)


def dataset_of(
    given: Any, benchmark: str | None, split: str | None, tasks: Any
) -> dict[str, str] | None:
    """An evaluation's dataset as MLflow keeps it; None if nothing is known of any."""
    if given is None and benchmark is None:
        return None
    if isinstance(given, str):
        given = {"name": given}
    elif given is None:
        given = {"name": f"{benchmark}:{split}" if split else benchmark}

    def of(name: str) -> Any:
        return given.get(name) if isinstance(given, Mapping) else getattr(given, name, None)

    name, source = of("name"), of("source")
    if not name:
        raise ValueError(f"dataset={given!r:.100} cannot be used: give it a name")
    listed = tasks if isinstance(tasks, (list, tuple)) else ()
    ids = [str(getattr(task, "id", task)) for task in listed]
    own = digest("dataset", str(name), str(split), *sorted(ids), size=4).hex()
    as_json, kind = (getattr(source, one, None) for one in ("to_json", "_get_source_type"))
    text = as_json() if callable(as_json) else json.dumps({"source": str(source or "")})
    return {
        "name": str(name),
        "digest": str(of("digest") or own)[:36],
        "source_type": str(kind() if callable(kind) else "code"),
        "source": str(text),
    }
