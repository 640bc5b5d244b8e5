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
    spool/            everything on disk
"""

from __future__ import annotations

from qitos_mlflow._forks import importing as importing
from qitos_mlflow._forks import let_forks_happen as let_forks_happen
from qitos_mlflow.delivery.leftovers import Delivery as Delivery
from qitos_mlflow.delivery.leftovers import Outcome as Outcome
from qitos_mlflow.delivery.leftovers import follow as follow
from qitos_mlflow.delivery.leftovers import take as take
from qitos_mlflow.delivery.pipeline import Pipeline as Pipeline
from qitos_mlflow.delivery.pipeline import living as living
from qitos_mlflow.delivery.sink import Hopeless as Hopeless
from qitos_mlflow.delivery.sink import OutOfTime as OutOfTime
from qitos_mlflow.delivery.sink import RetryLater as RetryLater
from qitos_mlflow.delivery.sink import Sink as Sink
from qitos_mlflow.delivery.spool.counts import NO_MEMORY as NO_MEMORY
from qitos_mlflow.delivery.spool.counts import Counts as Counts
from qitos_mlflow.delivery.spool.dead_letters import DeadLetter as DeadLetter
from qitos_mlflow.delivery.spool.files import Untrusted as Untrusted
from qitos_mlflow.delivery.spool.files import check_directory as check_directory
from qitos_mlflow.delivery.spool.files import json_object as json_object
from qitos_mlflow.delivery.spool.files import open_regular as open_regular
from qitos_mlflow.delivery.spool.files import trust as trust
from qitos_mlflow.delivery.spool.paths import Paths as Paths
from qitos_mlflow.delivery.spool.paths import find_segments as find_segments
from qitos_mlflow.delivery.spool.segments import SegmentInfo as SegmentInfo
from qitos_mlflow.delivery.spool.segments import inspect_segment as inspect_segment
from qitos_mlflow.delivery.spool.segments import purge as purge
from qitos_mlflow.delivery.spool.segments import send_again as send_again
from qitos_mlflow.delivery.spool.segments import waiting_records as waiting_records
