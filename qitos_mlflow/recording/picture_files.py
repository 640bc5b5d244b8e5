"""Picture files that a span's messages name by their path, read as the span ends.

A desktop's screenshots are one file, written anew with each step. So the file is read on the
agent's thread's time, but by another thread: a path may be on a network that is gone, and nothing
can end a read there. The agent waits `WAIT_S` at most, and not at all while an earlier read hangs.
"""

from __future__ import annotations

import os
import re
import stat
from base64 import b64encode
from typing import Any

import orjson

from qitos_mlflow._guard import shield, warn
from qitos_mlflow._inheritance import OwnThread
from qitos_mlflow.redaction.pictures import reference, type_of

WAIT_S = 0.2
"""Longest wait for the files of one span (seconds). One of 1 MB takes 2 ms; one that is the same as
for the last span 0.1 ms."""
MAX_FILES = 8
"""Files that are read for one span; the newest messages come last, and first here."""
MAX_SEEN = 200
"""Files that a trace remembers as read."""

READ_FOR = frozenset({"generation", "decide", "tool", "mcp"})
"""Spans that end before the next screenshot. As a step ends, its own one is overwritten already."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_TYPE = b"image_file"
_PATH = re.compile(rb'"type":"image_file"[^{}\[\]]*?"path":("(?:[^"\\]|\\.)*")')

Seen = dict[str, tuple[tuple[int, ...], str]]
"""What a trace has read: for each path the file's state, and the reference to its picture."""


def with_picture_files(payload: bytes, seen: Seen, max_bytes: int) -> bytes:
    """The record `payload` with the files that its image blocks name. Agent's thread; never raises.

    They are in its field `picture_files`: for each path the media type, and as `data` the content
    in base64, or a reference to it if the trace has recorded it.

    Args:
        payload: of a span in `READ_FOR`.
        seen: the trace's; changed.
        max_bytes: a larger file is not read (bytes).
    """
    global _reading
    if _TYPE not in payload:
        return payload
    with shield("picture_files"):
        named = dict.fromkeys(orjson.loads(path) for path in reversed(_PATH.findall(payload)))
        paths = [path for path in [*named][:MAX_FILES] if "://" not in path]
        if not paths or (_reading is not None and _reading.is_alive()):
            return payload
        _reading = reading = _Reading(paths, seen.copy(), max_bytes)
        reading.start()
        reading.join(WAIT_S)
        if reading.is_alive():
            warn("picture_files", "%s cannot be read in time; traces go without it", paths)
        elif reading.found:
            if len(seen) < MAX_SEEN:
                seen.update(reading.read)
            return payload[:-1] + b',"picture_files":' + orjson.dumps(reading.found) + b"}"
    return payload


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
        self._paths, self._seen, self._max_bytes = paths, seen, max_bytes
        self.found: dict[str, dict[str, str]] = {}
        self.read: Seen = {}

    def work(self) -> None:
        for path in self._paths:
            try:
                self._read(path)
            except (OSError, ValueError):
                continue

    def _read(self, path: str) -> None:
        # A FIFO would not open before something writes to it.
        file = os.open(path, _FLAGS)
        try:
            now = os.fstat(file)
            state = (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            if not stat.S_ISREG(now.st_mode) or now.st_size > self._max_bytes:
                return
            known = self._seen.get(path)
            if known is not None and known[0] == state:
                self.found[path] = {"data": known[1], "mime_type": ""}
                return
            with open(file, "rb", closefd=False) as content:
                data = content.read(self._max_bytes)
        finally:
            os.close(file)
        base64 = b64encode(data).decode()
        if (media := type_of(base64)) is None:  # Whatever it is, it is no picture.
            return
        self.found[path] = {"data": base64, "mime_type": media}
        self.read[path] = state, reference(data, media, len(base64))


def _with_contents(value: Any, files: dict[str, dict[str, str]]) -> Any:
    if isinstance(value, list):
        return [_with_contents(item, files) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "image_file" and (found := files.get(str(value.get("path")))):
        return {**value, **found}
    return {key: _with_contents(item, files) for key, item in value.items()}


_reading: _Reading | None = None
