"""Records to MLflow: folds each trace's records and says which calls they come to.

Receives redacted records from the shipper, in order, and hands back shipments of calls on a
`Transport`. `prepare` is pure but for the sink's own state, which rides in the spool's
acknowledgement; so a record seen again after a crash comes to the same calls again, and those
replace or coincide on the server.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import orjson

from qitos_mlflow._guard import report
from qitos_mlflow.delivery import DeadLetter
from qitos_mlflow.mlflow_plugin import limits
from qitos_mlflow.mlflow_plugin.cost import trace_cost
from qitos_mlflow.mlflow_plugin.destination import absolute, is_http, without_credentials
from qitos_mlflow.mlflow_plugin.ids import otel_trace_id
from qitos_mlflow.mlflow_plugin.metrics import RunState
from qitos_mlflow.mlflow_plugin.otlp import distinct
from qitos_mlflow.mlflow_plugin.shipment import Call, MlflowShipment, batches
from qitos_mlflow.mlflow_plugin.spans import TraceFold
from qitos_mlflow.mlflow_plugin.traceinfo import locate
from qitos_mlflow.mlflow_plugin.tracestate import TraceState
from qitos_mlflow.mlflow_plugin.transport import Poisoned, Refused, RunRef, Transport, delete_others

_log = logging.getLogger("qitos_mlflow")

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
        self._process = {key: settings.get(key) for key in ("user", "source")}
        self._experiment_id: str | None = None
        self._log_traces = bool(settings.get("log_traces", True))
        self._tells_cost = True

    # -- delivery.Sink -----------------------------------------------------------------------

    def restore(self, state: bytes) -> None:
        """Go back to what `state` returned."""
        self._resumed = True
        try:
            traces = [TraceState.from_json(plain) for plain in orjson.loads(state)["traces"]]
        except (KeyError, TypeError, ValueError) as error:
            # Another version's: the runs are found again by their tags, totals begin anew.
            report("sink.restore", error)
            traces = []
        self._traces = {trace.trace_id: trace for trace in traces}

    def prepare(self, records: Sequence[bytes]) -> MlflowShipment:
        """Fold `records` and list the calls they come to. No network."""
        dead: list[DeadLetter] = []
        touched: dict[str, TraceState] = {}
        for data in records:
            try:
                record = orjson.loads(data)
                trace = self._trace_of(record)
                if record["kind"] == "trace_start":
                    record.update(self._process)
                if trace.refused is not None:
                    dead.append(DeadLetter(data, trace.refused))
                    continue
                trace.take(record, data)
                touched[trace.trace_id] = trace
            except Exception as error:  # noqa: BLE001 - one bad record loses only itself
                dead.append(DeadLetter(data, f"not a record: {type(error).__name__}: {error}"))
        return self._shipment(touched, dead)

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> MlflowShipment | None:
        """End as KILLED the traces whose process died, or has closed without their end."""
        if closed and not self._settings.get("auto_end_run", True):
            return None  # Their user ends them.
        open_traces = {key: trace for key, trace in self._traces.items() if not trace.ended}
        for trace in open_traces.values():
            trace.kill(last_time_ns, "its end was lost" if closed else "the process died")
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
            tree = None
            if self._log_traces:
                tags = self._settings.get("tags") or {}
                tree = TraceFold.after_end(trace_id) if late else TraceFold(constant_tags=tags)
            trace = TraceState(trace_id, totals, tree, maybe_created=self._resumed or late)
            self._traces[trace_id] = trace
        return trace

    def _shipment(self, touched: dict[str, TraceState], dead: list[DeadLetter]) -> MlflowShipment:
        traces = list(touched.values())
        # First, because an agent may be waiting for its run.
        calls = [self._create_call(trace) for trace in traces if trace.run is None]
        calls += [call for trace in traces for call in self._run_calls(trace)]
        calls += self._tree_calls(traces)
        # Last, so that a run that has ended is complete, and knows what was refused of it.
        calls += [
            Call(partial(self._end_run, trace), ["end"], partial(_letter, trace), trace)
            for trace in traces
            if trace.ended
        ]
        for trace in traces:
            if trace.ended or not trace.started:
                del self._traces[trace.trace_id]
            trace.sent()
        return MlflowShipment(calls, dead)

    def _create_call(self, trace: TraceState) -> Call:
        # Each key once: a server refuses the run otherwise.
        create = partial(self._create_run, trace, list(dict(trace.tags).items()))
        refused = partial(setattr, trace, "refused")
        return Call(create, trace.records, bytes, trace, essential=refused)

    def _run_calls(self, trace: TraceState) -> Iterator[Call]:
        letter = partial(_letter, trace)
        for chunk in batches(trace.metrics, trace.params, trace.tags):
            yield Call(partial(self._log, trace), chunk, letter, trace)
        for artifact in trace.artifacts:
            yield Call(partial(self._write_artifact, trace), [artifact], letter, trace)

    def _tree_calls(self, traces: Sequence[TraceState]) -> Iterator[Call]:
        """Spans first, then what is known of their traces (MLFLOW.md 5b)."""
        spans = distinct(span for trace in traces for span in trace.spans)
        if spans:
            of_id = {otel_trace_id(trace.trace_id): trace for trace in traces}
            yield Call(partial(self._write_spans, of_id), spans, partial(_span_letter, of_id))
        for trace in traces:
            if trace.tree is not None and trace.tree_changed:
                write = partial(self._write_tree, trace)
                yield Call(write, [trace.tree.info()], partial(_letter, trace), trace)

    # -- calls -------------------------------------------------------------------------------

    def _create_run(
        self, trace: TraceState, tags: list[tuple[str, str]], _items: Any, timeout_s: float
    ) -> None:
        experiment_id = self._experiment(timeout_s)
        if trace.run is None and trace.maybe_created:
            found = self._transport.find_runs(experiment_id, trace.trace_id, timeout_s)
            trace.run = found[0] if found else None
        if trace.run is None:
            if not trace.started:
                raise Refused("NO_RUN", "the trace it belongs to has no run on this server")
            trace.maybe_created = True
            trace.creations += 1
            run_name = self._settings.get("run_name") or trace.name
            trace.run = self._transport.create_run(
                experiment_id,
                trace.start_ms,
                limits.clean_text(run_name, limits.RUN_NAME_CHARS),
                [("mlflow.source.type", "LOCAL"), *tags][: limits.BATCH_TAGS],
                timeout_s,
            )
        if self._announce is not None:
            self._announce(trace.trace_id, trace.run)

    def _experiment(self, timeout_s: float) -> str:
        if self._experiment_id is None:
            name = limits.clean_text(self._settings["experiment_name"], limits.EXPERIMENT_CHARS)
            self._experiment_id = self._transport.experiment_id(name, timeout_s)
        return self._experiment_id

    def _log(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        metrics = [item for kind, item in items if kind == "metric"]
        params = [item for kind, item in items if kind == "param"]
        tags = [item for kind, item in items if kind == "tag"]
        self._transport.log_batch(_run_of(trace).run_id, metrics, params, tags, timeout_s)

    def _write_spans(
        self, traces: dict[bytes, TraceState], spans: Sequence[Any], timeout_s: float
    ) -> None:
        # Those of a refused run are dead letters already.
        spans = [span for span in spans if traces[span.trace_id].refused is None]
        if spans and self._log_traces:
            with self._without_traces():
                self._transport.write_spans(self._experiment(timeout_s), spans, timeout_s)

    def _write_tree(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        if not self._log_traces:
            return
        run_id = None if trace.run is None else trace.run.run_id
        experiment_id = self._experiment(timeout_s)
        info = locate(items[0], experiment_id, run_id)
        if trace.told:
            info["trace_metadata"] |= self._cost(trace.tree, experiment_id, timeout_s)
        try:
            with self._without_traces():
                self._transport.write_trace(info, timeout_s)
                if not trace.told:  # Only now the server can tell which spans are the trace's.
                    trace.told = True
                    if cost := self._cost(trace.tree, experiment_id, timeout_s):
                        info["trace_metadata"] |= cost
                        self._transport.write_trace(info, timeout_s)
        except (Refused, Poisoned):
            # While a trace goes another one follows. Servers before 3.12 refuse an info that lacks
            # what they know, such as tokens of MLflow's own spans.
            if trace.ended:
                raise

    def _cost(self, tree: TraceFold | None, experiment_id: str, timeout_s: float) -> dict[str, str]:
        """The metadata that says what a trace cost; empty where nobody knows."""
        if tree is None or not self._tells_cost:
            return {}
        try:
            cost = trace_cost(self._transport, experiment_id, tree, timeout_s)
        except (Refused, Poisoned) as refusal:
            self._tells_cost = False
            _log.warning(
                "%s does not tell what model calls cost, so traces have no cost: %.200s",
                without_credentials(self._transport.uri),
                refusal,
            )
            return {}
        return {"mlflow.trace.cost": orjson.dumps(cost).decode()} if cost else {}

    @contextlib.contextmanager
    def _without_traces(self) -> Iterator[None]:
        """Go on with runs alone where a server is too old, or a store too simple, for traces."""
        try:
            yield
        except Refused as refusal:
            if refusal.code not in NO_TRACES:
                raise
            self._log_traces = False
            _log.warning(
                "%s cannot store traces (%s): runs are logged, span trees are not",
                without_credentials(self._transport.uri),
                refusal.code,
            )

    def _write_artifact(self, trace: TraceState, items: Sequence[Any], timeout_s: float) -> None:
        for path, content in items:
            self._transport.write_artifact(_run_of(trace), path, content, timeout_s)

    def _end_run(self, trace: TraceState, _items: Any, timeout_s: float) -> None:
        if ledger := trace.refused_ledger():
            self._transport.log_batch(_run_of(trace).run_id, [], [], ledger, timeout_s)
        if trace.creations > 1:
            delete_others(self._transport, _run_of(trace), trace.trace_id, timeout_s)
        if not self._settings.get("auto_end_run", True) and trace.status != "KILLED":
            return
        status = trace.status or "FINISHED"
        self._transport.end_run(_run_of(trace).run_id, status, trace.end_ms, timeout_s)


NO_TRACES = frozenset({"HTTP 404", "HTTP 405", "HTTP 501", "NOT_IMPLEMENTED"})
"""What a server without MLflow's trace endpoints answers to them."""


def _run_of(trace: TraceState) -> RunRef:
    if trace.run is None:
        raise Refused("NO_RUN", trace.refused or "its run was not created")
    return trace.run


def _letter(trace: TraceState, item: Any) -> bytes:
    """The dead letter of one item: enough to log it by hand."""
    run_id = None if trace.run is None else trace.run.run_id
    return orjson.dumps(
        {"trace_id": trace.trace_id, "run_id": run_id, "item": item}, default=_plain
    )


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else vars(value)


def _span_letter(traces: dict[bytes, TraceState], span: Any) -> bytes:
    from google.protobuf.json_format import MessageToDict

    traces[span.trace_id].refused_spans += 1
    return orjson.dumps({"span": MessageToDict(span)})
