"""What is known of a trace as a whole: id, settings, name, times, status, tags. Pure.

Receives decoded, redacted records of one trace, in order. Its numbers (`RunTotals`) and its tree
(`SpanTree`) read the facts from here, so that each is kept once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping import limits, lineage
from qitos_mlflow.mlflow_plugin.mapping.entities import StoredRun
from qitos_mlflow.mlflow_plugin.mapping.ids import digest
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_key, clean_ns, clean_text, mapping
from qitos_mlflow.recording.record import Record, RunSettings

DEFAULT_EXPERIMENT = "qitos"
"""Experiment of a trace whose start, and with it the settings, was lost."""

MAX_TAGS = 200
"""Tags of one trace; what other plugins add beyond is left out of the tree."""

RUN_NAME_TAG = "mlflow.runName"
"""Gives the run its name; MLflow refuses a run that is given both the tag and a name."""

_METADATA_TAGS = {
    "qitos_run_id": "qitos.run_id",
    "agent_name": "qitos.agent",
    "task_id": "qitos.task_id",
    "benchmark_name": "qitos.benchmark",
    "benchmark_split": "qitos.split",
    "linked_trace_id": "qitos.linked_trace_id",
    "resumed_from": "qitos.resumed_from",
    "qitos.closed": "qitos.closed",
    "qitos.killed": "qitos.killed",
}
"""Metadata that people search runs by, and its tags."""

PARENT_TAG = "mlflow.parentRunId"
"""Makes a run a child of another one."""

TREE_TAG = "qitos.mlflow_trace_id"
"""MLflow's id of the trace that has the spans, if MLflow's own tracer made it."""

EVALUATION_TAG = "qitos.evaluation"
"""Of an evaluation's run: the evaluation's id."""

STARTS = ("trace_start", "evaluation_start")
ENDS = ("trace_end", "evaluation_end")
"""Kinds of records that begin and end a run. An evaluation's are kept like a trace's."""

_RECORD_TAGS = {
    "trace_id": "qitos.trace_id",
    "group_id": "qitos.group_id",
    "parent_run_id": PARENT_TAG,
}

_SETTINGS_TAGS = {
    "source": "mlflow.source.name",
    "user": "mlflow.user",
    "traceparent": "qitos.traceparent",
}


def settings_in(fields: Any) -> dict[str, Any]:
    """The run settings in a record's ``settings``, or in a segment's header; empty for none."""
    known = RunSettings.__annotations__
    return {key: value for key, value in mapping(fields).items() if key in known}


def added(record: Mapping[str, Any], part: str) -> dict[str, Any]:
    """What other plugins add to a record, under legal names.

    Args:
        record: any. `recording.normalize` has checked its field ``added``.
        part: ``attributes`` of the span, ``metrics`` of the run, or ``tags`` of run and trace.
    """
    if "added" not in record:
        return {}
    found = mapping(mapping(record["added"]).get(part))
    return {clean_key(name): value for name, value in found.items()}


def without_ids(record: Any) -> None:
    """Take from a record what names a run or an experiment of the server it was recorded for."""
    ids = ("parent_run_id", "inherited_run_id", "experiment_of", "experiment_id")
    settings = mapping(record).get("settings")
    for part in (record, settings, mapping(settings).get("evaluation")):
        for key in (*ids, "run_id", "model_id"):
            if isinstance(part, dict):
                part.pop(key, None)
    tags = mapping(mapping(settings).get("tags"))
    if isinstance(tags, dict):
        tags.pop(TREE_TAG, None)


def error_text(error: Any) -> str:
    """An error as one line; empty for none."""
    if not isinstance(error, Mapping):
        return str(error) if error else ""
    return ": ".join(str(error[key]) for key in ("type", "message") if error.get(key))


@dataclass
class TraceFacts:
    """The facts of one trace so far. Their size is bounded, however long the trace.

    Attributes:
        trace_id: QitOS's id.
        settings: how its run is logged (`RunSettings`).
        name: the trace's name.
        started: its trace_start record has been seen.
        start_ns: when it started, or its first record if that was lost; nanoseconds.
        began_ns: when the agent began: after its trace has waited for the run; 0 if not known.
        last_ns: the latest time in its records.
        ended_ns: when it ended, or its run is to end; None before.
        status: MLflow's run status in the end.
        parent: the run that its own is a child of, if the server had to be asked; see `place`.
        cut_off: the end of its process ended it, not the trace itself.
        of_evaluation: it is no trace but an evaluation, whose run is the parent of others.
        recorded: spans that ended in the agent, as its end says.
        dropped: of those, how many were lost before they reached the disk, by reason.
        start_tags: tags of the run as of its start.
        later_tags: tags of the trace that came later.
        code: the version of the code, as tags.
        lost: values of the run that were lost or trimmed, by reason.
    """

    trace_id: str
    settings: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    started: bool = False
    start_ns: int = 0
    began_ns: int = 0
    last_ns: int = 0
    ended_ns: int | None = None
    status: str = ""
    parent: str = ""
    cut_off: bool = False
    of_evaluation: bool = False
    recorded: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    start_tags: dict[str, str] = field(default_factory=dict)
    later_tags: dict[str, str] = field(default_factory=dict)
    code: dict[str, str] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    # -- settings ----------------------------------------------------------------------------

    @property
    def experiment_name(self) -> str:
        """Name of the experiment, within MLflow's limit."""
        name = self.settings.get("experiment_name") or DEFAULT_EXPERIMENT
        return clean_text(name, limits.EXPERIMENT_CHARS)

    @property
    def experiment_id(self) -> str:
        """MLflow's id of the experiment; empty if its name is what is known."""
        return str(self.settings.get("experiment_id") or "")

    @property
    def run_to_ask(self) -> str:
        """The run of which the server has to be asked before this one's place is known; or empty.

        Its experiment is wanted, or whether it was open when the trace started.
        """
        return str(
            self.settings.get("inherited_run_id") or self.settings.get("experiment_of") or ""
        )

    def place(self, found: StoredRun | None) -> None:
        """Take in what the server says of `run_to_ask`; None: there is no such run."""
        inherited = self.settings.pop("inherited_run_id", None)
        wanted = self.settings.pop("experiment_of", None)
        if found is None:
            return
        # A run that was continued still has the time at which it ended before.
        ended_ms = None if found.status == "RUNNING" else found.end_ms
        if inherited and ended_ms is not None and ended_ms < self.start_ns // 1_000_000:
            return  # A process of a pool outlives the run in which it was started.
        self.parent = found.ref.run_id
        if wanted:
            self.settings["experiment_id"] = found.ref.experiment_id

    @property
    def run_name(self) -> str:
        """Name of the run: as configured, else by MLflow's tag, else the trace's."""
        tagged = mapping(self.settings.get("tags")).get(RUN_NAME_TAG)
        name = self.settings.get("run_name") or tagged or self.name
        return clean_text(name, limits.RUN_NAME_CHARS)

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """The evaluation that it is a part of, as `Evaluation` in `recording.record`; or empty."""
        return mapping(self.settings.get("evaluation"))

    @property
    def request_id(self) -> str:
        """The same for each run of one task in one trial, whatever agent does it; or empty."""
        found = {**self.start_tags, **self.later_tags}
        if "qitos.task_id" not in found:
            return ""
        names = ("qitos.benchmark", "qitos.split", "qitos.task_id", "qitos.trial")
        return digest("request", *(found.get(name, "") for name in names), size=16).hex()

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
        # Pairs it with others in MLflow's comparison of evaluations.
        pair = {"mlflow.eval.requestId": self.request_id} if self.request_id else {}
        return pair | {
            key: clean_text(value, limits.TRACE_TAG_CHARS)
            for key, value in found.items()
            if not key.startswith("mlflow.") or key == lineage.PROMPTS
        }

    def fold(self, record: Record) -> list[tuple[str, str]]:
        """Take in the trace's next record; returns the tags that it adds to the run."""
        fields: Mapping[str, Any] = record
        self.start_ns = self.start_ns or clean_ns(fields.get("start_ns") or fields.get("time_ns"))
        at_ns = fields.get("end_ns") or fields.get("time_ns") or fields.get("start_ns")
        self.last_ns = max(self.last_ns, clean_ns(at_ns))
        kind, says_more = record["kind"], "added" in fields or "code" in fields
        if kind == "span" and self.started and not says_more:  # As most are.
            return []
        plugins = _texts(added(record, "tags"), self.lost)
        code = _texts(lineage.code_tags(record), self.lost)
        self.code |= code
        whole = fields.get("whole") is True
        self.of_evaluation = self.of_evaluation or kind in (STARTS[1], ENDS[1])
        if kind in STARTS or whole:
            self.started = True
            self.name = str(fields.get("name") or "")
            self.start_ns = clean_ns(fields.get("start_ns") or fields.get("time_ns"))
            self._take_settings(fields, self.lost)
            self.start_tags = {**code, **self.start_tags, **plugins}
        elif kind == "span_start":
            self.began_ns = clean_ns(fields.get("start_ns"))
        if kind in STARTS:
            return list(self.start_tags.items())
        if not self.started:  # The run, if there is none already, is made of what there is.
            self._take_settings(record, None)
            self.start_tags["qitos.start_lost"] = "true"
        configured = mapping(self.settings.get("tags"))
        own = {key: text for key, text in code.items() if key not in configured}
        if kind in ENDS or whole:
            own |= self._fold_end(fields)
        for key, text in plugins.items():
            if key in self.later_tags or len(self.start_tags) + len(self.later_tags) < MAX_TAGS:
                self.later_tags[key] = text
        # A trace has its error's text in its root span.
        self.later_tags |= {key: text for key, text in own.items() if key != "qitos.error"}
        return [*(self.start_tags.items() if whole else ()), *own.items(), *plugins.items()]

    def _take_settings(self, record: Mapping[str, Any], lost: Counter[str] | None) -> None:
        """Take the record's settings, if it has any, and the start's tags; configured ones win."""
        self.settings = settings_in(record.get("settings")) or self.settings
        configured = mapping(self.settings.get("tags"))
        of_record = _picked(record, _RECORD_TAGS)
        if self.run_to_ask:
            of_record.pop(PARENT_TAG, None)
        tags = {
            **of_record,
            **_picked(self.settings, _SETTINGS_TAGS),
            **_picked(mapping(record.get("metadata")), _METADATA_TAGS),
            **{clean_key(key): text for key, text in configured.items()},
        }
        tags.pop(RUN_NAME_TAG, None)
        self.start_tags = _texts(tags, lost)

    def _fold_end(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Take in the end; returns its tags: stop reason, error, what was not known before."""
        metadata = mapping(record.get("metadata"))
        self.ended_ns = clean_ns(record.get("time_ns"))
        self.status = str(record.get("status") or "FINISHED")
        self.cut_off = not metadata.keys().isdisjoint(("qitos.closed", "qitos.killed"))
        recorded = record.get("recorded")
        self.recorded = recorded if isinstance(recorded, int) else 0
        self.dropped = dict(mapping(record.get("dropped")))
        error = error_text(record.get("error")) or metadata.get("error")
        outcome = {"stop_reason": metadata.get("stop_reason") or None, "qitos.error": error or None}
        return _texts({**_picked(metadata, _METADATA_TAGS), **outcome}, self.lost)


def _picked(source: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Texts and numbers of `source`, by their tags in `names`."""
    return {
        tag: source[key]
        for key, tag in names.items()
        if isinstance(source.get(key), (str, int, float)) and source[key] != ""
    }


def _texts(tags: Mapping[str, Any], lost: Counter[str] | None) -> dict[str, str]:
    return {
        key: clean_text(value, limits.TAG_CHARS, lost)
        for key, value in tags.items()
        if value is not None
    }
