"""Model calls in the one chat format that MLflow's page renders as a conversation: OpenAI's. Pure.

Receives what went into a model and came out of it in any of the common shapes (texts, OpenAI
chat and Responses, Anthropic blocks, Gemini parts), hands on messages with role, content, tool
calls and tool results. What is in no known shape is shown as text, never lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson

MAX_DATA_URL_CHARS = 32_768
"""Inlined images up to here stay, and are shown; larger ones become a note of type and size."""

_ROLES = {
    "human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant",
    "agent": "assistant", "function": "tool", "observation": "tool", "developer": "system",
}  # fmt: skip
_TEXT_TYPES = ("text", "input_text", "output_text", "summary_text", "refusal")


def request_messages(content: Any) -> list[dict[str, Any]]:
    """The messages of a request: a text, a message, a list of them, or a dict with ``messages``."""
    if content is None:
        return []
    if isinstance(content, Mapping):
        for key in ("messages", "input", "contents"):
            if isinstance(content.get(key), (list, str)):
                system = content.get("system")
                first = [{"role": "system", "content": _flat_text(system)}] if system else []
                return first + request_messages(content[key])
        return list(_messages(content, "user"))
    if isinstance(content, list):
        return [message for item in content for message in _messages(item, "user")]
    return [{"role": "user", "content": _as_text(content)}]


def response_choice(output: Any, response: Mapping[str, Any]) -> dict[str, Any]:
    """The answer as an OpenAI response with one choice.

    Args:
        output: text, message, or list of content blocks.
        response: the summary beside it: tool_calls, finish_reason, model_name, metadata.
    """
    if isinstance(output, Mapping) and isinstance(output.get("choices"), list):
        return dict(output)
    found = list(_messages(output, "assistant")) if output not in (None, "") else []
    message: dict[str, Any] = {"role": "assistant", "content": None}
    if len(found) == 1:
        message |= found[0]
    elif found:
        message["content"] = "\n".join(_flat_text(item.get("content")) for item in found)
        message["tool_calls"] = [call for item in found for call in item.get("tool_calls", [])]
    calls = _tool_calls(response.get("tool_calls")) or message.get("tool_calls")
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
    if message["content"] is None and not calls:
        message["content"] = ""
    finish = response.get("finish_reason") or ("tool_calls" if calls else "stop")
    metadata = response.get("metadata")
    identity = metadata.get("id") if isinstance(metadata, Mapping) else None
    choice = {"index": 0, "message": message, "finish_reason": str(finish)}
    answer = {
        "id": identity,
        "object": "chat.completion",
        "model": response.get("model_name"),
        "choices": [choice],
    }
    return {key: value for key, value in answer.items() if value is not None}


def last_text(messages: list[dict[str, Any]], role: str) -> str:
    """The text of the last message of `role`, or an empty text."""
    for message in reversed(messages):
        if message.get("role") == role and message.get("content"):
            return _flat_text(message["content"])
    return ""


def tool_definitions(tools: Any) -> list[dict[str, Any]] | None:
    """Tool definitions in OpenAI's form, from definitions of any provider or from mere names."""
    if not isinstance(tools, list):
        return None
    found = []
    for tool in tools:
        if isinstance(tool, str):
            function: Mapping[str, Any] = {"name": tool}
        elif isinstance(tool, Mapping):
            inner = tool.get("function")
            function = inner if isinstance(inner, Mapping) else tool
        else:
            continue
        if function.get("name"):
            schema = function.get("parameters") or function.get("input_schema")
            definition = {"name": str(function["name"]), "parameters": schema}
            definition["description"] = function.get("description")
            kept = {key: value for key, value in definition.items() if value is not None}
            found.append({"type": "function", "function": kept})
    return found or None


# -- messages ------------------------------------------------------------------------------------


def _messages(item: Any, default_role: str) -> Iterable[dict[str, Any]]:
    """One item of a conversation; Anthropic's tool results become messages of their own."""
    if not isinstance(item, Mapping):
        yield {"role": default_role, "content": _content(item)}
        return
    kind = item.get("type")
    if kind == "function_call":  # OpenAI Responses
        yield {"role": "assistant", "content": None, "tool_calls": _tool_calls([item])}
        return
    if kind == "function_call_output":
        yield _tool_result(item.get("call_id"), item.get("output"))
        return
    raw = item["content"] if "content" in item else item.get("parts")
    if "role" not in item and raw is None:
        known = kind in _TEXT_TYPES or _is_image(item)
        yield {"role": default_role, "content": _content([item] if known else item)}
        return
    role = str(item.get("role") or default_role).lower()
    role = _ROLES.get(role, role)
    calls = _tool_calls(item.get("tool_calls")) or []
    blocks: list[Any] = []
    for block in raw if isinstance(raw, list) else [raw]:
        use = _tool_use(block)
        if use is not None:
            calls.append(use)
        elif isinstance(block, Mapping) and block.get("type") == "tool_result":
            yield _tool_result(block.get("tool_use_id"), block.get("content"))
        elif isinstance(block, Mapping) and isinstance(block.get("functionResponse"), Mapping):
            result = block["functionResponse"]
            yield _tool_result(result.get("name"), result.get("response"))
        else:
            blocks.append(block)
    if not blocks and not calls and isinstance(raw, list) and raw:
        return  # nothing but tool results
    content = _content(blocks) if isinstance(raw, list) else _content(raw)
    message: dict[str, Any] = {"role": role, "content": content if blocks else None}
    if calls:
        message["tool_calls"] = calls
    for key in ("tool_call_id", "name"):
        if item.get(key) is not None:
            message[key] = str(item[key])
    if role == "tool":
        message["content"] = _flat_text(content)
    reasoning = item.get("reasoning_content") or item.get("reasoning")
    if isinstance(reasoning, str) and reasoning:
        text = message["content"]
        parts = text if isinstance(text, list) else [_text_part(text)] if text else []
        message["content"] = [_reasoning(reasoning), *parts]
    yield message


