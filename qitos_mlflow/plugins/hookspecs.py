"""The hooks of a trace plugin. An author needs no more than ``pluggy.HookimplMarker("qitos")``.

True of every hook: an implementation may leave out arguments it does not need; what it raises
(`Exception`) is kept from the agent, from the other plugins and from the rest of the same event,
and logged with the plugin's name at most once a minute. KeyboardInterrupt and SystemExit go
through. `trace` and `span` are the host's objects, live and shared: look, copy, do not change.
An implementation marked ``wrapper=True`` wraps its own plugin's implementation only. Plugins are
called in the order they were registered; ``tryfirst`` and ``trylast`` go before and after that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from collections.abc import Mapping

    from qitos_mlflow.tracing import Span, Trace

PROJECT = "qitos"
"""pluggy's project name, the one thing to be known about us."""

PREFIX = f"{PROJECT}_"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def qitos_wants_trace() -> bool | None:
    """Whether a trace that would begin now is wanted.

    When: before a trace is made; when every plugin and processor says False, none is, and the run
    costs nothing.
    Thread: the one about to start the trace; any, many at once.
    Blocking: no. Answer within microseconds, from what is known already.
    Return: False while this plugin would ignore a new trace; True, None or no implementation: it
    is wanted.
    Raise: counts as wanted.
    Since: 0.1.0
    """


@hookspec
def qitos_trace_start(trace: Trace) -> None:
    """A trace was entered: `trace_id`, `name`, `group_id` and the first `metadata` are there.

    When: as the first event of a trace. A plugin registered while a trace is going gets the rest
    of its events without this one.
    Thread: the one that started the trace, usually the agent's; several traces at once.
    Blocking: no. The agent waits for the return.
    Return: ignored.
    Raise: kept from everyone else; the trace's other events still come.
    Since: 0.1.0
    """


@hookspec
def qitos_span_start(span: Span) -> None:
    """A span was started: `span_id`, `parent_span_id` and `started_at` are final, `data` is not.

    When: once a span, before what it stands for is done.
    Thread: the one that does it: the agent's, or a tool's.
    Blocking: no. The agent waits for the return, at every span.
    Return: ignored.
    Raise: kept from everyone else; the span's end still comes.
    Since: 0.1.0
    """


@hookspec
def qitos_span_end(span: Span) -> None:
    """A span was finished: `data`, `output`, `error` and `ended_at` are as they will stay.

    When: once a span; after the trace's end for a span that outlives it on another thread.
    Thread: any, not always the one that started the span.
    Blocking: no. The agent waits for the return, at every span.
    Return: ignored.
    Raise: kept from everyone else; this event is not repeated.
    Since: 0.1.0
    """


@hookspec
def qitos_trace_end(trace: Trace) -> None:
    """A trace was left: `metadata` is complete; `error`, where the host has it, is what left it.

    When: once a trace, also when an exception ends it.
    Thread: usually the one that started the trace; another one for a session that was abandoned,
    or is left when the process ends.
    Blocking: no. The agent waits for the return.
    Return: ignored.
    Raise: kept from everyone else; this event is not repeated.
    Since: 0.1.0
    """


@hookspec
def qitos_record(record: dict[str, Any]) -> Mapping[str, Mapping[str, Any]] | None:
    """An event was recorded, without credentials, and is about to be kept: say what to add to it.

    When: for each event that a recording plugin, such as the built-in one, keeps; some tens of
    milliseconds after it. `record` is a copy for you alone; docs/extending.md has its fields.
    Thread: one in the background; one call at a time for each recording plugin.
    Blocking: for milliseconds. Not the agent but its records wait; too many waiting are dropped.
    Return: None, or what to log with it: ``{"attributes": {name: value}, "metrics": {name: number},
    "tags": {name: text}}``, each of the three as needed.
    Raise: the record is kept without an addition.
    Since: 0.1.0
    """


@hookspec
def qitos_force_flush(timeout_s: float | None) -> bool | None:
    """Deliver what was recorded before this call.

    When: somebody wants to be sure, with `timeout_s` seconds at most; None: by the plugin's own
    deadline.
    Thread: the caller's; any.
    Blocking: yes, up to the deadline.
    Return: True or None: it is delivered; False: the deadline passed first. One False makes the
    whole flush False.
    Raise: counts as False.
    Since: 0.1.0
    """


@hookspec
def qitos_shutdown() -> None:
    """Deliver what can be delivered, and close: no more is to come.

    When: the processor is shut down; any number of times, events may still follow and may be
    ignored.
    Thread: the caller's; any.
    Blocking: yes, up to the plugin's own deadline.
    Return: ignored.
    Raise: kept from everyone else.
    Since: 0.1.0
    """
