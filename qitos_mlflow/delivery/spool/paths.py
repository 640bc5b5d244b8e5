"""The files of the spool: their names, and how much room they have together.

Everything of one segment begins with its stem, ``<machine>-<pid>-<start>-<random>``:

    <stem>.<base>.seg   a part: the lines whose positions begin at <base> (16 hex digits)
    <stem>.ack          how far records were accepted, and the sink's state at that point
    <stem>.ack.tmp      the next acknowledgement while it is written
    <stem>.own          lock of the process that appends
    <stem>.ship         lock of the process that sends
    <stem>.dead         records the server refused for good, damaged lines, and why; stays
    <stem>.<base>.bad   a part that could not be read; stays
    <stem>.bad          damaged lines, as spools of format 1 keep them; stays
    <stem>.lost         losses by reason, JSON; stays

What stays does so until it is purged, so it has a bound of its own: it never takes the space of
records.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
import time
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from qitos_mlflow.delivery.spool.files import check_file

ASIDE_SUFFIXES = (".dead", ".dead.tmp", ".bad", ".lost", ".lost.tmp")
"""Files that stay when their segment is delivered."""
SCAN_S = 2.0
"""The sizes of the whole directory are read at most this often (seconds)."""

_NAME = re.compile(
    r"([\w-]+)\.(?:[0-9a-f]{16}\.(?:seg|bad)|own|ship|bad|(?:ack|dead|lost)(?:\.tmp)?)", re.ASCII
)


class _File:
    """A file of the segment, by its suffix."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix

    def __get__(self, paths: Paths, _: object = None) -> Path:
        return paths.directory / f"{paths.stem}{self._suffix}"


@dataclass(frozen=True)
class Paths:
    """Where the files of one segment are; what each holds is said above."""

    directory: Path
    stem: str
    listed: tuple[str, ...] | None = field(default=None, compare=False, repr=False)
    """The names of its files when the directory was last read; None: it was not read.

    Reading it for each of many segments would take a time that grows with their square.
    """

    ack = _File(".ack")
    own = _File(".own")
    ship = _File(".ship")
    dead = _File(".dead")
    bad = _File(".bad")
    lost = _File(".lost")

    def part(self, base: int) -> Path:
        """The part whose first line has position `base`."""
        return self.directory / f"{self.stem}.{base:016x}.seg"

    def files(self, *, now: bool = False) -> list[Path]:
        """All of its files when the directory was last read: the parts in order, then the others.

        With `now`, and if it was never read, it is read first.
        """
        names = self.listed
        if now or names is None:
            try:
                names = tuple(_list(self.directory, f"{self.stem}.")[self.stem])
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                return []
        return [self.directory / name for name in sorted(names)]

    def all_own(self) -> bool:
        """Whether all of its files are this user's."""
        with suppress(FileNotFoundError):  # It has been delivered.
            return not hasattr(os, "geteuid") or all(
                path.lstat().st_uid == os.geteuid() for path in self.files()
            )
        return True

    def parts(self, *, now: bool = False) -> list[tuple[int, Path]]:
        """The parts with their bases, in order; see `files`."""
        parts = [path for path in self.files(now=now) if path.suffix == ".seg"]
        return [(int(path.name.rsplit(".", 2)[1], 16), path) for path in parts]


def new_stem() -> str:
    """A stem that no other segment has, on this machine or another that shares the directory."""
    machine = re.sub(r"[^A-Za-z0-9_-]", "_", socket.gethostname())[:40] or "machine"
    return f"{machine}-{os.getpid()}-{time.time_ns():x}-{secrets.token_hex(4)}"


def find_segments(path: Path) -> list[Paths]:
    """The segments in the directory `path`, oldest first, or the one whose file `path` is.

    Raises:
        OSError: the directory cannot be read.
    """
    if path.is_dir():
        found = [Paths(path, stem, tuple(names)) for stem, names in _list(path).items()]
        return sorted(found, key=lambda paths: _age(paths.stem))
    name = _NAME.fullmatch(path.name)
    return [Paths(path.parent, name[1])] if name else []


def _list(directory: Path, prefix: str = "") -> dict[str, list[str]]:
    """The names of the files of each segment, by its stem; all other files are left alone."""
    found: dict[str, list[str]] = defaultdict(list)
    for entry in os.listdir(directory):  # noqa: PTH208 - thousands, without a Path for each
        if entry.startswith(prefix) and (name := _NAME.fullmatch(entry)):
            found[name[1]].append(entry)
    return found


def _age(stem: str) -> int:
    try:
        return int(stem.rsplit("-", 2)[1], 16)
    except (IndexError, ValueError):
        return 0


class Quota:
    """A bound of the directory's size, read now and then, counted in between. One thread.

    Args:
        directory: the spool; files of all processes count.
        cap_bytes: the bound.
        aside: bounds what is kept aside; otherwise everything else.
    """

    def __init__(self, directory: Path, cap_bytes: int, *, aside: bool = False) -> None:
        self._directory = directory
        self._cap_bytes = cap_bytes
        self._aside = aside
        self._used_bytes = 0
        self._scan_at = float("-inf")

    def has_room(self, size: int, share: float = 1.0) -> bool:
        """Whether `size` bytes more stay within `share` of the bound."""
        if time.monotonic() >= self._scan_at:
            self._used_bytes = 0
            with suppress(OSError), os.scandir(self._directory) as entries:
                for entry in entries:
                    if entry.name.endswith(ASIDE_SUFFIXES) == self._aside:
                        with suppress(OSError):  # It is gone meanwhile, or none of ours.
                            self._used_bytes += check_file(entry)
            self._scan_at = time.monotonic() + SCAN_S
        return self._used_bytes + size <= self._cap_bytes * share

    def take(self, size: int, share: float = 1.0) -> bool:
        """Count `size` bytes that are about to be written, if there is room for them."""
        room = self.has_room(size, share)
        self._used_bytes += size if room else 0
        return room
