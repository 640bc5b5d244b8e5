"""Content blocks, tool calls and tool results of any provider, in OpenAI's form. Pure.

Nothing is lost: `take` picks the fields that have a place in that form, and `with_rest` keeps the
others beside them, for the page's JSON view.
"""

from __future__ import annotations

import re
from typing import Any

import orjson

from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS, is_note, note_large

Fields = dict[str, Any]

_TEXT_TYPES = (None, "text", "input_text", "output_text", "summary_text", "refusal")
_THOUGHT_TYPES = ("thinking", "reasoning")
_CALL_TYPES = ("function_call", "custom_tool_call", "tool_use", "server_tool_use", "mcp_tool_use",
               "tool_call")  # fmt: skip
_RESULT_TYPES = ("function_call_output", "custom_tool_call_output", "tool_result",
                 "mcp_tool_result")  # fmt: skip
_READ_BY_PAGE = ("type", "parts", "tool_calls", "reasoning", "audio")
"""Fields of a message that MLflow's page reads."""
_IMAGE_KEYS = ("inline_data", "inlineData")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_PICTURES = {"iVBOR": "image/png", "/9j/": "image/jpeg", "R0lG": "image/gif", "UklG": "image/webp"}
"""How base64 of a picture begins."""


def take(fields: Fields, *names: str, kind: Any = object) -> Any:
    """Remove and return the first of these fields with a value of `kind`; None if there is none."""
    for name in names:
        value = fields.get(name)
        if value is not None and isinstance(value, kind):
            return fields.pop(name)
    return None


def with_rest(target: Fields, rest: Fields) -> Fields:
    """`target` and the fields of `rest` that say something, under names that are still free."""
    for key, value in rest.items():
        if value is None or value in ("", [], {}) or target.get(key) == value:
            continue
        while key in target:
            key = f"original_{key}"
        target[key] = value
    return target


def message_with_rest(message: Fields, rest: Fields) -> Fields:
    """The same for a message: what the page would read, and might break on, is renamed too."""
    renamed = {f"original_{k}" if k in _READ_BY_PAGE else k: v for k, v in rest.items()}
    return with_rest(message, renamed)


def as_text(value: Any) -> str:
    """`value` itself if it is a text, else its JSON."""
    if isinstance(value, str):
        return value
    try:
        return orjson.dumps(value, default=str).decode()
    except (TypeError, ValueError):  # Integers beyond 64 bits, for one.
        return str(value)


# -- content -------------------------------------------------------------------------------------


def text_part(text: str) -> Fields:
    """A part that is text."""
    return {"type": "text", "text": text}


def parts(raw: Any) -> list[Fields]:
    """The parts of a content: a text, a block, or a list of them."""
    blocks = raw if isinstance(raw, list) else [raw]
    return [_part(block) for block in blocks if block is not None]


def joined(found: list[Fields]) -> str | list[Fields] | None:
    """Parts as a message's content: one text if they are nothing more."""
    if any(part.keys() != {"type", "text"} for part in found):
        return found
    return "\n".join(part["text"] for part in found) if found else None


def thought(block: Any) -> tuple[str, Fields] | None:
    """Text and other fields of a block that is the model's thoughts, or None for any other."""
    if not isinstance(block, dict):
        return None
    if block.get("type") not in _THOUGHT_TYPES and block.get("thought") is not True:
        return None
    rest = {key: value for key, value in block.items() if key not in ("type", "thought")}
    text = take(rest, "thinking", "summary", "text", "reasoning", "content")
    return shown(text), rest


def shown(raw: Any) -> str:
    """A content as one text; its parts in lines, what is more than text as JSON."""
    if not isinstance(raw, list):
        return "" if raw is None else as_text(raw)
    lines = []
    for block in raw:
        for part in parts(block):
            lines.append(part["text"] if part.keys() == {"type", "text"} else as_text(block))
    return "\n".join(lines)


def _part(block: Any) -> Fields:
    if not isinstance(block, dict):
        return text_part(as_text(block))
    rest, kind = dict(block), block.get("type")
    if kind in _TEXT_TYPES:
        text = take(rest, "text", "refusal", kind=str)
        if text is not None:
            rest.pop("type", None)
            return with_rest(text_part(text), rest)
    if kind in ("image", "image_url", "input_image") or any(key in block for key in _IMAGE_KEYS):
        return _image(rest) or text_part(as_text(block))
    if kind == "input_audio" and _is_audio(block.get("input_audio")):
        return rest
    return text_part(as_text(block))


