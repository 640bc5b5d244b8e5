"""`qitos_mlflow.score` and `expect`: what is said of an agent's run after it has ended.

Receives an id or what the agent has returned. Hands a record to the pipeline of the trace, or to
the one that traces of this process go to. Waits for nothing. Wrong arguments raise.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import shield
from qitos_mlflow.bridge import results
from qitos_mlflow.mlflow_plugin.destination import Destination, MlflowPipeline
from qitos_mlflow.mlflow_plugin.destination import tracking_uri as destination_uri
from qitos_mlflow.mlflow_plugin.fluent.context import context
from qitos_mlflow.mlflow_plugin.mapping.assessments import metric_of
from qitos_mlflow.mlflow_plugin.mapping.ids import trace_id
from qitos_mlflow.mlflow_plugin.open_trace import OpenTrace
from qitos_mlflow.recording.pipelines import recorded_traces
from qitos_mlflow.recording.recorder import Recorder
from qitos_mlflow.recording.to_json import encode
from qitos_mlflow.recording.trace_recorder import TraceRecorder
from qitos_mlflow.settings import Settings, parsed

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

    A later score of the same name and source replaces the first one. Delivered like all that is
    recorded: in the background, also after an outage or the end of this process.

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
        TypeError: a value cannot be used, or `of` is nothing that has a trace.
        ValueError: no or several traces belong to it.
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
    """Say what an agent's run should have come to: an expectation on its trace.

    Scorers of `mlflow.genai.evaluate` find it in ``expectations``. The arguments are those of
    `score`; a value is also None.
    """
    _say(of, "expectation", name, value, source, source_type, metadata, None, tracking_uri)


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
        raise TypeError(f"name={name!r:.200} is no name; give a text, such as 'correctness'")
    if rationale is not None and not isinstance(rationale, str):
        raise TypeError(f"rationale of {name!r} is a {type(rationale).__name__}; give a text")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise TypeError(f"metadata of {name!r} is a {type(metadata).__name__}; give a dict")
    record = _record(kind, name, _value(name, value, kind), *_source(source, source_type))
    record["metadata"] = dict(metadata or {})
    targets = list(_targets(of, uri))
    with shield("feedback.record"):
        for trace, settings, to, of_trace, content in targets:
            said: Any = {**record, **({"rationale": rationale} if rationale and content else {})}
            _hand_over(trace, settings, to, said | of_trace)


def say_of(trace: OpenTrace, name: str, value: Any, source: str) -> None:
    """`score` for a trace that this process logs, wherever else it is logged, too."""
    said = _record("feedback", name, value, "CODE", source) | _fields_of(trace)
    _hand_over(trace, trace.configured, trace.pipeline.key, said)


def _record(kind: str, name: str, value: Any, source_type: str, source: str) -> dict[str, Any]:
    about = {"name": name, "value": value, "source_type": source_type, "source_id": source}
    return {"kind": "assessment", "type": kind, **about, "time_ns": later_ns()}


def _fields_of(trace: OpenTrace) -> dict[str, Any]:
    """The fields that name a trace of this process."""
    found: dict[str, Any] = {"trace_id": trace.id, "settings": trace.run_settings}
    return found if trace.tree is None else {**found, "mlflow_trace_id": trace.tree.trace_id}


def _hand_over(trace: Any, settings: Settings, to: Any, said: Any) -> None:
    # Until MLflow's own tracer sends its trace, nothing else can reach that.
    if getattr(trace, "tree", None) and trace.tree.assess(encode(said)):
        del said["mlflow_trace_id"]
        if metric_of(said) is None:
            return
    offer(settings, to, said)


def offer(settings: Settings, to: Destination, record: dict[str, Any]) -> None:
    """Hand a record to the pipeline that all of this process with that destination share."""
    pipeline = Recorder[TraceRecorder](settings).pipeline_to(to, partial(MlflowPipeline, to))
    pipeline.offer(encode(record), keep=True, urgent=True)


def later_ns() -> int:
    """Now, but a millisecond after the last time at least: of two points MLflow shows the later."""
    global _last_ns
    _last_ns = max(time.time_ns(), _last_ns + 1_000_000)
    return _last_ns


_last_ns = 0


def _targets(
    of: Any, uri: str | None
) -> Iterator[tuple[Any, Settings, Destination, dict[str, Any], bool]]:
    """Where it goes: trace, settings, destination, fields that name the trace, content or not.

    Of a trace of this process: wherever that is logged.
    """
    given = _id_of(of)
    known = logged(given)
    if uri is None and known:
        for trace in known:
            to: Any = trace.pipeline.key
            yield trace, trace.configured, to, _fields_of(trace), trace.content
        return
    if isinstance(of, str) and not known and _ID.fullmatch(of) is None:
        raise TypeError(f"{of!r:.100} is no id of a trace; give {WHAT}")
    settings, mode = settings_here(), tracing.get_tracing_provider().mode
    if uri is not None:
        settings = replace(settings, tracking_uri=parsed("tracking_uri", uri, "argument"))
    if mode != tracing.TracingMode.DISABLED:
        to = Destination.of(destination_uri(settings))
        content = settings.capture_content and mode == tracing.TracingMode.ENABLED
        yield None, settings, to, {"trace_id": known[0].id if known else given}, content


def logged(given: str) -> list[OpenTrace]:
    """The traces of this process with this id, QitOS's or MLflow's, wherever they are logged."""
    return [
        trace
        for trace in recorded_traces()
        if isinstance(trace, OpenTrace)
        and (
            given in (trace.host_id, trace.id)
            or (given.startswith("tr-") and given in (trace.mlflow_trace_id, trace_id(trace.id)))
        )
    ]


def settings_here() -> Settings:
    """Those of the plugin that logs the agents of this process; without one, the environment's."""
    found: list[Any] = [
        getattr(processor, "plugins", {}).get("mlflow") for processor in tracing.processors()
    ]
    takers = [plugin for plugin in reversed(found) if getattr(plugin, "takes", False)]
    first = max(takers, key=lambda plugin: plugin.origin, default=None)
    settings: Settings = Settings.resolve() if first is None else first.settings
    return settings


