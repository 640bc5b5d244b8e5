"""Points of metrics and runs as plain values, for mapping, sink and server. Pure."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Metric:
    """One point of a metric."""

    key: str
    value: float
    timestamp_ms: int
    step: int


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

    to_json = asdict
