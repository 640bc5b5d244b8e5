"""Files that go with a run: the final answer, and the directory that QitOS itself wrote of it.

On the agent's thread they are names only; the worker reads the files, so that they travel, and
survive, like any other record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

RUN_FILES = ("manifest.json", "events.jsonl", "steps.jsonl")
"""What a QitOS run directory (`runs/<run_id>/`) holds."""

MAX_BYTES = 16 * 1024 * 1024
"""A larger file is left where it is, and the artifact says so."""


def of_trace(trace_id: str, metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The records that stand for the files of a trace that is ending. Touches no disk."""
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
    """`record` with the content of its file in place of the name; None when there is no file.

    On the worker: reads the disk.

    Raises:
        OSError: there is one that cannot be read.
    """
    if "file" not in record:
        return record
    path = Path(record.pop("file"))
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            record["content"] = f"{path} has {size} bytes; files over {MAX_BYTES} stay there\n"
        else:
            record["content"] = path.read_bytes().decode(
                "utf-8", "replace"
            )  # Newlines as they are.
    except (FileNotFoundError, NotADirectoryError):
        return None
    return record
