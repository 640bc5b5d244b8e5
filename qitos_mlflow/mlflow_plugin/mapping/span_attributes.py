"""MLflow's attributes of one span: type, inputs, outputs, chat, tokens, model. Pure.

Receives a span record, hands on plain values by attribute name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from qitos_mlflow._usage import Usage, parse_usage
from qitos_mlflow.mlflow_plugin.mapping import chat_messages, limits
from qitos_mlflow.mlflow_plugin.mapping.content_blocks import with_rest
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text

SPAN_TYPES = {
    "agent": "AGENT",
    "step": "CHAIN",
    "decide": "CHAIN",
    "generation": "CHAT_MODEL",
    "act": "CHAIN",
    "tool": "TOOL",
    "mcp": "TOOL",
    "reduce": "CHAIN",
    "critic": "EVALUATOR",
    "handoff": "AGENT",
    "delegate": "AGENT",
    "fanout": "CHAIN",
    "parse": "PARSER",
    "guardrail": "GUARDRAIL",
    "custom": "UNKNOWN",
}
"""MLflow's type of each of QitOS's; another is passed on in capitals."""

_PROVIDERS = ("openai", "anthropic", "gemini", "mistral", "groq", "bedrock", "ollama", "deepseek")
"""Names by which MLflow looks prices up, and which hosts' model classes contain."""

_SHOWN = ("finish_reason", "model_name", "provider", "cached")
"""Fields of the host's summary of an answer that have a place of their own."""


def span_name(record: Mapping[str, Any]) -> str:
    """What the tree shows: ``step 3``, the model, the tool, the critic, or the span's type."""
    data = _data(record)
    kind = str(record.get("type") or "span")
    if kind == "step" and data.get("step_number") is not None:
        return f"step {data['step_number']}"
    if kind == "mcp" and data.get("server_name") and data.get("tool_name"):
        return f"{data['server_name']}/{data['tool_name']}"
    if kind == "handoff" and (data.get("from_agent") or data.get("to_agent")):
        return f"{data.get('from_agent') or '?'} → {data.get('to_agent') or '?'}"
    key = {
        "agent": "name",
        "generation": "model",
        "tool": "tool_name",
        "mcp": "tool_name",
        "act": "action_name",
        "critic": "critic_name",
    }.get(kind, "name")
    name = record.get("name") or data.get(key)
    return str(name) if name else kind


def of_span(record: Mapping[str, Any], tools: list[str] | None = None) -> dict[str, Any]:
    """The attributes of a span; None where there is nothing to say.

    Args:
        record: the span's record.
        tools: names of the agent's tools, shown with generations that do not list their own.
    """
    data = _data(record)
    kind = str(record.get("type") or "")
    mlflow_type = SPAN_TYPES.get(kind) or kind.upper() or "UNKNOWN"
    output = data.get("output_content")
    if output is None:
        output = record.get("output")
    found: dict[str, Any] = {
        "mlflow.spanType": clean_text(mlflow_type, limits.SPAN_TYPE_CHARS),
        "qitos.type": kind,
        "qitos.span_id": str(record.get("span_id", "")),
        "qitos.step": record.get("step"),
    }
    if kind == "generation":
        found |= _generation(data, output, tools)
    elif kind == "agent":
        task = data.get("task")
        found |= {
            "mlflow.spanInputs": None if task is None else {"task": task},
            "mlflow.spanOutputs": output,
            "qitos.model": data.get("model"),
            "qitos.tools": data.get("tools"),
        }
    elif kind == "step":
        decision = data.get("decision")
        found |= {
            "mlflow.spanInputs": data.get("observation"),
            "mlflow.spanOutputs": output if decision is None else decision,
        }
    elif kind in ("tool", "mcp", "act"):
        found |= {"mlflow.spanInputs": data.get("tool_args"), "mlflow.spanOutputs": output}
    elif kind == "critic":
        found |= {"mlflow.spanInputs": data.get("input_content"), "mlflow.spanOutputs": output}
        found["qitos.score"] = data.get("score")
    elif kind in ("decide", "reduce"):
        found |= {"mlflow.spanInputs": data.get("input_content"), "mlflow.spanOutputs": output}
        found["qitos.input_count"] = data.get("input_count")
    elif kind == "custom":
        found |= {"mlflow.spanInputs": data.get("data"), "mlflow.spanOutputs": output}
    else:  # hand-offs, and types of later hosts: everything that is there
        inputs = {k: v for k, v in data.items() if k != "output_content" and v is not None}
        found |= {"mlflow.spanInputs": inputs or None, "mlflow.spanOutputs": output}
    return {key: value for key, value in found.items() if value is not None}