def _content(raw: Any) -> str | list[dict[str, Any]] | None:
    """A text, or a list of parts where it is more than text."""
    if raw is None or isinstance(raw, str):
        return raw
    if not isinstance(raw, list):
        return _as_text(raw)
    parts = [part for block in raw for part in [_part(block)] if part is not None]
    if all(part["type"] == "text" for part in parts):
        return "\n".join(part["text"] for part in parts)
    return parts


def _part(block: Any) -> dict[str, Any] | None:
    if not isinstance(block, Mapping):
        return None if block is None else _text_part(_as_text(block))
    kind = block.get("type")
    if kind in _TEXT_TYPES or (kind is None and isinstance(block.get("text"), str)):
        return _text_part(_as_text(block.get("text", block.get("refusal", ""))))
    if kind in ("thinking", "reasoning"):
        return _reasoning(_flat_text(block.get("thinking") or block.get("summary") or ""))
    if _is_image(block):
        return _image(block)
    if kind == "input_audio":
        return _text_part("[audio]")
    return _text_part(_as_text(dict(block)))


def _is_image(block: Mapping[str, Any]) -> bool:
    return block.get("type") in ("image", "image_url", "input_image") or any(
        key in block for key in ("inline_data", "inlineData")
    )


def _image(block: Mapping[str, Any]) -> dict[str, Any]:
    url = block.get("image_url") or block.get("url") or block.get("path")
    source = block.get("source") or block.get("inline_data") or block.get("inlineData")
    if isinstance(url, Mapping):
        url = url.get("url")
    if url is None and isinstance(source, Mapping):
        url = source.get("url")
        if url is None:
            media = source.get("media_type") or source.get("mime_type") or source.get("mimeType")
            url = f"data:{media or 'image'};base64,{source.get('data', '')}"
    text = _as_text(url if url is not None else dict(block))
    if text.startswith("data:") and len(text) > MAX_DATA_URL_CHARS:
        media = text[5:].partition(";")[0].partition(",")[0]
        return _text_part(f"[image: {media or 'unknown type'}, {len(text)} characters]")
    if not text.startswith(("data:", "http://", "https://")):
        return _text_part(f"[image: {text}]")
    return {"type": "image_url", "image_url": {"url": text}}


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _reasoning(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text}]}


# -- tools ---------------------------------------------------------------------------------------


def _tool_calls(raw: Any) -> list[dict[str, Any]] | None:
    if not isinstance(raw, list):
        return None
    calls = []
    for call in raw:
        if not isinstance(call, Mapping):
            continue
        inner = call.get("function")
        function = inner if isinstance(inner, Mapping) else call
        arguments: Any = next(
            (
                function[key]
                for key in ("arguments", "args", "input")
                if function.get(key) is not None
            ),
            {},
        )
        name = function.get("name") or (inner if isinstance(inner, str) else "")
        identity = call.get("call_id") or call.get("id") or call.get("action_id") or ""
        calls.append(_call(identity, name, arguments))
    return calls or None


def _tool_use(block: Any) -> dict[str, Any] | None:
    """A tool call among content blocks (Anthropic, Gemini), or None."""
    if not isinstance(block, Mapping):
        return None
    if block.get("type") == "tool_use":
        return _call(block.get("id"), block.get("name"), block.get("input"))
    call = block.get("functionCall") or block.get("function_call")
    if isinstance(call, Mapping):
        return _call(call.get("id"), call.get("name"), call.get("args"))
    return None


def _call(identity: Any, name: Any, arguments: Any) -> dict[str, Any]:
    text = arguments if isinstance(arguments, str) else _as_text(arguments or {})
    function = {"name": str(name or ""), "arguments": text}
    return {"id": str(identity or ""), "type": "function", "function": function}


def _tool_result(identity: Any, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": str(identity or ""), "content": _flat_text(content)}


# -- texts ---------------------------------------------------------------------------------------


def _flat_text(content: Any) -> str:
    """The text of a content, parts in lines."""
    if isinstance(content, list):
        parts = [_part(block) for block in content]
        return "\n".join(
            part.get("text") or _as_text(part.get("image_url") or part.get("summary"))
            for part in parts
            if part is not None
        )
    return "" if content is None else _as_text(content)


def _as_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value, default=str).decode()
    except (TypeError, ValueError):  # Integers beyond 64 bits, for one.
        return str(value)
