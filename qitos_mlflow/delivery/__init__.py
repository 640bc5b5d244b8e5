"""From bytes in memory to a server, through a spool on disk: in order, at least once.

Receives opaque records, hands them to a `Sink`. Imports neither qitos nor mlflow and never looks
inside a record. `Pipeline` is the agent's side; `deliver_segment` and `follow` deliver what other
processes left; docs/spool.md says what survives what.

    queue -> worker -> segment   what this process appends: `parts`, in lines of `codec`
    segment -> cursor            reads it in chunks, and acknowledges
    shipper                      the thread: *when* something is sent
    shipping                     one segment to one sink, *how*: read, prepare, send, acknowledge
    Shipment (sink)              one batch at the sink
    deliver                      the same for segments of other processes; adopter: its thread here
    pipeline                     all of it as one object; running: its threads while at work
    spool, locks, cap, aside, files: what is on disk. retry: when to try again. stats: counts
"""

from __future__ import annotations

from qitos_mlflow.delivery.leftovers import Outcome, deliver_segment, follow
from qitos_mlflow.delivery.pipeline import Pipeline, importing
from qitos_mlflow.delivery.sink import OutOfTime, RetryLater, Shipment, Sink
from qitos_mlflow.delivery.spool.counts import Counts, CountsSnapshot
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter
from qitos_mlflow.delivery.spool.paths import Paths
from qitos_mlflow.delivery.spool.segments import (
    SegmentInfo,
    find_segments,
    inspect_segment,
    purge,
    waiting_records,
)

__all__ = [
    "Counts",
    "CountsSnapshot",
    "DeadLetter",
    "OutOfTime",
    "Outcome",
    "Paths",
    "Pipeline",
    "RetryLater",
    "SegmentInfo",
    "Shipment",
    "Sink",
    "deliver_segment",
    "find_segments",
    "follow",
    "importing",
    "inspect_segment",
    "purge",
    "waiting_records",
]
