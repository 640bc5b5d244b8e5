"""What MLflow adds to a recording pipeline: header, sink, and which leftovers may be delivered."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

from qitos_mlflow.mlflow_plugin.destination import same_destination, segment_header
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.settings import Settings


class MlflowPipeline(RecordPipeline):
    """The pipeline of traces that are logged at `uri`; None is MLflow's local default.

    Raises:
        QitosMlflowError: the spool cannot name the place.
    """

    def __init__(self, uri: str | None, key: Hashable, settings: Settings) -> None:
        self._uri = uri
        super().__init__(segment_header(uri), key, settings)

    def open_sink(self) -> Any:
        """Open the sink for this process's records."""
        from qitos_mlflow.mlflow_plugin.sink.sink import open_sink

        return open_sink(self.header, tracking_uri=self._uri, announce=self._announce)

    def open_leftovers(self, header: bytes) -> Callable[[], Any] | None:
        """What opens the sink for a dead process's segment, if its destination is the same."""
        if not same_destination(self.header, header):
            return None
        from qitos_mlflow.mlflow_plugin.sink.sink import open_sink

        # With our URI, which may have the credentials that theirs has not on disk.
        return partial(open_sink, header, tracking_uri=self._uri, resumed=True)

    def _announce(self, trace_id: str, ref: RunRef) -> None:
        """Sending thread. The run of a trace exists."""
        trace = self.find(trace_id)
        if trace is not None:
            trace.run.created(ref)
