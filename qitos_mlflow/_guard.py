"""Keeps our own failures away from the agent: they are logged, never raised.

A place that must not raise is a ``with shield(...)``, or catches ``Exception`` and hands it to
`report`: where every tenth of a microsecond counts, or something else is to be done. Tests listen
through `watchers` and fail on anything reported, so that a swallowed bug is never a silent one.
Every log line of the package goes through `log`, most of them by way of `warn` or `report`.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable

from qitos_mlflow._inheritance import check

LOG_EVERY_S = 60.0
"""Shortest time between two warnings under the same key (seconds)."""
MAX_KEYS = 1000
"""Keys that are remembered; some are of a run. More of them, and all may be logged again."""

_log = logging.getLogger("qitos_mlflow")
_last_logged: dict[str, float] = {}

watchers: list[Callable[[str, BaseException], None]] = []
"""Called with everything that is reported."""


def report(where: str, error: BaseException) -> None:
    """Log `error`, which was kept from the agent, at most once a minute for each place.

    Args:
        where: the place, a constant such as ``"bridge.on_after_act"``.
        error: what was caught.

    Any thread; never blocks, never raises.
    """
    try:
        warn(where, "%s failed: %s", where, in_words(error))
        log(logging.DEBUG, "traceback of the failure in %s", where, error=error)
        for watcher in list(watchers):
            watcher(where, error)
    except Exception:  # noqa: BLE001 - a log handler's or a watcher's own failure
        pass


class shield:  # noqa: N801 - reads as a statement
    """``with shield(where)``: an `Exception` that leaves the block is reported and not raised."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if not isinstance(error, Exception):
            return False
        report(self._where, error)
        return True


def warn(key: str, message: str, *args: object) -> None:
    """Log a warning, unless one was logged under `key` within the last minute."""
    # No lock: a fork could leave it held for ever, and two threads at once cost a second line.
    now = time.monotonic()
    last = _last_logged.get(key)
    if last is not None and now - last < LOG_EVERY_S:
        return
    if len(_last_logged) >= MAX_KEYS:
        _last_logged.clear()
    _last_logged[key] = now
    log(logging.WARNING, message, *args)


def log(level: int, message: str, *args: object, error: BaseException | None = None) -> None:
    """Log `message` after ``qitos-mlflow: ``, with the traceback of `error` if one is given."""
    if not _log.hasHandlers() and not has_stderr():  # Where logging writes as a last resort.
        return
    _log.log(level, f"qitos-mlflow: {message}", *args, exc_info=error)
    check()  # A handler may wait.


def say(text: str) -> None:
    """Print a line on stderr, if there is one. Raises `OSError` if its reader has gone."""
    if has_stderr():
        sys.stderr.write(f"qitos-mlflow: {text}\n")  # At once: another thread may be logging.


def has_stderr() -> bool:
    """Whether there is a `sys.stderr`, and its descriptor is not a file of the program's by now.

    Once a program has closed descriptor 2, the next file that it opens gets the number. Python
    keeps such files from child processes, and standard streams never.
    """
    stream, first = sys.stderr, id(sys.__stderr__)
    if stream is None or getattr(stream, "closed", False):
        return False
    if os.name == "nt" or id(stream) != first:  # Another stream is the program's choice.
        return True
    try:
        return os.get_inheritable(stream.fileno())
    except (OSError, ValueError):
        return False


def in_words(error: BaseException) -> str:
    """``"Type: text"``, or the type alone if the text is empty or ``__str__`` raises."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - an exception class of the user's
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
