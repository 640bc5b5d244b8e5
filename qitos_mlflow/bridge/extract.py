"""Reads what a span needs out of the Engine's objects. Pure: no spans, no clock, no threads.

Receives agents, engines, records and results as the host made them; hands on plain values or
references. Makes no deep copies and formats nothing large: this runs on the agent's thread. What
a host does not have is None, so that the same functions read every version.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Number
from typing import Any

FAILED_OUTPUT_STATUSES = frozenset({"error", "failed", "denied", "needs_user_input"})
"""A tool failed if its output is a dict with one of these: later hosts read it so themselves."""


def first(source: Any, *names: str) -> Any:
    """The first of these attributes that exists and is not None; one that raises does not exist."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except Exception:  # noqa: BLE001, S112 - a property of the user's; the next name may do
            continue
        if value is not None:
            return value
    return None


# -- the run -----------------------------------------------------------------------------------


def agent_name(agent: Any) -> str:
    """The agent's name, or its class's."""
    return str(first(agent, "name") or type(agent).__name__)


def model_name(agent: Any) -> str | None:
    """The model the agent is configured with; an answer may name another one."""
    name = first(first(agent, "llm"), "model", "model_name")
    return name if isinstance(name, str) and name else None


def tool_names(engine: Any) -> list[str] | None:
    """Names of the registered tools."""
    listing = first(first(engine, "tool_registry"), "list_tools")
    if not callable(listing):
        return None
    try:
        return [str(name) for name in listing()]
    except Exception:  # noqa: BLE001 - a registry of the user's
        return None


def run_metadata(engine: Any, task: Any) -> dict[str, Any]:
    """What is known of a run before it starts, without unknown keys.

    Args:
        engine: the Engine about to run.
        task: the text or `Task` it was given.
    """
    agent = first(engine, "agent")
    spec = first(engine, "run_spec")
    is_task = hasattr(task, "objective")
    inputs = mapping(first(task, "inputs")) if is_task else {}
    extra = mapping(first(task, "metadata")) if is_task else {}
    config = mapping(first(agent, "config"))
    writer = first(engine, "trace_writer")
    seeds = (first(spec, "seed"), config.get("seed"), extra.get("seed"))
    found = {
        "agent_name": agent_name(agent),
        "task": first(task, "objective") if is_task else task,
        "task_id": first(task, "id") if is_task else None,
        "model_name": model_name(agent) or first(spec, "model_name"),
        "model_family": first(spec, "model_family"),
        "protocol": _protocol_id(engine, agent) or first(spec, "prompt_protocol"),
        "parser": _class_name(first(engine, "parser") or first(agent, "model_parser"))
        or first(spec, "parser_name"),
        "max_steps": _max_steps(engine, task),
        "benchmark_name": extra.get("benchmark")
        or inputs.get("benchmark")
        or extra.get("benchmark_name")
        or first(spec, "benchmark_name"),
        "benchmark_split": extra.get("split")
        or inputs.get("split")
        or extra.get("benchmark_split")
        or first(spec, "benchmark_split"),
        "seed": next((seed for seed in seeds if seed is not None), None),
        "qitos_version": getattr(sys.modules.get("qitos"), "__version__", None),
        "qitos_run_id": first(writer, "run_id") or None,
        "qitos_run_dir": first(writer, "run_dir"),
        "tools": tool_names(engine),
    }
    return present(found)


