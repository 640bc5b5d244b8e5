"""Snapshots: what a record holds of a trace or span event, as it is at that moment. Agent's thread.

`to_json.encode` makes a copy of it at once, so that later changes of the span no longer matter. An
unknown object becomes its short `repr` or its type's name. Times and redaction follow on the
spooling thread: `normalize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from traceback import walk_tb
from typing import Any

from qitos_mlflow.recording.simpler import SlowTexts, text_of
from qitos_mlflow.redaction.trim import cut_later
from qitos_mlflow.tracing.redaction import REDACTED, redacted_export

WITHHELD = "[content off]"
"""In the place of an error's text if content is off."""

MAX_FRAMES = 64
"""Stack frames kept of an exception: the innermost ones."""

RUN_FILES = ("manifest.json", "events.jsonl", "steps.jsonl")
"""What a QitOS run directory (`runs/<run_id>/`) holds."""


def describe(error: BaseException, content: bool) -> dict[str, Any]:
    """Type, message and stack of `error`. The spooling thread adds the source lines.

    Without content it is the type only.
    """
    if not content:
        return {"type": type(error).__qualname__, "message": WITHHELD}
    frames = [
        (frame.f_code.co_filename, line, frame.f_code.co_name)
        for frame, line in walk_tb(error.__traceback__)
    ]
    return {
        "type": type(error).__qualname__,
        "message": text_of(error, SlowTexts()),
        "frames": frames[-MAX_FRAMES:],
    }


def span_record(span: Any, content: bool, field_chars: int) -> dict[str, Any]:
    """The record of a span that has just ended, without what its trace knows of it.

    Args:
        span: the host's Span; only its documented attributes are read.
        content: if False, inputs, outputs and error texts are left out; numbers and names stay.
        field_chars: longest text kept of one field (characters).
    """
    data = {**span.data.export()}
    kind = data.pop("type", None) or span.data.type
    record = {
        "kind": "span",
        "span_id": span.span_id,
        "parent_id": span.parent_span_id,
        "type": kind,
        "started_at": span.started_at,
        "ended_at": span.ended_at,
        "error": span.error,
    }
    if content:
        for key, value in data.items():
            if type(value) is str and len(value) > field_chars:
                data[key] = cut_later(value, field_chars)
        output = span.output
        if type(output) is str and len(output) > field_chars:
            output = cut_later(output, field_chars)
        record["output"] = output
    else:
        data = structure_only(redacted_export(data))
        if record["error"] is not None:
            record["error"] = WITHHELD
    if (exception := getattr(span, "exception", None)) is not None:
        record["exception"] = describe(exception, content)
    record["data"] = data
    return record


def files_of_run(trace_id: str, metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of a run's files: the final answer, and what QitOS wrote to its run directory.

    Touches no disk: the spooling thread reads a `file`, so that its content travels, and survives,
    like any other record.
    """
    answer = metadata.get("final_result")
    if answer is not None:
        path = "final_answer.txt" if issubclass(type(answer), str) else "final_answer.json"
        yield {"kind": "artifact", "trace_id": trace_id, "path": path, "content": answer}
    directory = metadata.get("qitos_run_dir")
    if isinstance(directory, str):
        for name in RUN_FILES:
            file = str(Path(directory, name))
            yield {"kind": "artifact", "trace_id": trace_id, "path": f"qitos/{name}", "file": file}


def structure_only(redacted: Mapping[str, Any]) -> dict[str, Any]:
    """The exported fields without those whose content was redacted."""
    return {key: value for key, value in redacted.items() if value != REDACTED}
