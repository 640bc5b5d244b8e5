"""The file system between the spool and the disk: one call fails, or a power cut comes.

`FileCalls` sees each call that code makes below a directory, as `os`, `io` and `fcntl` have them.
`PowerCut` keeps what of it is on the disk for sure, and builds what a cut may leave of the rest.
"""

from __future__ import annotations

import io
import os
import pathlib
import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

fcntl = pytest.importorskip("fcntl")

BY_PATH = (
    *("open", "stat", "lstat", "mkdir", "chmod", "unlink", "replace", "rename", "link"),
    *("listdir", "scandir"),
)
"""Functions of `os` whose first argument is a path."""
BY_DESCRIPTOR = ("write", "read", "fsync", "ftruncate", "fstat", "lseek", "fchmod", "close")
"""Functions of `os` whose first argument is a file descriptor."""
CHANGES = {"open", "write", "ftruncate", "fsync", "mkdir", "unlink", "replace", "rename"}
"""What changes files or names, or brings them to the disk."""


class _File(io.BufferedReader):
    """A file that is read, whose reads are calls of their own."""

    def __init__(self, calls: FileCalls, path: str) -> None:
        super().__init__(io.FileIO(path))
        self._calls = calls

    def read(self, *size: Any) -> bytes:
        return self._calls.call("read", super().read, *size)

    def readline(self, *size: Any) -> bytes:
        return self._calls.call("read", super().readline, *size)


