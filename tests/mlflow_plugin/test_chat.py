"""Model calls of every provider become one conversation that MLflow's page can show."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow.mlflow_plugin.chat import (
    last_text,
    request_messages,
    response_choice,
    tool_definitions,
)

CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("hi", [{"role": "user", "content": "hi"}]),
        (None, []),
        ([{"role": "system", "content": "s"}], [{"role": "system", "content": "s"}]),
        ({"messages": [{"role": "user", "content": "u"}]}, [{"role": "user", "content": "u"}]),
        (
            {"system": "s", "messages": [{"role": "user", "content": "u"}]},
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        ),
        ([{"role": "human", "content": "u"}], [{"role": "user", "content": "u"}]),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}],
            [{"role": "user", "content": "a\nb"}],
        ),
        # OpenAI: calls and results
        (
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": {"sum": 2}},
            ],
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": '{"sum":2}', "tool_call_id": "c1"},
            ],
        ),
        # Anthropic: calls and results are blocks
        (
            [
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "let me"},
                        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "2"}],
                },
            ],
            [
                {"role": "assistant", "content": "let me", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ],
        ),
        # OpenAI Responses: calls and results are items
        (
            [
                {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a":1}'},
                {"type": "function_call_output", "call_id": "c1", "output": "2"},
            ],
            [
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": "2"},
            ],
        ),
        # Gemini: parts
        (
            [{"role": "model", "parts": [{"text": "t"}]}],
            [{"role": "assistant", "content": "t"}],
        ),
    ],
)
def test_requests_of_every_provider_are_read(content: Any, messages: list[dict[str, Any]]) -> None:
    """Roles, texts, tool calls and tool results arrive in OpenAI's form."""
    assert request_messages(content) == messages


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
        {"type": "input_image", "image_url": "https://x/y.png"},
        {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
    ],
)
def test_images_are_references(block: dict[str, Any]) -> None:
    """An image stays where it is; its address is shown."""
    (message,) = request_messages([{"role": "user", "content": [{"text": "see"}, block]}])
    assert message["content"] == [
        {"type": "text", "text": "see"},
        {"type": "image_url", "image_url": {"url": "https://x/y.png"}},
    ]


def test_large_inlined_images_become_a_note() -> None:
    """A photo inlined as base64 does not fill the trace; a thumbnail is shown."""
    source = {"type": "base64", "media_type": "image/png", "data": "A" * 50_000}
    (message,) = request_messages(
        [{"role": "user", "content": [{"type": "image", "source": source}]}]
    )
    assert message["content"] == "[image: image/png, 50022 characters]"
    small = {"type": "image", "source": {**source, "data": "AAAA"}}
    (message,) = request_messages([{"role": "user", "content": [small]}])
    assert message["content"][0]["image_url"]["url"] == "data:image/png;base64,AAAA"


def test_answers_become_a_choice() -> None:
    """Text, tool calls and finish reason of an answer are one OpenAI choice."""
    answer = response_choice(
        "4", {"finish_reason": "stop", "model_name": "m", "metadata": {"id": "r"}}
    )
    assert answer == {
        "id": "r",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}
        ],
    }
    call = {"id": "c1", "name": "add", "arguments": {"a": 1}}
    (choice,) = response_choice("", {"tool_calls": [call]})["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert choice["finish_reason"] == "tool_calls"
    assert response_choice(None, {})["choices"][0]["message"]["content"] == ""


def test_mlflow_reads_the_messages() -> None:
    """MLflow's own chat types take what comes out."""
    from mlflow.types import chat as mlflow_chat
    from mlflow.types.chat import ChatMessage, ChatTool

    image = {"type": "image_url", "image_url": "https://x"}
    # MLflow 3.9 has no type for thoughts; its page shows them as they are.
    knows_thoughts = any("Reasoning" in name for name in vars(mlflow_chat))
    thoughts = [{"type": "thinking", "thinking": "hm"}] if knows_thoughts else []
    conversation = [
        {"role": "user", "content": [{"text": "a"}, image]},
        {"role": "assistant", "content": thoughts, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "x"}]},
    ]
    for message in request_messages(conversation):
        ChatMessage.model_validate(message)
    schema = {"type": "object", "properties": {}}
    for tool in tool_definitions(["search", {"name": "add", "input_schema": schema}]) or []:
        ChatTool.model_validate(tool)


def test_tools_are_defined() -> None:
    """Definitions of any provider, or mere names, become OpenAI's definitions."""
    schema = {"type": "object", "properties": {}}
    given_tools = [
        "search",
        {"type": "function", "function": {"name": "add", "description": "d", "parameters": schema}},
        {"name": "sub", "input_schema": schema},
        5,
    ]
    assert tool_definitions(given_tools) == [
        {"type": "function", "function": {"name": "search"}},
        {"type": "function", "function": {"name": "add", "parameters": schema, "description": "d"}},
        {"type": "function", "function": {"name": "sub", "parameters": schema}},
    ]
    assert tool_definitions(None) is None


def test_the_last_text_is_found() -> None:
    """The preview of a trace is what the model said last."""
    messages = request_messages(["q", {"role": "assistant", "content": "a"}, "q2"])
    assert last_text(messages, "assistant") == "a"
    assert last_text(messages, "user") == "q2"
    assert last_text([], "user") == ""


_keys = st.sampled_from(
    ["role", "content", "type", "text", "parts", "tool_calls", "function", "image_url", "source",
     "input", "messages", "name", "arguments", "call_id", "functionCall", "reasoning"]
)  # fmt: skip
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5)
    | st.sampled_from(["text", "image", "tool_use", "tool_result", "function_call", "thinking"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@given(_values, st.dictionaries(_keys, _values, max_size=3))
def test_any_shape_is_shown(content: Any, response: dict[str, Any]) -> None:
    """No shape is an error: what is not understood is shown as text."""
    for message in request_messages(content):
        assert isinstance(message["role"], str)
        assert isinstance(message["content"], (str, list, type(None)))
    assert response_choice(content, response)["choices"] is not None
    tool_definitions(content)
