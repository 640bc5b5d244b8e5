"""Keeps what can never be delivered, and why: what the server refused, and damaged lines.

The files that stay when a segment is delivered (see `paths`) have a share of the spool of their
own, so that they never take the space of records. What goes beyond that share is counted only.
"""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import ASIDE_FULL, Counts, reason_of
from qitos_mlflow.delivery.spool.files import json_object, opened, sync_directory, write_all
from qitos_mlflow.delivery.spool.paths import Paths, Quota

REASON_BYTES = 64 * 1024
"""Where in a line its reason ends, at most (bytes)."""
MAX_REASONS = 1000
"""Reasons of a segment that are told apart."""

_REASON = re.compile(rb'\{"time_ns": \d+, "reason": ("(?:[^"\\]|\\.)*"), ')


@dataclass(frozen=True)
class DeadLetter:
    """A record that cannot be delivered, or a part of one, and why."""

    record: bytes
    reason: str
    header: bytes = b""
    """A segment's header, if the record may be sent again (see `segments.send_again`)."""


def bury(dead: Sequence[DeadLetter], path: Path, quota: Quota, stats: Counts) -> None:
    """Append `dead` to the file `path` as far as `quota` has room; count all of it."""
    if not dead:
        return
    _guard.warn(
        "delivery.dead",
        "%s record(s) cannot be delivered, the first one because: %s; they are kept in %s",
        len(dead),
        dead[0].reason,
        path,
    )
    kept, put_off = [], 0
    for letter in dead:
        line = _json_line(letter)
        if quota.take(len(line)):
            kept.append(line)
            put_off += bool(letter.header)
    if len(kept) < len(dead):
        stats.drop(ASIDE_FULL, len(dead) - len(kept))
    if not kept:
        return
    try:
        with opened(path, os.O_RDWR | os.O_CREAT | os.O_APPEND) as descriptor:
            torn = b""
            if os.fstat(descriptor).st_size:
                os.lseek(descriptor, -1, os.SEEK_END)
                torn = b"" if os.read(descriptor, 1) == line_format.LF else line_format.LF
            write_all(descriptor, torn + b"".join(kept))
            os.fsync(descriptor)  # Once the records are acknowledged, this is the only copy.
        sync_directory(path.parent)
    except OSError as error:
        _guard.warn(
            "delivery.aside",
            "%s cannot be written (%s): it lacks some entries",
            path,
            error,
        )
        stats.drop(reason_of(error), len(kept))
    else:
        stats.add(dead_letters=len(kept), put_off=put_off)


def load_dead_letters(paths: Paths) -> Counter[str]:
    """How many are kept of a segment, by reason."""
    found: Counter[str] = Counter()
    for path in (paths.dead, paths.bad):
        with suppress(OSError):
            for begin in lines_of(path, REASON_BYTES):
                reason = _REASON.match(begin)  # There is none in a ".bad" file.
                text = json_object(b'{"is":%b}' % reason[1]).get("is") if reason else None
                if text not in found and len(found) >= MAX_REASONS:
                    text = "other reasons"
                found[text or "damaged line of the spool"] += 1
    return found


def letter_of(line: bytes) -> DeadLetter | None:
    """The dead letter in a line if it may be sent again; otherwise None."""
    content = json_object(line) if len(line) < line_format.LINE_BYTES else {}
    record, header = content.get("record"), content.get("header")
    if isinstance(record, str) and isinstance(header, str):
        return DeadLetter(record.encode(), "", header.encode())
    return None


def lines_of(path: Path, most: int) -> Iterator[bytes]:
    """The first `most` bytes of each line of a file, with its LF.

    Raises:
        OSError: the file cannot be read.
    """
    with opened(path) as descriptor, os.fdopen(descriptor, "rb", closefd=False) as file:
        while line := file.readline(most):
            yield line
            while line and not line.endswith(line_format.LF):
                line = file.readline(most)


def _json_line(letter: DeadLetter) -> bytes:
    content: dict[str, object] = {"time_ns": time.time_ns(), "reason": letter.reason}
    try:
        content["record"] = letter.record.decode()
    except UnicodeDecodeError:
        content["record_base64"] = base64.b64encode(letter.record).decode()
    if letter.header:
        content["header"] = letter.header.decode()
    return json.dumps(content).encode() + line_format.LF
