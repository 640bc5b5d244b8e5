"""Token counts in every provider's spelling."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest

from qitos_mlflow._usage import parse_usage
from qitos_mlflow.bridge.extract import token_usage


@pytest.mark.parametrize(
    ("raw", "counts"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 99}, (3, 4, 7)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4, 7)),
        ({"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 7}, (3, 4, 7)),
        # Gemini counts thoughts apart; the others' are in the answer's count already.
        ({"promptTokenCount": 3, "candidatesTokenCount": 4, "thoughtsTokenCount": 5}, (3, 9, 12)),
        ({"prompt_token_count": 3, "thoughts_token_count": 5}, (3, 5, 8)),
        ({"prompt_tokens": 3, "completion_tokens": 9, "thoughts_token_count": 5}, (3, 9, 12)),
        (
            {
                "prompt_tokens": 3,
                "completion_tokens": 4,
                "completion_tokens_details": {"reasoning_tokens": 2},
            },
            (3, 4, 7),
        ),
        ({"inputTokens": 3, "outputTokens": 4}, (3, 4, 7)),
        ({"prompt_eval_count": 3, "eval_count": 4}, (3, 4, 7)),
        ({"total_tokens": 7}, (None, None, 7)),
        ({"prompt_tokens": 3, "total_tokens": 7}, (3, 4, 7)),
        ({"prompt_tokens": 3.0, "completion_tokens": 4}, (3, 4, 7)),
        ({"prompt_tokens": None, "input_tokens": 3, "completion_tokens": 4}, (3, 4, 7)),
    ],
)
def test_every_spelling_of_usage_is_read(raw: dict[str, Any], counts: tuple[int, ...]) -> None:
    """Providers spell token counts differently; the run has one spelling."""
    lost: Counter[str] = Counter()
    usage = parse_usage(raw, lost)
    assert usage is not None
    assert (usage.prompt, usage.completion, usage.total) == counts
    assert not lost


@pytest.mark.parametrize("bad", ["12", "nan", math.nan, math.inf, -1, 1.5, True, [], {}, 10**400])
def test_a_bad_count_loses_only_itself(bad: Any) -> None:
    """What is no count is dropped and counted, its neighbours stay."""
    lost: Counter[str] = Counter()
    usage = parse_usage({"prompt_tokens": 5, "completion_tokens": bad, "total_tokens": 9}, lost)
    assert usage is not None
    assert (usage.prompt, usage.completion, usage.total) == (5, None, 9)
    assert lost == {"bad_value": 1}


@pytest.mark.parametrize(
    ("raw", "counts"),
    [
        # Anthropic's and Bedrock's own: the input is what is left beside the cache.
        (
            {"input_tokens": 12, "output_tokens": 50, "cache_read_input_tokens": 9000,
             "cache_creation_input_tokens": 500},
            (9512, 50, 9562, 9000, 500),
        ),
        (
            {"input_tokens": 12, "output_tokens": 50, "cache_read_input_tokens": None,
             "cache_creation_input_tokens": 500},
            (512, 50, 562, None, 500),
        ),
        (
            {"inputTokens": 12, "outputTokens": 50, "totalTokens": 9062,
             "cacheReadInputTokens": 9000, "cacheWriteInputTokens": 0},
            (9012, 50, 9062, 9000, 0),
        ),
        (
            {"inputTokens": 12, "outputTokens": 50, "totalTokens": 62,
             "cacheReadInputTokenCount": 9000, "cacheWriteInputTokenCount": 500},
            (9512, 50, 9562, 9000, 500),
        ),
        ({"input_tokens": 12, "cache_read_input_tokens": 9000}, (9012, None, None, 9000, None)),
        # The others' prompt has it: litellm, OpenAI, OpenAI's Responses, MLflow, Gemini.
        (
            {"prompt_tokens": 9512, "completion_tokens": 50, "total_tokens": 9562,
             "cache_read_input_tokens": 9000, "cache_creation_input_tokens": 500,
             "prompt_tokens_details": {"cached_tokens": 9000}},
            (9512, 50, 9562, 9000, 500),
        ),
        (
            {"prompt_tokens": 9012, "completion_tokens": 50, "cache_read_input_tokens": 9000},
            (9012, 50, 9062, 9000, None),
        ),
        (
            {"input_tokens": 9012, "output_tokens": 50, "total_tokens": 9062,
             "input_tokens_details": {"cached_tokens": 9000}},
            (9012, 50, 9062, 9000, None),
        ),
        (
            {"input_tokens": 9012, "output_tokens": 50, "cache_read_input_tokens": 9000,
             "input_tokens_details": {"cached_tokens": 9000}},
            (9012, 50, 9062, 9000, None),
        ),
        (
            {"input_tokens": 9512, "output_tokens": 50, "total_tokens": 9562,
             "cache_read_input_tokens": 9000, "cache_creation_input_tokens": 500},
            (9512, 50, 9562, 9000, 500),
        ),
        (
            {"promptTokenCount": 9012, "candidatesTokenCount": 50, "cachedContentTokenCount": 9000},
            (9012, 50, 9062, 9000, None),
        ),
    ],
)  # fmt: skip
def test_the_prompt_includes_the_cache_once(raw: dict[str, Any], counts: tuple[Any, ...]) -> None:
    """A prompt is all that was read, cached or not; what says so already is left as it is."""
    usage = parse_usage(raw)
    assert usage is not None
    found = (usage.prompt, usage.completion, usage.total, usage.cache_read, usage.cache_creation)
    assert found == counts


@pytest.mark.parametrize(
    ("raw", "completion"),
    [
        ({"completion_tokens_details": {"reasoning_tokens": 94}}, 103),
        ({"output_tokens_details": {"reasoning_tokens": 94}}, 103),
        ({"reasoning_tokens": 94}, 103),
        ({"reasoning_tokens": 93}, 9),
        ({"reasoning_tokens": "94"}, 9),
        ({"completion_tokens_details": None}, 9),
        ({"completion_tokens": 103, "reasoning_tokens": 94}, 103),
        ({"total_tokens": None, "reasoning_tokens": 94}, 9),
    ],
)
def test_reasoning_beside_the_completion_is_part_of_it(
    raw: dict[str, Any], completion: int
) -> None:
    """Reasoning that only the total has is added where it is just what the total has more."""
    usage = parse_usage({"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135, **raw})
    assert usage is not None
    assert (usage.prompt, usage.completion, usage.total) == (32, completion, 32 + completion)


@pytest.mark.parametrize(
    "raw",
    [
        {"input_tokens": 12, "output_tokens": 50, "cache_read_input_tokens": 9000},
        {"inputTokens": 12, "outputTokens": 50, "totalTokens": 62, "cacheReadInputTokens": 9000},
        {"prompt_tokens": 32, "completion_tokens": 9, "total_tokens": 135, "reasoning_tokens": 94},
        {"promptTokens": 12, "completionTokens": 3, "totalTokens": 15},
        {"inputTokenCount": 12, "outputTokenCount": 3},
        {"prompt_tokens": 12.0, "completion_tokens": 3.0},
        {"promptTokenCount": 3, "candidatesTokenCount": 4, "thoughtsTokenCount": 5},
        {"prompt_tokens": 3, "total_tokens": 7},
        {"total_tokens": 7},
    ],
)
def test_a_span_of_the_bridge_counts_the_same(raw: dict[str, Any]) -> None:
    """What the bridge writes into a span is read again, and nothing is added a second time."""
    usage, again = parse_usage(raw), parse_usage(token_usage(raw))
    assert usage is not None
    assert again is not None
    assert (usage.prompt, usage.completion, usage.total, usage.cache_read) == (
        again.prompt,
        again.completion,
        again.total,
        again.cache_read,
    )
