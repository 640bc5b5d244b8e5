"""Records to MLflow: folds each trace's records and says which calls they come to.

Receives redacted records from the shipper, in order, and hands back shipments of calls on a
`Transport`. `prepare` is pure but for the sink's own state, which rides in the spool's
acknowledgement; so a record seen again after a crash comes to the same calls again, and those
replace or coincide on the server.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import orjson

from qitos_mlflow.delivery import DeadLetter
from qitos_mlflow.mlflow_plugin import limits
from qitos_mlflow.mlflow_plugin.destination import absolute, is_http
from qitos_mlflow.mlflow_plugin.metrics import Metric, RunState
from qitos_mlflow.mlflow_plugin.shipment import Call, MlflowShipment
from qitos_mlflow.mlflow_plugin.tracestate import TraceState
from qitos_mlflow.mlflow_plugin.transport import Refused, RunRef, Transport

Announce = Callable[[str, RunRef], None]


def open_sink(
    header: bytes,
    *,
    tracking_uri: str | None = None,
    announce: Announce | None = None,
    resumed: bool = False,
) -> MlflowSink:
    """The sink for a segment with this header. Connects to nothing yet; may import mlflow.

    Args:
        header: what `destination.segment_header` wrote.
        tracking_uri: deliver here instead of where the header says.
        announce: told each run as it is created; called on the shipper's thread.
        resumed: somebody else may have delivered part of the segment before.
    """
    settings: dict[str, Any] = orjson.loads(header)
    uri = tracking_uri or settings.get("tracking_uri")
    return MlflowSink(open_transport(uri, settings.get("cwd")), settings, announce, resumed=resumed)


def open_transport(uri: str | None, cwd: str | None = None) -> Transport:
    """The transport for `uri`; None means MLflow's default as of the directory `cwd`."""
    if is_http(uri):
        from qitos_mlflow.mlflow_plugin.rest import RestTransport, needs_mlflow

        assert uri is not None
        if needs_mlflow() is None:
            return RestTransport(uri)
        from qitos_mlflow.mlflow_plugin.store import mlflow_requester

        return RestTransport(uri, mlflow_requester(uri))
    from qitos_mlflow.mlflow_plugin.store import StoreTransport, default_tracking_uri

    return StoreTransport(absolute(uri, cwd or ".") if uri else default_tracking_uri(cwd))


