"""MLflow's attributes of one span: type, inputs, outputs, chat, tokens, model. Pure.

Receives a span record, hands on plain values by attribute name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qitos_mlflow._usage import Usage, parse_usage
from qitos_mlflow.mlflow_plugin.mapping import chat_messages, limits
from qitos_mlflow.mlflow_plugin.mapping.content_blocks import as_text, parts, take, with_rest
from qitos_mlflow.mlflow_plugin.mapping.limits import clean_text, mapping
from qitos_mlflow.mlflow_plugin.mapping.span_kinds import kind_of, read, read_all
from qitos_mlflow.recording.record import SpanEnd

_PROVIDERS = ("openai", "anthropic", "gemini", "mistral", "groq", "bedrock", "ollama", "deepseek")
"""Names that MLflow has prices for; hosts' model classes contain them."""


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
        "mlflow.spanType": kind.mlflow_type
        or clean_text(own_type.upper() or "UNKNOWN", limits.SPAN_TYPE_CHARS),
        "qitos.type": own_type,
        "qitos.span_id": str(record.get("span_id", "")),
        "qitos.step": record.get("step"),
    }
    if kind.counts == "tokens":
        found |= _generation(data, output, tools)
    else:
        found |= {"mlflow.spanInputs": read(kind.inputs, data), "mlflow.spanOutputs": output}
    if kind.attributes:
        found |= read_all(kind.attributes, data)
    return {key: value for key, value in found.items() if value is not None}


def _generation(data: Mapping[str, Any], output: Any, tools: list[str] | None) -> dict[str, Any]:
    response = mapping(data.get("model_response"))
    request = data.get("input_content")
    model = data.get("model") or response.get("model_name")
    found: dict[str, Any] = {}
    if request is not None:
        messages, parameters = chat_messages.request(request)
        inputs = {"messages": messages, **({"model": str(model)} if model else {})}
        found["mlflow.spanInputs"] = with_rest(inputs, parameters)
        listed = data.get("tools") or mapping(request).get("tools") or response.get("tools")
        found["mlflow.chat.tools"] = chat_messages.tool_definitions(listed or tools)
    if output is not None or response.get("tool_calls"):
        answer = chat_messages.response(output, {"model_name": model, **response})
        found["mlflow.spanOutputs"] = answer
    if found:
        found["mlflow.message.format"] = "openai"
    if model:
        found["mlflow.llm.model"] = clean_text(model, limits.SPAN_TYPE_CHARS)
    usage = parse_usage(data.get("token_usage"))
    if usage is not None:
        found["mlflow.chat.tokenUsage"] = _token_usage(usage)
    rest = dict(response)
    found["mlflow.llm.provider"] = _provider(rest.get("provider"))
    found |= {
        f"qitos.{key}": rest.pop(key, None) for key in ("provider", "finish_reason", "cached")
    }
    rest.pop("model_name", None)
    take(rest, "tool_calls", kind=list)
    found["qitos.response"] = rest or None
    return found


def _token_usage(usage: Usage) -> dict[str, int]:
    """`usage` as MLflow spells it: whole numbers only; MLflow refuses a batch with None in it."""
    prompt, completion = usage.prompt or 0, usage.completion or 0
    counts = {
        "input_tokens": prompt,
        "output_tokens": completion,
        "total_tokens": prompt + completion if usage.total is None else usage.total,
        "cache_read_input_tokens": usage.cache_read,
        "cache_creation_input_tokens": usage.cache_creation,
    }
    return {name: count for name, count in counts.items() if count is not None}


def _provider(name: Any) -> str | None:
    """The provider's name in MLflow, if `name` contains it; None for any other.

    For a provider that MLflow does not know, its server looks for prices on the internet (7 s if it
    has no access). Without a provider it goes by the model's name.
    """
    low = name.lower() if isinstance(name, str) else ""
    return next((provider for provider in _PROVIDERS if provider in low), None)


def answer_preview(found: Mapping[str, Any]) -> str | None:
    """The text of a generation's last choice that has one, for the trace's list; no thoughts."""
    for choice in reversed(mapping(found.get("mlflow.spanOutputs")).get("choices", [])):
        content = parts(choice["message"]["content"])
        if text := "\n".join(part["text"] for part in content if "text" in part):
            return preview(text)
    return None


def preview(value: Any) -> str:
    """`value` as text of at most `limits.PREVIEW_CHARS`."""
    return clean_text(as_text(value), limits.PREVIEW_CHARS)