def _generation(data: Mapping[str, Any], output: Any, tools: list[str] | None) -> dict[str, Any]:
    response = data.get("model_response")
    response = response if isinstance(response, Mapping) else {}
    request = data.get("input_content")
    model = data.get("model") or response.get("model_name")
    found: dict[str, Any] = {}
    if request is not None:
        messages, parameters = chat_messages.request(request)
        inputs: dict[str, Any] = {"messages": messages}
        if model:
            inputs["model"] = str(model)
        found["mlflow.spanInputs"] = with_rest(inputs, parameters)
        given = request.get("tools") if isinstance(request, Mapping) else None
        listed = data.get("tools") or given or response.get("tools") or tools
        found["mlflow.chat.tools"] = chat_messages.tool_definitions(listed)
    if output is not None or response.get("tool_calls"):
        found["mlflow.spanOutputs"] = chat_messages.response(
            output, {"model_name": model, **response}
        )
    if found:
        found["mlflow.message.format"] = "openai"
    if model:
        found["mlflow.llm.model"] = clean_text(model, limits.SPAN_TYPE_CHARS)
    found["mlflow.llm.provider"] = _provider(response.get("provider"))
    found["qitos.provider"] = response.get("provider")
    found["qitos.finish_reason"] = response.get("finish_reason")
    found["qitos.cached"] = response.get("cached")
    shown = (*_SHOWN, "tool_calls") if isinstance(response.get("tool_calls"), list) else _SHOWN
    found["qitos.response"] = {k: v for k, v in response.items() if k not in shown} or None
    usage = parse_usage(data.get("token_usage"))
    if usage is not None:
        found["mlflow.chat.tokenUsage"] = token_usage(usage)
    return found


def token_usage(usage: Usage) -> dict[str, int]:
    """`usage` as MLflow spells it: whole numbers only; MLflow refuses a batch with None in it."""
    counts = {
        "input_tokens": usage.prompt or 0,
        "output_tokens": usage.completion or 0,
        "total_tokens": usage.total
        if usage.total is not None
        else (usage.prompt or 0) + (usage.completion or 0),
    }
    if usage.cache_read is not None:
        counts["cache_read_input_tokens"] = usage.cache_read
    if usage.cache_creation is not None:
        counts["cache_creation_input_tokens"] = usage.cache_creation
    return counts


def _provider(name: Any) -> str | None:
    """The provider as MLflow knows it, where the host names a class of that provider's.

    None for any other: MLflow's server would look on the internet for that provider's prices (7 s
    for a server that cannot get there), where without one it goes by the model's name.
    """
    low = name.lower() if isinstance(name, str) else ""
    return next((provider for provider in _PROVIDERS if provider in low), None)


def answer_preview(found: Mapping[str, Any]) -> str | None:
    """The text of a generation's answer, for the trace's list entry."""
    outputs = found.get("mlflow.spanOutputs")
    choices = outputs.get("choices") if isinstance(outputs, Mapping) else None
    messages = [
        choice["message"]
        for choice in choices or []
        if isinstance(choice, Mapping) and isinstance(choice.get("message"), Mapping)
    ]
    text = chat_messages.last_text(messages, "assistant")
    return preview(text) if text else None


def preview(value: Any) -> str:
    """`value` as text of at most `limits.PREVIEW_CHARS`."""
    text = value if isinstance(value, str) else orjson.dumps(value, default=str).decode()
    return clean_text(text, limits.PREVIEW_CHARS)


def _data(record: Mapping[str, Any]) -> Mapping[str, Any]:
    data = record.get("data")
    return data if isinstance(data, Mapping) else {}
