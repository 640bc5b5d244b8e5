"""What must not leave the process: credentials ever, and content where it is not wanted."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from qitos.engine.critic import Critic

from qitos_mlflow import tracing
from qitos_mlflow.tracing import SpanType, TracingMode, create_trace
from tests.bridge.agents import Model, ModelAgent, answer, toolbox
from tests.integration.logged import found_in, logged, only_run, runs_of
from tests.integration.server import MlflowServer, free_port


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture(autouse=True)
def _nothing_left_to_deliver(tmp_path: Path) -> Iterator[None]:
    """Take away what stays in a spool, or the tests' own process would report it at its end."""
    yield
    shutil.rmtree(tmp_path)


class Judge(Critic):
    """Says `word` in its reason and its details."""

    def __init__(self, word: str) -> None:
        self.word = word

    def evaluate(self, state: Any, decision: Any, results: list[Any]) -> dict[str, Any]:
        return {
            "action": "continue",
            "reason": self.word,
            "score": 0.5,
            "details": {"w": self.word},
        }


def run_agent(word: str) -> None:
    """Run an agent whose every input, output and error holds `word`."""

    def fetch(what: str) -> Any:
        """Fetch."""
        return {"fetched": [what, word], word: what}

    def stumble(what: str) -> None:
        """Raise."""
        raise ValueError(f"cannot {what}: {word}")

    agent = ModelAgent(
        Model(
            answer(f"Thought: {word}\nAction: fetch(what='{word}')", usage={"prompt_tokens": 7}),
            answer(f"Thought: {word}\nAction: stumble(what='{word}')"),
            answer(f"Thought: {word}\nFinal Answer: it is {word}"),
        ),
        toolbox(fetch=fetch, stumble=stumble),
    )
    agent.run(f"Find {word}", critics=[Judge(word)], render=False)


def trace_by_hand(word: str) -> None:
    """A trace that fails, with `word` wherever its maker may put it."""
    metadata = {"question": word, "nested": {"deep": [word]}}
    with pytest.raises(OSError, match=word), create_trace("by hand", metadata=metadata) as trace:
        for data in (
            tracing.CustomSpanData(name="custom", data={"value": word, word: 1}),
            tracing.ToolSpanData(tool_name="ask", tool_args={"q": word}, output_content=word),
            tracing.MCPSpanData(server_name="s", tool_name="t", tool_args=[word]),
            tracing.StepSpanData(0, observation={"o": word}, decision=word),
            tracing.GenerationSpanData(model="m", input_content=[{"content": word}]),
            tracing.HandoffSpanData(from_agent="a", to_agent="b", output_content=word),
            tracing.ReduceSpanData(output_content=word),
        ):
            span = trace.create_span(SpanType(data.type), data).start()
            span.set_output({"out": word})
            span.finish(f"failed over {word}")
        trace.metadata["final_result"] = word
        raise OSError(word)


@contextmanager
def both_ways(
    server: MlflowServer, experiment_name: str, spool: Path, **options: Any
) -> Iterator[None]:
    """Log to the server, and the same once more into the spool, to stay there."""
    options["experiment_name"] = experiment_name
    with (
        logged(None, offline=True, spool_dir=spool, **options),
        logged(server.uri, **options) as processor,
    ):
        yield
        assert processor.force_flush() is True


def everywhere(server: MlflowServer, spool: Path, text: str) -> list[Path]:
    """The files of the server, its artifacts included, and of the spool that have `text`."""
    return found_in([server.directory, spool], text)


