"""What is known of a trace as a whole: id, settings, name, times, status, tags. Pure.

Receives decoded, redacted records of one trace, in order. Its numbers (`RunTotals`) and its tree
(`SpanTree`) read the facts from here, so that each is kept once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import contributed, limits, params_and_tags
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_ns, clean_text, mapping
from qitos_mlflow.recording.record import Record, RunSettings, TraceEnd, TraceStart

DEFAULT_EXPERIMENT = "qitos"
"""Experiment of a trace whose start, and with it the settings, was lost."""

MAX_TAGS = 200
"""Tags of one trace; what other plugins add beyond is left out of the tree."""

RUN_NAME_TAG = "mlflow.runName"
"""Gives the run its name; MLflow refuses a run that is given both the tag and a name."""


def settings_in(fields: Any) -> dict[str, Any]:
    """The run settings in a record's ``settings``, or in a segment's header; empty for none."""
    known = RunSettings.__annotations__
    return {key: value for key, value in mapping(fields).items() if key in known}


@dataclass
class TraceFacts:
    """The facts of one trace so far. Their size is bounded, however long the trace.

    Attributes:
        trace_id: QitOS's id.
        settings: how its run is logged (`RunSettings`).
        name: the trace's name.
        started: its trace_start record has been seen.
        start_ns: when it started, or its first record if that was lost; nanoseconds.
        last_ns: the latest time in its records.
        ended_ns: when it ended, or its run is to end; None before.
        status: MLflow's run status in the end.
        cut_off: the end of its process ended it, not the trace itself.
        recorded: spans that ended in the agent, as its end says.
        dropped: of those, how many were lost before they reached the disk, by reason.
        start_tags: tags of the run as of its start.
        later_tags: tags of the trace that came later.
        lost: values of the run that were dropped or trimmed, by reason.
    """

    trace_id: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    started: bool = False
    start_ns: int = 0
    last_ns: int = 0
    ended_ns: int | None = None
    status: str = ""
    cut_off: bool = False
    recorded: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    start_tags: dict[str, str] = field(default_factory=dict)
    later_tags: dict[str, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    # -- as JSON -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The facts as plain JSON values."""
        return {**vars(self), "lost": dict(self.lost)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> TraceFacts:
        """The facts that `to_json` described."""
        return cls(**{**plain, "lost": Counter(plain["lost"])})

    # -- settings ----------------------------------------------------------------------------

    @property
    def experiment_name(self) -> str:
        """Name of the experiment, within MLflow's limit."""
        name = self.settings.get("experiment_name") or DEFAULT_EXPERIMENT
        return clean_text(name, limits.EXPERIMENT_CHARS)

    @property
    def run_name(self) -> str:
        """Name of the run: as configured, else by MLflow's tag, else the trace's."""
        tagged = mapping(self.settings.get("tags")).get(RUN_NAME_TAG)
        name = self.settings.get("run_name") or tagged or self.name
        return clean_text(name, limits.RUN_NAME_CHARS)

    @property
    def auto_end_run(self) -> bool:
        """Whether the run ends with its trace."""
        return bool(self.settings.get("auto_end_run", True))

    @property
    def log_traces(self) -> bool:
        """Whether the tree of spans is logged."""
        return bool(self.settings.get("log_traces", True))

    # -- records -----------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether the run is to end, or has."""
        return self.ended_ns is not None

    @property
    def trace_tags(self) -> dict[str, str]:
        """Tags of the trace: those of the run but MLflow's own."""
        found = {**self.start_tags, **self.later_tags}
        return {
            key: clean_text(value, limits.TRACE_TAG_CHARS)
            for key, value in found.items()
            if not key.startswith("mlflow.")
        }

    def fold(self, record: Record) -> list[tuple[str, str]]:
        """Take in the trace's next record; returns the tags that it adds to the run."""
        fields: Mapping[str, Any] = record
        if not (self.started or self.settings) and "settings" in fields:
            self.settings = settings_in(fields["settings"])
            self.lose_start()
        added = contributed.tags(record, self.lost)
        self.start_ns = self.start_ns or clean_ns(fields.get("start_ns") or fields.get("time_ns"))
        at_ns = fields.get("end_ns") or fields.get("time_ns") or fields.get("start_ns")
        self.last_ns = max(self.last_ns, clean_ns(at_ns))
        if record["kind"] == "trace_start":
            return self._fold_start(record, added)
        tags = self._fold_end(record) if record["kind"] == "trace_end" else []
        for key, text in added:
            if key in self.later_tags or len(self.start_tags) + len(self.later_tags) < MAX_TAGS:
                self.later_tags[key] = clean_text(text, limits.TRACE_TAG_CHARS)
        self._add_later(tags)
        return tags + added

    def _fold_start(
        self, record: TraceStart, added: list[tuple[str, str]]
    ) -> list[tuple[str, str]]:
        self.started = True
        self.trace_id = str(record.get("trace_id", ""))
        self.name = str(record.get("name") or "")
        self.start_ns = clean_ns(record.get("time_ns"))
        self.settings = settings_in(record.get("settings")) or self.settings
        self._begin([*params_and_tags.start_tags(record, self.settings, self.lost), *added])
        return list(self.start_tags.items())

    def lose_start(self) -> None:
        """Prepare for a run without its trace's start, in case there is none already."""
        known = {"trace_id": self.trace_id}
        tags = params_and_tags.start_tags(known, self.settings, None)
        self._begin([*tags, ("qitos.start_lost", "true")])

    def _begin(self, tags: list[tuple[str, str]]) -> None:
        self.start_tags = dict(tags)  # Servers refuse a key that is given twice.
        self.start_tags.pop(RUN_NAME_TAG, None)

    def _fold_end(self, record: TraceEnd) -> list[tuple[str, str]]:
        self.ended_ns = clean_ns(record.get("time_ns"))
        self.status = str(record.get("status") or "FINISHED")
        self.cut_off = "qitos.closed" in mapping(record.get("metadata"))
        recorded = record.get("recorded")
        self.recorded = recorded if isinstance(recorded, int) else 0
        self.dropped = dict(mapping(record.get("dropped")))
        return params_and_tags.end_tags(record, self.lost)

    def kill(self, last_ns: int | None, reason: str) -> list[tuple[str, str]]:
        """End a trace whose end will not come: KILLED. Returns the tags that say so.

        Args:
            last_ns: when the process was last known to live; None: its last record.
            reason: goes into the tag ``qitos.killed``.
        """
        self.ended_ns = self.last_ns = max(clean_ns(last_ns), self.last_ns)
        self.status, self.cut_off = "KILLED", True
        tags = [("qitos.killed", clean_text(reason, limits.TAG_CHARS))]
        self._add_later(tags)
        return tags

    def _add_later(self, tags: list[tuple[str, str]]) -> None:
        # A trace has its error's text in its root span.
        kept = ((key, text) for key, text in tags if key != "qitos.error")
        self.later_tags |= {key: clean_text(text, limits.TRACE_TAG_CHARS) for key, text in kept}
