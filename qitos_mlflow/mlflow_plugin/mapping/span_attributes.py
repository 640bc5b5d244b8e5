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
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text, mapping
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import Counts, kind_of, read, read_all
from qitos_mlflow.recording.record import SpanEnd

_PROVIDERS = ("openai", "anthropic", "gemini", "mistral", "groq", "bedrock", "ollama", "deepseek")
"""Names that MLflow has prices for; hosts' model classes contain them."""

_SHOWN = ("finish_reason", "model_name", "provider", "cached")
"""Fields of the host's summary of an answer that have a place of their own."""


def of_span(record: SpanEnd, tools: list[str] | None = None) -> dict[str, Any]:
    """The attributes of a span; one without a value is left out.

    Args:
        record: the span's record.
        tools: names of the agent's tools, shown with generations that do not list their own.
    """
    data, kind = mapping(record.get("data")), kind_of(record)
    own_type = str(record.get("type") or "")
    output = read(kind.output, data)
    if output is None:
        output = record.get("output")
    found: dict[str, Any] = {
        "mlflow.spanType": clean_text(
            kind.mlflow_type or own_type.upper() or "UNKNOWN", limits.SPAN_TYPE_CHARS
        ),
        "qitos.type": own_type,
        "qitos.span_id": str(record.get("span_id", "")),
        "qitos.step": record.get("step"),
    }
    if kind.counts is Counts.MODEL_CALL:
        found |= _generation(data, output, tools)
    else:
        found |= {"mlflow.spanInputs": read(kind.inputs, data), "mlflow.spanOutputs": output}
    found |= read_all(kind.attributes, data)
    return {key: value for key, value in found.items() if value is not None}


def _generation(data: Mapping[str, Any], output: Any, tools: list[str] | None) -> dict[str, Any]:
    response = mapping(data.get("model_response"))
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
    """The provider's name in MLflow, if `name` contains it; None for any other.

    For a provider that MLflow does not know, its server looks for prices on the internet (7 s if it
    has no access). Without a provider it goes by the model's name.
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
