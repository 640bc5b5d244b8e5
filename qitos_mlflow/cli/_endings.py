"""SIGINT and SIGTERM end a command within a second, whatever it waits for."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from qitos_mlflow.cli._show import complain

GRACE_S = 0.5
"""How long the step under way may go on (seconds). What it has sent may be sent once more later."""
SAY_S = 0.2
"""How long the last line may take if stderr is a pipe that nobody reads (seconds)."""


@contextmanager
def ends_on_signals(
    last_words: Callable[[], str], *, otherwise: bool = True
) -> Iterator[threading.Event]:
    """In the block, SIGINT and SIGTERM end the process, with one line and status 130 or 143.

    The event is set by the signal. The process then ends as soon as the block is left, at the
    latest after `GRACE_S`. Without `otherwise`, a block that is left in time simply goes on: a
    signal is the only end that it has.

    Nothing is raised in the block, where it could be swallowed: Python's handlers run between two
    instructions of the main thread, which may never come while it looks up a name or waits for a
    lock. So a thread of its own reads what Python's signal handler writes at once.
    """
    asked, left = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def watch() -> None:
        number = 0
        while number not in (signal.SIGINT, signal.SIGTERM):
            received = reading.recv(1)
            if not received:
                return  # The block is over.
            number = received[0]
        asked.set()
        if not left.wait(GRACE_S) or otherwise:
            _leave(number, last_words)

    reading, writing = socket.socketpair()
    writing.setblocking(False)
    before = {
        number: signal.signal(number, lambda *_: None)
        for number in (signal.SIGINT, signal.SIGTERM)  # A shell has SIGINT ignored in background.
    }
    wakeup = signal.set_wakeup_fd(writing.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="qitos-mlflow signals", daemon=True)
    thread.start()
    try:
        yield asked
    finally:
        left.set()
        signal.set_wakeup_fd(wakeup)
        writing.close()
        thread.join()  # For ever, if it ends the process.
        reading.close()
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave(number: int, last_words: Callable[[], str]) -> None:
    status = 128 + number
    late = threading.Timer(SAY_S, os._exit, [status])
    late.daemon = True
    late.start()
    with suppress(Exception):
        if sys.stdout.isatty():  # Beyond the line of progress; the cursor was hidden.
            os.write(sys.stdout.fileno(), b"\r\x1b[K\x1b[?25h")
        complain(f"ended by {signal.Signals(number).name}: {last_words()}", own=True)
    os._exit(status)
