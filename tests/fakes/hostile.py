"""What another user, or a broken disk, may put where the files of a segment are.

`PLANTS` has a function for each kind. It is given a segment as a dead process has left it, with
one part that holds two records, and changes its files.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from qitos_mlflow.delivery import Paths
from qitos_mlflow.delivery.spool import line_format

NOW = 1_800_000_000_000_000_000
GIB = 1024**3

Plant = Callable[[Paths], None]

NAMES = ("seg", "ack", "own", "ship", "dead", "lost")


def file_of(paths: Paths, name: str) -> Path:
    """One of `NAMES`, whether it is there or not."""
    return paths.part(0) if name == "seg" else paths.directory / f"{paths.stem}.{name}"


def _instead(name: str, make: Callable[[Path], Any], paths: Paths) -> None:
    path = file_of(paths, name)
    path.unlink(missing_ok=True)
    make(path)


def _socket(path: Path) -> None:
    # A socket's name must be short.
    here = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{here}/{path.name}")
    os.close(here)


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 * GIB)


def _elsewhere(path: Path) -> None:
    target = path.parent.parent / "elsewhere"
    target.write_bytes(b"of the user's\n" * 100)
    path.symlink_to(target)


THINGS: dict[str, Callable[[Path], Any]] = {
    "fifo": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "link": _elsewhere,
    "directory": lambda path: path.mkdir(),
    "2 GB": _sparse,
}
"""What is no file of ours at all: the segment is left alone and named."""


def line(kind: bytes, payload: bytes, time_ns: int = NOW) -> bytes:
    """A line whose checksum is right."""
    return line_format.encode(kind, payload, time_ns)


def _part(head: bytes, caller: bytes, *records: bytes) -> Plant:
    lines = [line(b"h", head), line(b"c", caller)] * 2 + [line(b"r", one) for one in records]

    def plant(paths: Paths) -> None:
        paths.part(0).write_bytes(b"".join(lines))

    return plant


def _content(name: str, content: bytes) -> Plant:
    return lambda paths: file_of(paths, name).write_bytes(content) and None


HEAD = json.dumps({"host": socket.gethostname(), "pid": 1, "offline": False}).encode()
CALLER = b'{"tracking_uri": null, "cwd": "/nowhere"}'
DEEP = b"[" * 100_000
HALF = rb'"\ud800"'
HUGE = b"9" * 5000

ODD_VALUES = {
    "text": b"never JSON",
    "nothing": b"",
    "list": b"[1, 2]",
    "null": b"null",
    "deep": DEEP,
    "deep inside": b'{"pid": ' + DEEP,
    "half a character": b'{"host": %b, "tracking_uri": %b}' % (HALF, HALF),
    "no UTF-8": b'{"host": "\xff", "pid": 1}',
    "NUL": b"\0" * 100,
    "NaN": b'{"pid": NaN, "host": NaN, "tracking_uri": NaN}',
    "infinite": b'{"pid": 1e400, "host": -1e400, "cwd": 1e400}',
    "huge": b'{"pid": %b, "host": %b, "headers": %b}' % (HUGE, HUGE, HUGE),
    "nulls": b'{"pid": null, "host": null, "offline": null, "tracking_uri": 7, "headers": null}',
    "objects": b'{"pid": {}, "host": [], "offline": {}, "tracking_uri": {}, "headers": [1]}',
    "odd URI": b'{"tracking_uri": "http://[bad", "cwd": ""}',
    "odd tenant": b'{"tracking_uri": "http://[bad", "headers": {"a": {"b": []}}}',
    "odd experiment": b'{"tracking_uri": null, "experiment_name": {"a": 1}}',
}
TRACE_END = b'{"kind": "trace_end", "trace_id": "t", "dropped": %b}'
TRACE_START = b'{"kind": "trace_start", "trace_id": "t", "settings": %b}'
LETTER = b'{"time_ns": 1, "reason": %b, "record": "r", "header": "h"}\n'

PLANTS: dict[str, Plant] = {
    **{
        f"{thing} as {name}": partial(_instead, name, make)
        for thing, make in THINGS.items()
        for name in NAMES
    },
    **{f"head: {key}": _part(value, CALLER, b"1", b"2") for key, value in ODD_VALUES.items()},
    **{f"caller: {key}": _part(HEAD, value, b"1") for key, value in ODD_VALUES.items()},
    **{f"record: {key}": _part(HEAD, CALLER, value) for key, value in ODD_VALUES.items()},
    **{
        f"end: {key}": _part(HEAD, CALLER, TRACE_END % value, TRACE_START % value)
        for key, value in ODD_VALUES.items()
    },
    **{f"lock: {key}": _content("own", value) for key, value in ODD_VALUES.items()},
    **{f"lost: {key}": _content("lost", value) for key, value in ODD_VALUES.items()},
    "lost: negative": _content("lost", b'{"queue_full": -5}'),
    "lost: text": _content("lost", b'{"queue_full": "5"}'),
    **{f"dead: {key}": _content("dead", value) for key, value in ODD_VALUES.items()},
    **{f"reason: {key}": _content("dead", LETTER % value) for key, value in ODD_VALUES.items()},
    "reason: half a character": _content("dead", LETTER % HALF),
    "reasons: many": _content(
        "dead", b"".join(LETTER % b'"%d"' % n for n in range(20_000)).replace(b'"h"', b"0")
    ),
    "ack: zz": _content("ack", line(b"a", b"zz 1")),
    "ack: empty": _content("ack", line(b"a", b"")),
    "ack: negative": _content("ack", line(b"a", b"-1 1")),
    "ack: float": _content("ack", line(b"a", b"1.5 1")),
    "ack: huge": _content("ack", line(b"a", b"f" * 10_000 + b" 1")),
    "ack: beyond the file": _content("ack", line(b"a", b"ffffff 1")),
    "ack: beyond all files": _content("ack", line(b"a", b"f" * 16 + b" 1")),
    "ack: amid a line": _content("ack", line(b"a", b"5 1")),
    "ack: a time of 4 KB": _content("ack", b"1a %b 3 00000000 0 1\n" % (b"f" * 4096)),
    "time: in 300 years": lambda paths: (
        paths.part(0).write_bytes(line(b"h", HEAD, 2**63 - 1) + line(b"c", CALLER)) and None
    ),
    "time: too large": lambda paths: (
        paths.part(0).write_bytes(line(b"h", HEAD, 16**400) + line(b"c", CALLER)) and None
    ),
    "lines: empty ones": _content("seg", b"\n" * 3_000_000),
    "lines: one of NUL": _content("seg", b"\0" * 3_000_000),
    "lines: beginnings": _content("seg", b"1r 0 ffff 00000000 " * 100_000),
    "lines: beginnings of themselves": _content(
        "seg", b"".join(b"1r 0 %06x 00000000 " % (n * 21 - 19) for n in range(50_000, 0, -1))
    ),
    "part: at the end of all": lambda paths: (
        paths.part(0xFFFFFFFFFFFFFFFF).write_bytes(line(b"r", b"x")) and None
    ),
    "name: no UTF-8": lambda paths: (
        Path(os.fsdecode(os.fsencode(paths.directory) + b"/\xff\xfe-1-1-1.ack")).write_bytes(b"")
        and None
    ),
    "name: a line feed": lambda paths: (
        (paths.directory / "a\n-1-1-1.ack").write_bytes(b"") and None
    ),
    "name: other digits": lambda paths: (
        (paths.directory / "x-\u0661-\u0661-1.ack").write_bytes(b"") and None
    ),
}


def left_alone(kind: str) -> bool:
    """Whether this kind is no file of ours, so that its segment is left alone and named."""
    thing, _, name = kind.partition(" as ")
    return thing in THINGS and not (thing == "2 GB" and name in ("own", "ship"))
