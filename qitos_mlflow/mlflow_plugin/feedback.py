"""`qitos_mlflow.score` and `expect`: what is said of an agent's run after it has ended.

Receives an id or what the agent has returned. Hands a record to the pipeline of the trace, or to
the one that traces of this process go to. Waits for nothing. Wrong arguments raise.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

from qitos_mlflow import tracing
from qitos_mlflow._guard import in_words, shield, warn
from qitos_mlflow._selection import Selection
from qitos_mlflow.bridge import results
from qitos_mlflow.mlflow_plugin.destination import Destination, MlflowPipeline
from qitos_mlflow.mlflow_plugin.destination import tracking_uri as destination_uri
from qitos_mlflow.mlflow_plugin.fluent.context import context
from qitos_mlflow.mlflow_plugin.mapping.assessments import metric_of
from qitos_mlflow.mlflow_plugin.open_trace import OpenTrace
from qitos_mlflow.recording.pipelines import recorded_traces
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.recording.to_json import encode
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import TRACKING_VARIABLE, Settings, parsed

SOURCE_TYPES = ("HUMAN", "LLM_JUDGE", "CODE")
"""MLflow's kinds of sources."""

WHAT = (
    "an MLflow trace id (tr-…), QitOS's id of a trace, a Trace, the result of "
    "agent.run(..., return_state=True) or engine.run(...), or a qitos_mlflow.context"
)

_ID = re.compile(r"[\w.:~-]{16,200}")
"""What may be the id of a trace of another process: not an agent's answer."""


def score(
    of: Any,
    name: str,
    value: Any,
    *,
    rationale: str | None = None,
    source: Any = None,
    source_type: str = "CODE",
    metadata: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
) -> None:
    """Score an agent's run: feedback on its trace, and a metric of its run if it is a number.

    A later score of the same name and source replaces the first one. A score is delivered like all
    that is recorded: in the background, also after an outage or the end of this process. If the run
    was not logged, the score is not logged, either, and one line in the log says so.

    Args:
        of: the run: an MLflow trace id, also of another process; QitOS's id of a trace; a Trace;
            what the agent returned (with ``return_state=True``); or a `context` with one trace.
        name: of the feedback and of the metric.
        value: a number, True or False, a text, or a list or dict of them.
        rationale: why.
        source: who says so: a name, or MLflow's `AssessmentSource`.
        source_type: ``HUMAN``, ``LLM_JUDGE`` or ``CODE``.
        metadata: more about it.
        tracking_uri: where the trace is; None: where this process logs.

    Raises:
        TypeError: a value cannot be used, or `of` is nothing that could have a trace.
        ValueError: several traces belong to `of`, or the number is not finite.
    """
    _say(of, "feedback", name, value, source, source_type, metadata, rationale, tracking_uri)


def expect(
    of: Any,
    name: str,
    value: Any,
    *,
    source: Any = None,
    source_type: str = "HUMAN",
    metadata: Mapping[str, Any] | None = None,
    tracking_uri: str | None = None,
) -> None:
    """Say what the result of an agent's run should have been: an expectation on its trace.

    Scorers of `mlflow.genai.evaluate` find it in ``expectations``. The arguments are those of
    `score`.
    """
    _say(of, "expectation", name, value, source, source_type, metadata, None, tracking_uri)


class _Target(NamedTuple):
    """Where a record goes: fields that name its trace, whether content is logged, MLflow's tree."""

    settings: Settings
    to: Destination
    fields: dict[str, Any]
    content: bool
    tree: Any = None


def _say(
    of: Any,
    kind: str,
    name: str,
    value: Any,
    source: Any,
    source_type: str,
    metadata: Any,
    rationale: Any,
    uri: str | None,
) -> None:
    if not isinstance(name, str) or not name.strip():
        raise TypeError(f"{kind} needs a name; give a text, such as 'correctness'")
    if rationale is not None and not isinstance(rationale, str):
        raise TypeError(f"rationale of {name!r} is {_kind(rationale)}; give a text")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata of {name!r} is {_kind(metadata)}; give a dict")
    record = _record(kind, name, _value(name, value), *_source(source, source_type))
    content = {"rationale": rationale, "metadata": dict(metadata or {})}
    if uri is not None:
        uri = parsed("tracking_uri", uri, "argument")
    given = _id_of(of)
    mode = tracing.get_tracing_provider().mode
    if given is None or mode == tracing.TracingMode.DISABLED:
        return
    with shield("feedback.record"):
        for target in _targets(given, uri):
            if target.content and mode == tracing.TracingMode.ENABLED:
                _hand_over(target, {**record, **{key: one for key, one in content.items() if one}})
            elif kind == "feedback" or isinstance(value, (bool, int, float)):
                _hand_over(target, record)
            else:
                warn("feedback.content", "content is not logged, so %r is not, either", name)


def say_of(trace: OpenTrace, name: str, value: Any, source: str) -> None:
    """`score` for this trace only, even if the agent is logged elsewhere, too."""
    _hand_over(_of_trace(trace), _record("feedback", name, value, "CODE", source), keep=True)


def _record(kind: str, name: str, value: Any, source_type: str, source: str) -> dict[str, Any]:
    about = {"name": name, "value": value, "source_type": source_type, "source_id": source}
    return {"kind": "assessment", "type": kind, **about, "time_ns": _later_ns()}


