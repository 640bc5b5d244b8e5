"""Files inlined as base64 (pictures, audio, documents): a large one becomes a note. Pure.

``[image/png, 400022 characters]`` stands for a data URL, or for the bare base64 that stands beside
its media type (Anthropic, Gemini, MCP, audio) or among a message's ``images`` (Ollama). Cut
anywhere, such a file is of no use; whole, it takes the room of what a person can read.
"""

from __future__ import annotations

import re
from typing import Any

from qitos_mlflow.mlflow_plugin.mapping.limits import CUT_HERE

MAX_INLINED_CHARS = 32_768
"""Files up to here stay, and pictures are shown."""

_MEDIA = r"[\w.+-]{1,64}(?:/[\w.+-]{1,64})?"
_DATA_URL = re.compile(r"data:([\w.+-]{1,64}/[\w.+-]{1,64})?[;,]", re.ASCII | re.IGNORECASE)
_BASE64 = re.compile(r"[\w+/=-]*", re.ASCII)
_LOOK_CHARS = 1024
_CUT = re.compile(re.escape(CUT_HERE) + r"(\d+) characters in all\]$")
_CUT_CHARS = 60
_NOTE = re.compile(rf"\[{_MEDIA}, \d+ characters\]", re.ASCII)
_MEDIA_KEYS = ("media_type", "mime_type", "mimeType", "format")


def is_note(text: str) -> bool:
    """Whether `text` stands for a file that was left out."""
    return _NOTE.fullmatch(text) is not None


def note_large(value: Any, max_chars: int = MAX_INLINED_CHARS) -> Any:
    """A copy of `value` (JSON types) with a note in the place of each file over `max_chars`."""
    if isinstance(value, str):
        return _note_url(value, max_chars)
    if isinstance(value, list):
        return [note_large(item, max_chars) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: note_large(item, max_chars) for key, item in value.items()}
    media = next((kept[key] for key in _MEDIA_KEYS if isinstance(kept.get(key), str)), None)
    if media is not None and "data" in kept:
        kept["data"] = _note_base64(kept["data"], media, max_chars)
    if isinstance(kept.get("images"), list):
        kept["images"] = [_note_base64(item, "image", max_chars) for item in kept["images"]]
    return kept


def _note_url(text: str, max_chars: int) -> str:
    if len(text) <= max_chars or (url := _DATA_URL.match(text)) is None:
        return text
    return _note(url.group(1) or "data", text)


def _note_base64(text: Any, media: str, max_chars: int) -> Any:
    if not isinstance(text, str) or len(text) <= max_chars:
        return text
    return _note(media, text) if _BASE64.fullmatch(text, 0, _LOOK_CHARS) else text


def _note(media: str, text: str) -> str:
    cut = _CUT.search(text, max(0, len(text) - _CUT_CHARS))  # `capture` cut it: how long it was
    # Nothing but a media type: it is not searched for credentials in any other form.
    media = media if re.fullmatch(_MEDIA, media, re.ASCII) else "data"
    return f"[{media}, {cut.group(1) if cut else len(text)} characters]"
