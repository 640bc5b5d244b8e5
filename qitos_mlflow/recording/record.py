"""The record: what is kept of one event of a trace, as plain JSON values. Knows no MLflow.

`snapshot` and the plugin write records, `normalize` completes and redacts them, the spool keeps
them, plugins see them in `qitos_record`, and a sink reads them. The types describe the record as
`normalize` hands it on. Times are integers: nanoseconds since the epoch (UTC).

These are types for readers, not a check: a sink must expect a record of another version, or a
damaged one, in which any field is missing or has another type. With content off
(`capture_content`, or the tracing mode ``ENABLED_WITHOUT_DATA``) fields that hold inputs or outputs
are missing.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

RECORD_VERSION = 1
"""The version of the form below, as each record's `version` says; without one it is 1.

Within one version, fields and kinds may be added, and a field that is missing today may be there
tomorrow. A reader passes over kinds and fields that it does not know. No field is removed or
renamed, and none changes its type, its unit or its meaning: that would be another version.
"""

JsonObject = dict[str, Any]


class InEvaluation(TypedDict, total=False):
    """Which evaluation a run is part of."""

    id: str
    """The evaluation's id."""
    name: str
    """Its name: that of its run."""
    experiment_name: str
    """Name of its experiment, if none is known by its id."""
    experiment_id: str
    """MLflow's id of its experiment."""
    run_id: str
    """MLflow's id of its run; missing if it gets one of its own."""
    output: str
    """Where a runner of the host keeps its results."""
    resumes: bool
    """Whether it goes on with the last evaluation that has the same `output`."""
    places: bool
    """Whether the run goes to the evaluation's experiment."""


class RunSettings(TypedDict, total=False):
    """How the run of one trace is logged, as it was configured when the trace started."""

    experiment_name: str
    """Name of the experiment, if none of the following says which it is."""
    experiment_id: str
    """MLflow's id of the experiment, if it is known by its id."""
    experiment_of: str
    """MLflow's id of the run whose experiment it is, if only that is known: the parent's."""
    inherited_run_id: str
    """MLflow's id of a run of another process: the parent, if it was open when the trace began."""
    run_name: str | None
    """Name of the run; null: the trace's name."""
    tags: dict[str, str]
    """Tags of the run."""
    auto_end_run: bool
    """Whether the run ends with its trace."""
    log_traces: bool
    """Whether the tree of spans is logged."""
    model_id: str
    """MLflow's id of the active model (`mlflow.set_active_model`); missing if there is none."""
    attachments: bool
    """Whether pictures become attachments; missing if they do."""
    user: str
    """The operating system's user."""
    user_id: str
    """The user that the agent works for, as `qitos_mlflow.context` says."""
    traceparent: str
    """The W3C header of the request that the agent works for."""
    source: str
    """Name of the script."""
    plugin_version: str
    """Version of the package that recorded it."""
    evaluation: InEvaluation
    """The evaluation that the run is a part of; missing outside of any."""


class Code(TypedDict, total=False):
    """The version of the program's code, as far as git knows it."""

    commit: str
    """The commit's hash."""
    branch: str | None
    """Name of the branch; null: none is checked out."""
    repository: str
    """URL of the first remote, without credentials."""
    dirty: bool | None
    """Whether files of the commit are changed; null: not known."""


class Failure(TypedDict, total=False):
    """An exception."""

    type: str
    """Name of its class."""
    message: str
    """Its text."""
    stacktrace: str
    """The traceback as Python prints it; missing with content off."""


class Added(TypedDict, total=False):
    """What plugins add in `qitos_record`; names are theirs."""

    attributes: JsonObject
    """Attributes of the span."""
    metrics: JsonObject
    """Metrics of the run at the record's step and time."""
    tags: JsonObject
    """Tags of the run and of the trace."""


class _Record(TypedDict, total=False):
    version: int
    """`RECORD_VERSION`."""
    trace_id: str
    """QitOS's id of the trace."""
    added: Added
    """What plugins add; missing if they add nothing."""
    code: Code
    """The program's version, once in a trace: in its start, or as soon as it is known."""


class TraceStart(_Record, total=False):
    """A trace starts."""

    kind: Literal["trace_start"]
    name: str
    """Name of the trace."""
    group_id: str | None
    """The host's group of traces, or null."""
    metadata: JsonObject
    """`agent_name`, `task`, `model_name`, … as far as they are known at the start."""
    time_ns: int
    """When it started (nanoseconds since the epoch)."""
    parent_run_id: str | None
    """MLflow's id of the run that this one is a child of, or null."""
    content: bool
    """Whether inputs and outputs are recorded."""
    settings: RunSettings
    """How the run is logged: `experiment_name`, `run_name`, `tags`, `user`, `source`, …"""


class SpanStart(_Record, total=False):
    """The agent's span of a trace that is one agent's run starts: the root of the trace's tree."""

    kind: Literal["span_start"]
    span_id: str
    """QitOS's id of the span."""
    parent_id: str | None
    """Id of the span above it, or null."""
    type: str
    """The span's type: `agent`."""
    data: JsonObject
    """`name` of the agent."""
    start_ns: int
    """When it started, in nanoseconds since the epoch."""
    settings: RunSettings
    """The same as in `trace_start`, in case that record is lost."""