# -- content ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["capture_content", "without data"])
def test_without_content_there_is_none_anywhere(
    way: str,
    mlflow_server: MlflowServer,
    client: MlflowClient,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """Metrics, tree and timing arrive; inputs, outputs, errors and files do not, here or there."""
    word = f"word-{uuid.uuid4().hex}"
    options = {"capture_content": False} if way == "capture_content" else {}
    if way == "without data":
        tracing.set_tracing_mode(TracingMode.ENABLED_WITHOUT_DATA)
    try:
        with both_ways(mlflow_server, experiment_name, tmp_path / "kept", **options):
            run_agent(word)
        with both_ways(mlflow_server, f"{experiment_name} 2", tmp_path / "kept", **options):
            trace_by_hand(word)
    finally:
        tracing.set_tracing_mode(TracingMode.ENABLED)

    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert run.points("step/number") == [(0, 0), (1, 1), (2, 2)]
    assert run.points("generation/prompt_tokens") == [(0, 7)]
    assert run.metrics["critic/avg_score"] == 0.5
    assert (run.metrics["tool/fetch/calls"], run.metrics["tool/stumble/errors"]) == (1, 1)
    assert run.params["agent_name"] == "asker"
    experiment = client.get_experiment_by_name(experiment_name)
    (found,) = client.search_traces(locations=[experiment.experiment_id])
    names = [span.name for span in found.data.spans]
    assert len(names) == int(run.tags["qitos.spans.recorded"])
    assert {"asker", "fetch", "stumble"} <= set(names)
    assert all(span.end_time_ns >= span.start_time_ns for span in found.data.spans)
    failed = only_run(client, f"{experiment_name} 2")
    assert (failed.status, failed.metrics["total_tool_calls"]) == ("FAILED", 2)
    assert failed.tags["qitos.error"].startswith("OSError")
    assert everywhere(mlflow_server, tmp_path / "kept", experiment_name)
    assert everywhere(mlflow_server, tmp_path / "kept", word) == []


def test_with_content_it_is_there(
    mlflow_server: MlflowServer, client: MlflowClient, experiment_name: str, tmp_path: Path
) -> None:
    """What the test above looks for in vain is found by it where content is wanted."""
    word = f"word-{uuid.uuid4().hex}"
    with both_ways(mlflow_server, experiment_name, tmp_path / "kept"):
        run_agent(word)
    found = {path.suffix for path in everywhere(mlflow_server, tmp_path / "kept", word)}
    assert {".db", ".seg", ".jsonl"} <= found


# -- credentials -----------------------------------------------------------------------------


def secrets() -> dict[str, str]:
    """Credentials of several shapes, new ones each time, by the way each is written down."""
    number = uuid.uuid4().hex

    return {
        "api_key": f"plain{number}a",
        "by its shape": f"sk-{number}b{number}",
        "password": f"hunter{number}c",
        "in a url": f"https://user:url{number}d@example.test/path",
        "in a text": f"API_KEY=text{number}e",
        "in a header": f"Authorization: Bearer head{number}f",
        "github": f"ghp_{number}gggg",
    }


def bare(secrets: dict[str, str]) -> list[str]:
    """What of them must not be found anywhere."""
    number = secrets["api_key"][len("plain") : -1]
    return [
        secrets["api_key"],
        secrets["by its shape"],
        secrets["password"],
        f"url{number}d",
        f"text{number}e",
        f"head{number}f",
        secrets["github"],
    ]


def test_credentials_reach_neither_disk_nor_server(
    mlflow_server: MlflowServer, client: MlflowClient, experiment_name: str, tmp_path: Path
) -> None:
    """Params, tags, inputs, outputs, errors, stacks and files are clean, in the spool and there."""
    given = secrets()
    keyed = {"api_key": given["api_key"], "password": given["password"]}
    loose = [given[name] for name in given if name not in keyed]

    def leak(text: str) -> Any:
        """Give everything away."""
        raise PermissionError(f"{text} {keyed} {loose}")

    options = {"tags": {**keyed, "note": " ".join(loose)}, "run_name": f"run {loose[0]}"}
    with both_ways(mlflow_server, experiment_name, tmp_path / "kept", **options):
        metadata = {**keyed, "loose": loose, "config": {"deep": {**keyed, "env": loose}}}
        with pytest.raises(PermissionError), create_trace("by hand", metadata=metadata) as trace:
            for data in (
                tracing.ToolSpanData(tool_name="call", tool_args=keyed, output_content=loose),
                tracing.GenerationSpanData(
                    model="m",
                    input_content=[{"role": "user", "content": text} for text in loose],
                    output_content={"headers": keyed},
                ),
                tracing.CustomSpanData(name="custom", data={"env": {**keyed, "all": loose}}),
            ):
                span = trace.create_span(SpanType(data.type), data).start()
                span.set_output([keyed, *loose])
                span.finish(f"failed with {loose} and {keyed}")
            leak("no")
        for text in loose:
            script = [answer(f"Thought: {text}\nAction: leak(text='x')"), answer("Final Answer: x")]
            ModelAgent(Model(*script), toolbox(leak=leak)).run(f"use {text}", render=False)
    names = [run.tags["note"] for run in runs_of(client, experiment_name)]
    assert len(names) == 1 + len(loose)
    for secret in bare(given):
        assert everywhere(mlflow_server, tmp_path / "kept", secret) == []


def test_the_servers_password_is_used_and_nowhere_written(
    mlflow_server: MlflowServer,
    client: MlflowClient,
    experiment_name: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """User and password in a tracking URI are in no file and no message, answer or not."""
    caplog.set_level(logging.DEBUG)
    password = f"pw{uuid.uuid4().hex}"
    for port, delivered in ((mlflow_server.port, True), (free_port(), False)):
        uri = f"http://someone:{password}@127.0.0.1:{port}"
        options = {"experiment_name": experiment_name, "flush_timeout_s": 30 if delivered else 0.1}
        with logged(uri, **options) as processor:
            with create_trace("one") as trace:
                trace.create_span(SpanType.STEP, tracing.StepSpanData(0)).start().finish()
            assert processor.force_flush() is delivered
    assert only_run(client, experiment_name).status == "FINISHED"
    assert everywhere(mlflow_server, tmp_path / "spool", password) == []
    printed = capfd.readouterr()
    assert password not in caplog.text + printed.out + printed.err