def _id_of(of: Any) -> str:
    if isinstance(of, str):
        return of
    if isinstance(of, context):
        ids = list(dict.fromkeys(one.qitos_trace_id for one in of.begun))
        if len(ids) != 1:
            raise ValueError(
                f"{len(ids)} traces have begun in this qitos_mlflow.context; give one of its "
                "trace_ids"
            )
        return ids[0]
    # A host's Trace has its id itself, one of MLflow's in its info.
    places = (of, getattr(of, "info", None))
    found = results.trace_of(of) or next(
        filter(None, (getattr(place, "trace_id", None) for place in places)), None
    )
    if not isinstance(found, str):
        raise TypeError(f"no trace is known of {of!r:.100} ({type(of).__name__}); give {WHAT}")
    return found


def _source(source: Any, source_type: str) -> tuple[str, str]:
    of_mlflow = getattr(source, "source_type", None)  # An AssessmentSource.
    if of_mlflow is not None:
        source_type, source = of_mlflow, source.source_id
    if source_type not in SOURCE_TYPES:
        raise ValueError(f"source_type={source_type!r:.100}; MLflow has {', '.join(SOURCE_TYPES)}")
    if source is not None and not isinstance(source, str):
        raise TypeError(f"source={source!r:.100} is a {type(source).__name__}; give a name")
    return source_type, source or "default"


def _value(name: str, value: Any, kind: str) -> Any:
    if not isinstance(value, (str, list, dict)) and callable(getattr(value, "item", None)):
        value = value.item()  # A number of numpy's or torch's.
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"value={value} of {name!r} is no number that MLflow takes")
    if value is None and kind == "feedback":
        raise TypeError(f"value of {name!r} is None; give a number, True or False, or a text")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"value of {name!r} cannot be used ({error}); give a number, True or False, a text, or "
            "a list or dict of them"
        ) from None
    return value
