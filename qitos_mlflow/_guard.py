"""Keeps our own failures away from the agent: they are logged, never raised.

A place that must not raise is a ``with shield(...)``, or catches ``BaseException`` and hands it to
`contain`: where every tenth of a microsecond counts, or something else is to be done. What
interrupts the program there, such as Ctrl-C, is raised on: see `_interruption`. Tests listen
through `watchers` and fail on anything reported, so that a swallowed bug is never a silent one.
Every log line of the package goes through `log`, most of them by way of `warn` or `report`, and
leaves without credentials and control characters.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable

from qitos_mlflow._inheritance import check
from qitos_mlflow._interruption import interruption
from qitos_mlflow._interruption import let_through as let_through
from qitos_mlflow._texts import clean, text_of, traceback_of
from qitos_mlflow._texts import in_words as in_words

LOG_EVERY_S = 60.0
"""Shortest time between two warnings under the same key (seconds)."""
MAX_KEYS = 1000
"""Keys that are remembered; some are of a run. More of them, and all may be logged again."""


class _Clean(logging.Filter):
    """Makes records clean before any handler sees them: message, arguments and traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Clean the record; every record passes."""
        try:
            if isinstance(record.args, tuple):
                record.args = tuple(
                    text_of(arg) if isinstance(arg, BaseException) else arg for arg in record.args
                )
            record.msg = clean(record.getMessage())
        except BaseException as own:  # noqa: BLE001 - an argument's own code
            let_through(own)
            record.msg = "qitos-mlflow: a message that cannot be written"
        record.args = ()
        if record.exc_info and (error := record.exc_info[1]) is not None:
            record.exc_text = traceback_of(error)
        record.exc_info = None  # Handlers of the user's write it as it is.
        return True


_log = logging.getLogger("qitos_mlflow")
_log.addFilter(_Clean())
_last_logged: dict[str, float] = {}

watchers: list[Callable[[str, BaseException], None]] = []
"""Called with everything that is reported."""


def report(where: str, error: BaseException) -> None:
    """Log `error`, which was kept from the agent, at most once a minute for each place.

    Args:
        where: the place, a constant such as ``"bridge.on_after_act"``.
        error: what was caught.

    Any thread; never blocks, raises only what interrupts it.
    """
    try:
        warn(where, "%s failed: %s", where, in_words(error))
        log(logging.DEBUG, "traceback of the failure in %s", where, error=error)
        for watcher in list(watchers):
            watcher(where, error)
    except BaseException as own:  # noqa: BLE001 - a log handler's or a watcher's own failure
        let_through(own)


def contain(where: str, error: BaseException) -> None:
    """Report what the code at `where` has raised; raise what has interrupted it."""
    let_through(error)
    report(where, error)


class shield:  # noqa: N801 - reads as a statement
    """``with shield(where)``: what the block raises is reported; what interrupts it is raised."""

    __slots__ = ("_where",)

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        if error is None:
            return False
        if (outside := interruption(error)) is error:
            return False
        if outside is not None:
            raise outside
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


def say(text: str, begin: str = "qitos-mlflow: ", *, own: bool = False) -> None:
    """Print a line on stderr, if there is one; `own` as in `clean`.

    Raises `OSError` if its reader has gone.
    """
    if has_stderr():
        sys.stderr.write(
            f"{begin}{clean(text, own=own)}\n"
        )  # At once: another thread may be logging.


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
