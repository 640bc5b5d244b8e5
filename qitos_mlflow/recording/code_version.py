"""Which version of the program's code records a trace: commit, branch, repository, changes.

git is asked once a process, on a thread of its own, so that a huge repository or a slow file system
delays nothing. The answer is part of the records, because they may be delivered elsewhere. Like
MLflow, this looks at the repository of the script, else at that of the working directory.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from qitos_mlflow._guard import shield
from qitos_mlflow._inheritance import check
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.redaction.redact import without_credentials

LOOKUP_S = 10.0
"""How long git may take (seconds). What is not known by then stays unknown."""

WAIT_S = 1.0
"""A trace's end waits, on the spooling thread, until so long after the lookup began (seconds). Else
the first trace of a short process would have no version. It must not use up the exit deadline."""

_OF_A_HOOK = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR", "GIT_PREFIX")
"""Variables that name the repository whose hook has started the process."""

_QUIET = {"GIT_OPTIONAL_LOCKS": "0", "GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0"}
"""It writes nothing, connects to nothing and asks for nothing."""


class CodeVersion:
    """Adds the version to records of one pipeline. Used by one thread at a time."""

    def __init__(self) -> None:
        self._without: set[str] = set()
        """Open traces whose start had to go without it."""

    def complete(self, record: dict[str, Any], exit_timeout_s: float) -> None:
        """Add the field `code` to the first record of the trace for which it is known."""
        kind, trace_id = record["kind"], record["trace_id"]
        lookup = _lookup_of_process()
        if kind == "trace_start" or (kind == "evaluation_start" and not _is_in_a_run(record)):
            self._without.add(trace_id)
        if trace_id not in self._without:
            return
        ends = kind in ("trace_end", "evaluation_end")
        if ends:
            left_s = lookup.began_s + min(WAIT_S, exit_timeout_s / 5) - time.monotonic()
            if left_s > 0 and not lookup.known.is_set():  # Its lock may be held since a fork.
                lookup.known.wait(left_s)
                check()
        if ends or lookup.known.is_set():
            self._without.discard(trace_id)
            if lookup.code:
                record["code"] = lookup.code


def _is_in_a_run(record: dict[str, Any]) -> bool:
    """Whether an evaluation's run is one of the user's, which has its own version."""
    return "run_id" in record["settings"]["evaluation"]


class _Lookup(OwnThread):
    """Asks git, once."""

    def __init__(self) -> None:
        super().__init__("qitos-mlflow-code-version")
        self.code: dict[str, Any] = {}  # Replaced, never changed.
        self.child: subprocess.Popen[bytes] | None = None
        self.known = threading.Event()
        self.began_s = time.monotonic()

    def work(self) -> None:
        try:
            with shield("code_version"):
                self._look()
        finally:
            self.known.set()

    def _look(self) -> None:
        script = Path(sys.argv[0] if sys.argv else "")
        places = [(str(script.parent), script.name)] if script.is_file() else []
        for directory, file in (*places, (".", "")):
            # Commands that run nothing that the repository names, so its owner does not matter.
            trusted = "-c", "safe.directory=*", "-C", directory
            head = self._git(*trusted, "rev-parse", "HEAD", "--abbrev-ref", "HEAD")
            # A script that the repository ignores is installed there, in an environment.
            if not head or (file and self._git(*trusted, "check-ignore", "--", file)):
                continue
            commit, branch = head.split()
            code = {"commit": commit, "branch": None if branch == "HEAD" else branch}
            urls = self._git(*trusted, "config", "--get-regexp", r"^remote\..*\.url$")
            if urls:
                code["repository"] = without_credentials(urls.splitlines()[0].partition(" ")[2])
            self.code = code
            changes = self._git(
                *("-c", "core.fsmonitor=false", "-C", directory, "status", "--porcelain"),
                *("--untracked-files=no", "--ignore-submodules=dirty"),
            )
            self.code = {**code, "dirty": None if changes is None else bool(changes)}
            return

    def _git(self, *arguments: str) -> str | None:
        """What git says; None if it fails, takes too long, or is not there."""
        left_s = self.began_s + LOOKUP_S - time.monotonic()
        try:
            environ = {key: text for key, text in os.environ.items() if key not in _OF_A_HOOK}
            with subprocess.Popen(  # noqa: S603
                ["git", *arguments],  # noqa: S607 - the one that the user would run
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**environ, **_QUIET},
                creationflags=getattr(subprocess, "CREATE_NO_WINDOW", 0),
            ) as self.child:
                try:
                    said, _ = self.child.communicate(timeout=max(0.0, left_s))
                except subprocess.TimeoutExpired:
                    self.child.kill()
                    return None
                return said.decode("utf-8", "replace").strip() if not self.child.wait() else None
        except (OSError, RuntimeError):
            return None
        finally:
            check()


_lookup: _Lookup | None = None


def _lookup_of_process() -> _Lookup:
    global _lookup
    if _lookup is None:
        lookup = _Lookup()
        try:
            lookup.start()
        except (RuntimeError, MemoryError):  # The process ends, or has too many threads.
            lookup.known.set()
        _lookup = lookup
    return _lookup


def _end_git() -> None:
    """The process ends: so does a git that still looks through files. Runs after all is sent."""
    if _lookup is not None and not _lookup.known.is_set() and _lookup.child is not None:
        _lookup.child.kill()


atexit.register(_end_git)


def _after_fork() -> None:
    """In a forked child: the parent's thread is not there to end its lookup."""
    global _lookup
    if _lookup is not None and not _lookup.known.is_set():
        _lookup = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
