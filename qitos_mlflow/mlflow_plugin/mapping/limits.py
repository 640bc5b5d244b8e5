"""Every limit of MLflow in one place, each with its source, and the functions that keep to them.

MLflow refuses a batch as a whole, so a bad value must be found before it is sent: only this value
is left out or trimmed, and counted. The functions are total and pure. Those that can lose something
take a ``Counter`` and count the reason in it.

Sources: *server* is what mlflow 3.17.2 checks itself (``mlflow/utils/validation.py``), *column*
the width of the database column (``store/tracking/dbmodels/models.py``), which SQLite ignores
and PostgreSQL enforces by refusing the batch; *run* was observed on both.
"""

from __future__ import annotations

import hashlib
import math
import posixpath
import re
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

BATCH_METRICS = 1000
"""Metrics in one log-batch call (server: MAX_METRICS_PER_BATCH)."""
BATCH_PARAMS = 100
"""Params in one log-batch call (server: MAX_PARAMS_TAGS_PER_BATCH)."""
BATCH_TAGS = 100
"""Tags in one log-batch call (server: MAX_PARAMS_TAGS_PER_BATCH)."""
BATCH_TOTAL = 1000
"""Metrics, params and tags together in one log-batch call (server: MAX_ENTITIES_PER_BATCH)."""

KEY_CHARS = 250
"""Name of a metric, param, tag or assessment (server: MAX_ENTITY_KEY_LENGTH; column)."""
PARAM_CHARS = 6000
"""Value of a param; longer ones are cut silently (server: MAX_PARAM_VAL_LENGTH)."""
TAG_CHARS = 8000
"""Value of a run's tag; longer ones are cut silently (server: MAX_TAG_VAL_LENGTH)."""
EXPERIMENT_CHARS = 256
"""Name of an experiment (column; the server itself says 500)."""
RUN_NAME_CHARS = 250
"""Name of a run (column)."""

TRACE_TAG_CHARS = 4096
"""Value of a trace's tag (MLflow's own client cuts here; column: 8000)."""
SESSION_CHARS = 250
"""Session id of a trace (column; SQLite servers refuse longer ones too: run)."""
PREVIEW_CHARS = 1000
"""Request and response preview of a trace (column)."""
CLIENT_REQUEST_CHARS = 50
"""Client request id of a trace (column)."""
SPAN_TYPE_CHARS = 500
"""Type of a span; model and provider names (column)."""

MAX_INT64 = 2**63 - 1
"""Steps, timestamps and times beyond this break the server or the column (run)."""

_LAST_S = 253_402_300_799
"""The end of the year 9999, which neither datetime nor protobuf can pass."""

UNNAMED = "unnamed"
"""What an empty name becomes."""

_ILLEGAL = re.compile(r"[^/\w.\- :]")
"""The complement of what names may hold (server: _VALID_PARAM_AND_METRIC_NAMES)."""
_HASH_CHARS = 6

_SURROGATE = re.compile("[\ud800-\udfff]")


def clean_key(name: object, max_chars: int = KEY_CHARS) -> str:
    """A legal name for a metric, param or tag that still reads like `name`.

    Legal is at most `max_chars` letters of any script, digits and ``_ - . : / space``, in a form
    that POSIX path normalisation leaves as it is (server: path_not_unique). A legal name is
    returned as it is. Any other gets ``_`` for what is illegal and ends in a short hash of the
    original, so that two names never become one.
    """
    text = name if isinstance(name, str) else str(name)
    if not text:
        return UNNAMED
    normal = posixpath.normpath(text) == text == text.strip() and text != "."
    legal = normal and not text.startswith(("/", "..")) and not _ILLEGAL.search(text)
    if legal and len(text) <= max_chars:
        return text
    parts = [
        part if part.strip(".") else "_" * len(part)
        for part in (piece.strip() for piece in _ILLEGAL.sub("_", text).split("/"))
        if part
    ]
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:_HASH_CHARS]
    if parts and parts[0].startswith(".."):
        parts[0] = "_" + parts[0].lstrip(".")
    readable = "/".join(parts)[: max_chars - _HASH_CHARS - 1].rstrip("/ ") or UNNAMED
    return f"{readable}-{digest}"


def clean_text(value: object, max_chars: int, lost: Counter[str] | None = None) -> str:
    """`value` as text of at most `max_chars` characters that every store accepts.

    NUL (PostgreSQL refuses it) and lone surrogates (not encodable) become U+FFFD. A cut text ends
    in ``…`` and counts as ``text_trimmed``, replaced characters as ``text_characters``.
    """
    text = value if isinstance(value, str) else str(value)
    if len(text) > max_chars:
        text = text[: max_chars - 1] + "…"
        _count(lost, "text_trimmed")
    clean = encodable(text.replace("\0", "\ufffd"))
    if clean != text:
        _count(lost, "text_characters")
    return clean


def encodable(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which cannot be sent."""
    return text if text.isascii() else _SURROGATE.sub("\ufffd", text)


def clean_metric(value: Any, lost: Counter[str] | None = None) -> float | None:
    """`value` as a finite float, or None, counted as ``bad_value``, when it is not a number.

    None is an absent value and not counted. A text that holds a finite number counts as a number,
    True as 1 and False as 0. NaN breaks the charts of MLflow's run page, infinity is stored as
    1.8e308, and anything that is no number fails the whole batch (all: run).
    """
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if math.isfinite(number):
        return number
    _count(lost, "bad_value")
    return None


def clean_score(value: Any) -> float | None:
    """`value` as a finite float if it is a number; None for anything else, texts and True too."""
    return None if isinstance(value, (str, bool)) else clean_metric(value)


def clean_step(value: Any) -> int:
    """`value` as a step: a whole number within 64 bits; 0 for anything else.

    A float would be refused by servers and break whole runs in file stores (run).
    """
    try:
        step = int(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return max(-MAX_INT64, min(step, MAX_INT64))


def clean_ms(ns: Any) -> int:
    """Nanoseconds since the epoch as whole milliseconds, never below 0 or beyond 64 bits."""
    return clean_ns(ns) // 1_000_000


def clean_ns(ns: Any) -> int:
    """`ns` as whole nanoseconds within 0 and 64 bits; 0 for anything that is no number."""
    if type(ns) is int and 0 <= ns <= MAX_INT64:  # Most are, and it is five times faster.
        return ns
    return max(0, clean_step(ns))


def rfc3339(ns: int) -> str:
    """Nanoseconds since the epoch as the time text of protobuf's JSON form, to the microsecond."""
    moment = datetime.fromtimestamp(min(ns // 1_000_000_000, _LAST_S), timezone.utc)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{ns % 1_000_000_000 // 1_000:06d}Z"


def mapping(value: Any) -> Mapping[str, Any]:
    """`value`, or an empty mapping if it is no JSON object."""
    return value if isinstance(value, dict) else {}  # Five times faster than with `Mapping`.


def _count(lost: Counter[str] | None, reason: str) -> None:
    if lost is not None:
        lost[reason] += 1
