"""Model calls in the one chat format that MLflow's page renders as a conversation: OpenAI's. Pure.

Receives the input and the output of a model in any of the common shapes (texts, OpenAI chat and
Responses, Anthropic, Gemini, Ollama), hands on messages with role, content, reasoning, tool calls
and tool results. Anything in another shape is shown as text or kept beside the rest, never lost.

If a role, or the type of a part, is unknown to the page, it shows no conversation at all (MLflow
3.12 to 3.17, ModelTraceExplorer). So roles are ``system``, ``user``, ``assistant`` and ``tool``,
and thoughts are the message's ``reasoning``, not a part.
"""

from __future__ import annotations

from typing import Any

import orjson

from qitos_mlflow.mlflow_plugin.mapping.content_blocks import (
    Fields,
    as_text,
    bare_image,
    called,
    joined,
    message_with_rest,
    parts,
    shown,
    take,
    text_part,
    thought,
    tool_call,
    tool_message,
    with_rest,
)

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant",
    "agent": "assistant", "function": "tool", "observation": "tool", "developer": "system",
}  # fmt: skip
_REQUEST_KEYS = ("messages", "input", "contents")
_SYSTEM_KEYS = ("system", "system_instruction", "systemInstruction", "instructions")
_MESSAGE_KEYS = ("content", "parts", "tool_calls", "refusal", "images", "reasoning_content")


def request(content: Any) -> tuple[list[Fields], Fields]:
    """The messages of a request, and its other fields.

    Args:
        content: a text, a message, a list of them, or a dict that holds them, as a provider's
            client takes it.
    """
    rest = dict(content) if isinstance(content, dict) else {}
    given = take(rest, *_REQUEST_KEYS, kind=(list, str))
    if given is None:
        return _all_messages(content, "user"), {}
    holders = [rest]
    if isinstance(rest.get("config"), dict):  # Gemini
        rest["config"] = dict(rest["config"])
        holders.append(rest["config"])
    found: list[Fields] = []
    for holder in holders:
        system = take(holder, *_SYSTEM_KEYS, kind=(str, list, dict))
        if system is not None:
            own = dict(system) if isinstance(system, dict) else {"content": system}
            found += _messages(with_rest({"role": "system"}, own), "system")
    return found + _all_messages(given, "user"), rest


def response(output: Any, summary: Fields) -> Fields:
    """The answer as an OpenAI response.

    Args:
        output: text, message, list of content blocks, or a provider's whole answer.
        summary: what the host says beside it: tool_calls, finish_reason, model_name, metadata.
    """
    choices, rest = _choices(output)
    calls, finish = summary.get("tool_calls"), summary.get("finish_reason")
    if isinstance(calls, list):
        _add_calls(choices[0]["message"], [tool_call(call) for call in calls])
    finish = finish or take(rest, "stop_reason", "done_reason", kind=str)
    for choice in choices:
        message = choice["message"]
        if message["content"] is None and not message.get("tool_calls"):
            message["content"] = ""
        if choice["finish_reason"] is None:
            choice["finish_reason"] = as_text(
                finish or ("tool_calls" if message.get("tool_calls") else "stop")
            )
    metadata = summary.get("metadata")
    identity = metadata.get("id") if isinstance(metadata, dict) else None
    answer: Fields = {
        "id": identity or take(rest, "id", "responseId", "response_id"),
        "object": take(rest, "object") or "chat.completion",
        "model": summary.get("model_name") or take(rest, "model", "modelVersion", "model_version"),
        "choices": choices,
    }
    return with_rest({key: value for key, value in answer.items() if value is not None}, rest)


def last_text(messages: list[Fields], role: str) -> str:
    """The text of the last message of `role` that has one, or an empty text; no thoughts."""
    for message in reversed(messages):
        if message.get("role") == role:
            text = "\n".join(part["text"] for part in parts(message["content"]) if "text" in part)
            if text:
                return text
    return ""


