"""The thread that finishes what dead processes left, in a process that delivers its own.

Looks through the spool now and then for segments of this host whose owner is gone, and delivers
those whose header the caller knows what to do with. It does so in a thread of its own, a batch at
a time with pauses, so that neither the process's own records nor its agent wait for it. What
belongs to a process that works offline is left alone: its user decides when that is delivered.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from qitos_mlflow import _guard
from qitos_mlflow.delivery.leftovers import deliver_segment
from qitos_mlflow.delivery.sink import Sink
from qitos_mlflow.delivery.spool.counts import Counts
from qitos_mlflow.delivery.spool.locks import is_held
from qitos_mlflow.delivery.spool.paths import Paths
from qitos_mlflow.delivery.spool.segments import find_segments, read_head

FIRST_LOOK_S = 2.0
"""A process that ends sooner has better things to do (seconds)."""
LOOK_EVERY_S = 60.0
"""How often the spool is looked through (seconds)."""
PATIENCE_S = 60.0
"""So long is one segment tried before the next one has its turn (seconds)."""
PAUSE_S = 0.1
"""Between two batches (seconds)."""

Adopt = Callable[[bytes], "Callable[[], Sink] | None"]
"""Says how to open the sink of a segment with this header; None leaves the segment alone."""


class Adopter:
    """Looks through `directory` until `stop`, whenever `online` says that the server answers.

    Args:
        directory: the spool.
        adopt: called on the adopter's thread; what it returns as well.
        online: whether the server is known to answer.
    """

    def __init__(self, directory: Path, adopt: Adopt, online: Callable[[], bool]) -> None:
        self._directory = directory
        self._adopt = adopt
        self._online = online
        self.busy = True
        """Whether there may be something to finish; False from a look at everything to the next."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="qitos-mlflow-adopter", daemon=True)

    def start(self) -> None:
        """Start the thread, once; not while the interpreter ends, when there is none to be had."""
        try:
            self._thread.start()
        except RuntimeError:
            pass

    def stop(self) -> None:
        """End the thread after the batch under way. Any thread; waits for nothing."""
        self._stop.set()

    def _run(self) -> None:
        delay_s = FIRST_LOOK_S
        while not self._stop.wait(delay_s):
            delay_s = FIRST_LOOK_S
            if self._online():
                delay_s = LOOK_EVERY_S
                self.busy = True
                for paths in self._segments():
                    self._finish(paths)
                self.busy = False

    def _segments(self) -> Iterator[Paths]:
        try:
            found = find_segments(self._directory)
        except OSError:  # It is gone, or was never made.
            return
        for paths in found:
            if self._stop.is_set():
                return
            yield paths

    def _finish(self, paths: Paths) -> None:
        try:
            if (open_sink := self._opener(paths)) is not None:
                deliver_segment(
                    paths,
                    lambda _: open_sink(),
                    timeout_s=PATIENCE_S,
                    stop=self._stop,
                    progress=self._pause,
                )
        except OSError as error:
            _guard.warn("delivery.adopt", "cannot deliver %s: %s", paths.stem, error)
        except Exception as error:  # noqa: BLE001 - a bug costs this segment its turn, no more
            _guard.report("delivery.adopter", error)

    def _pause(self, _: Counts) -> None:
        self._stop.wait(PAUSE_S)

    def _opener(self, paths: Paths) -> Callable[[], Sink] | None:
        if is_held(paths.own):
            return None
        head = read_head(paths)
        if head.caller is None or head.about.get("offline"):
            return None
        # What other machines left in a directory of the network is theirs to see to.
        return self._adopt(head.caller) if head.about.get("host") == socket.gethostname() else None
