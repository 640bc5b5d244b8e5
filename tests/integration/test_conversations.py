"""Model calls as providers' clients make them, read back from MLflow as conversations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from mlflow import MlflowClient
from mlflow.entities import Span

from qitos_mlflow import tracing
from qitos_mlflow.tracing import SpanType, create_trace
from tests.integration.logged import found_in, logged
from tests.integration.server import MlflowServer

FLUSH_S = 90.0
PICTURE = "iVBORw0KGgo" + "A" * 400_000
DATA_URL = f"data:image/png;base64,{PICTURE}"


def call(server: MlflowServer, experiment_name: str, **data: Any) -> Span:
    """Log one model call, and read it back."""
    with logged(server.uri, experiment_name=experiment_name) as processor:
        with create_trace("call") as trace:
            span = tracing.GenerationSpanData(model="m", **data)
            trace.create_span(SpanType.GENERATION, span).start().finish()
        assert processor.force_flush(FLUSH_S) is True
    client: MlflowClient = server.client
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_traces(locations=[experiment.experiment_id])
    (generation,) = found.search_spans(span_type="CHAT_MODEL")
    return generation


def test_a_chat_with_many_screenshots(
    mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """16 MB of pictures cost the chat not one character; each is stored once, as an attachment."""
    screenshots: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": DATA_URL}},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}},
    ]
    small = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    messages = [
        {"role": "system", "content": "You look at screens. " * 5_000},
        *[{"role": "user", "content": [{"text": "Now?"}, *screenshots]}] * 20,
        {"role": "user", "content": [small]},
    ]
    span = call(mlflow_server, experiment_name, input_content=messages, output_content="Done.")
    system, *asked, last = span.inputs["messages"]
    assert system == messages[0]
    shown = {part["image_url"]["url"] for message in asked for part in message["content"][1:]}
    assert len(shown) == 1
    assert [message["content"][0]["text"] for message in asked] == ["Now?"] * 20
    (other,) = [part["image_url"]["url"] for part in last["content"]]
    assert {url.partition("://")[0] for url in (*shown, other)} == {"mlflow-attachment"}
    assert found_in([mlflow_server.directory, tmp_path], "A" * 33_000) == []
    files = [path for path in mlflow_server.directory.rglob("attachments/*") if path.is_file()]
    of_trace = [path for path in files if span.trace_id in str(path)]
    assert sorted(path.stat().st_size for path in of_trace) == [8, len(PICTURE) * 3 // 4]


def test_tools_come_with_their_schemas(mlflow_server: MlflowServer, experiment_name: str) -> None:
    """The schemas of a model's tools are stored in the form that MLflow's own tools use."""
    schema = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tool = {"name": "weather", "description": "Look outside.", "parameters": schema}
    request = {"messages": [{"role": "user", "content": "Rain?"}], "temperature": 0.5}
    for number, tools in enumerate(
        (
            [{"type": "function", "function": tool}],
            [{"name": "weather", "description": "Look outside.", "input_schema": schema}],
            [{"functionDeclarations": [tool]}],
        )
    ):
        span = call(
            mlflow_server, f"{experiment_name} {number}", input_content={**request, "tools": tools}
        )
        assert span.attributes["mlflow.chat.tools"] == [{"type": "function", "function": tool}]
        assert span.inputs["temperature"] == 0.5


@pytest.mark.parametrize(
    "answer",
    [
        [{"type": "text", "text": "Wait."},
         {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Oslo"}}],
        {"candidates": [{"content": {"role": "model", "parts": [
            {"text": "Wait."},
            {"functionCall": {"id": "c1", "name": "weather", "args": {"city": "Oslo"}}}]}}]},
        {"object": "response", "output": [
            {"type": "message", "role": "assistant",
             "content": [{"type": "output_text", "text": "Wait."}]},
            {"type": "function_call", "call_id": "c1", "name": "weather",
             "arguments": '{"city":"Oslo"}'}]},
    ],
    ids=["anthropic", "gemini", "responses"],
)  # fmt: skip
def test_native_answers_are_tool_calls(
    answer: Any, mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """Whatever provider answered, MLflow has text and tool call in the same places."""
    span = call(mlflow_server, experiment_name, output_content=answer)
    (choice,) = span.outputs["choices"]
    assert choice["message"]["content"] == "Wait."
    (made,) = choice["message"]["tool_calls"]
    assert (made["id"], made["function"]["name"]) == ("c1", "weather")
    assert orjson.loads(made["function"]["arguments"]) == {"city": "Oslo"}
    client = mlflow_server.client
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_traces(locations=[experiment.experiment_id])
    assert found.info.response_preview == "Wait."
