"""The hooks of a trace plugin. An author needs no more than ``pluggy.HookimplMarker("qitos")``.

For every hook: an implementation may leave out arguments that it does not need. An `Exception`
that it raises reaches neither the agent nor the other plugins, and is logged with the plugin's
name at most once a minute; KeyboardInterrupt and SystemExit are passed on. `trace` and `span` are
the host's objects, live and shared: read and copy them, do not change them. An implementation
marked ``wrapper=True`` wraps its own plugin's implementation only. Plugins are called in the
order in which they were registered, ``tryfirst`` ones before and ``trylast`` ones after all others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qitos_mlflow.tracing import Span, Trace

PROJECT = "qitos"
"""pluggy's project name, all that a plugin needs to know of this package."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qitos_wants_trace() -> bool | None:
    """Whether a trace that would begin now is wanted.

    When: before a trace is made. If every plugin and processor says False, none is made, and the
    run costs nothing.
    Thread: the one about to start the trace; any, many at once.
    Blocking: no. Return within microseconds, from what is known already.
    Return: False if this plugin would ignore a new trace; True, None or no implementation: it is
    wanted.
    Raise: counts as wanted.
    Since: 0.1.0
    """


@hookspec
def qitos_trace_start(trace: Trace) -> None:
    """A trace was entered: `trace_id`, `name`, `group_id` and the first `metadata` are there.

    When: as the first event of a trace. A plugin registered while a trace is open gets the rest
    of its events without this one.
    Thread: the one that started the trace, usually the agent's; several traces at once.
    Blocking: no. The agent waits for the return.
    Return: ignored.
    Raise: logged; the trace's other events still come.
    Since: 0.1.0
    """


@hookspec
def qitos_span_start(span: Span) -> None:
    """A span was started: `span_id`, `parent_span_id` and `started_at` are final, `data` is not.

    When: once for a span, before the work it stands for.
    Thread: the one that does the work: the agent's, or a tool's.
    Blocking: no. The agent waits for the return, at every span.
    Return: ignored.
    Raise: logged; the span's end still comes.
    Since: 0.1.0
    """


@hookspec
def qitos_span_end(span: Span) -> None:
    """A span was finished: `data`, `output`, `error` and `ended_at` are final.

    When: once for a span; after the trace's end if the span outlives it on another thread.
    Thread: any, not always the one that started the span.
    Blocking: no. The agent waits for the return, at every span.
    Return: ignored.
    Raise: logged; this event is not repeated.
    Since: 0.1.0
    """


@hookspec
def qitos_trace_end(trace: Trace) -> None:
    """A trace was left: `metadata` is complete; `error`, if the host has it, is the exception.

    When: once for a trace, also if an exception ends it.
    Thread: usually the one that started the trace; another one for a session that was abandoned,
    or that is open when the process ends.
    Blocking: no. The agent waits for the return.
    Return: ignored.
    Raise: logged; this event is not repeated.
    Since: 0.1.0
    """


@hookspec
def qitos_record(record: dict[str, Any]) -> Mapping[str, Mapping[str, Any]] | None:
    """An event was recorded, without credentials, and is about to be stored: add to it.

    When: for each event that a recording plugin, such as the built-in one, stores; some tens of
    milliseconds after it. `record` is a copy for this plugin; docs/extending.md has its fields.
    Thread: one in the background; one call at a time.
    Blocking: for milliseconds. The agent does not wait, its records do; if too many wait, some
    are dropped.
    Return: None, or what to log with it: ``{"attributes": {name: value}, "metrics": {name: number},
    "tags": {name: text}}``, each of the three as needed.
    Raise: logged; the record is stored without an addition.
    Since: 0.1.0
    """


@hookspec
def qitos_force_flush(timeout_s: float | None) -> bool | None:
    """Deliver what was recorded before this call.

    When: a caller flushes, and waits `timeout_s` seconds at most; None: the plugin's own deadline.
    Thread: the caller's; any.
    Blocking: yes, up to the deadline.
    Return: True or None: it is delivered; False: the deadline passed first. One False makes the
    whole flush False.
    Raise: counts as False.
    Since: 0.1.0
    """


@hookspec
def qitos_shutdown() -> None:
    """Deliver what can be delivered, and close.

    When: the processor is shut down; any number of times. Events that follow may be ignored.
    Thread: the caller's; any.
    Blocking: yes, up to the plugin's own deadline.
    Return: ignored.
    Raise: logged.
    Since: 0.1.0
    """
