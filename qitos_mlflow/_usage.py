"""Token counts of all providers in one spelling. Pure.

The bridge reads the usage in a model's answer with it, the MLflow plugin the usage of a span. With
one table, both know the same spellings. Nothing is estimated.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

_PROMPT = ("prompt_tokens", "promptTokenCount", "prompt_token_count", "promptTokens",
           "prompt_eval_count")  # fmt: skip
_INPUT = ("input_tokens", "inputTokens", "inputTokenCount")
_INPUT_CACHE_READ = ("cache_read_input_tokens", "cacheReadInputTokens", "cacheReadInputTokenCount")
_INPUT_CACHE_CREATION = ("cache_creation_input_tokens", "cacheWriteInputTokens",
                         "cacheWriteInputTokenCount")  # fmt: skip
"""Anthropic's and Bedrock's; their input is what is left of the prompt beside these."""
_PROMPT_DETAILS = ("prompt_tokens_details", "input_tokens_details")
_INPUT_IS_ALL = ("total_tokens", *_PROMPT_DETAILS)
"""Beside these, an input is the whole prompt: OpenAI's Responses and MLflow spell theirs so."""
_CACHE_READ = ("cache_read_tokens", *_INPUT_CACHE_READ, "cached_content_token_count",
               "cachedContentTokenCount", "cached_tokens")  # fmt: skip
_CACHE_CREATION = ("cache_creation_tokens", *_INPUT_CACHE_CREATION)
_COMPLETION = ("completion_tokens", "output_tokens", "outputTokens", "completionTokens",
               "completionTokenCount", "outputTokenCount", "eval_count")  # fmt: skip
_COMPLETION_DETAILS = ("completion_tokens_details", "output_tokens_details")
_REASONING = ("reasoning_tokens",)
_ANSWER = ("candidatesTokenCount", "candidates_token_count")
_THOUGHTS = ("thoughtsTokenCount", "thoughts_token_count")
"""Gemini counts these beside its answer's; others' answers have theirs in them already."""
_TOTAL = ("total_tokens", "totalTokenCount", "total_token_count", "totalTokens")

_OURS_IN_ORDER = ("prompt_tokens", "completion_tokens", "total_tokens", "cache_read_tokens",
                  "cache_creation_tokens")  # fmt: skip
_OURS, _BOTH = frozenset(_OURS_IN_ORDER), frozenset(_OURS_IN_ORDER[:2])
"""As the bridge spells what it found."""

MAX_TOKENS = 10**15
"""Counts beyond this are mistakes; sums of them still fit 64 bits."""


@dataclass(frozen=True)
class Usage:
    """Token counts of one model call; None where they are not known.

    The prompt includes tokens read from a cache or written to it; the completion includes
    reasoning.
    """

    prompt: int | None
    completion: int | None
    reported_total: int | None
    cache_read: int | None
    cache_creation: int | None

    @property
    def total(self) -> int | None:
        """Prompt + completion if both are known, else the total that the provider reports."""
        if self.prompt is None or self.completion is None:
            return self.reported_total
        return self.prompt + self.completion


def parse_usage(raw: Any, lost: Counter[str] | None = None) -> Usage | None:
    """The counts in `raw`, or None when it holds none.

    A missing prompt or completion is computed from the total and the other. Values that are no
    counts (texts, NaN, negative, fractions, booleans) are ``bad_value``, and nothing replaces them.
    """
    if not isinstance(raw, Mapping):
        if raw is not None and lost is not None:
            lost["bad_value"] += 1
        return None
    if _BOTH <= raw.keys() <= _OURS and all(
        type(count) is int and 0 <= count <= MAX_TOKENS for count in raw.values()
    ):
        return Usage(*map(raw.get, _OURS_IN_ORDER))  # As below, in a fifth of the time.
    total = _first(raw, _TOTAL, lost)
    prompt = _first(raw, _PROMPT, lost)
    if prompt is None:
        prompt = _first(raw, _INPUT, lost)
        cached = [_first(raw, names, None) for names in (_INPUT_CACHE_READ, _INPUT_CACHE_CREATION)]
        if prompt is not None and any(cached) and _absent(raw, _INPUT_IS_ALL):
            prompt += sum(count or 0 for count in cached)
            total = None  # Not every provider has the cache in it (mlflow.bedrock says the same).
    completion = _first(raw, _COMPLETION, lost)
    answer, thoughts = _first(raw, _ANSWER, lost), _first(raw, _THOUGHTS, lost)
    if completion is None and (answer is not None or _absent(raw, (*_COMPLETION, *_ANSWER))):
        completion = answer if thoughts is None else (answer or 0) + thoughts
    if total is not None:
        if prompt is not None and completion is not None:
            # xAI, for one, counts reasoning in the total alone.
            reasoning = _first({**raw, **_details(raw, _COMPLETION_DETAILS)}, _REASONING, None)
            if reasoning == total - prompt - completion:
                completion += reasoning
        elif prompt is not None and _absent(raw, (*_COMPLETION, *_ANSWER)):
            completion = max(0, total - prompt)
        elif completion is not None and _absent(raw, (*_PROMPT, *_INPUT)):
            prompt = max(0, total - completion)
    if prompt is None and completion is None and total is None:
        return None
    cache_read = _first(raw, _CACHE_READ, lost)
    if cache_read is None:
        cache_read = _first(_details(raw, _PROMPT_DETAILS), ("cached_tokens",), lost)
    return Usage(prompt, completion, total, cache_read, _first(raw, _CACHE_CREATION, lost))


def _details(raw: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    found = [raw[name] for name in names if isinstance(raw.get(name), Mapping)]
    return {key: value for details in found for key, value in details.items()}


def _absent(raw: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    return all(raw.get(name) is None for name in names)


def _first(raw: Mapping[str, Any], names: tuple[str, ...], lost: Counter[str] | None) -> int | None:
    if raw.keys().isdisjoint(names):
        return None
    for name in names:
        if (value := raw.get(name)) is None:
            continue
        if isinstance(value, float) and value.is_integer():  # JSON of protobuf has no others.
            value = int(value)
        with suppress(TypeError):
            number = operator.index(value)  # Numpy's are integers, too.
            if 0 <= number <= MAX_TOKENS and not isinstance(value, bool):
                return number
        if lost is not None:
            lost["bad_value"] += 1
    return None
