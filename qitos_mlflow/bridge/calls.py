"""What happens around each call of the host: a run, a session, a tool.

Every public function here replaces a method, see `Patches.wrap`. It calls the original exactly
once with the same arguments, whatever fails in here, and returns or raises the very object that
the original does.
"""

from __future__ import annotations

import atexit
import sys
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._guard import report, shield
from qitos_mlflow.bridge import extract
from qitos_mlflow.bridge.hook import BridgeHook
from qitos_mlflow.bridge.live import LiveTrace, is_wanted
from qitos_mlflow.bridge.patches import Patches
from qitos_mlflow.bridge.run import AgentRun, Place, here

patches = Patches()
_sessions: dict[int, AgentRun] = {}
"""Open sessions by the id of their Engine, which outlives its entry."""
_abandoned: deque[AgentRun] = deque()
"""Sessions whose Engine is gone. Its finalizer only adds them here: it may run while its thread
holds a processor's lock, and would deadlock if it closed spans."""

Wrapped = Callable[..., Any]


def run(wrapped: Wrapped, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Engine.run``: one trace, or one subtree if it is called from within a run."""
    agent_run = _begin(engine, args, kwargs)
    if agent_run is None:
        return wrapped(*args, **kwargs)
    hook = BridgeHook(agent_run)
    try:
        _attach(engine, hook)
        result = wrapped(*args, **kwargs)
        _detach(engine, hook)
        agent_run.end(result=result)
    except BaseException as error:
        _detach(engine, hook)
        # Does nothing if it was called above.
        agent_run.end(error=error, run_id=extract.first(engine, "_active_run_id"))
        raise
    return result


def init_session(
    wrapped: Wrapped, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``Engine.init_session``: the session's trace begins; `step` continues it."""
    agent_run = _begin(engine, args, kwargs)
    if agent_run is None:
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(*args, **kwargs)
        _keep_session(engine, agent_run)
    except BaseException as error:
        agent_run.end(error=error, run_id=extract.first(engine, "_active_run_id"))
        raise
    return result


def step(wrapped: Wrapped, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Engine.step``: one step of the session's trace; the last one ends it."""
    agent_run = _sessions.get(id(engine))
    if agent_run is None:
        return wrapped(*args, **kwargs)
    before = here.get()
    here.set(Place(agent_run, agent_run.root))
    hook = BridgeHook(agent_run, in_session=True)
    try:
        _attach(engine, hook)
        result = wrapped(*args, **kwargs)
        _detach(engine, hook)
        agent_run.session_stepped(None)
    except BaseException as error:
        _detach(engine, hook)
        agent_run.session_stepped(error)  # The caller may step again.
        raise
    finally:
        here.set(before)
    if extract.first(result, "stop"):
        reason = extract.text_of(extract.first(result, "stop_reason"))
        _end_session(id(engine), stop_reason=reason)
    return result


def execute_one(
    wrapped: Wrapped, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``ActionExecutor._execute_one``: one tool span, whatever the tool does; any thread."""
    place = here.get()
    if place is None or place.run.live.closed:
        return wrapped(*args, **kwargs)
    live = place.run.live
    try:
        span = _begin_tool(place, executor, args[0] if args else kwargs["action"])
    except Exception as error:  # noqa: BLE001 - the tool runs without a span
        report("bridge.tool", error)
        here.set(place)
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(*args, **kwargs)
        _end_tool(live, span, result)
    except BaseException as error:
        _finish(live, span, error)
        raise
    finally:
        here.set(place)
    return result


def call_tool(
    wrapped: Wrapped, executor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``ActionExecutor._call_tool``: keeps the exception; the result has only its text."""
    place = here.get()
    if place is None or not place.tool:
        return wrapped(*args, **kwargs)
    place.span.exception = None  # of an earlier attempt
    try:
        return wrapped(*args, **kwargs)
    except Exception as error:
        if place.span.ended_at is None:  # A span that ran into its time limit is read no more.
            place.span.exception = error
        raise


def critic_result(
    wrapped: Wrapped, owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``CriticResult.from_dict``: notes who gave a score; the host sets one for the others."""
    result = wrapped(*args, **kwargs)
    place = here.get()
    if place is not None and args and isinstance(args[0], dict):
        place.run.verdicts.append((result, "score" in args[0]))
    return result


def _begin(engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> AgentRun | None:
    """A run for this call, as this context's place; None if no processor wants it or we failed."""
    before = here.get()
    try:
        if not patches.active:
            return None
        if before is not None and before.run.engine_id == id(engine) and not before.run.began:
            return None  # The same call once more: a subclass's run() that calls ours.
        if _sessions or _abandoned:
            _end_leftover_sessions(id(engine))
        if (before is None or before.starts_trace) and not is_wanted():
            return None
        patches.fit()
        return AgentRun(engine, args[0] if args else kwargs.get("task"), before)
    except BaseException as error:
        place = here.get()
        if place is not None and place is not before and place.run.before is before:
            place.run.end(error=error)  # It has begun, and the caller does not get it.
        here.set(before)
        if not isinstance(error, Exception):  # Such as Ctrl-C.
            raise
        report("bridge.begin", error)  # The agent runs without a trace.
        return None


def _keep_session(engine: Any, agent_run: AgentRun) -> None:
    try:
        agent_run.session_began(engine)
        # To run before our processors' exit handlers, registered when the trace began.
        atexit.unregister(_end_leftover_sessions)
        atexit.register(_end_leftover_sessions)
        weakref.finalize(engine, _abandon, id(engine)).atexit = False
        _sessions[id(engine)] = agent_run
    except Exception as error:  # noqa: BLE001 - a session that could not be ended gets no trace
        report("bridge.init_session", error)
        agent_run.end()


def _attach(engine: Any, hook: BridgeHook) -> None:
    with shield("bridge.attach"):  # A trace without steps is better than none.
        engine.hooks.append(hook)


def _detach(engine: Any, hook: BridgeHook) -> None:
    """Take just this hook away, from whatever list the Engine has by now."""
    with shield("bridge.detach"):  # A hook left behind does nothing.
        for index, candidate in enumerate(engine.hooks):
            if candidate is hook:
                del engine.hooks[index]
                return


def _begin_tool(place: Place, executor: Any, action: Any) -> Any:
    name, tool_args = str(extract.first(action, "name")), extract.first(action, "args")
    server = None
    if "qitos.mcp.bridge" in sys.modules:
        server = extract.mcp_server(executor.tool_registry.get(name))
    data: Any
    if server is None:
        data = tracing.ToolSpanData(tool_name=name, tool_args=tool_args)
    else:
        data = tracing.MCPSpanData(server_name=server, tool_name=name, tool_args=tool_args)
    span = place.run.live.start(data, place.span)
    place.run.acts_with_tools.add(place.span.span_id)
    here.set(Place(place.run, span, tool=True))
    return span


def _end_tool(live: LiveTrace, span: Any, result: Any) -> None:
    try:
        raised = getattr(span, "exception", None)
        span.exception = None
        span.data.output_content, failure, span.output = extract.tool_result(result)
    except Exception as problem:  # noqa: BLE001 - the tool has done its work
        report("bridge.tool", problem)
        raised = failure = None
    _finish(live, span, raised if failure is not None and raised is not None else failure)


def _finish(live: LiveTrace, span: Any, error: BaseException | str | None) -> None:
    with shield("bridge.tool"):
        live.finish(span, error)


def _abandon(engine_id: int) -> None:
    agent_run = _sessions.pop(engine_id, None)
    if agent_run is not None:
        _abandoned.append(agent_run)


def _end_session(engine_id: int, stop_reason: str | None = None) -> None:
    agent_run = _sessions.pop(engine_id, None)
    if agent_run is not None:
        place = here.get()
        agent_run.end(stop_reason=stop_reason)
        here.set(place)


def _end_leftover_sessions(engine_id: int | None = None) -> None:
    """End this Engine's session and those whose Engine is gone; all of them for None."""
    place = here.get()
    with suppress(IndexError):  # Other threads may be taking some of them.
        while True:
            _abandoned.popleft().end()
    here.set(place)
    for left in [engine_id] if engine_id is not None else list(_sessions):
        _end_session(left)
