"""Token counts of a model's answer, under one set of names. Pure."""

from __future__ import annotations

from typing import Any

from qitos_mlflow._usage import parse_usage
from qitos_mlflow.bridge.extract import first, mapping, present


def token_usage(usage: Any, provider: Any = None) -> dict[str, int] | None:
    """Token counts under one set of names; None if there are no real ones.

    Args:
        usage: the provider's own, never an estimate.
        provider: the host's name for the provider.
    """
    found = parse_usage(usage)
    if found is None:
        return None
    prompt, completion, total = found.prompt, found.completion, found.reported_total
    if (
        prompt is not None
        and total is not None
        and total > prompt + (completion or 0)
        and any(name in str(provider).lower() for name in ("gemini", "google"))
    ):
        completion = total - prompt  # QitOS 0.3.0 leaves the thoughts out of Gemini's counts.
    if total is None:
        total = (prompt or 0) + (completion or 0)
    counts = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": total,
        "cache_read_tokens": found.cache_read,
        "cache_creation_tokens": found.cache_creation,
    }
    return present(counts)


def cache_hits(agent: Any) -> int | None:
    """How often a caching model has answered from its cache; None for a model without one.

    After a hit, such a model may report the usage of its last miss again.
    """
    hits = mapping(getattr(first(agent, "llm"), "__dict__", None)).get("_hits")
    return hits if isinstance(hits, int) else None
