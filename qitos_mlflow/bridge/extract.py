"""Reads what a span needs out of the Engine's objects. Pure: no spans, no clock, no threads.

Receives agents, engines, records and results as the host made them; hands on plain values or
references. Makes no deep copies, formats nothing large, and does not ask whether a value of the
user's is true (a query set would run its query): this runs on the agent's thread. What a host does
not have is None, so that the same functions read every version.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Number
from traceback import walk_tb
from typing import Any

from qitos_mlflow._guard import let_through
from qitos_mlflow._usage import parse_usage

FAILED_OUTPUT_STATUSES = frozenset({"error", "failed", "denied", "needs_user_input"})
"""A tool failed if its output is a dict with one of these: later hosts read it so themselves."""


def first(source: Any, *names: str) -> Any:
    """The first of these attributes that exists and is not None; one that raises does not exist."""
    for name in names:
        try:
            value = getattr(source, name, None)
        except BaseException as error:  # noqa: BLE001 - a property of the user's; the next may do
            let_through(error)
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
    except BaseException as error:  # noqa: BLE001 - a registry of the user's
        let_through(error)
        return None


def run_metadata(engine: Any, task: Any) -> dict[str, Any]:
    """What is known of a run before it starts, without unknown keys.

    Args:
        engine: the Engine about to run.
        task: the text or `Task` it was given.
    """
    agent, spec, writer = (first(engine, name) for name in ("agent", "run_spec", "trace_writer"))
    inputs, extra = mapping(first(task, "inputs")), mapping(first(task, "metadata"))
    seeds = (first(spec, "seed"), mapping(first(agent, "config")).get("seed"), extra.get("seed"))
    parser = first(engine, "parser") or first(agent, "model_parser")
    budgets = (first(task, "budget"), first(engine, "_base_budget"), first(engine, "budget"))
    steps = (first(budget, "max_steps") for budget in budgets)
    found = {
        "agent_name": agent_name(agent),
        "task": first(task, "objective") if hasattr(task, "objective") else task,
        "task_id": first(task, "id"),
        "model_name": model_name(agent) or first(spec, "model_name"),
        "model_family": first(spec, "model_family"),
        "protocol": _protocol_id(engine, agent) or first(spec, "prompt_protocol"),
        "parser": type(parser).__name__ if parser is not None else first(spec, "parser_name"),
        "max_steps": next((number for number in steps if isinstance(number, int)), None),
        "seed": next((seed for seed in seeds if seed is not None), None),
        "qitos_version": getattr(sys.modules.get("qitos"), "__version__", None),
        "qitos_run_id": first(writer, "run_id") or None,
        "qitos_run_dir": first(writer, "run_dir"),
        "tools": tool_names(engine),
    }
    for key in ("name", "split"):
        short, full = "benchmark" if key == "name" else key, f"benchmark_{key}"
        given = (extra.get(short), inputs.get(short), extra.get(full), first(spec, full))
        found[full] = next(filter(None, given), None)
    return present(found)


def init_metadata(payload: Mapping[str, Any]) -> dict[str, Any]:
    """What the host's INIT event adds to `run_metadata`."""
    meta = mapping(payload.get("run_meta"))
    found = {key: meta.get(key) for key in ("model_name", "model_family", "protocol", "parser")}
    return present(
        {"qitos_run_id": payload.get("run_id") or None, "task_id": payload.get("task_id"), **found}
    )


def text_of(reason: Any) -> str | None:
    """A stop reason as text: hosts use strings and string enums."""
    value = getattr(reason, "value", reason)
    return str(value) if value is not None else None


# -- decide ------------------------------------------------------------------------------------


def decision(source: Any) -> dict[str, Any] | None:
    """A decision as a dict without empty fields."""
    if source is None or isinstance(source, dict):
        return source
    keys = ("mode", "actions", "final_answer", "rationale", "meta")
    found = {key: first(source, key) for key in keys}
    found["actions"] = [action(item) for item in found["actions"] or ()]
    return {key: value for key, value in found.items() if not _is_empty(value)}


def action(source: Any) -> dict[str, Any]:
    """An action's name, arguments and, when native tool calls gave one, its id."""
    read = source.get if isinstance(source, Mapping) else partial(first, source)
    return present({key: read(key) for key in ("name", "args", "action_id")})


