"""Token counts from whatever spelling a provider's answer has. Pure."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from qitos_mlflow.bridge.extract import first, known, mapping

PROMPT_KEYS = ("prompt_tokens", "input_tokens", "prompt_token_count", "promptTokenCount",
               "inputTokens", "prompt_eval_count")  # fmt: skip
COMPLETION_KEYS = ("completion_tokens", "output_tokens", "outputTokens", "eval_count")
ANSWER_KEYS = ("candidates_token_count", "candidatesTokenCount")
"""Gemini's count of what is in its answer; what it thought before that is counted apart."""
THOUGHT_KEYS = ("thoughts_token_count", "thoughtsTokenCount")
TOTAL_KEYS = ("total_tokens", "total_token_count", "totalTokenCount", "totalTokens")
CACHE_READ_KEYS = ("cache_read_input_tokens", "cache_read_tokens", "cached_content_token_count",
                   "cachedContentTokenCount", "cacheReadInputTokens")  # fmt: skip
CACHE_CREATION_KEYS = ("cache_creation_input_tokens", "cache_creation_tokens",
                       "cacheWriteInputTokens")  # fmt: skip
DETAIL_KEYS = ("prompt_tokens_details", "input_tokens_details")


def token_usage(usage: Any, provider: Any = None) -> dict[str, int] | None:
    """Token counts under one spelling; None when there are no real ones.

    Only integers pass. Tokens of thoughts are part of the completion.

    Args:
        usage: what the provider's answer carried, never an estimate.
        provider: the host's name for who answered.
    """
    if not isinstance(usage, Mapping):
        return None
    prompt = _count(usage, PROMPT_KEYS)
    completion = _count(usage, COMPLETION_KEYS)
    total = _count(usage, TOTAL_KEYS)
    if completion is None:
        counts = [_count(usage, keys) for keys in (ANSWER_KEYS, THOUGHT_KEYS)]
        completion = sum(count or 0 for count in counts) if any(counts) else counts[0]
    if (
        prompt is not None
        and total is not None
        and total > prompt + (completion or 0)
        and any(name in str(provider).lower() for name in ("gemini", "google"))
    ):
        completion = total - prompt  # QitOS 0.3.0 hands on all of Gemini's counts but the thoughts.
    if prompt is None and completion is None and total is None:
        return None
    if total is None:
        total = (prompt or 0) + (completion or 0)
    details = [mapping(usage.get(key)) for key in DETAIL_KEYS]
    cached = [_count(item, ("cached_tokens",)) for item in details]
    found = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "cache_read_tokens": known(_count(usage, CACHE_READ_KEYS), *cached),
        "cache_creation_tokens": _count(usage, CACHE_CREATION_KEYS),
    }
    return {key: value for key, value in found.items() if value is not None}


def cache_hits(agent: Any) -> int | None:
    """How often a caching model has answered by itself; None for a model that does not cache.

    A hit on such a model may report the usage of its last miss again.
    """
    hits = mapping(getattr(first(agent, "llm"), "__dict__", None)).get("_hits")
    return hits if isinstance(hits, int) else None


def _count(usage: Mapping[str, Any], keys: Sequence[str]) -> int | None:
    for key in keys:
        value = usage.get(key)
        if value is None or isinstance(value, bool):
            continue
        try:
            count = operator.index(value)
        except TypeError:
            continue
        if count >= 0:
            return count
    return None
