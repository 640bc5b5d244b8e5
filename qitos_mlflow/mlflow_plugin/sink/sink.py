"""Records to MLflow: folds each trace's records and lists the calls that follow from them.

Receives redacted records from the sending thread, in order, and makes calls on a `Transport`.
`prepare` changes nothing but the sink's own state, which is part of the spool's acknowledgement. So
a record that is seen again after a crash leads to the same calls again, and what these write
replaces what is there.

One sink serves traces of any experiment and settings: each `trace_start` brings its own.
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
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import settings_in
from qitos_mlflow.mlflow_plugin.mapping.trace_info import trace_info
from qitos_mlflow.mlflow_plugin.server.open_transport import open_transport
from qitos_mlflow.mlflow_plugin.server.transport import Transport
from qitos_mlflow.mlflow_plugin.sink.call_list import Call, CallList, Group, batches
from qitos_mlflow.mlflow_plugin.sink.operations import Announce, Operations
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState, of_first_version
from qitos_mlflow.recording.record import Record

STATE_VERSION = 2
"""Form of the state in acknowledgements; version 0.1.0 wrote another one, without a version."""


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
        tracking_uri: deliver here instead of to the header's destination.
        announce: called with each run as it is created, on the sending thread.
        resumed: another process may have delivered part of the segment before.
    """
    fields: dict[str, Any] = orjson.loads(header)
    uri = tracking_uri or fields.get("tracking_uri")
    return MlflowSink(open_transport(uri, fields.get("cwd")), fields, announce, resumed=resumed)


