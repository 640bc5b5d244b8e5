"""Real pictures, for tests, and a model that looks at them."""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from typing import Any

from qitos_mlflow import tracing


def png(shade: int, side: int = 8, *, compressed: bool = True) -> bytes:
    """A grey PNG; not compressed, it has about `side` times `side` bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    rows = (b"\0" + bytes([shade]) * side) * side
    data = zlib.compress(rows, 9 if compressed else 0)
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", data), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def base64(content: bytes) -> str:
    """As texts have it."""
    return b64encode(content).decode()


def data_url(content: bytes) -> str:
    """As an address."""
    return f"data:image/png;base64,{base64(content)}"


def generation(trace: Any, *blocks: dict[str, Any]) -> None:
    """A model call with these blocks in its one message."""
    messages = [{"role": "user", "content": [{"type": "text", "text": "Look."}, *blocks]}]
    data = tracing.GenerationSpanData(model="m", input_content=messages, output_content="Seen.")
    trace.create_span(tracing.SpanType.GENERATION, data).start().finish()