def _image(rest: Fields) -> Fields | None:
    """An image's part from its block's fields, or None if there is no image in them."""
    rest.pop("type", None)
    url = take(rest, "image_url", "url", "path")
    inner: Fields = {}
    if isinstance(url, dict):
        inner = dict(url)
        url = take(inner, "url", kind=str)
    elif url is None:
        source = take(rest, "source", *_IMAGE_KEYS, kind=dict)
        if source is None and isinstance(rest.get("data"), str):  # MCP
            source, rest = rest, {}
        inner = dict(source or {})
        url = take(inner, "url", kind=str)
        data = take(inner, "data", kind=str) if url is None else None
        if data is not None:
            media = take(inner, "media_type", "mime_type", "mimeType", kind=str) or "image/png"
            url = data if is_note(data) else _data_url(media, data)
        if inner.get("type") in ("base64", "url"):
            inner.pop("type")
    if not isinstance(url, str):
        return None
    return with_rest(with_rest(_picture(url), inner), rest)


def _data_url(media: str, data: str) -> str:
    return f"data:{media};base64,{data}" if _BASE64.fullmatch(data) else f"{media}, {data}"


def _picture(url: str) -> Fields:
    url = note_large(url, MAX_INLINED_CHARS)
    if is_note(url):
        return text_part(url)
    if not url.startswith(("data:", "http://", "https://")):
        return text_part(f"[image: {url}]")
    return {"type": "image_url", "image_url": {"url": url}}


def bare_image(raw: Any) -> Fields:
    """A part for what Ollama has among a message's images: base64 without a media type."""
    text = as_text(raw)
    media = next((media for start, media in _PICTURES.items() if text.startswith(start)), None)
    return _picture(_data_url(media, text) if media else text)


def _is_audio(audio: Any) -> bool:
    return (
        isinstance(audio, dict)
        and audio.get("format") in ("wav", "mp3")
        and isinstance(audio.get("data"), str)
        and not is_note(audio["data"])
    )


# -- tools ---------------------------------------------------------------------------------------


def tool_call(call: Any) -> Fields:
    """A tool call, whatever its form."""
    if not isinstance(call, dict):
        return _call("", as_text(call), None)
    rest = dict(call)
    if rest.get("type") in ("function", "custom", *_CALL_TYPES):
        rest.pop("type")
    function = take(rest, "function", "custom", kind=dict)
    inner = rest if function is None else dict(function)
    identity = take(rest, "call_id", "id", "action_id")
    name = take(inner, "name") or take(rest, "function", kind=str)
    arguments = take(inner, "arguments", "args", "input", "parameters")
    made = _call(identity, name, arguments)
    if inner is not rest:
        with_rest(made["function"], inner)
    return with_rest(made, rest)


def called(block: Any) -> Fields | None:
    """The tool call that a content block is (Anthropic, Gemini, OpenAI Responses), or None."""
    if not isinstance(block, dict):
        return None
    if block.get("type") in _CALL_TYPES:
        return tool_call(block)
    rest = dict(block)
    call = take(rest, "functionCall", "function_call", kind=dict)
    return None if call is None else with_rest(tool_call(call), rest)


def tool_message(block: Any) -> Fields | None:
    """The message for a block that is a tool's result, or None."""
    if not isinstance(block, dict):
        return None
    rest = dict(block)
    inner = take(rest, "functionResponse", "function_response", kind=dict)
    if inner is not None:
        fields = dict(inner)
        identity = take(fields, "id") or fields.get("name")
    elif block.get("type") in _RESULT_TYPES:
        rest.pop("type")
        fields, rest = rest, {}
        identity = take(fields, "tool_use_id", "call_id", "tool_call_id", "id")
    else:
        return None
    content = joined(parts(take(fields, "content", "output", "response", "result")))
    message = {"role": "tool", "tool_call_id": as_text(identity or ""), "content": content or ""}
    return message_with_rest(message_with_rest(message, fields), rest)


def _call(identity: Any, name: Any, arguments: Any) -> Fields:
    function = {"name": as_text(name or ""), "arguments": as_text(arguments or {})}
    return {"id": as_text(identity or ""), "type": "function", "function": function}