class MlflowSink:
    """`delivery.Sink` for one destination. Used by one thread.

    Args:
        transport: carries the calls.
        header: the segment's header. Its run settings, if it has any, are those of traces whose
            start brings none.
        announce: called with each run as it is created.
        resumed: a run may exist already for any trace; look before creating one.
    """

    def __init__(
        self,
        transport: Transport,
        header: Mapping[str, Any],
        announce: Announce | None = None,
        *,
        resumed: bool = False,
    ) -> None:
        self._transport = transport
        self._settings = settings_in(header)
        self._calls = Operations(transport, announce)
        self._resumed = resumed
        self._traces: dict[str, TraceState] = {}
        self._refused: dict[str, str] = {}
        self._prepared = CallList(())

    # -- delivery.Sink -----------------------------------------------------------------------

    def restore(self, state: bytes) -> None:
        """Go back to what `state` returned; of another destination, to what holds here too."""
        self._resumed = True
        self._traces, self._refused = {}, {}
        try:
            plain = orjson.loads(state)
            uri, refused, found = plain["uri"], dict(plain["refused"]), plain["traces"]
            if "version" not in plain:
                found = [of_first_version(trace, self._settings) for trace in found]
            elif plain["version"] != STATE_VERSION:
                raise ValueError(f"a state of version {plain['version']!r:.20}")
            traces = [TraceState.from_json(trace) for trace in found]
        except (KeyError, TypeError, ValueError) as error:
            # Another version's: the runs are found again by their tags, totals begin anew.
            report("sink.restore", error)
            return
        self._traces = {trace.facts.trace_id: trace for trace in traces}
        if uri == self._uri:
            self._refused = refused
            return
        for trace in traces:
            trace.move(uri)

    def prepare(self, records: Sequence[bytes]) -> None:
        """Fold `records` and list the calls they come to. No network."""
        dead: list[DeadLetter] = []
        touched: dict[str, TraceState] = {}
        for data in records:
            try:
                record: Record = orjson.loads(data)
                if (reason := self._refused.get(record["trace_id"])) is not None:
                    dead.append(DeadLetter(data, reason))
                    if record["kind"] == "trace_end":
                        del self._refused[record["trace_id"]]
                    continue
                trace = self._trace_of(record)
                trace.take(record, data)
                touched[record["trace_id"]] = trace
            except Exception as error:  # noqa: BLE001 - one bad record loses only itself
                dead.append(DeadLetter(data, f"not a record: {type(error).__name__}: {error}"))
        self._prepared = self._list(touched, dead)

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        """End as KILLED the traces whose process died, or has closed without their end."""
        left = {
            key: trace
            for key, trace in self._traces.items()
            # Their user ends those that are to stay open.
            if not trace.facts.ended and (trace.facts.auto_end_run or not closed)
        }
        for trace in left.values():
            trace.kill(last_time_ns, "its end was lost" if closed else "the process died")
        self._prepared = self._list(left, [])
        return bool(left)

    def send(self, timeout_s: float) -> list[DeadLetter]:
        """Make the calls that are left; returns what the server refused of them."""
        return self._prepared.send(timeout_s)

    def state(self) -> bytes:
        """What later records depend on: settings, totals so far and run of each open trace."""
        traces = [trace.to_json() for trace in self._traces.values()]
        state = {"version": STATE_VERSION, "uri": self._uri, "traces": traces}
        return orjson.dumps({**state, "refused": self._refused})

    def close(self) -> None:
        """Free connections."""
        self._transport.close()

    @property
    def _uri(self) -> str:
        return self._transport.address

    # -- records to calls --------------------------------------------------------------------

    def _trace_of(self, record: Record) -> TraceState:
        trace_id = record["trace_id"]
        trace = self._traces.get(trace_id)
        if trace is None:
            trace = self._traces[trace_id] = TraceState.begin(
                trace_id,
                self._settings,
                tree=self._calls.stores_traces,
                late=record["kind"] != "trace_start",
                resumed=self._resumed,
            )
        return trace

    def _list(self, touched: dict[str, TraceState], dead: list[DeadLetter]) -> CallList:
        traces = list(touched.values())
        groups = {key: self._group(trace) for key, trace in touched.items()}
        # First, because an agent may be waiting for its run.
        calls = [
            self._call(self._calls.create_run, trace, groups, ["run"], essential=True)
            for trace in traces
            if trace.run is None
        ]
        for trace in traces:
            waiting = trace.waiting
            for chunk in batches(waiting.metrics, waiting.params, waiting.tags):
                calls.append(self._call(self._calls.log, trace, groups, chunk))
            for artifact in waiting.artifacts:
                calls.append(self._call(self._calls.write_artifact, trace, groups, [artifact]))
        calls += self._tree_calls(traces, groups)
        # Last, so that a run that has ended is complete, and knows what was refused of it.
        calls += [
            self._call(self._calls.end_run, trace, groups, ["end"])
            for trace in traces
            if trace.facts.ended
        ]
        for key, trace in touched.items():
            if trace.facts.ended or not trace.facts.started:
                del self._traces[key]
            trace.sent()
        experiment = traces[0].facts.experiment_name if traces else ""
        return CallList(calls, dead, partial(self._calls.server_is_well, experiment))

    def _tree_calls(
        self, traces: Sequence[TraceState], groups: Mapping[str, Group]
    ) -> Iterator[Call]:
        """Spans first, then the infos of their traces (see `span_tree`)."""
        spans = distinct(span for trace in traces for span in trace.waiting.spans)
        if spans:
            of_id = {otel_trace_id(trace.facts.trace_id): trace for trace in traces}
            yield Call(partial(self._calls.write_spans, of_id), spans, partial(_span_letter, of_id))
        for trace in traces:
            # What comes after a trace's end does not change what is known of it.
            known = trace.facts.started or trace.facts.ended
            if known and trace.tree is not None and trace.tree.changed:
                # Another info follows, unless the trace has ended or this one has feedback that
                # no later one repeats.
                last = trace.facts.ended or trace.tree.full
                write = self._calls.write_last_info if last else self._calls.write_info
                yield self._call(write, trace, groups, [trace_info(trace.tree)])
                trace.tree.info_made()

    def _group(self, trace: TraceState) -> Group:
        check, refuse = partial(self._calls.check_run, trace), partial(self._refuse, trace)
        return Group(trace.waiting.records, check, refuse)

    @staticmethod
    def _call(
        send: Callable[[TraceState, Sequence[Any], float], None],
        trace: TraceState,
        groups: Mapping[str, Group],
        items: Sequence[Any],
        *,
        essential: bool = False,
    ) -> Call:
        group = groups[trace.facts.trace_id]
        return Call(partial(send, trace), items, partial(_letter, trace), group, essential)

    def _refuse(self, trace: TraceState, reason: str) -> None:
        """Keep nothing of a trace but why the server refuses its run, until it ends."""
        trace.refused = reason
        if self._traces.pop(trace.facts.trace_id, None) is not None:
            self._refused[trace.facts.trace_id] = reason


def _letter(trace: TraceState, item: Any) -> bytes:
    """The dead letter of one item: enough to log it by hand."""
    run_id = None if trace.run is None else trace.run.run_id
    return orjson.dumps(
        {"trace_id": trace.facts.trace_id, "run_id": run_id, "item": item},
        default=lambda content: content.decode("utf-8", "replace"),  # Of a file.
    )


def _span_letter(traces: dict[bytes, TraceState], span: Any) -> bytes:
    from google.protobuf.json_format import MessageToDict

    traces[span.trace_id].count_refused(span)
    return orjson.dumps({"span": MessageToDict(span)})
