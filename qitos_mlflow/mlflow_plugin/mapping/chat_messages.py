"""Model calls in the one chat format that MLflow's page renders as a conversation: OpenAI's. Pure.

Receives the input and the output of a model as a provider's client takes and gives them (OpenAI
chat and Responses, Anthropic, Gemini, Ollama), or as mere texts; hands on messages with role,
content, reasoning, tool calls and tool results. The forms are these, where ``a|b`` are the names
that providers give to one thing, and what stands in brackets may be missing:

===========  =======================================================================================
request      a message, a list of them, or an object ``messages|input|contents``; in it, or in its
             ``config``: ``[system|system_instruction|systemInstruction|instructions]``
answer       an object ``choices|candidates``, each ``message|content|text
             [finish_reason|finishReason]``; an object ``message|output``; or a message, or a list
             of them, all of which are one
message      an object with a role, ``type: message``, or one of `_MESSAGE_KEYS` and no type:
             ``[role] content|parts [tool_calls] [function_call] [images] [refusal]
             [reasoning_content|reasoning|thinking]``; a block, or a text
content      a block, or a list of them: see `content_blocks`
===========  =======================================================================================

Anything in another form is shown as text or kept beside the rest, never lost.

If a role, or the type of a part, is unknown to the page, it shows no conversation at all (MLflow
3.12 to 3.17, ModelTraceExplorer). So roles are ``system``, ``user``, ``assistant`` and ``tool``,
and thoughts are the message's ``reasoning``, not a part.
"""

from __future__ import annotations

from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping.content_blocks import (
    Encoded,
    Fields,
    as_text,
    flat,
    form_of,
    joined,
    parts,
    read,
    shown,
    take,
    tool_call,
    with_rest,
)
from qitos_mlflow.mlflow_plugin.mapping.limits import mapping

_ROLES = {
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "ai": "assistant", "model": "assistant", "bot": "assistant",
    "agent": "assistant", "function": "tool", "observation": "tool", "developer": "system",
}  # fmt: skip
_PLAIN = {"role", "content"}
_MESSAGE_KEYS = ("content", "parts", "tool_calls", "refusal", "images", "reasoning_content")


def request(content: Any) -> tuple[list[Any], Fields]:
    """The messages of a request, each as its fields or `Encoded`, and its other fields."""
    rest = dict(content) if isinstance(content, dict) else {}
    given = take(rest, "messages", "input", "contents", kind=(list, str))
    if given is None:
        return _conversation(content, "user"), {}
    holders = [rest]
    if isinstance(rest.get("config"), dict):  # Gemini
        rest["config"] = dict(rest["config"])
        holders.append(rest["config"])
    names = ("system", "system_instruction", "systemInstruction", "instructions")
    found: list[Any] = []
    for holder in holders:
        system = take(holder, *names, kind=(str, list, dict))
        if system is not None:
            own = system if _is_message(system) else {"content": system}
            own = {"original_role": own.get("role"), **own, "role": "system"}
            found += _messages(own, "system")
    return found + _conversation(given, "user"), rest


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
        called = bool(message.get("tool_calls"))
        message["content"] = message["content"] or (None if called else "")
        reason = choice["finish_reason"] or finish or ("tool_calls" if called else "stop")
        choice["finish_reason"] = as_text(reason)
    answer: Fields = {
        "id": mapping(summary.get("metadata")).get("id")
        or take(rest, "id", "responseId", "response_id"),
        "object": take(rest, "object") or "chat.completion",
        "model": summary.get("model_name") or take(rest, "model", "modelVersion", "model_version"),
        "choices": choices,
    }
    return with_rest({key: value for key, value in answer.items() if value is not None}, rest)


def tool_definitions(tools: Any) -> list[Fields] | None:
    """Tool definitions in OpenAI's form, from definitions of any provider or from mere names."""
    found: list[Fields] = []
    for tool in tools if isinstance(tools, list) else ():
        if not isinstance(tool, (str, dict)):
            continue
        rest = flat(tool if isinstance(tool, dict) else {"name": tool}, "function", "custom")
        declared = take(rest, "functionDeclarations", "function_declarations", kind=list)
        found += tool_definitions(declared) or []  # Gemini
        name = take(rest, "name") or take(rest, "type")  # {"type": "web_search"}
        if declared is not None or not name:
            continue
        schema = take(rest, "parameters", "input_schema", "inputSchema", kind=dict)
        if schema is not None and isinstance(schema.get("properties"), dict):
            parameters = {key: _parameter(value) for key, value in schema["properties"].items()}
            schema = {**schema, "properties": parameters}
        function = with_rest({"name": as_text(name)}, {"parameters": schema, **rest})
        found.append({"type": "function", "function": function})
    return found or None


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
    if not several:
        message = take(rest, "message", "output", kind=(dict, list))  # Ollama, OpenAI Responses
        if message is None and rest.get("type") == "message" and "content" in rest:  # Anthropic
            message = {key: rest.pop(key) for key in ("type", "role", "content") if key in rest}
        if message is None:
            message, rest = output, {}
        several = [{"message": message}]
    return [_choice(index, raw) for index, raw in enumerate(several)], rest


