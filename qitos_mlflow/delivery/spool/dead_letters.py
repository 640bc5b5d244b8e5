"""Keeps what can never be delivered, and why: what the server refused, and damaged lines.

The files that stay when a segment is delivered (see `paths`) have a share of the spool of their
own, so that they never take the space of records. What goes beyond that share is counted only.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.spool import line_format
from qitos_mlflow.delivery.spool.counts import ASIDE_FULL, Counts, reason_of
from qitos_mlflow.delivery.spool.paths import Paths, Quota, open_private, sync_directory, write_all


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
        descriptor = open_private(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            torn = b""
            if os.fstat(descriptor).st_size:
                os.lseek(descriptor, -1, os.SEEK_END)
                torn = b"" if os.read(descriptor, 1) == line_format.LF else line_format.LF
            write_all(descriptor, torn + b"".join(kept))
            os.fsync(descriptor)  # Once the records are acknowledged, this is the only copy.
        finally:
            os.close(descriptor)
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
        with suppress(OSError), path.open("rb") as file:
            for line in file:
                try:
                    found[str(json.loads(line)["reason"])] += 1
                except (ValueError, KeyError, TypeError):  # As all lines of a ".bad" file.
                    found["damaged line of the spool"] += 1
    return found


def _json_line(letter: DeadLetter) -> bytes:
    content: dict[str, object] = {"time_ns": time.time_ns(), "reason": letter.reason}
    try:
        content["record"] = letter.record.decode()
    except UnicodeDecodeError:
        content["record_base64"] = base64.b64encode(letter.record).decode()
    if letter.header:
        content["header"] = letter.header.decode()
    return json.dumps(content).encode() + line_format.LF
