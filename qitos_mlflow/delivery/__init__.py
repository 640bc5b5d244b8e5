"""From bytes in memory to a server, through a spool on disk: in order, at least once.

Receives opaque records, hands them to a `Sink`. Imports neither qitos nor mlflow and never looks
inside a record. `Pipeline` is the agent's side; `take` and `follow` deliver what other
processes left. docs/spool.md says what survives what.

    pipeline          all of it as one object
    byte_queue        memory between the agent's threads and the spooling thread
    spooling_thread   queue -> normalize -> segment; begins and ends the sending thread
    sending_thread    segment -> sink: *when* something is sent; backoff: when to try again
    segment_transfer  *how* one segment is sent: read, prepare, send, acknowledge
    leftovers         the same for segments of other processes, one or a whole directory
    sink              the interface of what knows the server
    fork              what a fork waits for
    spool/            everything on disk
"""

from __future__ import annotations

from qitos_mlflow.delivery.fork import importing
from qitos_mlflow.delivery.leftovers import Delivery, Outcome, follow, take
from qitos_mlflow.delivery.pipeline import Pipeline, living
from qitos_mlflow.delivery.sink import OutOfTime, RetryLater, Sink
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter
from qitos_mlflow.delivery.spool.paths import Paths, find_segments
from qitos_mlflow.delivery.spool.segments import (
    SegmentInfo,
    inspect_segment,
    purge,
    waiting_records,
)

__all__ = [
    "Counts",
    "DeadLetter",
    "Delivery",
    "OutOfTime",
    "Outcome",
    "Paths",
    "Pipeline",
    "RetryLater",
    "SegmentInfo",
    "Sink",
    "find_segments",
    "follow",
    "importing",
    "inspect_segment",
    "living",
    "purge",
    "take",
    "waiting_records",
]