class SpanEnd(_Record, total=False):
    """A span has ended."""

    kind: Literal["span"]
    span_id: str
    """QitOS's id of the span."""
    parent_id: str | None
    """Id of the span above it, or null."""
    type: str
    """The span's type: `generation`, `tool`, `step`, …"""
    step: int | None
    """Number of the outermost agent's step that the span belongs to, or null."""
    start_ns: int | None
    """When it started (nanoseconds since the epoch)."""
    end_ns: int | None
    """When it ended (nanoseconds since the epoch)."""
    error: str | None
    """The span's error as text, or null."""
    exception: Failure
    """`type`, `message` and `stacktrace`; missing if there was no exception."""
    data: JsonObject
    """Fields [by span type](plugins.md#what-traces-and-spans-have)."""
    output: Any
    """The span's `output`; missing with content off."""
    pictures: dict[str, str]
    """Contents of pictures in base64, by the ids in `picture:<id>?…` texts; not seen by plugins."""
    late: int
    """Number of spans that have ended after their trace so far; missing on spans before its end."""
    settings: RunSettings
    """The same as in `trace_start`; only on spans that end after their trace."""


class TraceEnd(_Record, total=False):
    """A trace has ended."""

    kind: Literal["trace_end"]
    time_ns: int
    """When it ended (nanoseconds since the epoch)."""
    metadata: JsonObject
    """As at the start, and `stop_reason`, `final_result`, `success`, …"""
    status: Literal["FINISHED", "FAILED", "KILLED"]
    """`FINISHED`, `FAILED` or `KILLED`."""
    error: Failure | None
    """`type`, `message` and `stacktrace` of the exception that ended it, or null."""
    recorded: int
    """Spans that ended in the agent."""
    dropped: dict[str, int]
    """Spans lost before they reached the disk, by reason."""
    settings: RunSettings
    """The same as in `trace_start`, in case that record is lost."""
    lost: dict[str, int]
    """Other records lost before they reached the disk, by kind and reason."""


class RunFile(_Record, total=False):
    """A file that belongs to the run."""

    kind: Literal["artifact"]
    path: str
    """Where it goes, below the run's artifacts."""
    content: Any
    """A text as it is; anything else is written as JSON."""
    settings: RunSettings
    """The same as in `trace_start`; only on files that are sent again."""


class TracePictures(_Record, total=False):
    """Pictures that are sent again."""

    kind: Literal["pictures"]
    pictures: dict[str, str]
    """Their contents in base64, by their ids."""
    settings: RunSettings
    """The same as in `trace_start`."""


class Assessment(_Record, total=False):
    """What is said of a trace afterwards: a score, or what should have come of it."""

    kind: Literal["assessment"]
    type: Literal["feedback", "expectation"]
    """`feedback` or `expectation`."""
    name: str
    """Name of the feedback or expectation, and of a score's metric."""
    value: Any
    """A number, a boolean, a text, or a list or object of them."""
    rationale: str
    """Why; missing if nothing was said, or with content off."""
    mlflow_trace_id: str
    """MLflow's id of the trace that has the spans; missing if it follows from `trace_id`."""
    run_id: str
    """MLflow's id of the run that a number is about, instead of a trace."""
    source_type: str
    """`HUMAN`, `LLM_JUDGE` or `CODE`."""
    source_id: str
    """Who says so."""
    metadata: JsonObject
    """More about it."""
    time_ns: int
    """When it was said (nanoseconds since the epoch)."""
    settings: RunSettings
    """The same as in `trace_start`; missing if `trace_id` is all that is known of the trace. Then
    that may be MLflow's id, too."""


class EvaluationStart(_Record, total=False):
    """An evaluation starts, or is resumed. Its run is the parent of others."""

    kind: Literal["evaluation_start"]
    name: str
    """Name of its run."""
    metadata: JsonObject
    """Params of its run."""
    dataset: dict[str, str]
    """`name`, `digest`, `source_type` and `source` of what it evaluates on."""
    time_ns: int
    """When it started (nanoseconds since the epoch)."""
    settings: RunSettings
    """How its run is logged; `evaluation` is this one."""


class EvaluationResult(_Record, total=False):
    """A task of an evaluation is over. What it adds (`added`) goes to the run of its agent.

    How that was judged is in assessments.
    """

    kind: Literal["evaluation_result"]
    name: str
    """Name of the run, if it is `whole`."""
    whole: bool
    """Whether this is all of the run: no agent was logged."""
    start_ns: int
    """When the task was begun (nanoseconds since the epoch)."""
    time_ns: int
    """When it was judged (nanoseconds since the epoch)."""
    status: Literal["FINISHED", "FAILED", "KILLED"]
    """Status of the run, if it is `whole`."""
    settings: RunSettings
    """How the run is logged."""


class EvaluationEnd(_Record, total=False):
    """An evaluation has ended in one process."""

    kind: Literal["evaluation_end"]
    time_ns: int
    """When it ended (nanoseconds since the epoch)."""
    status: Literal["FINISHED", "FAILED", "KILLED"]
    """How it ended."""
    settings: RunSettings
    """The same as in `evaluation_start`, in case that record is lost."""


Record = (
    TraceStart
    | SpanStart
    | SpanEnd
    | TraceEnd
    | RunFile
    | TracePictures
    | Assessment
    | EvaluationStart
    | EvaluationResult
    | EvaluationEnd
)