def tool_definitions(tools: Any) -> list[Fields] | None:
    """Tool definitions in OpenAI's form, from definitions of any provider or from mere names."""
    if not isinstance(tools, list):
        return None
    found = []
    for tool in tools:
        if not isinstance(tool, dict):
            found += [_definition({"name": tool})] if isinstance(tool, str) else []
            continue
        rest = dict(tool)
        declared = take(rest, "functionDeclarations", "function_declarations", kind=list)
        if declared is not None:  # Gemini
            found += tool_definitions(declared) or []
            continue
        inner = take(rest, "function", kind=dict)
        found.append(_definition(rest if inner is None else with_rest(dict(inner), rest)))
    return [one for one in found if one is not None] or None


def _definition(fields: Fields) -> Fields | None:
    rest = dict(fields)
    kind = rest.pop("type", None)
    name = take(rest, "name") or (kind if kind != "function" else None)  # {"type": "web_search"}
    if not name:
        return None
    schema = take(rest, "parameters", "input_schema", "inputSchema", kind=dict)
    if schema is not None and isinstance(schema.get("properties"), dict):
        parameters = {key: _parameter(value) for key, value in schema["properties"].items()}
        schema = {**schema, "properties": parameters}
    function = {
        "name": as_text(name),
        "parameters": schema,
        "description": take(rest, "description"),
    }
    kept = {key: value for key, value in function.items() if value is not None}
    return {"type": "function", "function": with_rest(kept, rest)}


def _parameter(schema: Any) -> Any:
    """`schema` without a list of types, for which MLflow's page (3.12) shows no tool at all."""
    if not isinstance(schema, dict) or not isinstance(schema.get("type"), list):
        return schema
    # Not "string | null": MLflow's judges would not take that for a type.
    rest = {key: value for key, value in schema.items() if key != "type"}
    return with_rest({"anyOf": [{"type": one} for one in schema["type"]]}, rest)


# -- answers -------------------------------------------------------------------------------------


def _choices(output: Any) -> tuple[list[Fields], Fields]:
    """At least one choice, and what the whole answer has beside them."""
    rest = dict(output) if isinstance(output, dict) else {}
    several = take(rest, "choices", "candidates", kind=list)  # OpenAI, Gemini
    if several:
        return [_choice(index, one) for index, one in enumerate(several)], rest
    items = rest.get("output")
    if isinstance(items, list) and all(isinstance(one, dict) and "type" in one for one in items):
        return [_choice(0, {"message": rest.pop("output")})], rest  # OpenAI Responses
    if isinstance(rest.get("message"), dict):  # Ollama
        return [_choice(0, {"message": rest.pop("message")})], rest
    if rest.get("type") == "message" and "content" in rest:  # Anthropic
        rest.pop("type")
        message = {key: rest.pop(key) for key in ("role", "content") if key in rest}
        return [_choice(0, {"message": message})], rest
    return [_choice(0, {"message": output})], {}


def _choice(index: int, raw: Any) -> Fields:
    rest = dict(raw) if isinstance(raw, dict) else {"message": raw}
    if rest.get("index") == index:
        rest.pop("index")
    choice = {
        "index": index,
        "message": _one_message(take(rest, "message", "content", "text")),
        "finish_reason": take(rest, "finish_reason", "finishReason", kind=str),
    }
    return with_rest(choice, rest)


def _one_message(raw: Any) -> Fields:
    """The assistant's message out of all that an answer consists of."""
    found = [] if raw in (None, "") else _all_messages(raw, "assistant")
    if len(found) == 1:
        return found[0]
    content: list[Fields] = []
    calls: list[Fields] = []
    thoughts: list[str] = []
    rest: list[Fields] = []
    for message in found:
        message.pop("role")
        content += parts(message.pop("content"))
        calls += message.pop("tool_calls", [])
        thoughts += [message.pop("reasoning")] if "reasoning" in message else []
        rest.append(message)
    merged = _message("assistant", content, calls, thoughts)
    for fields in rest:
        with_rest(merged, fields)
    return merged


