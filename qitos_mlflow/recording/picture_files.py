"""Picture files that a span's messages name by their path, read as the span ends.

A desktop's screenshots are one file, written anew with each step. So the agent's thread waits until
the file is read. Another thread reads it: a path may be on a network that is gone, and nothing can
end a read there. The agent waits `WAIT_S` at most, and after a wait in vain not at all for a while.
"""

from __future__ import annotations

import os
import time
from base64 import b64encode
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from qitos_mlflow._guard import shield, warn
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.delivery import open_regular
from qitos_mlflow.recording.to_json import IMAGE_FILE, Snapshot, encode
from qitos_mlflow.redaction.pictures import reference, type_of

WAIT_S = 0.2
"""Longest wait for the files of one span (seconds). One of 1 MB takes 2 ms; one that is the same as
for the last span 0.1 ms."""
PAUSE_S = 10.0
"""After a wait in vain, no file is read for so long (seconds), nor while that reading hangs."""
MAX_FILES = 8
"""Files that are read for one span; the newest messages come last, and first here."""
MAX_SEEN = 200
"""Files that a trace remembers as read."""
SETTLED_NS = 100_000_000
"""A file that has just been written may be written again within one tick of the file system's
clock (nanoseconds). Then only its content shows it."""

READ_FOR = frozenset({"generation", "decide", "tool", "mcp"})
"""Spans that end before the next screenshot. As a step ends, its own one is overwritten already."""

Seen = dict[str, tuple[tuple[int, ...], str]]
"""What a trace has read: for each path the file's state, and the reference to its picture."""


def with_picture_files(snapshot: Snapshot, seen: Seen, max_bytes: int) -> Snapshot:
    """The record with the files that its image blocks name. Agent's thread; never raises.

    They are in its field `picture_files`: for each path the media type, and as `data` the content
    in base64, or a reference to it if the trace has recorded it.

    Args:
        snapshot: of a span in `READ_FOR`.
        seen: the trace's; changed.
        max_bytes: of all files together; one that has no room is not read (bytes).
    """
    global _late
    if not snapshot.names_files:
        return snapshot
    with shield("picture_files"):
        record = snapshot.record
        named = dict.fromkeys(reversed([*_paths(record)]))
        paths = [path for path in [*named][:MAX_FILES] if "://" not in path]
        if not paths or (_late is not None and _late.blocks()):
            return snapshot
        reading = _Reading(paths, seen.copy(), max_bytes)
        reading.start()
        reading.join(WAIT_S)
        if reading.is_alive():
            _late = reading
            warn("picture_files", "a picture's file cannot be read in time; traces go without it")
        elif reading.found:
            if len(seen) < MAX_SEEN:
                seen.update(reading.read)
            return encode({**record, "picture_files": reading.found})
    return snapshot


def _paths(value: Any) -> Iterator[str]:
    """The paths in the image blocks in `value`, in order."""
    if isinstance(value, dict):
        if value.get("type") == IMAGE_FILE and isinstance(path := value.get("path"), str):
            yield path
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return
    for item in value:
        yield from _paths(item)


def put_files(record: dict[str, Any]) -> None:
    """Put the contents of `picture_files` into the image blocks that name the files."""
    if files := record.pop("picture_files", None):
        for part in ("data", "output"):
            if part in record:
                record[part] = _with_contents(record[part], files)


class _Reading(OwnThread):
    """Reads files, once."""

    def __init__(self, paths: list[str], seen: Seen, max_bytes: int) -> None:
        super().__init__("qitos-mlflow-picture-files")
        self._paths, self._seen, self._left_bytes = paths, seen, max_bytes
        self._began_s = time.monotonic()
        self.found: dict[str, dict[str, str]] = {}
        self.read: Seen = {}

    def blocks(self) -> bool:
        """Whether this reading, which was late, keeps others from being tried."""
        return self.is_alive() or time.monotonic() < self._began_s + PAUSE_S

    def work(self) -> None:
        for path in self._paths:
            with suppress(OSError, ValueError):
                self._read(path)

    def _read(self, path: str) -> None:
        with os.fdopen(open_regular(Path(path)), "rb") as file:
            now = os.fstat(file.fileno())
            if now.st_size > self._left_bytes:
                return
            state = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            known = self._seen.get(path)
            if known is not None and known[0] == state:
                self.found[path] = {"data": known[1]}
                return
            data = file.read(now.st_size + 1)
        base64 = b64encode(data).decode()
        # Whatever it is otherwise, it is no picture, or not yet.
        if len(data) == now.st_size and (media := type_of(base64)) is not None:
            self._left_bytes -= len(data)
            self.found[path] = {"data": base64, "mime_type": media}
            if time.time_ns() - max(now.st_mtime_ns, now.st_ctime_ns) > SETTLED_NS:
                self.read[path] = state, reference(data, media)


def _with_contents(value: Any, files: dict[str, dict[str, str]]) -> Any:
    if isinstance(value, list):
        return [_with_contents(item, files) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == IMAGE_FILE and (found := files.get(str(value.get("path")))):
        return {**value, **found}
    return {key: _with_contents(item, files) for key, item in value.items()}


_late: _Reading | None = None
"""The last one that the agent has waited for in vain."""
