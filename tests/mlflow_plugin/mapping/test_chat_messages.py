"""Model calls of every provider become one conversation that MLflow's page can show."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qitos_mlflow.mlflow_plugin.mapping import span_attributes
from qitos_mlflow.mlflow_plugin.mapping.chat_messages import (
    request,
    response,
    tool_definitions,
)


def request_messages(content: Any) -> list[dict[str, Any]]:
    """The messages of a request."""
    return request(content)[0]


def answered(output: Any, **summary: Any) -> dict[str, Any]:
    """The message of an answer's one choice."""
    (choice,) = response(output, summary)["choices"]
    message: dict[str, Any] = choice["message"]
    return message


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
    assert message["content"] == "[image/png, 50022 characters]"
    small = {"type": "image", "source": {**source, "data": "AAAA"}}
    (message,) = request_messages([{"role": "user", "content": [small]}])
    assert message["content"][0]["image_url"]["url"] == "data:image/png;base64,AAAA"


def test_answers_become_a_choice() -> None:
    """Text, tool calls and finish reason of an answer are one OpenAI choice."""
    answer = response("4", {"finish_reason": "stop", "model_name": "m", "metadata": {"id": "r"}})
    assert answer == {
        "id": "r",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": "4"}, "finish_reason": "stop"}
        ],
    }
    call = {"id": "c1", "name": "add", "arguments": {"a": 1}}
    (choice,) = response("", {"tool_calls": [call]})["choices"]
    assert choice["message"] == {"role": "assistant", "content": None, "tool_calls": [CALL]}
    assert choice["finish_reason"] == "tool_calls"
    assert response(None, {})["choices"][0]["message"]["content"] == ""


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
    schema = {"type": "object", "properties": {"a": {"type": ["string", "null"]}}}
    for tool in tool_definitions(["search", {"name": "add", "input_schema": schema}]) or []:
        ChatTool.model_validate(tool)


def test_tools_are_defined() -> None:
    """Definitions of any provider, or mere names, become OpenAI's definitions."""
    schema = {"type": "object", "properties": {}}
    given_tools = [
        "search",
        {"type": "function", "function": {"name": "add", "description": "d", "parameters": schema}},
        {"name": "sub", "input_schema": schema},
        {"type": "custom", "custom": {"name": "grep", "description": "d"}},
        5,
    ]
    assert tool_definitions(given_tools) == [
        {"type": "function", "function": {"name": "search"}},
        {"type": "function", "function": {"name": "add", "parameters": schema, "description": "d"}},
        {"type": "function", "function": {"name": "sub", "parameters": schema}},
        {"type": "function", "function": {"name": "grep", "description": "d"}},
    ]
    assert tool_definitions(None) is None


def test_a_parameter_of_several_types_hides_no_tool() -> None:
    """A page that takes one type as text shows a tool of OpenAI's strict mode, too."""
    several = {"type": ["string", "null"], "description": "d"}
    schema = {"type": "object", "properties": {"a": several, "b": {"type": "integer"}, "c": True}}
    (tool,) = tool_definitions([{"name": "add", "parameters": schema}]) or []
    assert tool["function"]["parameters"]["properties"] == {
        "a": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "d"},
        "b": {"type": "integer"},
        "c": True,
    }
    assert several["type"] == ["string", "null"]


def test_the_last_text_is_found() -> None:
    """The preview of a trace is what the model said last."""
    choices = [{"text": "a"}, {"message": {"content": "b"}}, {"text": ""}]
    for output, text in (({"choices": choices}, "b"), (None, None)):
        answer = {"mlflow.spanOutputs": response(output, {})}
        assert span_attributes.answer_preview(answer) == text


# -- answers as providers give them -------------------------------------------------------------

