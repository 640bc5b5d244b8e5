"""Long texts cut, and large inlined files replaced by a note that gives their size. Pure.

The snapshot cuts single texts to a number of characters (`cut_later`), so that the agent's thread
copies no more. It leaves `MARGIN_CHARS` more, which the redactor reads and takes off, because half
of a credential is not recognised. After redaction, `trim_fields` holds every field of a record
to a number of bytes.

Files inlined as base64 (pictures, audio, documents) are never cut: half of one is of no use. A
large one becomes a note such as ``[image/png, 400022 characters]``. This covers data URLs, and bare
base64 beside its media type (Anthropic, Gemini, MCP, audio) or among a message's ``images``
(Ollama).
"""

from __future__ import annotations

import re
from typing import Any

from qitos_mlflow import _json
from qitos_mlflow.redaction.patterns import lazily

CUT_HERE = "… [cut: "
"""Begins the note in the place of what was cut off; the original length follows."""

MARGIN_CHARS = 4096
"""More than a private key has (characters)."""

MAX_INLINED_CHARS = 32_768
"""Longest file that stays; MLflow shows such pictures (characters)."""

_MEDIA = r"[\w.+-]{1,64}(?:/[\w.+-]{1,64})?"
_MEDIA_KEYS = ("media_type", "mime_type", "mimeType", "format")
_DATA_URL = lazily(r"(?ai)data:([\w.+-]{1,64}/[\w.+-]{1,64})?[;,]")
_BASE64 = lazily(r"(?a)[\w+/=-]*")
_LOOK_CHARS = 1024
"""As many characters show whether a text is base64."""
_CUT = lazily(re.escape(CUT_HERE) + r"(\d+) characters in all(?:, at (\d+))?\]$")
_CUT_CHARS = 80
"""A note of a cut is not longer (characters)."""
_FILE_NOTE = lazily(rf"(?a)\[{_MEDIA}, \d+ characters\]")
_WITH_FIELDS = ("data", "metadata")


def is_note(text: str) -> bool:
    """Whether `text` is the note of a file that was left out."""
    return _FILE_NOTE.fullmatch(text) is not None


def note_large(value: Any, max_chars: int = MAX_INLINED_CHARS, *, trim_rest: bool = False) -> Any:
    """A copy of `value` (JSON types) with a note in the place of each file over `max_chars`.

    With `trim_rest`, all other texts are cut to `max_chars` bytes.
    """
    if isinstance(value, str):
        if len(value) > max_chars and (url := _DATA_URL.match(value)):
            return _note(url.group(1) or "data", value)
        return trim(value, max_chars) if trim_rest else value
    if isinstance(value, list):
        return [note_large(item, max_chars, trim_rest=trim_rest) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {key: note_large(item, max_chars, trim_rest=trim_rest) for key, item in value.items()}
    media = next((kept[key] for key in _MEDIA_KEYS if isinstance(kept.get(key), str)), None)
    if media is not None and _is_large_base64(value.get("data"), max_chars):
        kept["data"] = _note(media, value["data"])
    if isinstance(images := value.get("images"), list):
        for index, image in enumerate(images):
            if _is_large_base64(image, max_chars):
                kept["images"][index] = _note("image", image)
    return kept


def _is_large_base64(text: Any, max_chars: int) -> bool:
    large = isinstance(text, str) and len(text) > max_chars
    return large and _BASE64.fullmatch(text, 0, _LOOK_CHARS) is not None


def _note(media: str, text: str) -> str:
    # Only a media type: the note is not searched for credentials in the form that `media` had.
    media = media if re.fullmatch(_MEDIA, media, re.ASCII) else "data"
    return f"[{media}, {_length(text)} characters]"


def _length(text: str) -> int:
    """How many characters `text` had before it was cut."""
    cut_note = _CUT.search(text, max(0, len(text) - _CUT_CHARS))
    return int(cut_note.group(1)) if cut_note else len(text)


def cut(text: str, length: int) -> str:
    """The first `length` characters of `text`, and a note of how many it had."""
    return f"{text[:length]}{CUT_HERE}{_length(text)} characters in all]"


def cut_later(text: str, length: int) -> str:
    """`text` as `cut` would leave it, with more for the redactor to read; see `cut_point`."""
    note = f"{CUT_HERE}{len(text)} characters in all, at {length}]"
    return f"{text[: length + MARGIN_CHARS]}{note}"


def cut_point(text: str) -> tuple[int, int, str] | None:
    """Where `cut_later` wants a text cut, where its note begins, and the note that is to stay."""
    note = _CUT.search(text, max(0, len(text) - _CUT_CHARS)) if text.endswith("]") else None
    if note is None or note.group(2) is None:
        return None
    return int(note.group(2)), note.start(), f"{CUT_HERE}{note.group(1)} characters in all]"


def trim(text: str, max_bytes: int) -> str:
    """`text` if it has at most `max_bytes` of UTF-8, else its beginning and the note of a cut.

    The result has at most `max_bytes`, or the size of the note (40 bytes) if that is more.
    """
    data = text.encode("utf-8", "surrogatepass")
    if len(data) <= max_bytes:
        return text
    note = cut(text, 0)
    return data[: max(0, max_bytes - len(note.encode()))].decode("utf-8", "ignore") + note


def trim_fields(record: dict[str, Any], max_bytes: int) -> dict[str, Any]:
    """A copy of `record` in which no field is larger than `max_bytes` of JSON.

    Each item of `data` and `metadata` is a field, and so is everything else. If it is enough to cut
    the longest texts of a field, the field keeps its form, so that a chat stays a chat. Otherwise
    the field becomes the beginning of its JSON text.
    """
    kept = {}
    for name, value in record.items():
        if name in _WITH_FIELDS and isinstance(value, dict):
            kept[name] = {key: _trim_field(item, max_bytes) for key, item in value.items()}
        else:
            kept[name] = _trim_field(value, max_bytes)
    return kept


def _trim_field(value: Any, max_bytes: int) -> Any:
    if isinstance(value, str):
        return note_large(value, max_bytes, trim_rest=True)
    if not isinstance(value, (dict, list)) or len(_json.dumps(value)) <= max_bytes:
        return value
    each = max_bytes // 2
    while each >= 256:
        smaller = note_large(value, each, trim_rest=True)
        if len(_json.dumps(smaller)) <= max_bytes:
            return smaller
        each //= 4
    return trim(_json.dumps(value).decode(), max_bytes)
