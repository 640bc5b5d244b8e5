"""Points of metrics and runs as plain values, for mapping, sink and server. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import unquote


@dataclass(frozen=True)
class Metric:
    """One point of a metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


@dataclass
class RunData:
    """Metrics, params and tags to be added to a run."""

    metrics: list[Metric] = field(default_factory=list)
    params: list[tuple[str, str]] = field(default_factory=list)
    tags: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class NewRun:
    """A run to be created; `start_ms` is milliseconds since the epoch."""

    experiment_id: str
    name: str
    start_ms: int
    tags: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class PromptRef:
    """A version of a prompt in MLflow's registry."""

    name: str
    version: str


@dataclass(frozen=True)
class RunRef:
    """A run on the server, with the fields that MLflow's own `ActiveRun` shows.

    `start_ms` is milliseconds since the epoch.
    """

    run_id: str
    experiment_id: str
    run_name: str
    artifact_uri: str
    start_ms: int


@dataclass(frozen=True)
class StoredRun:
    """A run with its latest metrics, its tags and its params as the server has them.

    `metric_times`: of each metric, in milliseconds since 1970.
    """

    ref: RunRef
    status: str
    end_ms: int | None
    metrics: Mapping[str, float]
    tags: Mapping[str, str]
    metric_times: Mapping[str, int] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)


def is_inside(path: object) -> bool:
    """Whether the name of a file stays below the directory that it is put into."""
    if not isinstance(path, str) or "\0" in path:
        return False
    parts = [part for form in (path, unquote(path)) for part in re.split(r"[/\\]", form)]
    return not {"", ".", ".."}.intersection(parts)
