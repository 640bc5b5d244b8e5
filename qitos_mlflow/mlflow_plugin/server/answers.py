"""What MLflow answers, as plain values: the one place that looks into an answer.

Receives JSON of a server or a store, hands on values of the types that are promised. An answer that
lacks something, or has it in another type, or is about something else, is none of MLflow's: a
proxy's, another program's, or one that was damaged. Then nothing is known of the request, and it is
made again later.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import NewRun, RunRef, StoredRun

T = TypeVar("T")

IDENTIFIER = re.compile(r"[\w.:@+=~-]{1,250}", re.ASCII)
"""MLflow's are hexadecimal or decimal; other stores may have other ones. They go into paths and
filters, so nothing that has a meaning there is in them."""
TEXT_CHARS = 10_000
"""Longest name or address of a run (characters): both are kept in the spool. MLflow takes 8,000."""
LATEST_MS = 2**53
"""Times are milliseconds since 1970, and numbers that JSON can hold."""


class NotMlflows(RetryLater):
    """What came is no answer of MLflow's to what was asked."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"an answer that is not MLflow's: {problem}")


def part(answer: Any, key: str) -> Any:
    """A part that every answer of MLflow has."""
    if not isinstance(answer, Mapping) or answer.get(key) is None:
        raise NotMlflows(f"it has no {key!r}")
    return answer[key]


def thing(answer: Any, key: str) -> Mapping[str, Any]:
    """A part that is an object."""
    found = part(answer, key)
    if not isinstance(found, Mapping):
        raise NotMlflows(f"{key!r} is of type {type(found).__name__}")
    return found


def optional(answer: Any, key: str, kind: type[T], empty: T) -> T:
    """A part that may be missing, or null."""
    found = answer.get(key) if isinstance(answer, Mapping) else part(answer, key)
    if found is None:
        return empty
    if not isinstance(found, kind):
        raise NotMlflows(f"{key!r} is of type {type(found).__name__}")
    return found


def identifier(answer: Any, key: str, wanted: str | None = None) -> str:
    """The id of something; an answer about another thing than the `wanted` one is none."""
    found = part(answer, key)
    if not isinstance(found, str) or not IDENTIFIER.fullmatch(found):
        raise NotMlflows(f"{key!r} is no id")
    if wanted not in (None, found):
        raise NotMlflows(f"{key!r} is another one than was asked for")
    return found


def text(answer: Any, key: str) -> str:
    """A text; empty if there is none."""
    return optional(answer, key, str, "")


def mapping(answer: Any, key: str) -> Mapping[str, Any]:
    """An object; empty if there is none."""
    return optional(answer, key, Mapping, {})  # type: ignore[type-abstract]


def objects(answer: Any, key: str) -> Sequence[Mapping[str, Any]]:
    """A list of objects; empty if there is none."""
    found: list[Any] = optional(answer, key, list, [])
    if not all(isinstance(one, Mapping) for one in found):
        raise NotMlflows(f"{key!r} has something else than objects in it")
    return found


def time_ms(answer: Any, key: str) -> int:
    """A time in milliseconds, also as the text that MLflow's 64-bit integers are; 0: none."""
    found = 0 if answer.get(key) is None else answer[key]
    if isinstance(found, str) and re.fullmatch("[0-9]{1,16}", found):
        found = int(found)
    if type(found) is not int or not 0 <= found < LATEST_MS:
        raise NotMlflows(f"{key!r} is no time")
    return found


def number(answer: Any, key: str) -> float:
    """A number, also as the text that NaN and the infinities are."""
    found = part(answer, key)
    try:
        return float(found if type(found) in (int, float, str) else "")
    except (ValueError, OverflowError):
        raise NotMlflows(f"{key!r} is no number") from None


def experiment(found: Any, wanted: str | None = None) -> tuple[str, bool]:
    """The id of an experiment, and whether it is deleted."""
    return identifier(found, "experiment_id", wanted), text(found, "lifecycle_stage") == "deleted"


def run_ref(info: Any, run_id: str | None = None, experiment_id: str | None = None) -> RunRef:
    """A run by its info; if they are given, the one with these ids."""
    place = text(info, "artifact_uri")
    if not place or len(place) > TEXT_CHARS:
        raise NotMlflows("'artifact_uri' is empty or too long")
    return RunRef(
        run_id=identifier(info, "run_id", run_id),
        experiment_id=identifier(info, "experiment_id", experiment_id),
        run_name=text(info, "run_name")[:TEXT_CHARS],
        artifact_uri=place,
        start_ms=time_ms(info, "start_time"),
    )


def stored_run(run: Any, run_id: str | None = None) -> StoredRun:
    """A run with its numbers, tags and params."""
    info, data = thing(run, "info"), mapping(run, "data")
    metrics = objects(data, "metrics")
    return StoredRun(
        ref=run_ref(info, run_id),
        status=text(info, "status"),
        end_ms=time_ms(info, "end_time") or None,
        metrics=_by_key(metrics, lambda one: number(one, "value")),
        tags=_by_key(objects(data, "tags"), lambda one: text(one, "value")),
        metric_times=_by_key(metrics, lambda one: time_ms(one, "timestamp")),
        params=_by_key(objects(data, "params"), lambda one: text(one, "value")),
    )


def created_run(run: Any, wanted: NewRun) -> RunRef:
    """The run that was created, in the experiment and for the trace that it was wanted for."""
    tags, found = dict(wanted.tags), stored_run(run)
    own = tags.get("qitos.trace_id")
    if own is not None and found.tags.get("qitos.trace_id", own) != own:
        raise NotMlflows("it has the run of another trace")
    return run_ref(run["info"], experiment_id=wanted.experiment_id)


def with_tag(runs: Iterable[StoredRun], tag: str, value: str) -> list[StoredRun]:
    """The runs that were searched for by a tag. All of them have it."""
    found = list(runs)
    if any(run.tags.get(tag) != value for run in found):
        raise NotMlflows(f"it has runs without the tag {tag!r} that was searched for")
    return found


def trace_info(info: Any, trace_id: str) -> Mapping[str, Any]:
    """What is said of a trace: the parts of it that are read have their types."""
    if part(info, "trace_id") != trace_id:
        raise NotMlflows("'trace_id' is another one than was asked for")
    location = mapping(mapping(info, "trace_location"), "mlflow_experiment")
    if location:
        identifier(location, "experiment_id")
    for name in ("tags", "trace_metadata"):
        for key in mapping(info, name):
            text(info[name], key)
    for one in objects(info, "assessments"):
        text(one, "assessment_id")
        mapping(one, "metadata")
    return info  # type: ignore[no-any-return]


def total(points: Sequence[Mapping[str, Any]]) -> float | None:
    """The sum that MLflow's QueryTraceMetrics was asked for; None if there is nothing to add."""
    if not points:
        return None
    found = number(thing(points[0], "values"), "SUM")
    if not math.isfinite(found):
        raise NotMlflows("'SUM' is no number")
    return found


def _by_key(items: Sequence[Mapping[str, Any]], value: Callable[[Any], T]) -> dict[str, T]:
    return {_name(one): value(one) for one in items}


def _name(item: Any) -> str:
    found = part(item, "key")
    if not isinstance(found, str) or not found:
        raise NotMlflows("'key' is no name")
    return found
