"""One delivery pipeline for each destination that a plugin's traces go to.

Nothing is opened before the first trace. A destination is looked up when a trace starts, so
`mlflow.set_tracking_uri` in between is followed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from qitos_mlflow._guard import warn
from qitos_mlflow.delivery import Pipeline
from qitos_mlflow.mlflow_plugin.destination import same_destination, segment_header
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.recording import process_exit
from qitos_mlflow.recording.contributions import ask_plugins
from qitos_mlflow.recording.losses import LossLedger
from qitos_mlflow.recording.normalize import normalize
from qitos_mlflow.settings import Settings


class Pipelines:
    """The pipelines of one plugin, by tracking URI. Any thread.

    Args:
        settings: what was configured.
        announce: told each run as it is created, with its trace's id; on the shipper's thread.
        end_traces: called before the process ends: has the last records of open traces offered.
        may_rest: whether no trace is going, whose records may yet come.
    """

    def __init__(
        self,
        settings: Settings,
        announce: Callable[[str, RunRef], None],
        end_traces: Callable[[], None],
        may_rest: Callable[[], bool],
    ) -> None:
        self.settings = settings
        self._announce = announce
        self._end_traces = end_traces
        self._may_rest = may_rest
        self._losses_told = 0
        self._pipelines: dict[str | None, Pipeline] = {}
        self._inherited: dict[str, Pipeline] = {}
        # Reentrant: a signal handler may flush or shut down while this thread holds it.
        self._lock = threading.RLock()

    def to(self, uri: str | None) -> Pipeline:
        """The pipeline to `uri`, made when there is none yet; None is MLflow's local default."""
        with self._lock:
            process_exit.watch(self)
            if uri not in self._pipelines:
                self._pipelines.setdefault(uri, self._new(uri))
            return self._pipelines[uri]

    def all(self) -> list[Pipeline]:
        """The pipelines there are now."""
        with self._lock:
            return list(self._pipelines.values())

    def flush(self, timeout_s: float) -> bool:
        """Deliver all that was offered so far; True when it is on the server.

        False when `timeout_s` passes first, and, once for each loss, when something was lost,
        damaged or refused since the last time this was asked.
        """
        deadline = time.monotonic() + timeout_s
        pipelines = self.all()
        delivered = [pipeline.flush(deadline - time.monotonic()) for pipeline in pipelines]
        lost = sum(_losses(pipeline) for pipeline in pipelines)
        lost, self._losses_told = lost - self._losses_told, lost
        return all(delivered) and not lost

    def close(self, timeout_s: float) -> bool:
        """Flush and end; True when nothing is left. Any number of times."""
        deadline = time.monotonic() + timeout_s
        pipelines = self.all()
        for pipeline in pipelines:  # All of them first: the time for the disk runs at once.
            pipeline.refuse()
        closed = [pipeline.close(deadline - time.monotonic()) for pipeline in pipelines]
        if not all(closed):
            process_exit.keep(self)
        return all(closed)

    def begin_end(self) -> None:
        """The process is about to end: the last records of all are on their way. No waiting."""
        self._end_traces()
        for pipeline in self.all():
            pipeline.refuse()

    def after_fork(self, traces: Mapping[str, Pipeline]) -> None:
        """In a forked child: locks that another thread held are free again.

        Args:
            traces: the parent's traces, by id, and where they go.
        """
        self._lock = threading.RLock()
        self._losses_told = 0
        self._inherited.update(traces)

    def lose_if_inherited(self, trace_id: str) -> None:
        """Count a span that has begun here, if its trace is that of a parent process."""
        pipeline = self._inherited.get(trace_id)
        if pipeline is not None:
            pipeline.count_lost("forked")
            process_exit.watch(self)  # Its end brings the count to the disk.
            warn(
                "plugin.forked",
                "spans of a trace that began in the process this one was forked from are lost; "
                "begin a trace in this one",
            )

    def _new(self, uri: str | None) -> Pipeline:
        settings = self.settings
        header = segment_header(settings, uri)
        ledger = LossLedger(lambda payload: normalize(payload, settings.field_bytes, ask_plugins))

        def open_sink() -> Any:
            from qitos_mlflow.mlflow_plugin.sink.sink import open_sink

            return open_sink(header, tracking_uri=uri, announce=self._announce)

        def adopt(theirs: bytes) -> Callable[[], Any] | None:
            if not same_destination(header, theirs):
                return None
            from qitos_mlflow.mlflow_plugin.sink.sink import open_sink

            # With our URI, which may have the credentials that theirs has not on disk.
            return partial(open_sink, theirs, tracking_uri=uri, resumed=True)

        return Pipeline(
            header=header,
            normalize=ledger.refine,
            open_sink=None if settings.offline else open_sink,
            directory=settings.spool_dir,
            queue_bytes=settings.queue_bytes,
            spool_bytes=settings.spool_bytes,
            dropped=ledger.lost,
            open_leftovers=adopt,
            may_rest=self._may_rest,
        )


def _losses(pipeline: Pipeline) -> int:
    counts = pipeline.stats
    return counts.dead_letters + counts.bad_lines + sum(counts.dropped.values())