def _choice(index: int, raw: Any) -> Fields:
    rest = dict(raw) if isinstance(raw, dict) else {"message": raw}
    answer = take(rest, "message", "content", "text")
    choice = {
        "index": index,
        "message": _merged("assistant", _conversation(answer, "assistant"), {}),
        "finish_reason": take(rest, "finish_reason", "finishReason", kind=str),
    }
    return with_rest(choice, rest)


def _add_calls(message: Fields, calls: list[Fields]) -> None:
    """Add the calls of the host's summary; most often the message has them already."""
    own = message.get("tool_calls", [])
    free = list(own)  # Two calls may be alike: each of the message's is one of `calls` at most.
    for call in calls:
        for known in free:
            same = _function(call) == _function(known)
            if call["id"] == known["id"] != "" or (same and "" in (call["id"], known["id"])):
                known["id"] = known["id"] or call["id"]
                if same:  # The same JSON, in another spelling.
                    del call["function"]
                with_rest(known, call)
                free.remove(known)
                break
        else:
            own = [*own, call]
    if own:
        message["tool_calls"] = own


def _function(call: Fields) -> tuple[str, Any]:
    name, arguments = call["function"]["name"], call["function"]["arguments"]
    try:
        return name, _json.loads(arguments)
    except _json.JSONDecodeError:
        return name, arguments


# -- messages ------------------------------------------------------------------------------------


def _conversation(raw: Any, role: str) -> list[Any]:
    if isinstance(raw, list) and raw and isinstance(raw[0], Encoded):
        return raw
    items = raw if isinstance(raw, list) else [] if raw is None else [raw]
    return [message for item in items for message in _messages(item, role)]


def _is_message(item: Any) -> bool:
    if not isinstance(item, dict) or form_of(item) == "thought":
        return False
    named = "type" not in item and any(key in item for key in _MESSAGE_KEYS)
    return named or "role" in item or item.get("type") == "message"


def _messages(item: Any, role: str) -> list[Fields]:
    """One item of a conversation; tool results among its blocks become messages of their own.

    Args:
        item: a message, or a block in the place of one.
        role: that of a message without one, and of a block that does not give it away.
    """
    if isinstance(item, str):
        return [{"role": role, "content": item}]
    if isinstance(item, dict) and item.keys() == _PLAIN:  # Most are, and it is ten times faster.
        given, content = item["role"], item["content"]
        if isinstance(given, str) and given in _ROLES and content and isinstance(content, str):
            return [{"role": _ROLES[given], "content": content}]
    if not _is_message(item):
        role = "assistant" if form_of(item) in ("call", "thought") else role
        item = {"content": [item]}
    rest = flat(item)
    given = take(rest, "role")
    known = _ROLES.get(as_text(given).lower())
    if known is None:
        with_rest(rest, {"original_role": given})
    calls = [*(take(rest, "tool_calls", kind=list) or []), take(rest, "function_call", kind=dict)]
    content = take(rest, "content", "parts")
    images = take(rest, "images", kind=list) or []
    blocks = [
        *(content if isinstance(content, list) else [content]),
        *({"type": "image", "data": as_text(image)} for image in images),
        take(rest, "refusal", kind=str),
    ]
    found: list[Fields] = [
        {"reasoning": shown(take(rest, "reasoning_content", "reasoning", "thinking"))},
        {"tool_calls": [tool_call(call) for call in calls if call is not None]},
        *map(read, blocks),
    ]
    results = [one for one in found if one.get("role") == "tool"]
    others = [one for one in found if one.get("role") != "tool" and any(one.values())]
    if not results or others:
        return [*results, _merged(known or role, others, rest)]
    with_rest(results[-1], rest)
    return results


def _merged(role: str, messages: list[Fields], rest: Fields) -> Fields:
    """One message out of several, which are used up, and of further fields."""
    if len(messages) == 1 and not rest and messages[0].keys() == _PLAIN:  # Most often.
        text = messages[0]["content"]
        if isinstance(text, str):
            return {"role": role, "content": text}
    content: list[Fields] = []
    calls: list[Fields] = []
    thoughts: list[str] = []
    for one in messages:
        one.pop("role", None)
        content += parts(one.pop("content", None))
        calls += one.pop("tool_calls", [])
        thoughts.append(one.pop("reasoning", ""))
        with_rest(rest, one)
    message: Fields = {"role": role, "content": joined(content)}
    if role == "tool" and not content:
        message["content"] = ""
    if calls:
        message["tool_calls"] = calls
    if any(thoughts):
        message["reasoning"] = "\n".join(filter(None, thoughts))
    for key in ("tool_call_id", "name"):
        if rest.get(key) is not None:
            rest[key] = as_text(rest[key])
    return with_rest(message, rest)
