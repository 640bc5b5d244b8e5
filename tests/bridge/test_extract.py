"""Reading the host's objects, whichever version made them."""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qitos_mlflow._guard import in_words
from qitos_mlflow._stop_reasons import ERROR_STOPS
from qitos_mlflow.bridge import extract
from qitos_mlflow.bridge.extract import cache_hits, token_usage
from qitos_mlflow.bridge.outcome import (
    is_interrupt,
    issues_of,
    outcome_of,
)
from qitos_mlflow.mlflow_plugin.plugin import OpenTrace


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}, (3, 4, 7)),
        ({"input_tokens": 3, "output_tokens": 4}, (3, 4, 7)),
        ({"promptTokenCount": 3, "candidatesTokenCount": 4, "totalTokenCount": 9}, (3, 4, 9)),
        ({"prompt_token_count": 3, "candidates_token_count": 4}, (3, 4, 7)),
        ({"promptTokenCount": 3, "candidatesTokenCount": 4, "thoughtsTokenCount": 5}, (3, 9, 12)),
        ({"prompt_token_count": 3, "thoughts_token_count": 5}, (3, 5, 8)),
        ({"promptTokenCount": 3, "candidatesTokenCount": 0}, (3, 0, 3)),
        ({"inputTokens": 3, "outputTokens": 4, "totalTokens": 7}, (3, 4, 7)),
        ({"prompt_eval_count": 3, "eval_count": 4}, (3, 4, 7)),
        ({"prompt_tokens": None, "input_tokens": 3, "completion_tokens": 4}, (3, 4, 7)),
        ({"completion_tokens": 4}, (None, 4, 4)),
        ({"prompt_tokens": 3, "completion_tokens": None, "total_tokens": None}, (3, None, 3)),
        ({"total_tokens": 7}, (None, None, 7)),
        ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, (0, 0, 0)),
    ],
)
def test_every_spelling_of_token_counts_is_one(usage: dict[str, Any], expected: Any) -> None:
    """Whatever a provider calls its counts, the span has prompt, completion and total."""
    found = token_usage(usage)
    assert found is not None
    assert all(type(value) is int for value in found.values())
    keys = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert tuple(found.get(key) for key in keys) == expected


@pytest.mark.parametrize(
    ("usage", "provider", "completion"),
    [
        ((10, 5, 115), "GeminiModel", 105),
        ((10, 5, 115), "google", 105),
        ((10, None, 110), "GeminiModel", 100),
        ((10, 5, 15), "GeminiModel", 5),
        ((10, 5, 12), "GeminiModel", 5),
        ((None, 5, 115), "GeminiModel", 5),
        ((10, 5, 115), "OpenAIModel", 5),
        ((10, 5, 115), None, 5),
    ],
)
def test_geminis_thoughts_are_part_of_its_completion(
    usage: tuple[Any, ...], provider: Any, completion: int
) -> None:
    """The host leaves them out of all its counts but the total."""
    keys = ("prompt_tokens", "completion_tokens", "total_tokens")
    found = token_usage(dict(zip(keys, usage, strict=True)), provider)
    assert found is not None
    assert (found["completion_tokens"], found["total_tokens"]) == (completion, usage[2])


@pytest.mark.parametrize(
    "usage",
    [
        None,
        {},
        "12",
        [1, 2],
        {"prompt_tokens": None},
        {"prompt_tokens": "12", "total_tokens": "many"},
        {"prompt_tokens": True},
        {"prompt_tokens": 1.5, "completion_tokens": float("nan")},
        {"total_tokens": -1},
    ],
)
def test_what_is_no_count_is_none(usage: Any) -> None:
    """Strings, floats, booleans, negative and missing counts are no usage."""
    assert token_usage(usage) is None


@pytest.mark.parametrize(
    ("usage", "read", "created"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 2}}, 2, None),
        ({"input_tokens_details": {"cached_tokens": 2}}, 2, None),
        ({"cache_read_input_tokens": 2, "cache_creation_input_tokens": 1}, 2, 1),
        ({"cachedContentTokenCount": 2}, 2, None),
        ({"cacheReadInputTokens": 2, "cacheWriteInputTokens": 1}, 2, 1),
        ({"prompt_tokens_details": None}, None, None),
    ],
)
def test_cache_counts_are_kept_apart(usage: dict[str, Any], read: Any, created: Any) -> None:
    """Tokens read from and written to a provider's cache are extra keys, if it reports them."""
    found = token_usage({"prompt_tokens": 5, "completion_tokens": 1, **usage})
    assert found is not None
    assert (found.get("cache_read_tokens"), found.get("cache_creation_tokens")) == (read, created)
    assert found["total_tokens"] == 6


def test_only_a_counter_of_hits_counts_as_one() -> None:
    """A model whose attributes answer to anything is not taken for a caching one."""

    class Anything:
        def __getattr__(self, name: str) -> int:
            return 7

    assert cache_hits(SimpleNamespace(llm=Anything())) is None
    assert cache_hits(SimpleNamespace(llm=SimpleNamespace(_hits=3))) == 3
    assert cache_hits(SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.5, 0.5),
        (1, 1.0),
        (Decimal("0.5"), 0.5),
        (Fraction(1, 2), 0.5),
        (np.float32(0.5), 0.5),
        (np.int64(1), 1.0),
        (True, None),
        ("0.5", None),
        (None, None),
        (0.5j, None),
        pytest.param(10**400, None, id="huge"),
        (Decimal("sNaN"), None),
    ],
)
def test_a_critics_score_is_any_number(score: Any, expected: float | None) -> None:
    """Other libraries' numbers count too; what no float can be is no score, and harms no other."""
    (found, other) = extract.critic_scores([{"score": score}, {"score": 0.25}], [])
    assert (found, other) == (expected, 0.25)
    assert found is None or type(found) is float


