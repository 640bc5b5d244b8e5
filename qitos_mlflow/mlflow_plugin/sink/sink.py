"""Records to MLflow: folds each trace's records and says which calls they come to.

Receives redacted records from the shipper, in order, and hands back shipments of calls on a
`Transport`. `prepare` is pure but for the sink's own state, which rides in the spool's
acknowledgement; so a record seen again after a crash comes to the same calls again, and those
replace or coincide on the server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import orjson

from qitos_mlflow._guard import report
from qitos_mlflow.delivery import DeadLetter
from qitos_mlflow.mlflow_plugin.mapping.ids import otel_trace_id
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import distinct
from qitos_mlflow.mlflow_plugin.mapping.run_totals import RunTotals
from qitos_mlflow.mlflow_plugin.mapping.span_tree import SpanTree
from qitos_mlflow.mlflow_plugin.server.open_transport import open_transport
from qitos_mlflow.mlflow_plugin.server.transport import Transport
from qitos_mlflow.mlflow_plugin.sink.call_list import Call, CallList, Group, batches
from qitos_mlflow.mlflow_plugin.sink.operations import Announce, Operations
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState
from qitos_mlflow.redaction.uris import without_credentials


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
        self._calls = Operations(transport, settings, announce)
        self._resumed = resumed
        self._traces: dict[str, TraceState] = {}
        self._refused: dict[str, str] = {}
        self._process = {key: settings.get(key) for key in ("user", "source")}

    # -- delivery.Sink -----------------------------------------------------------------------

    def restore(self, state: bytes) -> None:
        """Go back to what `state` returned; of another destination's, to what is true here too."""
        self._resumed = True
        self._traces, self._refused = {}, {}
        try:
            plain = orjson.loads(state)
            uri, refused = plain["uri"], dict(plain["refused"])
            traces = [TraceState.from_json(trace) for trace in plain["traces"]]
        except (KeyError, TypeError, ValueError) as error:
            # Another version's: the runs are found again by their tags, totals begin anew.
            report("sink.restore", error)
            return
        self._traces = {trace.trace_id: trace for trace in traces}
        if uri == self._uri:
            self._refused = refused
            return
        for trace in traces:
            trace.move(uri)

    def prepare(self, records: Sequence[bytes]) -> CallList:
        """Fold `records` and list the calls they come to. No network."""
        dead: list[DeadLetter] = []
        touched: dict[str, TraceState] = {}
        for data in records:
            try:
                record = orjson.loads(data)
                if (reason := self._refused.get(record["trace_id"])) is not None:
                    dead.append(DeadLetter(data, reason))
                    if record["kind"] == "trace_end":
                        del self._refused[record["trace_id"]]
                    continue
                trace = self._trace_of(record)
                if record["kind"] == "trace_start":
                    record.update(self._process)
                trace.take(record, data)
                touched[trace.trace_id] = trace
            except Exception as error:  # noqa: BLE001 - one bad record loses only itself
                dead.append(DeadLetter(data, f"not a record: {type(error).__name__}: {error}"))
        return self._shipment(touched, dead)

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> CallList | None:
        """End as KILLED the traces whose process died, or has closed without their end."""
        if closed and not self._settings.get("auto_end_run", True):
            return None  # Their user ends them.
        open_traces = {key: trace for key, trace in self._traces.items() if not trace.ended}
        for trace in open_traces.values():
            trace.kill(last_time_ns, "its end was lost" if closed else "the process died")
        return self._shipment(open_traces, []) if open_traces else None

    def state(self) -> bytes:
        """What later records depend on: runs, totals so far, and whose they are."""
        traces = [trace.to_json() for trace in self._traces.values()]
        return orjson.dumps({"uri": self._uri, "traces": traces, "refused": self._refused})

    def close(self) -> None:
        """Free connections."""
        self._transport.close()

    @property
    def _uri(self) -> str:
        return without_credentials(self._transport.uri)

    # -- records to calls --------------------------------------------------------------------

    def _trace_of(self, record: dict[str, Any]) -> TraceState:
        trace_id = record["trace_id"]
        trace = self._traces.get(trace_id)
        if trace is None:
            totals = RunTotals(
                constant_tags=self._settings.get("tags") or {},
                constant_params={"qitos_mlflow_version": self._settings.get("plugin_version", "")},
            )
            # Without its start, a span is one that came after the trace had ended: look its run up.
            # A trace whose start was lost has none: one is made of what is known at its end.
            late = record["kind"] != "trace_start"
            tree = None
            if self._calls.log_traces:
                tags = self._settings.get("tags") or {}
                tree = SpanTree.after_end(trace_id) if late else SpanTree(constant_tags=tags)
            trace = TraceState(trace_id, totals, tree, maybe_created=self._resumed or late)
            if late:
                trace.lose_start(self._process)
            self._traces[trace_id] = trace
        return trace

    def _shipment(self, touched: dict[str, TraceState], dead: list[DeadLetter]) -> CallList:
        traces = list(touched.values())
        groups = {trace.trace_id: self._group(trace) for trace in traces}
        # First, because an agent may be waiting for its run.
        calls = [
            self._call(self._calls.create_run, trace, groups, ["run"], essential=True)
            for trace in traces
            if trace.run is None
        ]
        for trace in traces:
            for chunk in batches(trace.metrics, trace.params, trace.tags):
                calls.append(self._call(self._calls.log, trace, groups, chunk))
            for artifact in trace.artifacts:
                calls.append(self._call(self._calls.write_artifact, trace, groups, [artifact]))
        calls += self._tree_calls(traces, groups)
        # Last, so that a run that has ended is complete, and knows what was refused of it.
        calls += [
            self._call(self._calls.end_run, trace, groups, ["end"])
            for trace in traces
            if trace.ended
        ]
        for trace in traces:
            if trace.ended or not trace.started:
                del self._traces[trace.trace_id]
            trace.sent()
        return CallList(calls, dead, self._calls.server_is_well)

    def _tree_calls(
        self, traces: Sequence[TraceState], groups: Mapping[str, Group]
    ) -> Iterator[Call]:
        """Spans first, then what is known of their traces (see `spans`)."""
        spans = distinct(span for trace in traces for span in trace.spans)
        if spans:
            of_id = {otel_trace_id(trace.trace_id): trace for trace in traces}
            write = partial(self._calls.write_spans, of_id)
            yield Call(write, spans, partial(_span_letter, of_id))
        for trace in traces:
            if trace.tree is not None and trace.tree_changed:
                # While a trace goes another one follows, unless this one has what it would lack.
                last = trace.ended or trace.tree.full
                write_tree = self._calls.write_last_tree if last else self._calls.write_tree
                yield self._call(write_tree, trace, groups, [trace.tree.info()])

    def _group(self, trace: TraceState) -> Group:
        check, refuse = partial(self._calls.check_run, trace), partial(self._refuse, trace)
        return Group(trace.records, check, refuse)

    @staticmethod
    def _call(
        send: Callable[[TraceState, Sequence[Any], float], None],
        trace: TraceState,
        groups: Mapping[str, Group],
        items: Sequence[Any],
        *,
        essential: bool = False,
    ) -> Call:
        group = groups[trace.trace_id]
        return Call(partial(send, trace), items, partial(_letter, trace), group, essential)

    def _refuse(self, trace: TraceState, reason: str) -> None:
        """Keep nothing of a trace but why the server will not have its run, until it ends."""
        trace.refused = reason
        if self._traces.pop(trace.trace_id, None) is not None:
            self._refused[trace.trace_id] = reason


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

    traces[span.trace_id].count_refused(span)
    return orjson.dumps({"span": MessageToDict(span)})
