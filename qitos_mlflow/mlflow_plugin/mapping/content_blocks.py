"""Content blocks, tool calls and tool results of any provider, in OpenAI's form. Pure.

A block is a text, or an object that `_FORMS` recognises by its type, or by an object inside of it
that holds the rest; a ``thought: true`` makes a thought of it. The fields of each (``a|b`` are the
names of one thing, what stands in brackets may be missing):

- text: ``text|refusal``
- thought: ``thinking|summary|text|reasoning|content``
- call: ``[call_id|id|action_id] name [arguments|args|input|parameters]``, also in an object
  ``function|custom``
- result: ``[tool_use_id|call_id|tool_call_id|id] [name] content|output|response|result``
- image: an address ``image_url|url``, or base64 or an address ``data
  [media_type|mime_type|mimeType]``, or a file ``path``; also in an object ``image_url|source``
- audio: ``input_audio``, in the formats that MLflow's page plays

Any other block is shown as JSON. Nothing is lost: `take` picks the fields that have a place in
OpenAI's form, and `with_rest` keeps the others beside them, for the page's JSON view.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping.limits import mapping
from qitos_mlflow.redaction.pictures import type_of
from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS, is_note, note_large

Fields = dict[str, Any]

_FORMS: dict[str, tuple[tuple[str | None, ...], tuple[str, ...]]] = {
    "call": (
        ("function_call", "custom_tool_call", "tool_use", "server_tool_use", "mcp_tool_use",
         "tool_call"),
        ("functionCall", "function_call"),
    ),
    "result": (
        ("function_call_output", "custom_tool_call_output", "tool_result", "mcp_tool_result"),
        ("functionResponse", "function_response"),
    ),
    "image": (
        ("image", "image_url", "input_image", "image_base64", "image_file"),
        ("inline_data", "inlineData"),
    ),
    "audio": (("input_audio",), ()),
    "thought": (("thinking", "reasoning"), ()),
    "text": ((None, "text", "input_text", "output_text", "summary_text", "refusal"), ()),
}  # fmt: skip
"""The types of a block of each form, and the names of the object inside of it."""
_IMPLIED = (*(kind for kinds, _ in _FORMS.values() for kind in kinds),
            "function", "custom", "message", "base64", "url")  # fmt: skip
"""Types that say no more than the form does."""
_READ_BY_PAGE = ("type", "parts", "tool_calls", "reasoning", "audio")
"""Fields of a message that MLflow's page reads, and might break on."""
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_ADDRESSES = ("data:", "http://", "https://", "mlflow-attachment://")
"""How the address of a picture begins that the page can show."""


@dataclass(frozen=True)
class Encoded:
    """In a list of messages: several of them, as the bytes of a protobuf `ArrayValue`."""

    messages: bytes


# -- fields --------------------------------------------------------------------------------------


def take(fields: Fields, *names: str, kind: Any = object) -> Any:
    """Remove and return the first of these fields with a value of `kind`; None if there is none."""
    for name in names:
        value = fields.get(name)
        if value is not None and isinstance(value, kind):
            return fields.pop(name)
    return None


def with_rest(target: Fields, rest: Fields) -> Fields:
    """`target` and the fields of `rest` that say something, under names that are still free.

    A message (it has a role) gets no field that the page would read.
    """
    taken = _READ_BY_PAGE if "role" in target else ()
    for key, value in rest.items():
        if value is None or value in ("", [], {}) or target.get(key) == value:
            continue
        while key in target or key in taken:
            key = f"original_{key}"
        target[key] = value
    return target


def flat(fields: Fields, *wrappers: str) -> Fields:
    """The fields, and those of an object inside of them, in one; without a type that is implied.

    Args:
        fields: of a block, a call, a tool or a message; they stay as they are.
        wrappers: names that the object may have.
    """
    rest = {key: value for key, value in fields.items() if key != "type" or value not in _IMPLIED}
    inner = take(rest, *wrappers, kind=dict)
    return rest if inner is None else with_rest(flat(inner), rest)


def as_text(value: Any) -> str:
    """`value` itself if it is a text, else its JSON."""
    if isinstance(value, str):
        return value
    try:
        return _json.dumps(value, default=str).decode()
    except (TypeError, ValueError):  # Integers beyond 64 bits, for one.
        return str(value)


# -- blocks --------------------------------------------------------------------------------------