class MlflowSink:
    """`delivery.Sink` for one destination. Used by one thread.

    Args:
        transport: carries the calls.
        settings: the segment's header.
        announce: told each run as it is created.
        resumed: a run may exist already for any trace; look before creating one.
    """

    def __init__(
        self,
        transport: Transport,
        settings: dict[str, Any],
        announce: Announce | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        self._transport = transport
        self._settings = settings
        self._announce = announce
        self._resumed = resumed
        self._traces: dict[str, TraceState] = {}
        self._experiments: dict[str, str] = {}

    # -- delivery.Sink -----------------------------------------------------------------------

    def restore(self, state: bytes) -> None:
        """Go back to what `state` returned."""
        traces = orjson.loads(state)["traces"] if state else []
        self._traces = {t.trace_id: t for t in map(TraceState.from_json, traces)}
        self._resumed = self._resumed or bool(state)

    def prepare(self, records: Sequence[bytes]) -> MlflowShipment:
        """Fold `records` and list the calls they come to. No network."""
        dead: list[DeadLetter] = []
        touched: dict[str, TraceState] = {}
        for data in records:
            try:
                record = orjson.loads(data)
                trace = self._trace_of(record)
                if trace.refused is not None:
                    dead.append(DeadLetter(data, trace.refused))
                    continue
                trace.take(record, data)
                touched[trace.trace_id] = trace
            except Exception as error:  # noqa: BLE001 - one bad record loses only itself
                dead.append(DeadLetter(data, f"not a record: {type(error).__name__}: {error}"))
        return self._shipment(touched, dead)

    def abandoned(self, last_time_ns: int) -> MlflowShipment | None:
        """End the traces whose process died as KILLED."""
        open_traces = {key: trace for key, trace in self._traces.items() if not trace.ended}
        for trace in open_traces.values():
            trace.kill(last_time_ns)
        return self._shipment(open_traces, []) if open_traces else None

    def state(self) -> bytes:
        """What later records depend on: runs, totals so far."""
        return orjson.dumps({"traces": [trace.to_json() for trace in self._traces.values()]})

    def close(self) -> None:
        """Free connections."""
        self._transport.close()

    # -- records to calls --------------------------------------------------------------------

    def _trace_of(self, record: dict[str, Any]) -> TraceState:
        trace_id = record["trace_id"]
        trace = self._traces.get(trace_id)
        if trace is None:
            totals = RunState(
                constant_tags=self._settings.get("tags") or {},
                constant_params={"qitos_mlflow_version": self._settings.get("plugin_version", "")},
            )
            # Without its start, a span is one that came after the trace had ended: look its run up.
            late = record["kind"] != "trace_start"
            trace = TraceState(trace_id, totals, maybe_created=self._resumed or late)
            self._traces[trace_id] = trace
        return trace

    def _shipment(self, touched: dict[str, TraceState], dead: list[DeadLetter]) -> MlflowShipment:
        calls: list[Call] = []
        for trace in touched.values():
            calls += self._calls(trace)
            if trace.ended or not trace.started:
                del self._traces[trace.trace_id]
            trace.sent()
        return MlflowShipment(calls, dead)

    def _calls(self, trace: TraceState) -> list[Call]:
        calls: list[Call] = []
        if trace.run is None:
            create = partial(self._create_run, trace, list(trace.tags))
            refused = partial(setattr, trace, "refused")
            calls.append(Call(create, trace.records, bytes, trace, essential=refused))
        for chunk in _chunks(trace.metrics, trace.params, trace.tags):
            calls.append(Call(partial(self._log, trace), chunk, partial(_letter, trace), trace))
        if trace.ended and self._settings.get("auto_end_run", True):
            calls.append(
                Call(partial(self._end_run, trace), ["end"], partial(_letter, trace), trace)
            )
        return calls

    # -- calls -------------------------------------------------------------------------------

    def _create_run(
        self, trace: TraceState, tags: list[tuple[str, str]], _items: Any, timeout_s: float
    ) -> None:
        if trace.run is None:
            name = limits.clean_text(self._settings["experiment_name"], limits.EXPERIMENT_CHARS)
            if name not in self._experiments:
                self._experiments[name] = self._transport.experiment_id(name, timeout_s)
            experiment_id = self._experiments[name]
            if trace.maybe_created:
                trace.run = self._transport.find_run(experiment_id, trace.trace_id, timeout_s)
        if trace.run is None:
            if not trace.started:
                raise Refused("NO_RUN", "the trace it belongs to has no run on this server")
            trace.maybe_created = True
            run_name = self._settings.get("run_name") or trace.name
            trace.run = self._transport.create_run(
                experiment_id,
                trace.start_ms,
                limits.clean_text(run_name, limits.RUN_NAME_CHARS),
                [*tags[: limits.BATCH_TAGS - len(_SOURCE)], *self._source_tags()],
                timeout_s,
            )
        if self._announce is not None:
            self._announce(trace.trace_id, trace.run)

    def _source_tags(self) -> list[tuple[str, str]]:
        settings = self._settings
        values = (settings.get("user"), settings.get("source"), "LOCAL")
        return [(key, str(value)) for key, value in zip(_SOURCE, values, strict=True) if value]

    def _log(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        metrics = [item for kind, item in items if kind == "metric"]
        params = [item for kind, item in items if kind == "param"]
        tags = [item for kind, item in items if kind == "tag"]
        self._transport.log_batch(_run_of(trace).run_id, metrics, params, tags, timeout_s)

    def _end_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        status = trace.status or "FINISHED"
        self._transport.end_run(_run_of(trace).run_id, status, trace.end_ms, timeout_s)


_SOURCE = ("mlflow.user", "mlflow.source.name", "mlflow.source.type")

Item = tuple[str, Any]
"""What a log_batch call carries: "metric", "param" or "tag", and the thing itself."""


def _run_of(trace: TraceState) -> RunRef:
    if trace.run is None:
        raise Refused("NO_RUN", trace.refused or "its run was not created")
    return trace.run


def _letter(trace: TraceState, item: Any) -> bytes:
    """The dead letter of one item: enough to log it by hand."""
    run_id = None if trace.run is None else trace.run.run_id
    return orjson.dumps({"trace_id": trace.trace_id, "run_id": run_id, "item": item}, default=vars)


def _chunks(
    metrics: list[Metric], params: list[tuple[str, str]], tags: list[tuple[str, str]]
) -> Iterator[list[Item]]:
    """Everything in batches within MLflow's limits; of tags set more than once the last stays."""
    left: dict[str, deque[Any]] = {
        "metric": deque(metrics),
        "param": deque(params),
        "tag": deque(dict(tags).items()),
    }
    while any(left.values()):
        chunk: list[Item] = []
        for kind, most in _MOST.items():
            queue = left[kind]
            room = min(most, limits.BATCH_TOTAL - len(chunk), len(queue))
            chunk += [(kind, queue.popleft()) for _ in range(room)]
        yield chunk


_MOST = {
    "param": limits.BATCH_PARAMS,
    "tag": limits.BATCH_TAGS,
    "metric": limits.BATCH_METRICS,
}