def _add_calls(message: Fields, calls: list[Fields]) -> None:
    """Add the calls of the host's summary; most often the message has them already."""
    own = message.get("tool_calls", [])
    free = list(own)  # Two calls may be alike: each of the message's is one of `calls` at most.
    for call in calls:
        for known in free:
            same = _same(call["function"], known["function"])
            if call["id"] == known["id"] != "" or (same and "" in (call["id"], known["id"])):
                known["id"] = known["id"] or call["id"]
                if same:  # The same JSON, in another spelling.
                    function = {k: v for k, v in call.pop("function").items() if k != "arguments"}
                    with_rest(known["function"], function)
                with_rest(known, call)
                free.remove(known)
                break
        else:
            own = [*own, call]
    if own:
        message["tool_calls"] = own


def _same(one: Fields, other: Fields) -> bool:
    try:
        arguments = [orjson.loads(function["arguments"]) for function in (one, other)]
    except orjson.JSONDecodeError:
        arguments = [function["arguments"] for function in (one, other)]
    return bool(one["name"] == other["name"] and arguments[0] == arguments[1])


# -- messages ------------------------------------------------------------------------------------


def _all_messages(raw: Any, default_role: str) -> list[Fields]:
    if raw is None:
        return []
    items = raw if isinstance(raw, list) else [raw]
    return [message for item in items for message in _messages(item, default_role)]


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and (
        "role" in item
        or item.get("type") == "message"
        or ("type" not in item and any(key in item for key in _MESSAGE_KEYS))
    )


def _messages(item: Any, default_role: str) -> list[Fields]:
    """One item of a conversation; tool results among its blocks become messages of their own."""
    if not _is_message(item) or thought(item):
        if called(item) or thought(item):
            default_role = "assistant"
        item = {"content": [item]}
    rest = dict(item)
    if rest.get("type") == "message":
        rest.pop("type")
    given = take(rest, "role")
    role = default_role if given is None else _ROLES.get(as_text(given).lower())
    if role is None:
        role, rest["original_role"] = default_role, given
    calls = [tool_call(call) for call in take(rest, "tool_calls", kind=list) or []]
    content: list[Fields] = []
    thoughts: list[str] = []
    results: list[Fields] = []
    raw = take(rest, "content", "parts")
    for block in raw if isinstance(raw, list) else [raw]:
        if (call := called(block)) is not None:
            calls.append(call)
        elif (result := tool_message(block)) is not None:
            results.append(result)
        elif (own := thought(block)) is not None:
            thoughts.append(own[0])
            rest = with_rest(rest, own[1])
        else:
            content += parts(block)
    if (call := take(rest, "function_call", kind=dict)) is not None:  # OpenAI before tools
        calls.append(tool_call(call))
    content += [bare_image(image) for image in take(rest, "images", kind=list) or []]
    if (refusal := take(rest, "refusal", kind=str)) is not None:
        content.append(text_part(refusal))
    if (reasoning := take(rest, "reasoning_content", "reasoning", "thinking")) is not None:
        thoughts.insert(0, shown(reasoning))
    if results and not (content or calls or thoughts):
        message_with_rest(results[-1], rest)
        return results
    for key in ("tool_call_id", "name"):
        if rest.get(key) is not None:
            rest[key] = as_text(rest[key])
    return [*results, message_with_rest(_message(role, content, calls, thoughts), rest)]


def _message(role: str, content: list[Fields], calls: list[Fields], thoughts: list[str]) -> Fields:
    message: Fields = {"role": role, "content": joined(content)}
    if role == "tool" and message["content"] is None:
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    if any(thoughts):
        message["reasoning"] = "\n".join(text for text in thoughts if text)
    return message
