"""Token counts as providers spell them, in one spelling. Pure.

Receives the ``token_usage`` of a generation span, hands on a `Usage`. What is not a whole,
non-negative number is dropped and counted; nothing is estimated.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_PROMPT = ("prompt_tokens", "input_tokens", "promptTokenCount", "prompt_token_count",
           "inputTokens", "promptTokens", "inputTokenCount", "prompt_eval_count")  # fmt: skip
_COMPLETION = ("completion_tokens", "output_tokens", "candidatesTokenCount",
               "candidates_token_count", "completionTokenCount", "outputTokens",
               "completionTokens", "outputTokenCount", "eval_count")  # fmt: skip
_GEMINI = ("candidatesTokenCount", "candidates_token_count")
_THOUGHTS = ("thoughtsTokenCount", "thoughts_token_count")
"""Gemini counts these beside its answer's; others' answers have theirs in them already."""
_TOTAL = ("total_tokens", "totalTokenCount", "total_token_count", "totalTokens")
_CACHE_READ = ("cache_read_tokens", "cache_read_input_tokens", "cachedContentTokenCount",
               "cached_content_token_count", "cacheReadInputTokens", "cached_tokens")  # fmt: skip
_CACHE_CREATION = ("cache_creation_tokens", "cache_creation_input_tokens",
                   "cacheWriteInputTokens")  # fmt: skip
_DETAILS = ("prompt_tokens_details", "input_tokens_details")

MAX_TOKENS = 10**15
"""Counts beyond this are mistakes; sums of them still fit 64 bits."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one generation; None where they are not known."""

    prompt: int | None = None
    completion: int | None = None
    total: int | None = None
    cache_read: int | None = None
    cache_creation: int | None = None


def parse_usage(raw: Any, lost: Counter[str] | None = None) -> Usage | None:
    """The counts in `raw`, or None when it holds none.

    The total is prompt + completion where both are there, whatever a provider calls its total;
    an absent one of the two follows from total and the other. Values that are there but are no
    counts (texts, NaN, negative, fractions, booleans) are ``bad_value``, and nothing replaces them.
    """
    if not isinstance(raw, Mapping):
        if raw is not None and lost is not None:
            lost["bad_value"] += 1
        return None
    details: Mapping[str, Any] = next(
        (raw[key] for key in _DETAILS if isinstance(raw.get(key), Mapping)), {}
    )
    prompt = _first(raw, _PROMPT, lost)
    completion = _first(raw, _COMPLETION, lost)
    thoughts = _first(raw, _THOUGHTS, lost)
    if completion is None:
        completion = thoughts if _absent(raw, _COMPLETION) else None
    elif thoughts is not None and _first(raw, _GEMINI, None) == completion:
        completion += thoughts
    total = _first(raw, _TOTAL, lost)
    if prompt is not None and completion is not None:
        total = prompt + completion
    elif total is not None and prompt is not None and _absent(raw, _COMPLETION):
        completion = max(0, total - prompt)
    elif total is not None and completion is not None and _absent(raw, _PROMPT):
        prompt = max(0, total - completion)
    if prompt is None and completion is None and total is None:
        return None
    return Usage(
        prompt,
        completion,
        total,
        _first(raw, _CACHE_READ, lost) or _first(details, ("cached_tokens",), lost),
        _first(raw, _CACHE_CREATION, lost),
    )


def _absent(raw: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    return all(raw.get(name) is None for name in names)


def _first(raw: Mapping[str, Any], names: tuple[str, ...], lost: Counter[str] | None) -> int | None:
    for name in names:
        value = raw.get(name)
        if value is None:
            continue
        number = _count(value)
        if number is not None:
            return number
        if lost is not None:
            lost["bad_value"] += 1
    return None


def _count(value: Any) -> int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    if not 0 <= value <= MAX_TOKENS or value != int(value):  # NaN is not within any range
        return None
    return int(value)