def init_metadata(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the host's INIT event adds to `run_metadata`."""
    meta = mapping(payload.get("run_meta"))
    found = {
        "qitos_run_id": payload.get("run_id") or None,
        "task_id": payload.get("task_id"),
        "model_name": meta.get("model_name"),
        "model_family": meta.get("model_family"),
        "protocol": meta.get("protocol"),
        "parser": meta.get("parser"),
    }
    return present(found)


def session_metadata(engine: Any) -> dict[str, Any]:
    """What an Engine knows after ``init_session``, which makes no INIT event."""
    found = {
        "qitos_run_id": first(engine, "_active_run_id") or None,
        "protocol": first(first(engine, "_resolved_protocol"), "id") or None,
    }
    return present(found)


def text_of(reason: Any) -> str | None:
    """A stop reason as text: hosts use strings and string enums."""
    value = getattr(reason, "value", reason)
    return str(value) if value is not None else None


# -- decide ------------------------------------------------------------------------------------


def decision(source: Any) -> dict[str, Any] | None:
    """A decision as a dict without empty fields."""
    if source is None or isinstance(source, dict):
        return source
    found = {
        "mode": first(source, "mode"),
        "actions": [action(item) for item in first(source, "actions") or ()],
        "final_answer": first(source, "final_answer"),
        "rationale": first(source, "rationale"),
        "meta": first(source, "meta"),
    }
    return {key: value for key, value in found.items() if value}


def action(source: Any) -> dict[str, Any]:
    """An action's name, arguments and, when native tool calls gave one, its id."""
    read = source.get if isinstance(source, Mapping) else partial(first, source)
    return present({key: read(key) for key in ("name", "args", "action_id")})


def messages(payload: Mapping[str, Any]) -> Any:
    """The messages sent to the model, without the host's private keys (leading underscore)."""
    sent = payload.get("messages")
    if not isinstance(sent, list):
        return payload.get("prepared_full") or payload.get("prepared")
    return [_public(message) for message in sent]


def response(model_response: Any) -> dict[str, Any] | None:
    """The host's summary of an answer without its text, which is the span's output."""
    if not isinstance(model_response, Mapping):
        return None
    return {
        key: value
        for key, value in model_response.items()
        if key != "text" and value not in (None, {}, [])
    }


# -- act ---------------------------------------------------------------------------------------


def tool_result(result: Any) -> tuple[Any, str | None, dict[str, Any]]:
    """What the agent saw of a tool call, why it failed (None: it did not), and details.

    Args:
        result: an `ActionResult`; anything else counts as plain output.
    """
    if not hasattr(result, "status") or not hasattr(result, "metadata"):
        return result, None, {}
    status = text_of(first(result, "status")) or "unknown"
    output, error, extra = (
        first(result, "output"),
        first(result, "error"),
        mapping(result.metadata),
    )
    category = extra.get("error_category")
    found = {
        "status": status,
        "attempts": first(result, "attempts"),
        "latency_ms": first(result, "latency_ms"),
        "error_category": category,
        "toolset": extra.get("toolset_name"),
        "source": extra.get("source"),
        "action_id": first(result, "action_id"),
    }
    details = present(found)
    if status == "success":
        said = mapping(output) if isinstance(output, dict) else {}
        if str(said.get("status") or "").strip().lower() not in FAILED_OUTPUT_STATUSES:
            return output, None, details
        why = said.get("error") or said.get("message") or said["status"]
        return output, f"{category or said['status']}: {why}", details
    why = error or mapping(output).get("message") or status
    seen = output if output is not None else {"error": error}
    return seen, f"{category or status}: {why}", details


def mcp_server(tool: Any) -> str | None:
    """Name of the MCP server behind a tool, None for any other tool.

    A bridged tool has no mark of its own: its function's module and closure have the server.
    """
    function = first(tool, "func", "fn", "function")
    if getattr(function, "__module__", None) != "qitos.mcp.bridge":
        return None
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    server = None
    for name, cell in zip(getattr(code, "co_freevars", ()), cells, strict=False):
        if name == "server":
            server = cell.cell_contents
    return str(first(server, "name") or type(server).__name__) if server is not None else "mcp"


# -- critic ------------------------------------------------------------------------------------


def critic_name(critic: Any, output: Any = None) -> str:
    """A critic's own name, else the host's for it, else its class's."""
    own = first(critic, "name")
    if isinstance(own, str) and own:
        return own
    return str(mapping(output).get("critic_name") or type(critic).__name__)


def judged_by_model(critic: Any) -> bool:
    """Whether a critic holds a language model, so that its verdict may be that model's."""
    return first(critic, "llm", "model") is not None


def critic_scores(
    outputs: Sequence[Any], verdicts: Sequence[tuple[Any, bool]]
) -> list[float | None]:
    """The scores the critics gave, None for a critic that gave none.

    Args:
        outputs: what the host recorded, in the critics' order.
        verdicts: what the host made of those critics that returned a dict, in the same order, and
            whether the dict had a score: if not, the host records one of its own.
    """
    left = list(verdicts)
    scores: list[float | None] = []
    for output in outputs:
        said = mapping(output)
        score = _number(said.get("score"))
        if left:
            verdict, scored = left[0]
            if all(said.get(k) == getattr(verdict, k, None) for k in ("action", "reason", "score")):
                del left[0]
                score = score if scored else None
        scores.append(score)
    return scores


def critics_in_traceback(critics: Sequence[Any], error: BaseException) -> set[int]:
    """Indexes of the critics that were running when `error` was raised; all when unknown."""
    running: set[int] = set()
    traceback = error.__traceback__
    while traceback is not None:
        owner = traceback.tb_frame.f_locals.get("self")
        running.update(i for i, critic in enumerate(critics) if critic is owner)
        traceback = traceback.tb_next
    return running or set(range(len(critics)))


# -- helpers -----------------------------------------------------------------------------------


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def present(found: Mapping[str, Any]) -> dict[str, Any]:
    """`found` without the keys whose value is None."""
    return {key: value for key, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Number):  # Numpy's and `Decimal` are.
        return None
    try:
        return float(value)  # type: ignore[arg-type]  # What cannot be one raises.
    except (TypeError, ValueError, OverflowError):
        return None


def _class_name(value: Any) -> str | None:
    return type(value).__name__ if value is not None else None


def _public(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    for key in message:
        if isinstance(key, str) and key.startswith("_"):
            return {k: v for k, v in message.items() if not str(k).startswith("_")}
    return message


def _protocol_id(engine: Any, agent: Any) -> str | None:
    # Only what is configured: the host resolves the rest, and its INIT event has the result.
    protocol = first(engine, "protocol") or first(agent, "model_protocol")
    if protocol is None or isinstance(protocol, str):
        return protocol
    identity = first(protocol, "id")
    return str(identity) if identity is not None else None


def _max_steps(engine: Any, task: Any) -> int | None:
    for budget in (first(task, "budget"), first(engine, "_base_budget"), first(engine, "budget")):
        steps = first(budget, "max_steps")
        if isinstance(steps, int):
            return steps
    return None
