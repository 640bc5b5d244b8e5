"""The pipeline of records to one destination, shared by all recorders that record for it.

Receives snapshots of records from `trace_recorder`, on the agent's thread, and normalizes them on
the spooling thread. Opens nothing before the first trace. Knows no server: a plugin derives from
`RecordPipeline` how to open a sink.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Hashable
from functools import partial
from typing import Any

from qitos_mlflow._guard import warn
from qitos_mlflow.delivery import Pipeline, trust
from qitos_mlflow.recording.code_version import CodeVersion
from qitos_mlflow.recording.conversation import Conversations
from qitos_mlflow.recording.normalize import normalize, read, redacted_message
from qitos_mlflow.recording.pictures import TakenPictures
from qitos_mlflow.recording.to_json import Snapshot
from qitos_mlflow.settings import Settings, temporary_name

MAX_PICTURE_BYTES = 8 * 1024 * 1024
"""A larger picture of a span is left out (bytes)."""


class RecordPipeline(Pipeline):
    """A `delivery.Pipeline` of records, for one destination. Any thread.

    Args:
        header: stored with the records, for the process that delivers them later. Opaque.
        key: equal for equal destinations.
        settings: the first user's. Spool, queue and offline mode follow from them.
        local: whether the destination is a store on this machine, which cannot hang like a server.
    """

    max_picture_bytes = MAX_PICTURE_BYTES
    """A larger picture is left out; 0: none is taken out of its record (bytes)."""

    def __init__(
        self, header: bytes, key: Hashable, settings: Settings, *, local: bool = False
    ) -> None:
        self.key = key
        self._local = local
        self.exit_timeout_s = 0.0
        """The longest of its users' exit timeouts (seconds)."""
        self.local_exit_timeout_s = 0.0
        """The same if the destination is on this machine and makes progress; else 0 (seconds)."""
        self.field_bytes = 0
        """The largest of its users' bounds of one field (bytes)."""
        self.users: weakref.WeakSet[Any] = weakref.WeakSet()
        if settings.spool_dir.name == temporary_name():
            warn(
                "spool.temporary",
                "this user has no home directory that can be written, so records wait in %s; "
                "QITOS_MLFLOW_SPOOL_DIR names a better place",
                settings.spool_dir,
            )
        trust(settings.spool_owners)
        super().__init__(
            header,
            directory=settings.spool_dir,
            queue_bytes=settings.queue_bytes,
            spool_bytes=settings.spool_bytes,
            offline=settings.offline,
            fsync=settings.spool_fsync,
        )

    def use(self, user: Any, settings: Settings) -> None:
        """Note a user: of deadlines and bounds, the largest value counts."""
        self.users.add(user)
        self.exit_timeout_s = max(self.exit_timeout_s, settings.exit_timeout_s)
        self.field_bytes = max(self.field_bytes, settings.field_bytes)
        if self._local and not settings.offline:
            self.local_exit_timeout_s = max(
                self.local_exit_timeout_s, settings.local_exit_timeout_s
            )

    @property
    def sync_command(self) -> tuple[str, str]:
        """The shell command that delivers its records later, and the path that it is given."""
        return "qitos-mlflow sync", str(self.paths.directory)

    def may_rest(self) -> bool:
        """Spooling thread. Whether no trace can record anything soon."""
        return all(trace.is_quiet for trace in self.traces)

    @property
    def traces(self) -> list[Any]:
        """The traces that are recorded to it, open ones and the last ended ones."""
        return [trace for trace in recorded_traces() if trace.pipeline is self]

    def add(self, trace: Any, trace_id: str) -> None:
        """Give a `TraceRecorder` that begins its id, and remember it for as long as it lives.

        The id is `trace_id`, or if a trace with that id is open for this destination, whatever its
        spool, one like it: run and trace are found on a server by it.
        """
        name, number = trace_id, 1
        while (other := self.find(name)) is not None and not other.ended:
            number += 1
            name = f"{trace_id}~{number}"
        trace.id = name
        _traces[self.key, name] = trace

    def find(self, trace_id: str) -> Any:
        """The trace with this id in the records for this destination, None if there is none."""
        return _traces.get((self.key, trace_id))

    @property
    def counted_losses(self) -> int:
        """Records lost, refused or damaged so far."""
        return self.stats.dead_letters + sum(self.stats.dropped.values())

    def add_loss(self, trace_id: str, kind: str, reason: str) -> None:
        """Keep for the end of the trace that a record of this kind (``span``, …) was lost.

        The record of the end gets the sums when it is normalized: everything before it is in the
        spool by then, or known to be lost. Later losses are only in the counts of the pipeline.
        """
        with self._losses_lock:
            self._losses.setdefault(trace_id, Counter())[kind, reason] += 1

    def after_fork(self) -> None:
        """Begin anew in a forked child: open traces and their losses are the parent's."""
        global _traces
        super().after_fork()
        _traces = weakref.WeakValueDictionary()

    def _begin(self) -> None:
        super()._begin()
        self._losses: dict[str, Counter[tuple[str, str]]] = {}
        self._code_version = CodeVersion()
        self._pictures = TakenPictures(self.max_picture_bytes)
        self._conversations = Conversations(
            partial(redacted_message, max_picture_bytes=self.max_picture_bytes), b","
        )
        # Reentrant: a signal handler may record while this thread counts.
        self._losses_lock = threading.RLock()

    def normalize(self, payload: Snapshot) -> bytes | None:
        """Spooling thread. The record that goes to disk; see `normalize`."""
        return normalize(
            payload, self.field_bytes, self._complete, self._pictures, self._conversations
        )

    def _complete(self, record: dict[str, Any]) -> None:
        """Write in what is known only now: the code's version; at a trace's end, its losses.

        Spans are counted by reason, the rest apart.
        """
        self._code_version.complete(record, self.exit_timeout_s)
        if record["kind"] == "trace_end":
            with self._losses_lock:
                losses = self._losses.pop(record["trace_id"], Counter())
            for (kind, reason), number in losses.items():
                if kind == "span":
                    record["dropped"][reason] = number
                else:
                    record["lost"][f"{kind}_{reason}"] = number

    def lost(self, record: Snapshot | bytes, reason: str) -> None:
        """Spooling thread. Count a record that was lost after it was offered."""
        fields, _ = read(record)
        self._pictures.forget(fields)
        if fields["kind"] != "trace_end" and "late" not in fields:
            self.add_loss(fields["trace_id"], fields["kind"], reason)


unfinished: set[RecordPipeline] = set()
"""All pipelines that may have something to deliver when the process ends."""


def recorded_traces() -> list[Any]:
    """The traces of all pipelines, open ones and the last ended ones."""
    found = [ref() for ref in _traces.valuerefs()]  # One call: others begin traces meanwhile.
    return [trace for trace in found if trace is not None]


_traces: weakref.WeakValueDictionary[tuple[Hashable, str], Any] = weakref.WeakValueDictionary()
"""The traces of all pipelines, by the destination's key and their id in the records."""
