"""From bytes in memory to a server, through a spool on disk: in order, at least once.

Receives opaque records, hands them to a `Sink`. Imports neither qitos nor mlflow and never looks
inside a record. `Pipeline` is the agent's side; `deliver_segment` and `follow` deliver what other
processes left; docs/spool.md says what survives what.
"""

from __future__ import annotations

from qitos_mlflow.delivery.deliver import Outcome, deliver_segment, follow
from qitos_mlflow.delivery.files import Paths
from qitos_mlflow.delivery.pipeline import Pipeline
from qitos_mlflow.delivery.sink import DeadLetter, RetryLater, Shipment, Sink
from qitos_mlflow.delivery.spool import (
    SegmentInfo,
    find_segments,
    inspect_segment,
    purge,
    waiting_records,
)
from qitos_mlflow.delivery.stats import Snapshot, Stats

__all__ = [
    "DeadLetter",
    "Outcome",
    "Paths",
    "Pipeline",
    "RetryLater",
    "SegmentInfo",
    "Shipment",
    "Sink",
    "Snapshot",
    "Stats",
    "deliver_segment",
    "find_segments",
    "follow",
    "inspect_segment",
    "purge",
    "waiting_records",
]
