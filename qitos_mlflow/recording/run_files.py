"""Files that go with a run: the final answer, and what QitOS itself wrote to its run directory.

On the agent's thread a file is only a path. The spooling thread reads it, so that its content
travels, and survives, like any other record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RUN_FILES = ("manifest.json", "events.jsonl", "steps.jsonl")
"""What a QitOS run directory (`runs/<run_id>/`) holds."""

MAX_BYTES = 16 * 1024 * 1024
"""A larger file stays where it is; the artifact gives its path and size."""


def of_trace(trace_id: str, metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records of the files of a trace that is ending. Agent's thread; touches no disk."""
    answer = metadata.get("final_result")
    if answer is not None:
        path = "final_answer.txt" if isinstance(answer, str) else "final_answer.json"
        yield {"kind": "artifact", "trace_id": trace_id, "path": path, "content": answer}
    directory = metadata.get("qitos_run_dir")
    if isinstance(directory, str):
        for name in RUN_FILES:
            file = str(Path(directory, name))
            yield {"kind": "artifact", "trace_id": trace_id, "path": f"qitos/{name}", "file": file}


def read(record: dict[str, Any]) -> dict[str, Any] | None:
    """`record` with the content of its `file`; None if there is no such file.

    Spooling thread; reads the disk. Newlines stay as they are; bytes that are not UTF-8 become
    U+FFFD.

    Raises:
        OSError: the file exists and cannot be read.
    """
    if "file" not in record:
        return record
    path = Path(record.pop("file"))
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            record["content"] = f"{path} has {size} bytes; files over {MAX_BYTES} stay there\n"
        else:
            record["content"] = path.read_bytes().decode("utf-8", "replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record
