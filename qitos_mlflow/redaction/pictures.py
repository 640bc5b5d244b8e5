"""Pictures in records: each becomes a reference, and its content is kept apart, once. Pure.

A reference is a text such as ``picture:<id>?type=image/png&size=3000``. The id follows from the
content; `size` is in bytes.
"""

from __future__ import annotations

from base64 import b64decode
from binascii import Error
from hashlib import blake2b
from typing import Any
from uuid import UUID

from qitos_mlflow.redaction.patterns import lazily

Pictures = dict[str, str]
"""The contents of pictures in base64, by their ids."""

REFERENCE = lazily(
    r"(?a)picture:(?P<id>[0-9a-f-]{36})\?type=(?P<type>image/[\w.+-]{1,64})&size=(?P<size>\d+)"
)
_DATA_URL = lazily(r"(?ai)data:(image/[\w.+-]{1,64});base64,")
_MEDIA_KEYS = ("media_type", "mime_type", "mimeType")
_MEDIA = lazily(r"(?a)image/[\w.+-]{1,64}")
_URL_SAFE = str.maketrans("-_", "+/")
PICTURE_TYPES = {
    "iVBOR": "image/png", "/9j/": "image/jpeg", "R0lG": "image/gif", "UklG": "image/webp",
}  # fmt: skip
"""How base64 of a picture begins."""


def type_of(base64: str) -> str | None:
    """The media type of a picture, by how it begins; None if it is of no common type."""
    return next((kind for start, kind in PICTURE_TYPES.items() if base64.startswith(start)), None)


def reference(content: bytes, media: str) -> str:
    """What stands for a picture."""
    identity = UUID(bytes=blake2b(content, digest_size=16).digest())
    return f"picture:{identity}?type={media.lower()}&size={len(content)}"


def take_pictures(value: Any, least_chars: int, most_bytes: int, found: Pictures) -> Any:
    """A copy of `value` (JSON types) with references in the place of inlined pictures.

    Args:
        value: anything; data URLs are found, and base64 beside its media type or among `images`.
        least_chars: shorter ones stay (characters).
        most_bytes: larger ones stay (bytes).
        found: gets the contents.
    """

    def take(text: Any, media: str | None, start: int = 0) -> Any:
        if media is None or not isinstance(text, str) or len(text) <= least_chars:
            return text
        base64 = text[start:].translate(_URL_SAFE).rstrip("=")
        base64 += "=" * (-len(base64) % 4)
        try:
            content = b64decode(base64, validate=True)
        except (Error, ValueError):
            return text
        if not 0 < len(content) <= most_bytes:
            return text
        made = reference(content, media)
        found[made[len("picture:") :][:36]] = base64
        return made

    def copy(value: Any) -> Any:
        if isinstance(value, str):
            url = _DATA_URL.match(value) if len(value) > least_chars else None
            return take(value, url.group(1), url.end()) if url else value
        if isinstance(value, list):
            return [copy(item) for item in value]
        if not isinstance(value, dict):
            return value
        kept = {key: copy(item) for key, item in value.items()}
        media = next((kept[key] for key in _MEDIA_KEYS if isinstance(kept.get(key), str)), "")
        if _MEDIA.fullmatch(media) and kept.get("data") == value.get("data"):
            kept["data"] = take(value.get("data"), media)
        if isinstance(images := kept.get("images"), list):
            kept["images"] = [
                take(image, type_of(image)) if isinstance(image, str) else image for image in images
            ]
        return kept

    return copy(value)