def _hand_over(target: _Target, record: dict[str, Any], *, keep: bool = False) -> None:
    said: Any = {**record, **target.fields}
    # Until MLflow's own tracer sends its trace, nothing else can reach that.
    if target.tree is not None and target.tree.assess(encode(said)):
        del said["mlflow_trace_id"]
        if metric_of(said) is None:
            return
    offer(target.settings, target.to, keep=keep, **said)


def offer(settings: Settings, to: Destination, /, *, keep: bool = False, **record: Any) -> None:
    """Hand a record to the pipeline that this process has for the destination.

    `keep`: also if the queue is full.
    """
    pipeline = Recorder[TraceRecorder](settings).pipeline_to(to, partial(MlflowPipeline, to))
    pipeline.offer(encode({"time_ns": _later_ns(), **record}), keep=keep, urgent=True)


def _later_ns() -> int:
    """Now, but a millisecond after the last time at least: of two points MLflow shows the later."""
    global _last_ns
    _last_ns = max(time.time_ns(), _last_ns + 1_000_000)
    return _last_ns


_last_ns = 0


def _targets(given: str, uri: str | None) -> list[_Target]:
    """Wherever a trace of this process is logged; for others, where this process logs."""
    known = logged(given)
    if uri is None and known:
        return [_of_trace(trace) for trace in known]
    settings = settings_here()
    if uri is not None:
        settings = replace(settings or Settings.resolve(), tracking_uri=uri)
    if settings is None:
        text = "%s is not scored: nothing is logged here; set MLFLOW_TRACKING_URI"
        warn("feedback.nowhere", text, given)
        return []
    to, trace_id = Destination.of(destination_uri(settings)), known[0].id if known else given
    return [_Target(settings, to, {"trace_id": trace_id}, settings.capture_content)]


def _of_trace(trace: OpenTrace) -> _Target:
    to: Any = trace.pipeline.key
    fields: dict[str, Any] = {"trace_id": trace.id, "settings": trace.run_settings}
    if trace.tree is not None:
        fields["mlflow_trace_id"] = trace.tree.trace_id
    return _Target(trace.configured, to, fields, trace.content, trace.tree)


def logged(given: str) -> list[OpenTrace]:
    """The traces of this process with this id, QitOS's or MLflow's, wherever they are logged."""
    return [trace for trace in recorded_traces() if given in getattr(trace, "ids", ())]


def settings_here() -> Settings | None:
    """Those of the plugin that logs the agents of this process; without one, the environment's.

    None if nothing is logged here.
    """
    found = [getattr(one, "plugins", {}).get("mlflow") for one in tracing.processors()]
    takers: list[Any] = [plugin for plugin in reversed(found) if getattr(plugin, "takes", False)]
    if takers:
        first = max(takers, key=lambda plugin: plugin.origin)
        return first.settings if first.qitos_wants_trace() else None
    selection = Selection.from_environ()
    loads = selection.rank("mlflow", "qitos-mlflow") is not None
    goes = selection.asks_for("mlflow") or os.environ.get(TRACKING_VARIABLE)
    return Settings.resolve() if loads and goes else None


def _id_of(of: Any) -> str | None:
    """The id of a trace; None, with a line in the log, if the run was not logged."""
    if isinstance(of, str):
        if _ID.fullmatch(of) is None and not logged(of):
            raise TypeError(f"{of!r:.100} is no id of a trace; give {WHAT}")
        return of
    found: Any = results.trace_of(of)
    if isinstance(of, context):
        # Inside one span of MLflow's own several agents are one trace.
        ids = list(dict.fromkeys(one.trace_id or one.qitos_trace_id for one in of.begun))
        if len(ids) > 1:
            raise ValueError(
                f"{len(ids)} traces have begun in this qitos_mlflow.context; give one of its "
                "trace_ids"
            )
        found = next(iter(ids), None)
    # A host's Trace has its id itself, one of MLflow's in its info.
    for name in ("trace_id", "info.trace_id"):
        with suppress(Exception):  # The user's own object.
            found = found or attrgetter(name)(of)
    if isinstance(found, str):
        return found
    if not isinstance(of, context) and type(of).__module__.partition(".")[0] != "qitos":
        raise TypeError(f"no trace is known of {_kind(of)}; give {WHAT}")
    warn("feedback.unlogged", "no trace of %s was logged, so no score of it is, either", _kind(of))
    return None


def _kind(value: Any) -> str:
    """What a value is, in words: its `repr` may be huge, or fail."""
    return f"an object of type {type(value).__name__}"


def _source(source: Any, source_type: str) -> tuple[str, str]:
    of_mlflow = getattr(source, "source_type", None)  # An AssessmentSource.
    if of_mlflow is not None:
        source_type, source = of_mlflow, source.source_id
    if source_type not in SOURCE_TYPES:
        raise ValueError(f"source_type={source_type!r:.100}; MLflow has {', '.join(SOURCE_TYPES)}")
    if source is not None and not isinstance(source, str):
        raise TypeError(f"source is {_kind(source)}; give a name")
    return source_type, source or "default"


def _value(name: str, value: Any) -> Any:
    with suppress(Exception):  # A number of numpy's or torch's.
        value = value if isinstance(value, (str, list, dict)) else value.item()
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"value={value} of {name!r} is no number that MLflow takes")
    try:
        if value is None:
            raise TypeError("None")
        json.dumps(value, allow_nan=False)
    except Exception as error:  # noqa: BLE001 - a cycle, too many levels, the user's own object
        raise TypeError(
            f"value of {name!r} cannot be used ({in_words(error)}); give a number, True or False, "
            "a text, or a list or dict of them"
        ) from None
    return value
