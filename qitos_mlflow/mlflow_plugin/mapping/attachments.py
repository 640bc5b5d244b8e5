"""Pictures of spans as MLflow's attachments: files of their trace, to which spans refer. Pure.

MLflow shows them, and its judges open them (``mlflow-attachment://``, MLflow 3.12 and later; judges
3.15). The id follows from the content, so that a picture sent again is the same file.
"""

from __future__ import annotations

import re
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Any, NamedTuple
from urllib.parse import quote

from qitos_mlflow import _json
from qitos_mlflow.mlflow_plugin.mapping.entities import is_inside
from qitos_mlflow.redaction.pictures import REFERENCE, Pictures, take_pictures
from qitos_mlflow.redaction.trim import MAX_INLINED_CHARS

MAX_BYTES = 8 * 1024 * 1024
"""A larger picture stays inlined (bytes); judges open up to 10 MiB."""

ATTACHMENT = re.compile(
    r"mlflow-attachment://(?P<id>[0-9a-f-]{36})\?content_type=(?P<type>image%2F[\w.%+-]+)"
    r"&trace_id=[\w-]+&size=(?P<size>\d+)",
    re.ASCII,
)


class Attachment(NamedTuple):
    """A file of a trace."""

    id: str
    content: bytes

    @property
    def path(self) -> str:
        """Where it is, below the trace's artifacts."""
        return f"attachments/{self.id}"


def check_names(record: Mapping[str, Any]) -> None:
    """Raise `ValueError` if a file of the record would leave its directory."""
    names = [*(record.get("pictures") or ())]
    if record["kind"] == "artifact":
        names.append(record["path"])
    for name in names:
        if not is_inside(name):
            raise ValueError(f"{name!r:.200} is no name for a file")


def may_show(data: bytes) -> bool:
    """Whether JSON may have pictures: data URLs, references, media types, Ollama's ``images``."""
    return b"image/" in data or b'"images"' in data


def attach(record: Mapping[str, Any], trace_id: str) -> tuple[dict[str, Any], list[Attachment]]:
    """A span's record with addresses of attachments in the place of pictures, and these.

    Args:
        record: decoded; it stays as it is.
        trace_id: MLflow's id of the trace whose attachments they are.
    """
    made = dict(record)
    found: Pictures = {**made.pop("pictures", {})}
    for part in ("data", "output"):
        if part in made:
            made[part] = _addressed(take_pictures(made[part], 0, MAX_BYTES, found), trace_id)
    contents = {key: _bytes(base64) for key, base64 in found.items()}
    return made, [Attachment(key, content) for key, content in contents.items() if content]


def inlined(text: str, attachments: Mapping[str, Attachment]) -> str:
    """A span's text for a server without attachments: pictures as data URLs, or as notes."""

    def inline(found: re.Match[str]) -> str:
        media, size = found["type"].replace("%2F", "/"), int(found["size"])
        known = attachments.get(found["id"])
        if known is not None and size * 4 / 3 <= MAX_INLINED_CHARS:
            return f"data:{media};base64,{b64encode(known.content).decode()}"
        return f"[{media}, {size * 4 // 3} characters]"

    return ATTACHMENT.sub(inline, text)


def _bytes(base64: Any) -> bytes:
    """What is in a text; empty if that was damaged."""
    try:
        return b64decode(base64)
    except (TypeError, ValueError):
        return b""


def _addressed(value: Any, of_trace: str) -> Any:
    def address(found: re.Match[str]) -> str:
        media = quote(found["type"], safe="")
        address = f"mlflow-attachment://{found['id']}?content_type={media}"
        return f"{address}&trace_id={of_trace}&size={found['size']}"

    return _json.loads(REFERENCE.sub(address, _json.dumps(value).decode()))
