"""One delivery pipeline for each destination that a plugin's traces go to, and the process's end.

Nothing is opened before the first trace. A destination is looked up when a trace starts, so
`mlflow.set_tracking_uri` in between is followed.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import sys
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from qitos_mlflow._guard import report
from qitos_mlflow.delivery import Pipeline
from qitos_mlflow.mlflow_plugin.destination import same_destination, segment_header
from qitos_mlflow.mlflow_plugin.extension import ask_plugins
from qitos_mlflow.mlflow_plugin.ledger import Ledger
from qitos_mlflow.mlflow_plugin.refine import refine
from qitos_mlflow.mlflow_plugin.transport import RunRef
from qitos_mlflow.settings import Settings

COUNT_S = 0.25
"""Longest time that the end of the process is held up by counting what is left (seconds)."""


class Pipelines:
    """The pipelines of one plugin, by tracking URI. Any thread.

    Args:
        settings: what was configured.
        announce: told each run as it is created, with its trace's id; on the shipper's thread.
        at_exit: called before the process ends, if there is anything to deliver by then.
    """

    def __init__(
        self,
        settings: Settings,
        announce: Callable[[str, RunRef], None],
        at_exit: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._announce = announce
        self._at_exit = at_exit
        self._watching_exit_of = 0
        self._ended_in = 0
        self._ends_before_mlflow = False
        self._losses_told = 0
        self._pipelines: dict[str | None, Pipeline] = {}
        self._lock = threading.Lock()
        # For a first trace in somebody's exit handler, when it is too late to register another.
        # Weakly: what nobody holds any more must not live until the process ends.
        atexit.register(_end, weakref.ref(self))

    def to(self, uri: str | None) -> Pipeline:
        """The pipeline to `uri`, made when there is none yet; None is MLflow's local default."""
        with self._lock:
            self._watch_exit()
            pipeline = self._pipelines.get(uri)
            if pipeline is None:
                pipeline = self._pipelines[uri] = self._new(uri)
            return pipeline

    def flush(self, timeout_s: float) -> bool:
        """Deliver all that was offered so far; True when it is on the server.

        False when `timeout_s` passes first, and, once for each loss, when something was lost or
        refused since the last time this was asked.
        """
        delivered = self._each(Pipeline.flush, timeout_s)
        lost = sum(_losses(pipeline) for pipeline in self._all())
        lost, self._losses_told = lost - self._losses_told, lost
        return delivered and not lost

    def close(self, timeout_s: float) -> bool:
        """Flush and end; True when nothing is left. Any number of times."""
        return self._each(Pipeline.close, timeout_s)

    def say_what_is_left(self) -> None:
        """On stderr: how much was not delivered and the command that delivers it, what is lost."""
        until = time.monotonic() + COUNT_S
        records, traces, files = 0, set(), []
        complete = True
        for pipeline in self._all():
            before = records
            for record in pipeline.waiting():
                records += 1
                traces.add(orjson.loads(record).get("trace_id"))
                complete = time.monotonic() < until
                if not complete:
                    break
            if records > before:  # One file stands for all of its segment.
                files += [shlex.quote(str(path)) for _, path in pipeline.paths.parts()[:1]]
        unsaved = sum(pipeline.unsaved for pipeline in self._all())
        if files:  # None: a sidecar has delivered them meanwhile.
            _say(
                f"{'' if complete else 'more than '}{_count(records, 'record')} of "
                f"{_count(len(traces), 'trace')} kept that are not delivered yet; deliver them "
                f"with: qitos-mlflow sync {' '.join(files)}"
            )
        if unsaved:
            _say(
                f"{_count(unsaved, 'record')} lost: the server took nothing, and the spool "
                f"{self._settings.spool_dir} could not be written"
            )

    def end_before_mlflow(self) -> None:
        """From now on deliver before MLflow's own exit handler, which ends its active run.

        Exit handlers come last in, first out, and MLflow may have been imported since ours was
        registered.
        """
        if not self._ends_before_mlflow:
            self._ends_before_mlflow = True
            atexit.unregister(self._ending)
            atexit.register(self._ending)

    def after_fork(self) -> None:
        """In a forked child: locks that another thread held are free again."""
        self._lock = threading.Lock()
        self._losses_told = 0

    def _new(self, uri: str | None) -> Pipeline:
        settings = self._settings
        header = segment_header(settings, uri)
        ledger = Ledger(lambda payload: refine(payload, settings.field_bytes, ask_plugins))

        def open_sink() -> Any:
            from qitos_mlflow.mlflow_plugin.sink import open_sink

            return open_sink(header, tracking_uri=uri, announce=self._announce)

        def adopt(theirs: bytes) -> Callable[[], Any] | None:
            if not same_destination(header, theirs):
                return None
            from qitos_mlflow.mlflow_plugin.sink import open_sink

            # With our URI, which may have the credentials that theirs has not on disk.
            return partial(open_sink, theirs, tracking_uri=uri, resumed=True)

        return Pipeline(
            header=header,
            refine=ledger.refine,
            open_sink=None if settings.offline else open_sink,
            directory=settings.spool_dir,
            queue_bytes=settings.queue_bytes,
            spool_bytes=settings.spool_bytes,
            dropped=ledger.lost,
            adopt=adopt,
        )

    def _each(self, act: Callable[[Pipeline, float], bool], timeout_s: float) -> bool:
        """Whether `act` succeeded for every pipeline, all within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        succeeded = True
        for pipeline in self._all():
            succeeded = act(pipeline, max(0.0, deadline - time.monotonic())) and succeeded
        return succeeded

    def _all(self) -> list[Pipeline]:
        with self._lock:
            return list(self._pipelines.values())

    def _watch_exit(self) -> None:
        """Have `at_exit` called before this process ends.

        Children that multiprocessing has forked leave by `os._exit`, past `atexit`, but run its
        own finalizers.
        """
        if self._watching_exit_of == os.getpid():
            return
        self._watching_exit_of = os.getpid()
        atexit.unregister(self._ending)  # Inherited by a forked child: once is enough.
        process = sys.modules.get("multiprocessing.process")
        if process is not None and process.parent_process() is not None:
            from multiprocessing.util import Finalize

            Finalize(None, self._ending, exitpriority=100)
        atexit.register(self._ending)

    def _ending(self) -> None:
        # Workers that multiprocessing has spawned come here both ways: the deadline is for all.
        if self._ended_in == os.getpid():
            return
        self._ended_in = os.getpid()
        try:
            if self._pipelines:
                self._at_exit()
        except Exception as error:  # noqa: BLE001 - the process ends as it would have
            report("plugin.at_exit", error)
        _keep_exit_status()


def _keep_exit_status() -> None:
    """Have a script that Ctrl-C ended tell its parent so, as it would have without us.

    Python forgets it when a text is compiled meanwhile, as it is for every dataclass of a module
    that is imported in the last moments (3.10 to 3.13: `unhandled_keyboard_interrupt`).
    """
    interactive = sys.flags.interactive or hasattr(sys, "ps1")
    if getattr(sys, "last_type", None) is KeyboardInterrupt and not interactive:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102 - the one way to have it remember


def _end(reference: weakref.ref[Pipelines]) -> None:
    if (pipelines := reference()) is not None:
        pipelines._ending()


def _losses(pipeline: Pipeline) -> int:
    counts = pipeline.stats
    return counts.dead_letters + sum(counts.dropped.values())


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _say(line: str) -> None:
    # The last lines of the process: loggers may be gone.
    print(f"qitos-mlflow: {line}", file=sys.stderr)  # noqa: T201
