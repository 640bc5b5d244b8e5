"""The end of the process: all pipelines deliver what they can, within one deadline together.

A store on this machine gets longer while it makes progress: its first use takes a slow machine more
than the deadline. Then one line on stderr says what is left, and the command that delivers it.
Ctrl-C ends the wait; the line and the exit status of Ctrl-C remain.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection

from qitos_mlflow._guard import report, say
from qitos_mlflow._interruption import interruption
from qitos_mlflow._threads import in_time
from qitos_mlflow.delivery import json_object, living, waiting_records
from qitos_mlflow.recording.pipelines import RecordPipeline, unfinished

KILLED_BY_EXIT = "the process ended before the trace did"
"""Why traces that are open when the process ends are KILLED."""

COUNT_S = 0.25
"""Longest time that counting what is left delays the end of the process (seconds)."""

SAY_AFTER_S = 2.0
"""From when on a line says that the process waits for a local store (seconds)."""
LOOK_EVERY_S = 1.0
"""How often the wait for a local store looks for progress (seconds)."""

at_last: list[Callable[[], object]] = []
"""Called in each process once everything is delivered or reported."""

_registered_in: int | None = None
"""Id of the process whose exit handlers are registered."""
_first = False
_interrupted = False
_ctrl_c = False
_began_s: float | None = None


def register() -> None:
    """Deliver what this process has before it ends. Any thread, any number of times."""
    global _registered_in, _first, _interrupted, _ctrl_c, _began_s
    if _registered_in == os.getpid():
        return
    _registered_in, _first, _began_s = os.getpid(), False, None
    _interrupted = _ctrl_c = False
    atexit.unregister(end)  # Inherited by a forked child: once is enough.
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        # Children that multiprocessing has forked leave by `os._exit`, past `atexit`, but run its
        # own finalizers. Those that it has spawned come here both ways.
        Finalize(None, end, exitpriority=100)
    atexit.register(end)


def end_first() -> None:
    """From now on deliver before the exit handlers that are registered so far.

    Exit handlers run last in, first out. A library that was imported after ours was registered
    may end in its own handler what the delivery still needs.
    """
    global _first
    if not _first:
        _first = True
        atexit.unregister(end)
        atexit.register(end)


def end() -> None:
    """An exit handler, which may be registered many times: deliver what this process has."""
    if _registered_in == os.getpid():
        pipelines = {*unfinished}
        if _began_s is None:  # Also what has nothing left may have counted a loss since.
            alive = [ref() for ref in living.valuerefs()]
            pipelines.update(one for one in alive if isinstance(one, RecordPipeline))
        _end_all(sorted(pipelines, key=lambda pipeline: pipeline.exit_timeout_s))
        _keep_exit_status()


# For a first trace in an exit handler of the program, when it is too late to register another.
atexit.register(lambda: end())


def _end_all(pipelines: list[RecordPipeline]) -> None:
    global _began_s
    unfinished.difference_update(pipelines)
    if _began_s is None:  # Not the last exit handler to come here: one deadline for all.
        _began_s = time.monotonic()
    for pipeline in pipelines:
        _guarded(_refuse, pipeline)
    left = []
    for pipeline in pipelines:
        left_s = _began_s + pipeline.exit_timeout_s - time.monotonic()
        waits = pipeline.local_exit_timeout_s and not _interrupted
        if waits and _guarded(_wait_while_it_gets_on, pipeline, _began_s):
            left_s = pipeline.exit_timeout_s  # To end what the records leave open.
        if not _guarded(pipeline.close, 0.0 if _interrupted or pipeline.hopeless else left_s):
            left.append(pipeline)
    _guarded(_say_what_is_lost, pipelines)  # This fails if stderr is a closed pipe.
    _guarded(_say_what_is_left, left)
    _guarded(_say_what_is_put_off, pipelines)
    for act in at_last:
        _guarded(act)


def _refuse(pipeline: RecordPipeline) -> None:
    """Record the end of its open traces, then take no more. Waits for nothing."""
    for trace in pipeline.traces:
        trace.end_early("KILLED", KILLED_BY_EXIT)
    pipeline.refuse()


def _wait_while_it_gets_on(pipeline: RecordPipeline, began_s: float) -> bool:
    """Whether all is delivered to a local store, within its time.

    Blocks. Ends early once it has made no progress for `exit_timeout_s`.
    """
    seen: object = None
    said, seen_s = False, 0.0
    while True:
        if (progress := pipeline.progress) != seen:
            seen, seen_s = progress, time.monotonic() if progress is not None else 0.0
        until = min(seen_s + pipeline.exit_timeout_s, began_s + pipeline.local_exit_timeout_s)
        left_s = until - time.monotonic()
        if left_s <= 0 or pipeline.hopeless or pipeline.flush(min(left_s, LOOK_EVERY_S)):
            return left_s > 0 and not pipeline.hopeless
        if not said and time.monotonic() > began_s + SAY_AFTER_S:
            said = True
            more_s = began_s + pipeline.local_exit_timeout_s - time.monotonic()
            with contextlib.suppress(OSError):
                say(
                    f"waiting up to {more_s:.0f} s more for the local store, while it makes "
                    f"progress; Ctrl-C leaves the rest to: {_command(*pipeline.sync_command)}",
                    own=True,
                )


def _guarded(act: Callable[..., object], *args: object) -> bool:
    global _interrupted, _ctrl_c
    try:
        return bool(act(*args))
    except BaseException as error:  # noqa: BLE001 - the process ends as it would have
        if (outside := interruption(error)) is None:
            report("process_exit", error)
        else:  # Ctrl-C, or a signal handler of the program that exits: nothing waits any more.
            _interrupted = True
            _ctrl_c = _ctrl_c or isinstance(outside, KeyboardInterrupt)
    return False


def _say_what_is_lost(pipelines: Collection[RecordPipeline]) -> None:
    """On stderr: what `qitos-mlflow status` cannot tell."""
    if lost := sum(pipeline.unsaved for pipeline in pipelines):
        directories = {str(one.paths.directory) for one in pipelines if one.unsaved}
        say(
            f"{_count(lost, 'record')} lost: neither the server nor the spool "
            f"{', '.join(sorted(directories))} took them in time",
            own=True,
        )


def _say_what_is_left(left: Collection[RecordPipeline]) -> None:
    """On stderr: how much is kept but not delivered, and the command that delivers it."""
    found = [_Kept(pipeline) for pipeline in left]
    until = time.monotonic() + COUNT_S
    in_time(lambda: all(kept.count(until) for kept in found), COUNT_S)
    commands: dict[str, set[str]] = {}  # Each with its paths.
    complete = all(kept.complete for kept in found)
    for kept in found:
        if kept.records or not complete:
            commands.setdefault(kept.command, set()).add(kept.path)
    if commands:  # Else another process has delivered them meanwhile.
        records = sum(kept.records for kept in found)
        traces = len(set().union(*(kept.traces for kept in found)))
        say(  # Loggers may be gone.
            f"{'' if complete else 'more than '}{_count(records, 'record')} of "
            f"{_count(traces, 'trace')} {'is' if records == 1 else 'are'} kept but not "
            "delivered yet; deliver with: "
            + "; ".join(_command(command, *sorted(d)) for command, d in commands.items()),
            own=True,
        )


def _say_what_is_put_off(pipelines: Collection[RecordPipeline]) -> None:
    for pipeline in pipelines:
        if number := pipeline.stats.put_off:
            say(
                f"{_count(number, 'record')} {'is' if number == 1 else 'are'} put off, such as a "
                "file that cannot be stored; once that is mended, deliver with: "
                + _command(*pipeline.sync_command),
                own=True,
            )


class _Kept:
    """What a pipeline's segment holds that is not delivered."""

    def __init__(self, pipeline: RecordPipeline) -> None:
        self.pipeline = pipeline
        self.command, self.path = pipeline.sync_command
        self.records = 0
        self.traces: set[str] = set()
        self.complete = False

    def count(self, until: float) -> bool:
        """Read the segment; returns whether that is complete at `until` (monotonic)."""
        for record in waiting_records(self.pipeline.paths):
            if time.monotonic() > until:
                return False
            self.records += 1
            self.traces.add(str(json_object(record).get("trace_id")))
        self.complete = True
        return True


def _command(command: str, *paths: str) -> str:
    return f"{command} {shlex.join(paths)}"


def _keep_exit_status() -> None:
    """Let a process that Ctrl-C has ended report this to its parent, as it does without us.

    Python forgets it if a text is compiled meanwhile, as it is for every dataclass of a module
    that is imported in the last moments (3.10 to 3.13: `unhandled_keyboard_interrupt`). It never
    learns of Ctrl-C in an exit handler.
    """
    interactive = sys.flags.interactive or hasattr(sys, "ps1")
    ended = _ctrl_c or getattr(sys, "last_type", None) is KeyboardInterrupt
    if ended and not interactive:
        with contextlib.suppress(KeyboardInterrupt):
            exec("raise KeyboardInterrupt")  # noqa: S102 - the one way to make Python remember


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
