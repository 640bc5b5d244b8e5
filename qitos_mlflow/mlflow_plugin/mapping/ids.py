"""MLflow's ids of QitOS's traces and spans: derived, so that a replay finds what it wrote. Pure."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache

# Zeros are no id in OpenTelemetry.
_HEX_32 = re.compile(r"(?!0+$)[0-9a-f]{32}")
_MLFLOW_ID = re.compile(r"tr-[0-9a-f]{32}")
_HEX_16 = re.compile(r"(?!0+$)[0-9a-f]{16}")


def digest(*parts: str, size: int) -> bytes:
    """`size` bytes that follow from `parts`, the same in every process."""
    text = "\0".join(parts).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=size, person=b"qitos-mlflow").digest()


@lru_cache(maxsize=256)
def otel_trace_id(qitos_id: str) -> bytes:
    """16 bytes: the id itself if it is a UUID or 32 hex digits, else a hash of it."""
    plain = qitos_id.replace("-", "").lower()
    if _HEX_32.fullmatch(plain):
        return bytes.fromhex(plain)
    return digest("trace", qitos_id, size=16)


def trace_id(qitos_id: str) -> str:
    """MLflow's id of a QitOS trace; an id of MLflow's is returned as it is."""
    if _MLFLOW_ID.fullmatch(qitos_id):
        return qitos_id
    return f"tr-{otel_trace_id(qitos_id).hex()}"


@lru_cache(maxsize=1024)  # A span's parent is asked for with each of its children.
def span_id(qitos_trace_id: str, qitos_id: str) -> bytes:
    """8 bytes: the id itself if it is 16 hex digits, else a hash of both ids."""
    if _HEX_16.fullmatch(qitos_id):
        return bytes.fromhex(qitos_id)
    return digest("span", qitos_trace_id, qitos_id, size=8)
