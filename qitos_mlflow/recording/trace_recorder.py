"""Host events to records, on the agent's thread: one open trace, as one plugin records it.

Receives the host's Trace and Span objects from a plugin's hooks. Hands snapshots to the pipeline of
their destination. Nothing here waits. Nothing grows with the trace but one number for each open
span, and up to a bound the texts of objects whose `repr` is slow.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

from qitos_mlflow._guard import contain
from qitos_mlflow.delivery import NO_MEMORY
from qitos_mlflow.recording import snapshot
from qitos_mlflow.recording.picture_files import READ_FOR, Seen, with_picture_files
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.recording.simpler import SlowTexts
from qitos_mlflow.recording.to_json import Snapshot, encode
from qitos_mlflow.settings import Settings
from qitos_mlflow.tracing import content_allowed
from qitos_mlflow.tracing.redaction import redacted_metadata

LATE_SPAN_S = 60.0
"""How long after its trace's end an unfinished span keeps the pipeline running (seconds)."""


class TraceRecorder:
    """One trace, as one plugin records it. Any thread; every method returns at once.

    Args:
        trace: the host's.
        pipeline: where its records go.
        settings: the plugin's.
        run_settings: how its run is logged. They are in the start, and again in the records that a
            sink may get without the start.

    Attributes:
        content: whether its records hold inputs and outputs.
        id: of the trace in its records; see `RecordPipeline.add`.
        no_pictures: its spans are not shown, so the spool needs no pictures of them.
        closed: its plugin takes no more spans.
        started: its start is recorded, or its loss is counted.
        ended: its end is recorded: only late spans can follow.
        shared: what `recorded` gets is used, too, with what plugins add.
    """

    def __init__(
        self,
        trace: Any,
        pipeline: RecordPipeline,
        settings: Settings,
        run_settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.id: str
        self.pipeline = pipeline
        self.content = settings.capture_content and content_allowed(trace)
        self.no_pictures = False
        self.closed = False
        self.started = self.ended = self.shared = False
        self._field_chars = settings.field_bytes
        self._files = self.content and settings.log_artifacts
        self._settings = {} if run_settings is None else {"settings": run_settings}
        self._ended_s = float("inf")
        self._spans = count()  # Steps as a whole, whichever threads end spans.
        self._late = 0
        self._slow = SlowTexts()
        self._pictures: Seen = {}
        self._steps: dict[str, int | None] = {}
        # The bridge's traces are one agent's run, whose span is the root of the tree.
        self._awaits_root = "agent_name" in (trace.metadata or {})
        # Not a failure of this trace: it was being handled when the trace began.
        self._handling = sys.exc_info()[1]
        self._ending = threading.Lock()  # Never released: an atomic flag.
        pipeline.add(self, str(trace.trace_id))

    @property
    def unfinished_spans(self) -> int:
        """How many of its spans are open."""
        return len(self._steps)

    @property
    def is_quiet(self) -> bool:
        """Whether it has ended and no late span is expected any more."""
        return time.monotonic() - self._ended_s >= (LATE_SPAN_S if self._steps else 0.0)

    def start(
        self, trace: Any, *, more_metadata: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        """Record the start.

        Args:
            trace: the host's.
            more_metadata: added to the trace's own, which come first.
            **more: the plugin's own fields.
        """
        record = {
            "kind": "trace_start",
            "trace_id": self.id,
            "name": trace.name,
            "group_id": trace.group_id,
            "metadata": self._metadata(trace, more_metadata),
            "time_ns": time.time_ns(),
            "content": self.content,
            **self._settings,
            **more,
        }
        self.started = True
        self._offer_kept(record)

    def start_span(self, span: Any) -> None:
        """Note which of the agent's steps the span belongs to: the x axis of its metrics."""
        # The outermost step counts, so that charts line up with nested agents too.
        step = self._steps.get(span.parent_span_id)
        if step is None and span.data.type == "step":
            step = span.data.step_number
        self._steps[span.span_id] = step
        if self._awaits_root:
            self._awaits_root = False
            try:
                self._offer_root(span)
            except MemoryError:
                self.lose("span_start", NO_MEMORY)

    def end_span(self, span: Any) -> None:
        """Record a span.

        Raises:
            Exception: the span's data is not the host's and cannot be read. The loss is counted.
        """
        next(self._spans)
        step = self._steps.pop(span.span_id, None)
        if self.closed or self.pipeline.closed:
            self.lose("span", "closed")
            return
        try:
            self._late += self.ended
            if step is None:
                step = self._steps.get(span.parent_span_id)
            if step is None and span.data.type == "step":
                step = span.data.step_number
            # In characters: each is at least a byte, and `normalize` cuts to the byte.
            record = snapshot.span_record(span, self.content, self._field_chars)
            record |= {"trace_id": self.id, "step": step}
            if self.shared:
                record["shared"] = True
            if self._late:
                record |= {"late": self._late, **self._settings}
            if self.no_pictures:
                record["no_pictures"] = True
            made = encode(record, self._slow)
            if record["type"] in READ_FOR and (most := self.pipeline.max_picture_bytes):
                made = with_picture_files(made, self._pictures, most)
            taken = self.pipeline.offer(made)
        except MemoryError:
            self.lose("span", NO_MEMORY)
            return
        except BaseException:
            self.lose("span", "snapshot_failed")
            raise
        if not taken:
            self._pictures.clear()  # Those of the record are read again.
            self._note_loss("span", "queue_full")
        self.recorded(made)

    def recorded(self, snapshot: Snapshot) -> None:
        """The start, a span or the end was recorded. Derive it to use it on the same thread."""

    @staticmethod
    def status(metadata: Mapping[str, Any], failure: BaseException | None) -> str:
        """The run's status for how the trace ended. Derive it to know better."""
        return "FINISHED" if failure is None else "FAILED"

    def tags(self) -> Mapping[str, str]:
        """Further tags for the run and its trace, asked once when the trace ends."""
        return {}

    def end(self, trace: Any) -> None:
        """Record the end of the trace, once, and the files that go with its run."""
        # For hosts whose Trace ignores it: the exception that is leaving the ``with`` block.
        leaving = sys.exc_info()[1]
        failure = getattr(trace, "error", None if leaving is self._handling else leaving)

        def complete(end: dict[str, Any]) -> None:
            if failure is not None:
                end["error"] = snapshot.describe(failure, self.content)
            end["metadata"] = self._metadata(trace)
            end["status"] = self.status(end["metadata"], failure)
            if added := self.tags():
                end["added"] = {"tags": dict(added)}
            for file in snapshot.files_of_run(self.id, end["metadata"]) if self._files else ():
                try:
                    if not self.pipeline.offer(encode(file, self._slow)):
                        self._note_loss("artifact", "queue_full")
                except MemoryError:
                    self.lose("artifact", NO_MEMORY)

        self._end(TraceRecorder.status({}, failure), {}, complete)

    def end_early(self, status: str, why: str) -> None:
        """Record the end with this status, unless it is recorded, before the trace itself ends."""
        self._end(status, {"qitos.closed": why}, lambda end: None)

    def _end(
        self,
        status: str,
        metadata: dict[str, Any],
        complete: Callable[[dict[str, Any]], None],
    ) -> None:
        if not self._ending.acquire(blocking=False):  # Another thread or a handler ends it.
            return
        self.ended = True
        self._handling = None  # Its traceback keeps the agent's local variables alive.
        self._pictures.clear()
        try:
            end: dict[str, Any] = {
                "kind": "trace_end",
                "trace_id": self.id,
                "time_ns": time.time_ns(),
                "metadata": metadata,
                "status": status,
                "error": None,
                "recorded": next(self._spans),
                "dropped": {},
                "lost": {},
                **self._settings,
            }
        except MemoryError:
            self.lose("trace_end", NO_MEMORY)
            return
        try:
            complete(end)
        except BaseException as error:  # noqa: BLE001 - a run whose end is lost stays RUNNING
            contain("recorder.end", error)
        finally:  # Also after Ctrl-C: nothing ends it once more.
            # At once: the program that waited for the agent looks at its trace next.
            self._offer_kept(end)
            self._ended_s = time.monotonic()

    def _note_loss(self, kind: str, reason: str) -> None:
        if self._ended_s == float("inf"):
            self.pipeline.add_loss(self.id, kind, reason)

    def lose(self, kind: str, reason: str) -> None:
        """Count a record of this kind (``span``, …) that was lost before it was offered."""
        self._note_loss(kind, reason)
        self.pipeline.stats.drop(reason)

    def _offer_kept(self, record: dict[str, Any]) -> None:
        """Record the start or the end, if memory is short without its metadata."""
        try:
            try:
                made = encode(record, self._slow)
            except MemoryError:
                made = encode({**record, "metadata": {}}, self._slow)
                self.lose("metadata", NO_MEMORY)
            self.pipeline.offer(made, keep=True, urgent=True)  # The call may raise (3.10).
        except MemoryError:
            self.lose(record["kind"], NO_MEMORY)
            return
        self.recorded(made)

    def _offer_root(self, span: Any) -> None:
        record = {
            "kind": "span_start",
            "trace_id": self.id,
            "span_id": span.span_id,
            "parent_id": span.parent_span_id,
            "type": span.data.type,
            "data": {"name": getattr(span.data, "name", None)},
            "start_ns": time.time_ns(),
            **self._settings,
        }
        self.pipeline.offer(encode(record, self._slow), keep=True)

    def _metadata(self, trace: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        metadata = {**(more or {}), **(trace.metadata or {})}
        return metadata if self.content else snapshot.structure_only(redacted_metadata(metadata))