class FileCalls:
    """Every call below `root`, counted by its name; `fails` says which one fails.

    `fails` gets the name of a call and how many of that name there were before it.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.counts: Counter[str] = Counter()
        self.fails: Callable[[str, int], OSError | None] = lambda name, number: None
        self._root = str(root)
        self._counting = threading.Lock()
        self._descriptors: set[int] = set()
        for name in (*BY_PATH, *BY_DESCRIPTOR):
            stand_in = self._stand_in(name, getattr(os, name))
            patch.setattr(os, name, stand_in)
            # Python 3.10 keeps the functions that a Path calls.
            accessor = getattr(pathlib, "_NormalAccessor", None)
            if accessor is not None and name != "open" and hasattr(accessor, name):
                patch.setattr(accessor, name, staticmethod(stand_in))
        patch.setattr(fcntl, "flock", self._stand_in("flock", fcntl.flock))
        self._open = io.open
        patch.setattr(io, "open", self._open_file)
        accessor = getattr(pathlib, "_NormalAccessor", None)
        if accessor is not None:
            patch.setattr(accessor, "open", staticmethod(self._open_file))

    def call(self, name: str, real: Callable[..., Any], *args: Any, **more: Any) -> Any:
        """Count and make one call, or fail as `fails` says."""
        with self._counting:
            number = self.counts[name]
            self.counts[name] += 1
        failure = self.fails(name, number)
        if failure is not None and name != "close":
            raise failure
        result = real(*args, **more)
        if failure is not None:  # A descriptor is closed whatever close() reports.
            raise failure
        self.done(name, args, result)
        return result

    def done(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        """Called after a call that has succeeded."""

    def _is_ours(self, what: Any) -> bool:
        if isinstance(what, int):
            return what in self._descriptors
        return isinstance(what, (str, os.PathLike)) and os.fspath(what).startswith(self._root)

    def _stand_in(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(*args: Any, **more: Any) -> Any:
            if not args or not self._is_ours(args[0]):
                return real(*args, **more)
            try:
                result = self.call(name, real, *args, **more)
            finally:
                if name == "close":
                    self._descriptors.discard(args[0])
            if name == "open":
                self._descriptors.add(result)
            return result

        return stand_in

    def _open_file(self, file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        if mode != "rb" or not self._is_ours(file):
            return self._open(file, mode, *args, **more)
        return self.call("open", partial(_File, self), os.fspath(file))


@dataclass(eq=False)
class _Node:
    """A file or a directory, under whatever name. The first version is on the disk."""

    directory: bool = False
    versions: list[bytes] = field(default_factory=lambda: [b""])


_Names = dict[str, _Node]
_Change = tuple[str, Callable[[_Names], Any]]
"""The directory that it is about, and what it does to the names."""


@dataclass
class Moment:
    """What is on the disk for sure at one moment, and what may be there as well."""

    sure: _Names
    changes: list[_Change]
    contents: dict[_Node, list[bytes]]

    def left(self, into: Path, root: Path, seed: int) -> None:
        """Write into the directory `into` what a cut at this moment may leave of `root`.

        0: nothing but what is sure. 1: all, as when a process is killed. 2: all names, no content
        but what is sure. Others: any of it, at random.
        """
        chance = random.Random(seed)
        names = dict(self.sure)
        for _, change in self.changes:
            if seed in (1, 2) or (seed and chance.random() < 0.5):
                change(names)
        for name in sorted(names):
            node, target = names[name], into / os.path.relpath(name, root)
            if not target.parent.is_dir():
                continue  # Its directory is gone.
            if node.directory:
                target.mkdir(exist_ok=True)
            else:
                target.write_bytes(self._content(node, seed, chance))

    def _content(self, node: _Node, seed: int, chance: random.Random) -> bytes:
        versions = self.contents[node]
        if seed in (0, 1, 2):
            return versions[-1 if seed == 1 else 0]
        at = chance.randrange(len(versions))
        now, after = versions[at], versions[min(at + 1, len(versions) - 1)]
        torn = after[: chance.randrange(len(now), len(after) + 1)] if len(after) > len(now) else now
        # Some file systems note the new size before the content.
        return torn + b"\0" * chance.choice((0, 0, len(after) - len(torn)))


class PowerCut(FileCalls):
    """Keeps the `moments` of all calls below `root` that change something.

    A file's content is on the disk after `fsync` of the file, a name after `fsync` of the directory
    that it is in. The rest may be there or not, each change by itself.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.moments: list[Moment] = []
        self._nodes: list[_Node] = []
        self._names: _Names = {}
        self._sure: _Names = {}
        self._changes: list[_Change] = []
        self._opened: dict[int, tuple[str, _Node]] = {}
        super().__init__(root, patch)

    def done(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if not args or name not in CHANGES or (name == "open" and len(args) == 1):
            return
        at: Any = args[0] if isinstance(args[0], int) else os.fspath(args[0])
        if name == "open":
            node = self._node(at)
            self._opened[result] = (at, node)
            if args[1] & os.O_TRUNC:
                node.versions.append(b"")
        elif name == "mkdir":
            made = self._new(directory=True)
            self._change(at, lambda names: names.update({at: made}))
        elif name in ("replace", "rename"):
            moved, to = self._names[at], os.fspath(args[1])
            self._change(at, lambda names: (names.pop(at, None), names.update({to: moved})))
        elif name == "unlink":
            self._change(at, lambda names: names.pop(at, None))
        elif name == "fsync":
            self._sync(*self._opened[at])
        else:
            versions = self._opened[at][1].versions
            longer = name == "write" and versions[-1] + bytes(args[1])[:result]
            versions.append(longer or versions[-1][: args[1]])
        contents = {node: list(node.versions) for node in self._nodes}
        self.moments.append(Moment(dict(self._sure), list(self._changes), contents))

    def _node(self, path: str) -> _Node:
        """What was opened; a directory that is not known was there before."""
        if path not in self._names:
            new = self._new(directory=Path(path).is_dir())
            self._change(path, lambda names: names.update({path: new}))
            if new.directory:
                self._sure[path] = new
        return self._names[path]

    def _new(self, *, directory: bool) -> _Node:
        self._nodes.append(_Node(directory))
        return self._nodes[-1]

    def _change(self, path: str, change: Callable[[_Names], Any]) -> None:
        change(self._names)
        self._changes.append((str(Path(path).parent), change))

    def _sync(self, path: str, node: _Node) -> None:
        if not node.directory:
            del node.versions[:-1]
            return
        for place, change in self._changes:
            if place == path:
                change(self._sure)
        self._changes = [change for change in self._changes if change[0] != path]
