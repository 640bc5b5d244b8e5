"""Records to MLflow: folds each trace's records and lists the calls that follow from them.

Receives redacted records from the sending thread, in order, and makes calls on a `Transport`.
`prepare` changes nothing but the sink's own state, which is part of the spool's acknowledgement. So
a record that is seen again after a crash leads to the same calls again, and what these write
replaces what is there.

One sink serves traces of any experiment and settings: each `trace_start` brings its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow._guard import report
from qitos_mlflow.delivery import DeadLetter, Hopeless, RetryLater
from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.attachments import check_names
from qitos_mlflow.mlflow_plugin.mapping.lineage import prompts_in
from qitos_mlflow.mlflow_plugin.mapping.otlp_span import distinct
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import (
    ENDS,
    STARTS,
    TREE_TAG,
    settings_in,
    without_ids,
)
from qitos_mlflow.mlflow_plugin.server.access import WORKSPACE
from qitos_mlflow.mlflow_plugin.server.artifacts import write_elsewhere
from qitos_mlflow.mlflow_plugin.server.http import SessionRequester, uninstrumented
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.tracking_uri import (
    absolute,
    is_http,
    is_local,
    working_directory,
)
from qitos_mlflow.mlflow_plugin.server.transport import Transport
from qitos_mlflow.mlflow_plugin.sink.assessments import Assessments
from qitos_mlflow.mlflow_plugin.sink.call_list import Call, CallList
from qitos_mlflow.mlflow_plugin.sink.earlier_states import of_earlier_version
from qitos_mlflow.mlflow_plugin.sink.evaluations import EvaluationOperations
from qitos_mlflow.mlflow_plugin.sink.links import link_prompts, link_trace
from qitos_mlflow.mlflow_plugin.sink.operations import Announce
from qitos_mlflow.mlflow_plugin.sink.reading import RecordReader
from qitos_mlflow.mlflow_plugin.sink.trace_state import TraceState, Waiting
from qitos_mlflow.redaction.redact import MARKER, without_credentials

STATE_VERSION = 3
"""Form of the state in acknowledgements. The first one, in spools of format 1, has no number."""


class MlflowSink:
    """`delivery.Sink` for one segment. Connects to nothing until it sends; may import mlflow.

    Args:
        header: the segment's header, as `destination.segment_header` writes it. Its run settings,
            if it has any, are those of traces whose start brings none.
        transport: carries the calls; None: one for `tracking_uri`.
        tracking_uri: deliver here instead of to the header's destination.
        trusted: this process's credentials are configured for that server.
        files: files may go where that server says, which may be somewhere else.
        announce: called with each run as it is created, on the sending thread.
        resumed: another process may have delivered part of the segment before: a run may exist
            already for any trace; look before creating one.
    """

    def __init__(
        self,
        header: bytes,
        transport: Transport | None = None,
        *,
        tracking_uri: str | None = None,
        trusted: bool = True,
        files: bool = True,
        announce: Announce = lambda *_: None,
        resumed: bool = False,
    ) -> None:
        fields: dict[str, Any] = _json.loads(header)
        uri = tracking_uri or fields.get("tracking_uri")
        with uninstrumented():
            self._transport = transport or open_transport(
                uri,
                fields.get("cwd"),
                fields.get("headers"),
                asked=fields.get("asked", True),
                trusted=trusted,
                files=files,
            )
        self.patience = self._transport.patience
        self._settings = settings_in(fields)
        recorded_for = fields.get("tracking_uri")
        self._elsewhere = uri is not None and without_credentials(uri) != recorded_for
        """It delivers to another server than the records were recorded for."""
        self._operations = EvaluationOperations(self._transport, announce, header)
        self._assessments = Assessments(self._transport, self._operations)
        self._resumed = resumed
        self._reader = RecordReader()
        self._traces: dict[str, TraceState] = {}
        self._refused: dict[str, str] = {}
        """Why the server refuses the run of a trace: each of its records is a dead letter."""
        self._prepared = CallList(self._operations)
        self._link = partial(link_trace, self._transport)
        self._last = False
        """No more records will come."""

    # -- delivery.Sink -----------------------------------------------------------------------

    def restore(self, state: bytes) -> None:
        """Go back to what `state` returned; of another destination, to what holds here too."""
        self._resumed = True
        self._traces, self._refused = {}, {}
        try:
            plain = _json.loads_foreign(state)
            uri, refused, found = plain["uri"], dict(plain["refused"]), plain["traces"]
            version = plain.get("version", 1)
            if version in (1, 2):
                found = [of_earlier_version(trace, self._settings) for trace in found]
            elif version != STATE_VERSION:
                raise ValueError(f"a state of version {version!r:.20}")
            traces = [TraceState.from_json(trace) for trace in found]
        except (KeyError, TypeError, ValueError) as error:
            # Another version's: the runs are found again by their tags, totals begin anew.
            report("sink.restore", error)
            return
        self._traces = {trace.facts.trace_id: trace for trace in traces}
        if uri == self._transport.address:
            self._refused = refused
            self._operations.restore(plain.get("parents"))
        else:
            for trace in traces:
                trace.move(uri)

    def prepare(self, records: Sequence[bytes]) -> None:
        """Fold `records` and list the calls they come to. What is no record is a dead letter."""
        dead: list[DeadLetter] = []
        touched: dict[str, TraceState] = {}
        for data in records:
            try:
                record, rest = self._reader.read(data)
                trace_id, kind = str(record["trace_id"]), record["kind"]
                check_names(record)
            except (KeyError, TypeError, ValueError) as error:
                dead.append(DeadLetter(data, f"not a record: {type(error).__name__}: {error}"))
                continue
            if self._elsewhere:
                without_ids(record)
            if trace_id in self._refused:
                dead.append(DeadLetter(data, self._refused[trace_id]))
                if kind in ENDS:
                    del self._refused[trace_id]
                continue
            if trace_id not in self._traces:
                self._traces[trace_id] = TraceState.begin(
                    trace_id,
                    self._settings,
                    tree=self._operations.stores_traces,
                    late=kind not in STARTS and not record.get("whole"),
                    resumed=self._resumed,
                )
            trace = self._traces[trace_id]
            trace.take(record, data, rest)
            touched[trace_id] = trace
        self._list(touched, dead)

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        """End as KILLED the traces whose process died, or has closed without their end."""
        left = {
            key: trace
            for key, trace in self._traces.items()
            # Their user ends those that are to stay open.
            if trace.facts.auto_end_run or not closed
        }
        for trace in left.values():
            trace.kill(last_time_ns, "its end was lost" if closed else "the process died")
        self._list(left, [])
        self._last = True
        return bool(left or self._operations.parents.due)

    def send(self, timeout_s: float) -> list[DeadLetter]:
        """Make the calls that are left; returns what the server refused of them."""
        with uninstrumented():
            began = time.monotonic()
            dead = self._prepared.send(timeout_s)
            left_s = timeout_s - (time.monotonic() - began)
            self._operations.parents.refresh(left_s, final=self._last)
        for trace in self._traces.values():
            trace.waiting = Waiting()
        for trace_id, reason in self._prepared.refused.items():
            if self._traces.pop(trace_id, None) is not None:  # More of it may come.
                self._refused[trace_id] = reason
        return dead

    def state(self) -> bytes:
        """What later records depend on: settings, totals so far and run of each open trace.

        Of a trace whose run the server refuses: nothing but the reason.
        """
        state = {"version": STATE_VERSION, "uri": self._transport.address}
        traces = [trace.to_json() for trace in self._traces.values()]
        parents = self._operations.parents.due
        return _json.dumps(
            {**state, "traces": traces, "refused": self._refused, "parents": parents}
        )

    def close(self) -> None:
        """Free connections."""
        self._transport.close()

    # -- records to calls --------------------------------------------------------------------

    def _list(self, touched: Mapping[str, TraceState], dead: list[DeadLetter]) -> None:
        """List the calls for what waits of these traces, and forget the traces that are over."""
        operations, scored = self._operations, self._assessments
        traces = [trace for trace in touched.values() if not trace.unplaced]
        # First, because an agent may be waiting for its run.
        calls = [Call(trace, operations.create_run, ["run"]) for trace in traces if not trace.run]
        logs, last = self._logs(traces)
        calls += logs
        # One after the other, so that one request may carry them. Infos follow (see `span_tree`).
        calls += [
            Call(trace, operations.write_spans, distinct(trace.waiting.spans))
            for trace in traces
            if trace.waiting.spans
        ]
        for trace in traces:
            # What comes after a trace's end does not change what is known of it.
            known = trace.facts.started or trace.facts.ended
            if known and trace.tree is not None and trace.tree.changed:
                calls.append(Call(trace, operations.write_info, [trace.tree.info()]))
                trace.tree.info_made()
        calls += last
        calls += [
            Call(trace, self._link, [trace.facts.start_tags[TREE_TAG]])
            for trace in traces
            if trace.facts.ended and TREE_TAG in trace.facts.start_tags
        ]
        for trace in traces:
            prompts = prompts_in(trace.facts.trace_tags) if trace.facts.ended else []
            if prompts and trace.tree is not None:
                calls.append(Call(trace, partial(link_prompts, self._transport), prompts))
        # Where they go may fail for long while all else works.
        calls += [
            Call(trace, operations.write_artifact, [file])
            for trace in traces
            for file in trace.waiting.artifacts
        ]
        calls += [Call(*parts) for parts in operations.listed(traces)]
        # Last, so that a run that has ended is complete, and knows what was refused of it.
        over = [trace for trace in traces if trace.facts.ended]
        over.sort(key=lambda trace: trace.facts.of_evaluation)
        calls += [Call(trace, operations.end_run, ["end"]) for trace in over]
        # After all else, because they may wait for what another process delivers.
        for trace in touched.values():
            if trace.unplaced:
                calls.append(Call(trace, scored.find_run, ["run"]))
                calls += [Call(trace, operations.log, items) for items in _batches(trace.waiting)]
            if trace.waiting.assessments:
                calls.append(Call(trace, scored.write, trace.waiting.assessments))
        for trace_id, trace in touched.items():
            if trace.facts.ended or not trace.facts.started:
                del self._traces[trace_id]
        self._prepared = CallList(operations, calls, dead, self._prepared.accepted)

    def _logs(self, traces: Sequence[TraceState]) -> tuple[list[Call], list[Call]]:
        """The calls for metrics, params and tags, and those to be made after the infos.

        These are the last ones of traces whose cost the infos ask for: one call has both.
        """
        logs: list[Call] = []
        last: list[Call] = []
        for trace in traces:
            own = [Call(trace, self._operations.log, items) for items in _batches(trace.waiting)]
            if own and self._operations.may_cost(trace):
                last.append(own.pop())
            logs += own
        return logs, last


def _batches(waiting: Waiting) -> Iterator[list[tuple[str, Any]]]:
    """Params, tags and metrics, each with its kind, in batches within MLflow's limits.

    If a tag is set twice, the last value stays.
    """
    queues = (
        ("param", limits.BATCH_PARAMS, iter(waiting.params)),
        ("tag", limits.BATCH_TAGS, iter(dict(waiting.tags).items())),
        ("metric", limits.BATCH_METRICS, iter(waiting.metrics)),
    )
    while True:
        items: list[tuple[str, Any]] = []
        for kind, most, queue in queues:
            room = min(most, limits.BATCH_TOTAL - len(items))
            items += [(kind, one) for one in islice(queue, room)]
        if not items:
            return
        yield items


def open_transport(
    uri: str | None,
    cwd: str | None = None,
    routing: Mapping[str, str] | None = None,
    *,
    asked: bool = True,
    trusted: bool = True,
    files: bool = True,
) -> Transport:
    """The transport for `uri`; None means MLflow's default as of the directory `cwd`.

    Imports mlflow only if the destination needs it.

    Args:
        uri: of a server or a store.
        cwd: what a relative path is relative to.
        routing: headers that say whose data it is; None: those of this process.
        asked: MLflow's plugins could be asked when `routing` was recorded; if not, they are now.
        trusted: this process's credentials are configured for that server.
        files: files may go where that server says, which may be somewhere else.
    """
    if uri is not None and MARKER in uri and not is_local(uri):  # This names another place.
        raise Hopeless("the URI had a secret, which is not stored; give it with --tracking-uri")
    if uri is not None and is_http(uri):
        requester = SessionRequester(uri, routing, asked=asked, trusted=trusted)
        return RestTransport(uri, requester, trusted=trusted, files=files)
    try:
        from qitos_mlflow.mlflow_plugin.server import mlflow_client, sqlite_store
    except RuntimeError as error:  # Of a user without a home (`Path.home` in mlflow).
        raise RetryLater(f"mlflow cannot be imported ({error}); set HOME") from error

    cwd = cwd or working_directory()
    store = absolute(uri, cwd) if uri else sqlite_store.default_tracking_uri(cwd)
    workspace = None if routing is None else routing.get(WORKSPACE, "default")
    write = partial(write_elsewhere, trusted=trusted)
    return mlflow_client.StoreTransport(store, workspace, write)