USE = {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}
ANSWER = {"role": "assistant", "content": "let me", "tool_calls": [CALL]}
CUSTOM = {"id": "c1", "type": "custom", "custom": {"name": "sh", "input": "ls"}}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([{"type": "text", "text": "let me"}, USE], ANSWER),
        (
            {"type": "message", "role": "assistant", "content": [{"text": "let me"}, USE]},
            ANSWER,
        ),
        (
            {
                "candidates": [
                    {
                        "content": {
                            "role": "model",
                            "parts": [
                                {"text": "hm", "thought": True},
                                {"text": "let me"},
                                {"functionCall": {"id": "c1", "name": "add", "args": {"a": 1}}},
                            ],
                        },
                        "finishReason": "STOP",
                    }
                ]
            },
            {**ANSWER, "reasoning": "hm"},
        ),
        (
            {
                "object": "response",
                "output": [
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                    {
                        "type": "message",
                        "role": "assistant",
                        "content": [{"type": "output_text", "text": "let me", "annotations": []}],
                    },
                    {
                        "type": "function_call",
                        "call_id": "c1",
                        "name": "add",
                        "arguments": '{"a":1}',
                    },
                ],
            },
            {**ANSWER, "reasoning": "hm"},
        ),
        ({"content": "let me", "tool_calls": [CALL]}, ANSWER),
        ({"choices": [{"index": 0, "message": {**ANSWER, "refusal": None}}]}, ANSWER),
        (
            {"choices": [{"message": {**ANSWER, "reasoning_content": "hm"}}]},
            {**ANSWER, "reasoning": "hm"},
        ),
        ({"message": ANSWER, "done": True}, ANSWER),
        (
            {"role": "assistant", "content": None, "tool_calls": [CUSTOM]},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {
                        "id": "c1",
                        "type": "function",
                        "function": {"name": "sh", "arguments": "ls"},
                    }
                ],
            },
        ),
        (
            {
                "role": "assistant",
                "content": None,
                "function_call": {"name": "add", "arguments": "{}"},
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "", "type": "function", "function": {"name": "add", "arguments": "{}"}}
                ],
            },
        ),
        (
            {"role": "assistant", "content": None, "refusal": "no"},
            {"role": "assistant", "content": "no"},
        ),
        ({"sum": 2}, {"role": "assistant", "content": '{"sum":2}'}),
    ],
)
def test_answers_of_every_provider_are_read(output: Any, message: dict[str, Any]) -> None:
    """An answer as the provider's client returns it is a message with text, thoughts and calls."""
    assert answered(output) == message


def test_what_else_an_answer_says_is_beside_it() -> None:
    """Id, model, reason to stop and usage of a provider's answer have their place."""
    answer = response(
        {
            "id": "r",
            "type": "message",
            "role": "assistant",
            "model": "m",
            "content": [USE],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 3},
        },
        {},
    )
    assert (answer["id"], answer["model"]) == ("r", "m")
    assert answer["usage"] == {"input_tokens": 3}
    assert answer["choices"][0]["finish_reason"] == "tool_use"
    gemini = {"candidates": [{"content": {"parts": [{"text": "a"}]}, "finishReason": "STOP"}] * 2}
    reasons = [choice["finish_reason"] for choice in response(gemini, {})["choices"]]
    assert reasons == ["STOP", "STOP"]


def test_calls_that_the_host_lists_too_are_there_once() -> None:
    """The host's list of tool calls is the message's own, in another spelling."""
    listed = [{"id": "c1", "name": "add", "arguments": {"a": 1}}]
    assert answered({"content": None, "tool_calls": [CALL]}, tool_calls=listed)["tool_calls"] == [
        CALL
    ]
    without_id = {"functionCall": {"name": "add", "args": {"a": 1}}}
    assert answered([without_id], tool_calls=listed)["tool_calls"] == [CALL]
    assert len(answered([USE], tool_calls=[{"id": "c2", "name": "sub"}])["tool_calls"]) == 2
    twice = [{"name": "add", "arguments": {"a": 1}}] * 2  # Alike, and two all the same.
    assert len(answered("hi", tool_calls=twice)["tool_calls"]) == 2


@pytest.mark.parametrize(
    ("content", "first"),
    [
        (
            {"contents": [], "system_instruction": {"parts": [{"text": "s"}]}},
            {"role": "system", "content": "s"},
        ),
        (
            {"contents": [], "config": {"system_instruction": "s"}},
            {"role": "system", "content": "s"},
        ),
        ({"input": "u", "instructions": "s"}, {"role": "system", "content": "s"}),
        (
            [{"parts": [{"function_response": {"name": "f", "response": {"a": 1}}}]}],
            {"role": "tool", "tool_call_id": "f", "content": '{"a":1}', "name": "f"},
        ),
        (
            [
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "c1",
                            "content": [{"type": "text", "text": ""}],
                        }
                    ],
                }
            ],
            {"role": "tool", "tool_call_id": "c1", "content": ""},
        ),
        (
            [{"role": "user", "content": "see", "images": ["iVBORw0K"]}],
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "see"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0K"}},
                ],
            },
        ),
        (
            [{"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}],
            {"role": "assistant", "content": None, "reasoning": "hm"},
        ),
        ([{"role": "critic", "content": "c"}],
         {"role": "user", "content": "c", "original_role": "critic"}),
    ],
)  # fmt: skip
def test_what_a_request_says_beside_its_messages(content: Any, first: dict[str, Any]) -> None:
    """Instructions, tool results, pictures and thoughts are found where each provider has them."""
    assert request_messages(content)[0] == first