def messages(payload: Mapping[str, Any]) -> Any:
    """The messages sent to the model, without the host's private keys (leading underscore)."""
    sent = payload.get("messages")
    if not isinstance(sent, list):
        full = payload.get("prepared_full")
        return payload.get("prepared") if _is_empty(full) else full
    return [_public(message) for message in sent]


def response(model_response: Any) -> dict[str, Any] | None:
    """The host's summary of an answer without its text, which is the span's output."""
    if not isinstance(model_response, Mapping):
        return None
    return {
        key: value
        for key, value in model_response.items()
        if key != "text" and not _is_empty(value)
    }


def token_usage(usage: Any, provider: Any = None) -> dict[str, int] | None:
    """Token counts under one set of names; None if there are no real ones.

    Args:
        usage: the provider's own, never an estimate.
        provider: the host's name for the provider.
    """
    found = parse_usage(usage)
    if found is None:
        return None
    prompt, completion, total = found.prompt, found.completion, found.reported_total
    if (
        prompt is not None
        and total is not None
        and total > prompt + (completion or 0)
        and any(name in str(provider).lower() for name in ("gemini", "google"))
    ):
        completion = total - prompt  # QitOS 0.3.0 leaves the thoughts out of Gemini's counts.
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": (prompt or 0) + (completion or 0) if total is None else total,
        "cache_read_tokens": found.cache_read,
        "cache_creation_tokens": found.cache_creation,
    }
    return present(counts)


def cache_hits(agent: Any) -> int | None:
    """How often a caching model has answered from its cache; None for a model without one.

    After a hit, such a model may report the usage of its last miss again.
    """
    hits = mapping(getattr(first(agent, "llm"), "__dict__", None)).get("_hits")
    return hits if isinstance(hits, int) else None


# -- act ---------------------------------------------------------------------------------------


def tool_result(result: Any) -> tuple[Any, str | None, dict[str, Any]]:
    """What the agent saw of a tool call, why it failed (None: it did not), and details.

    Args:
        result: an `ActionResult`; anything else counts as plain output.
    """
    if not hasattr(result, "status") or not hasattr(result, "metadata"):
        return result, None, {}
    status = text_of(first(result, "status")) or "unknown"
    output, error = first(result, "output"), first(result, "error")
    extra = mapping(result.metadata)
    category = extra.get("error_category")
    found = {key: first(result, key) for key in ("attempts", "latency_ms", "action_id")}
    found |= {"status": status, "error_category": category, "source": extra.get("source")}
    details = present({**found, "toolset": extra.get("toolset_name")})
    if status == "success":
        said = output if issubclass(type(output), dict) else {}
        failed = said.get("status")
        if not isinstance(failed, str) or failed.strip().lower() not in FAILED_OUTPUT_STATUSES:
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
    named = dict(zip(getattr(code, "co_freevars", ()), cells, strict=False))
    server = named["server"].cell_contents if "server" in named else None
    return str(first(server, "name") or type(server).__name__) if server is not None else "mcp"


# -- critic ------------------------------------------------------------------------------------


def critic_name(critic: Any, output: Any = None) -> str:
    """A critic's own name, else the host's for it, else its class's."""
    own = first(critic, "name")
    if isinstance(own, str) and own:
        return own
    return str(mapping(output).get("critic_name") or type(critic).__name__)


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


def critics_in_traceback(critics: Sequence[Any], error: BaseException) -> Sequence[Any]:
    """The critics that were running when `error` was raised; all when unknown."""
    selves = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    return [one for one in critics if any(one is owner for owner in selves)] or critics


# -- helpers -----------------------------------------------------------------------------------


def mapping(value: Any) -> Mapping[str, Any]:
    """`value` if it is a mapping, else an empty one."""
    # `isinstance` asks a lazy object for its class.
    return value if issubclass(type(value), Mapping) else {}


def present(found: Mapping[str, Any]) -> dict[str, Any]:
    """`found` without the keys whose value is None."""
    return {key: value for key, value in found.items() if value is not None}


def _is_empty(value: Any) -> bool:
    """Whether `value` is None or a text or container of Python's without anything in it."""
    return value is None or (type(value) in (str, dict, list, tuple) and not value)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, Number):  # Numpy's and `Decimal` are.
        return None
    try:
        return float(value)  # type: ignore[arg-type]  # What cannot be one raises.
    except (TypeError, ValueError, OverflowError):
        return None


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
    return protocol if isinstance(protocol, str) else text_of(first(protocol, "id"))