def test_private_keys_leave_messages_otherwise_as_they_are() -> None:
    """Messages keep their content by reference; only the host's own keys are left out."""
    blocks = [{"type": "text", "text": "hi"}]
    plain = {"role": "user", "content": blocks}
    private = {"role": "tool", "content": "x", "_step_id": 3}
    found = extract.messages({"messages": [plain, private, "odd"]})
    assert found == [plain, {"role": "tool", "content": "x"}, "odd"]
    assert found[0] is plain
    assert private["_step_id"] == 3
    assert extract.messages({"prepared": "text"}) == "text"


def test_a_property_that_raises_is_a_missing_value() -> None:
    """Agents are other people's classes."""

    class Odd:
        @property
        def name(self) -> str:
            raise RuntimeError

        llm = SimpleNamespace(model=12, model_name="m")

    assert extract.agent_name(Odd()) == "Odd"
    assert extract.model_name(Odd()) is None


def test_metadata_of_a_bare_engine_has_no_empty_values() -> None:
    """An engine of which nothing is known leaves the task and the agent's class."""
    metadata = extract.run_metadata(SimpleNamespace(agent=SimpleNamespace()), "do it")
    metadata.pop("qitos_version", None)
    assert metadata == {"agent_name": "SimpleNamespace", "task": "do it"}


@pytest.mark.parametrize(
    ("result", "seen", "error"),
    [
        ({"status": "success", "output": 4}, 4, None),
        ({"status": "success", "output": {"status": "ok"}}, {"status": "ok"}, None),
        ({"status": "error", "error": "no"}, {"error": "no"}, "c: no"),
        ({"status": "timed_out", "error": "slow"}, {"error": "slow"}, "c: slow"),
        (
            {"status": "skipped", "output": {"status": "denied", "message": "rule"}},
            {"status": "denied", "message": "rule"},
            "c: rule",
        ),
        ({"status": "error"}, {"error": None}, "c: error"),
    ],
)
def test_a_tool_result_is_what_the_agent_saw(result: Any, seen: Any, error: Any) -> None:
    """Output, reason of failure and circumstances of a tool call, of every status."""
    action = SimpleNamespace(metadata={"error_category": "c"}, attempts=2, **result)
    output, why, details = extract.tool_result(action)
    assert (output, why) == (seen, error)
    assert details["attempts"] == 2
    assert details["status"] == result["status"]


def test_a_tool_result_of_another_shape_is_plain_output() -> None:
    """What a custom executor returns is the output."""
    assert extract.tool_result([1, 2]) == ([1, 2], None, {})


def test_mcp_tools_are_known_by_their_function() -> None:
    """A tool bridged from an MCP server is recognised by its function's module and closure."""

    def bridged(server: Any) -> Any:
        def call(**args: Any) -> Any:
            return server, args

        call.__module__ = "qitos.mcp.bridge"
        return SimpleNamespace(func=call)

    assert extract.mcp_server(bridged(SimpleNamespace(name="files"))) == "files"
    assert extract.mcp_server(bridged(object())) == "object"
    assert extract.mcp_server(SimpleNamespace(func=len)) is None
    assert extract.mcp_server(None) is None


@pytest.mark.parametrize(
    ("reason", "failure", "status"),
    [
        ("final", None, "ok"),
        ("budget_steps", None, "ok"),
        (None, None, "ok"),
        ("unrecoverable_error", ValueError("x"), "error"),
        ("unrecoverable_error", None, "error"),
        ("context_overflow", None, "error"),
        ("env_capability_mismatch", None, "error"),
        ("cancelled_immediate", None, "interrupted"),
        ("cancelled_after_step", None, "interrupted"),
        ("interrupt", None, "interrupted"),
    ],
)
def test_the_status_follows_the_stop_reason(reason: Any, failure: Any, status: str) -> None:
    """Unrecoverable stops are errors, cancelled ones interruptions, all others fine."""
    outcome = outcome_of(None, {}, reason, failure=failure)
    assert outcome["status"] == status
    assert outcome["success"] is (reason == "final")
    assert ("error" in outcome) is (status != "ok")


def test_an_exception_without_text_is_called_by_its_type() -> None:
    """Neither an empty text nor a `__str__` that raises makes an empty error."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert in_words(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert in_words(Mute()) == "Mute"
    assert outcome_of(None, {}, error=Mute())["error"] == "Mute"
    assert is_interrupt(SystemExit())
    assert not is_interrupt(Mute())


def test_a_run_whose_stop_reason_is_a_failure_has_failed_in_mlflow() -> None:
    """Bridge and MLflow plugin agree on what each stop reason means."""
    for reason in ERROR_STOPS:
        assert outcome_of(None, {}, reason)["status"] == "error"
        assert OpenTrace.status({"stop_reason": reason}, None) == "FAILED"


def test_the_hosts_own_reason_wins_over_the_exceptions() -> None:
    """A state that says why it stopped is believed, also when an exception left the run."""
    state = SimpleNamespace(stop_reason="critic_stop", final_result=None)
    assert outcome_of(state, {}, error=ValueError("x"))["stop_reason"] == "critic_stop"


def test_issues_are_one_text() -> None:
    """What was wrong with a task is joined; nothing wrong is None."""
    assert issues_of({"issues": [{"message": "a"}, {"message": "b"}, "odd"]}) == "a; b"
    assert issues_of({}) is None
