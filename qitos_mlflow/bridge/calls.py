"""What happens around each call of the host: a run, a session, a tool.

Every public function here replaces a method, see `patches.wrap`. It calls the original exactly
once with the same arguments, whatever fails in here, and returns or raises the very object that
the original does.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

from qitos_mlflow import tracing
from qitos_mlflow._after_import import after_import
from qitos_mlflow._guard import contain, shield
from qitos_mlflow.bridge import extract, results
from qitos_mlflow.bridge.hook import attach, detach
from qitos_mlflow.bridge.live import LiveTrace, is_wanted
from qitos_mlflow.bridge.patches import wrap
from qitos_mlflow.bridge.run import AgentRun, Place, here

_sessions: list[AgentRun] = []
"""Open sessions, one for an Engine, which may be gone."""
_lock = threading.RLock()  # A signal handler may run an agent while it is held.
_fitted = False

POOLS = {
    "qitos.engine.action_executor": False,  # parallel tools, tools with a time limit
    "qitos.kit.tool.fanout": False,
    "qitos.kit.tool.agent.agent_tool": True,
}
"""Host modules whose thread pools start tools or agents, and whether these outlive the run."""

Wrapped = Callable[..., Any]


def run(wrapped: Wrapped, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Engine.run``: one trace, or one subtree if it is called from within a run."""
    agent_run = _begin(engine, args, kwargs)
    if agent_run is None:
        return wrapped(*args, **kwargs)
    try:
        attach(agent_run, engine)
        result = wrapped(*args, **kwargs)
        detach(agent_run, engine)
        agent_run.end(result=result)
        with shield("bridge.result"):
            results.note(result, agent_run.qitos_run_id, agent_run.live.trace.trace_id)
    except BaseException as error:
        detach(agent_run, engine)  # Once more, if Ctrl-C came within it.
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
        with shield("bridge.init_session"):
            agent_run.session_began(engine)
        # To run before our processors' exit handlers, registered when the trace began.
        atexit.unregister(_end_sessions)
        atexit.register(_end_sessions)
        _sessions.append(agent_run)
    except BaseException as error:
        agent_run.end(error=error, run_id=extract.first(engine, "_active_run_id"))
        raise
    return result


def step(wrapped: Wrapped, engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``Engine.step``: one step of the session's trace; the last one ends it."""
    agent_run = next((one for one in list(_sessions) if one.engine() is engine), None)
    if agent_run is None:
        return wrapped(*args, **kwargs)
    before = here.get()
    here.set(Place(agent_run, agent_run.root))
    try:
        attach(agent_run, engine, in_session=True)
        result = wrapped(*args, **kwargs)
        detach(agent_run, engine)
        agent_run.session_stepped(None)
        with shield("bridge.result"):
            results.note(result, agent_run.qitos_run_id, agent_run.live.trace.trace_id)
        if extract.first(result, "stop"):
            _end_session(agent_run, extract.text_of(extract.first(result, "stop_reason")))
    except BaseException as error:
        detach(agent_run, engine)
        agent_run.session_stepped(error)  # The caller may step again.
        raise
    finally:
        here.set(before)
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
    except BaseException as error:  # noqa: BLE001 - the tool runs without a span
        here.set(place)
        contain("bridge.tool", error)
        return wrapped(*args, **kwargs)
    try:
        result = wrapped(*args, **kwargs)
        _end_tool(live, span, result)
    except BaseException as error:
        with shield("bridge.tool"):
            live.finish(span, error)
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
        if before is not None and before.run.engine() is engine and not before.run.began:
            return None  # The same call once more: a subclass's run() that calls ours.
        if _sessions:
            _end_sessions(engine)
        if (before is None or before.starts_trace) and not is_wanted():
            return None
        _fit()
        task = args[0] if args else kwargs.get("task")
        # A host that resumes a run gives its id as the task.
        resumed = task if kwargs.get("_resume_state") is not None else None
        return AgentRun(engine, task, before, resumed)
    except BaseException as error:  # noqa: BLE001 - a processor's, or the user's objects'
        place = here.get()
        if place is not None and place is not before and place.run.before is before:
            place.run.end(error=error)  # It has begun, and the caller does not get it.
        here.set(before)
        contain("bridge.begin", error)  # The agent runs without a trace.
        return None


def _fit() -> None:
    """Wrap tools and critics, and replace thread pools, when the first run to be traced begins.

    What a host does not have is left out, with one line in the log.
    """
    global _fitted
    if _fitted:
        return
    with _lock, shield("bridge.fit"):  # Runs are traced without what is missing.
        if not _fitted:
            try:
                after_import("qitos.engine.action_executor", _wrap_tools)
                after_import("qitos.engine.critic_result", _wrap_verdicts)
                for module, detached in POOLS.items():
                    after_import(module, partial(_replace_pool, detached))
            finally:  # Nothing may be replaced once more.
                _fitted = True


def _wrap_tools(module: ModuleType) -> None:
    wrap(module.ActionExecutor, "_execute_one", execute_one)
    wrap(module.ActionExecutor, "_call_tool", call_tool)


def _wrap_verdicts(module: ModuleType) -> None:
    wrap(module.CriticResult, "from_dict", critic_result)


def _replace_pool(detached: bool, module: ModuleType) -> None:
    if "ThreadPoolExecutor" in vars(module):
        from qitos_mlflow.bridge import pools

        pools.replace(module, detached=detached)


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
    raised, failure = getattr(span, "exception", None), None
    with shield("bridge.tool"):
        span.exception = None
        span.data.output_content, failure, span.output = extract.tool_result(result)
    with shield("bridge.tool"):
        live.finish(span, raised if failure is not None and raised is not None else failure)


def _end_sessions(engine: Any = None) -> None:
    """End this Engine's session and those whose Engine is gone; all of them for None."""
    place = here.get()
    for left in list(_sessions):
        of = left.engine()
        if engine is None or of is None or of is engine:
            _end_session(left)
    here.set(place)


def _end_session(session: AgentRun, stop_reason: str | None = None) -> None:
    with suppress(ValueError):  # Another thread has taken it.
        _sessions.remove(session)
        session.end(stop_reason=stop_reason)