def test_parameters_of_a_request_are_inputs() -> None:
    """What a request says beside its messages is among the span's inputs."""
    messages, rest = request({"messages": ["u"], "temperature": 0.1, "config": {"top_k": 2}})
    assert len(messages) == 1
    assert rest == {"temperature": 0.1, "config": {"top_k": 2}}


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image_url", "image_url": {"url": "[image/png, 400022 characters]"}},
        {
            "type": "image",
            "source": {
                "type": "base64",
                "media_type": "image/png",
                "data": "[image/png, 400022 characters]",
            },
        },
        {"inlineData": {"mimeType": "image/png", "data": "[image/png, 400022 characters]"}},
        {"type": "image", "mimeType": "image/png", "data": "[image/png, 400022 characters]"},
    ],
)
def test_the_note_of_a_large_picture_is_shown(block: dict[str, Any]) -> None:
    """What `normalize` left of a picture is text, however the picture was inlined."""
    (message,) = request_messages([{"role": "user", "content": [{"text": "see"}, block]}])
    text = message["content"]
    shown = text if isinstance(text, str) else "\n".join(part["text"] for part in text)
    assert shown.startswith("see\n[image/png, 400022 characters]")


def test_the_preview_is_what_was_said_not_thought() -> None:
    """The trace's list shows the answer's text, of any provider's answer, without thoughts."""
    for output in (
        [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "It rains."}],
        {"candidates": [{"content": {"parts": [{"text": "hm", "thought": True},
                                               {"text": "It rains."}]}}]},
        {"choices": [{"message": {"content": "It rains.", "reasoning_content": "hm"}}]},
    ):  # fmt: skip
        data = {"output_content": output}
        found = span_attributes.of_span({"type": "generation", "data": data})
        assert span_attributes.answer_preview(found) == "It rains."


# -- any shape ---------------------------------------------------------------------------------

_keys = st.sampled_from(
    ["role", "content", "type", "text", "parts", "tool_calls", "function", "image_url", "source",
     "input", "messages", "name", "arguments", "call_id", "functionCall", "reasoning", "choices",
     "candidates", "output", "message", "contents", "system_instruction", "instructions", "config",
     "function_call", "function_response", "refusal", "images", "custom", "thinking", "thought",
     "id", "tool_use_id", "data", "url", "path", "media_type", "inlineData", "index", "system",
     "finish_reason", "stop_reason", "model", "metadata", "response", "input_audio", "summary"]
)  # fmt: skip
_words = st.integers(0, 10**6).map(lambda number: f"w{number:06}")
_types = st.sampled_from(
    ["text", "image", "image_url", "tool_use", "tool_result", "function_call", "thinking", "user",
     "function_call_output", "message", "reasoning", "custom", "refusal", "assistant", "tool"]
)  # fmt: skip
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.just("") | _words | _types,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=5),
    max_leaves=12,
)


def words(value: Any) -> set[str]:
    """The words that a shape holds at its leaves."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(words, value))
    return {value} if isinstance(value, str) and value[:1] == "w" and value[1:].isdigit() else set()


def shown_by_the_page(message: dict[str, Any]) -> bool:
    """Whether MLflow's page takes a message as part of a conversation (3.17)."""
    content = message["content"]
    known = content is None or isinstance(content, str)
    return (
        message["role"] in ("system", "user", "assistant", "tool")
        and message.get("type") != "reasoning"
        and isinstance(message.get("reasoning", ""), str)
        and (known or all(part["type"] in ("text", "image_url") for part in content))
        and all(
            isinstance(text, str)
            for call in message.get("tool_calls", ())
            for text in (call["id"], call["function"]["name"], call["function"]["arguments"])
        )
    )


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(_values, _values, st.dictionaries(_keys, _values, max_size=3))
@example(None, {"text": None, "type": "thinking", "thought": "w000000"}, {})
def test_nothing_of_any_shape_is_lost(content: Any, output: Any, summary: dict[str, Any]) -> None:
    """Each word of a model call is somewhere in its span, in messages that the page can show."""
    data = {"input_content": content, "output_content": output, "model_response": summary}
    found = span_attributes.of_span({"type": "generation", "data": data})
    text = orjson.dumps(found).decode()
    missing = {word for word in words([content, output, summary]) if word not in text}
    assert not missing, found
    messages = list(found.get("mlflow.spanInputs", {}).get("messages", []))
    messages += [one["message"] for one in found.get("mlflow.spanOutputs", {}).get("choices", [])]
    assert all(shown_by_the_page(message) for message in messages), messages
    tool_definitions(content)
