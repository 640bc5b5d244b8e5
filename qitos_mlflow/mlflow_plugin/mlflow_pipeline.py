"""What MLflow adds to a recording pipeline: header, sink, and which leftovers may be delivered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from qitos_mlflow.mlflow_plugin.destination import same_destination, segment_header
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.recording.pipelines import Destination, FindTrace


def mlflow_destination(uri: str | None) -> Destination:
    """Where traces go that are logged at `uri`; None is MLflow's local default.

    Raises:
        QitosMlflowError: the spool cannot name the place.
    """
    header = segment_header(uri)

    def open_sink(find: FindTrace) -> Any:
        from qitos_mlflow.mlflow_plugin.sink.sink import open_sink

        return open_sink(header, tracking_uri=uri, announce=partial(_announce, find))

    def open_leftovers(theirs: bytes) -> Callable[[], Any] | None:
        if not same_destination(header, theirs):
            return None
        from qitos_mlflow.mlflow_plugin.sink.sink import open_sink

        # With our URI, which may have the credentials that theirs has not on disk.
        return partial(open_sink, theirs, tracking_uri=uri, resumed=True)

    return Destination(header, open_sink, open_leftovers)


def _announce(find: FindTrace, trace_id: str, ref: RunRef) -> None:
    """Sending thread. The run of a trace exists."""
    trace: Any = find(trace_id)
    if trace is not None:
        trace.run.created(ref)