def form_of(block: Any) -> str | None:
    """Which of `_FORMS` a block has, or None if it is any other object."""
    if not isinstance(block, dict):
        return "text"
    forms = (
        form
        for form, (kinds, wrappers) in _FORMS.items()
        if block.get("type") in kinds or any(isinstance(block.get(key), dict) for key in wrappers)
    )
    form = next(forms, None)
    return "thought" if form in ("text", None) and block.get("thought") is True else form


def read(block: Any) -> Fields:
    """A message with nothing in it but this block; with a role if it is a result or a thought."""
    form = form_of(block)
    if form == "call":
        return {"tool_calls": [tool_call(block)]}
    if form == "result":
        rest = flat(block, "functionResponse", "function_response")
        identity = take(rest, "tool_use_id", "call_id", "tool_call_id", "id") or rest.get("name")
        content = joined(parts(take(rest, "content", "output", "response", "result"))) or ""
        message = {"role": "tool", "tool_call_id": as_text(identity or ""), "content": content}
        return with_rest(message, rest)
    if form == "thought":
        rest = flat(block)
        if rest.get("thought") is True:
            del rest["thought"]
        text = shown(take(rest, "thinking", "summary", "text", "reasoning", "content"))
        return with_rest({"role": "assistant", "content": None, "reasoning": text}, rest)
    return {"content": parts(block)}


def parts(raw: Any) -> list[Fields]:
    """The parts of a content: texts, images and audio."""
    blocks = raw if isinstance(raw, list) else [raw]
    return [_part(block) for block in blocks if block is not None]


def joined(found: list[Fields]) -> str | list[Fields] | None:
    """Parts as a message's content: one text if they are nothing more."""
    if any(part.keys() != {"type", "text"} for part in found):
        return found
    return "\n".join(part["text"] for part in found) if found else None


def shown(raw: Any) -> str:
    """A content as one text; as JSON if it is more than text."""
    return as_text(joined(parts(raw)) or "")


def tool_call(call: Any) -> Fields:
    """A tool call: a block, one of a message's ``tool_calls``, or one as the host lists it."""
    rest: Fields = {"name": call}
    if isinstance(call, dict):
        rest = flat(call, "function", "custom", "functionCall", "function_call")
    identity = take(rest, "call_id", "id", "action_id")
    name = take(rest, "name") or take(rest, "function", kind=str)
    arguments = take(rest, "arguments", "args", "input", "parameters")
    function = {"name": as_text(name or ""), "arguments": as_text(arguments or {})}
    made = {"id": as_text(identity or ""), "type": "function", "function": function}
    return with_rest(made, rest)


def _part(block: Any) -> Fields:
    if not isinstance(block, dict):
        return {"type": "text", "text": as_text(block)}
    form, rest = form_of(block), flat(block)
    if form == "text" and (text := take(rest, "text", "refusal", kind=str)) is not None:
        return with_rest({"type": "text", "text": text}, rest)
    if form == "image":
        rest = flat(block, "image_url", "source", "inline_data", "inlineData")
        if (address := _address(rest)) is not None:
            return with_rest(_image(address), rest)
    audio = mapping(block.get("input_audio"))
    playable = audio.get("format") in ("wav", "mp3") and isinstance(audio.get("data"), str)
    if form == "audio" and playable and not is_note(audio["data"]):
        return dict(block)
    return {"type": "text", "text": as_text(block)}


def _address(fields: Fields) -> str | None:
    """Take an image's address out of its fields; a data URL if it is inlined."""
    address: str | None = take(fields, "image_url", "url", kind=str)
    data: str | None = None if address else take(fields, "data", kind=str)
    if data is None:
        return address or take(fields, "path", kind=str)
    media: str | None = take(fields, "media_type", "mime_type", "mimeType", kind=str)
    if _BASE64.fullmatch(data):
        return f"data:{media or type_of(data) or 'image/png'};base64,{data}"
    whole = media is None or is_note(data) or data.startswith(_ADDRESSES)
    return data if whole else f"{media}, {data}"


def _image(address: str) -> Fields:
    address = note_large(address, MAX_INLINED_CHARS)
    if address.startswith(_ADDRESSES):
        return {"type": "image_url", "image_url": {"url": address}}
    return {"type": "text", "text": address if is_note(address) else f"[image: {address}]"}
