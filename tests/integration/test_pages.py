"""What a person sees of real agents: MLflow's pages, in a real browser.

With the environment variable ``IMAGES`` set to a directory, the pictures of the documentation are
written there: ``IMAGES=docs/images pytest tests/integration/test_pages.py``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace

from qitos_mlflow import tracing
from qitos_mlflow.cli._demo_agent import TASKS, run_task
from qitos_mlflow.tracing import SpanType, create_trace
from tests.integration.browser import Browser, Pages
from tests.integration.logged import logged
from tests.integration.server import MlflowServer

pytestmark = pytest.mark.browser

DESK, WEATHER = "desk questions", "weather"
"""The experiments."""
EXPAND = "css=[col-id*='Run Name'] button:has(svg)"
"""The box with a plus before a run with children."""
FLUSH_S = 90.0
WIDE = (1750, 640)
HIGH = (1500, 1200)


@dataclass(frozen=True)
class Shown:
    """What there is to see, and where."""

    pages: Pages
    """Of the desk's experiment."""
    traces: dict[str, Trace]
    """By the task's id; of two the first."""

    def trace(self, task: str) -> str:
        """The page of a task's trace."""
        info = self.traces[task].info
        return Pages(self.pages.server, info.experiment_id).trace(info.trace_id)

    def run(self, task: str, tab: str = "") -> str:
        """The page of a task's run."""
        return self.pages.run(self.traces[task].info.trace_metadata["mlflow.sourceRun"], tab)

    def span(self, task: str, name: str, number: int) -> str:
        """What to click for a span of a trace: the n-th of this name, from 0."""
        spans = [span for span in self.traces[task].data.spans if span.name == name]
        spans.sort(key=lambda span: span.start_time_ns)
        return f"css=[data-testid='timeline-tree-node-{spans[number].span_id}']"


def native_tool_calls() -> None:
    """A trace whose model calls its tool by the provider's own protocol, with a picture."""
    call = {
        "id": "call-1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": "You know the weather."},
        {"role": "user", "content": [{"type": "text", "text": "Is this Oslo?"}, picture]},
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "I look outside.", "signature": "s"}],
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "call-1", "content": "rain, 4 degrees"},
        {"role": "critic", "content": [{"type": "text", "text": "Be brief.", "cache_control": {}}]},
    ]
    data = tracing.GenerationSpanData(
        model="gpt-4o-mini",
        input_content=messages,
        output_content="It rains in **Oslo**.",
        model_response={"provider": "openai"},
        token_usage={"prompt_tokens": 2000, "completion_tokens": 100},
    )
    metadata = {"task": "Is this Oslo?", "task_id": "weather"}
    with create_trace("weather", metadata=metadata) as trace:
        trace.create_span(SpanType.GENERATION, data).start().finish()


PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAoAAAAKCAYAAACNMs+9AAAAFUlEQVR42mNk+M9Qz0AEYBxV"
    "SF+FABJADveWkH6oAAAAAElFTkSuQmCC"
)


@pytest.fixture(scope="module")
def shown(shared_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """The demo's agents on the server."""
    workspace = tmp_path_factory.mktemp("workspace")
    uri, spool = shared_server.uri, workspace / "spool"
    with logged(uri, experiment_name=DESK, spool_dir=spool) as processor:
        for task in TASKS:
            run_task(task)
        assert processor.force_flush(FLUSH_S) is True
    with logged(uri, experiment_name=WEATHER, spool_dir=spool) as processor:
        native_tool_calls()
        assert processor.force_flush(FLUSH_S) is True
    client = MlflowClient(uri)
    experiments = [client.get_experiment_by_name(name).experiment_id for name in (DESK, WEATHER)]
    traces: dict[str, Trace] = {}
    for trace in client.search_traces(locations=experiments, order_by=["timestamp_ms ASC"]):
        traces.setdefault(trace.info.tags["qitos.task_id"], trace)
    return Shown(Pages(uri, experiments[0]), traces)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Where pictures go."""
    given = os.environ.get("IMAGES")
    # Tests work in a directory of their own.
    return Path(__file__).parents[2] / given if given else tmp_path


@pytest.fixture(autouse=True)
def _no_errors(browser: Browser) -> Any:
    """No page has a JavaScript error that it did not catch."""
    before = len(browser.errors)
    yield
    assert browser.errors[before:] == []


def test_the_table_of_runs(browser: Browser, shown: Shown, images: Path) -> None:
    """All runs are there, and their totals are columns to choose."""
    columns = ["total_steps", "total_tool_calls", "total_tokens", "critic/avg_score"]
    text = browser.page_shot(
        shown.pages.runs,
        images / "runs-table.png",
        click=[
            "ago",  # The runs are there: only then their metrics are on the list.
            "css=button:has-text('Columns')",
            *(f'text="{column}"' for column in columns),
            *('text="Dataset" >> nth=-1', 'text="Models" >> nth=-1', "css=h2"),
        ],
        wait_for_text=["hiker", "matching runs"],
        size=WIDE,
    )
    assert {task.agent for task in TASKS} <= set(text.split())
    assert set(columns) <= set(text.split())


def test_the_charts_of_a_run(browser: Browser, shown: Shown, images: Path) -> None:
    """A run's metrics are charts over the agent's steps."""
    text = browser.page_shot(
        shown.run("boiling-water", "model-metrics"),
        images / "run-charts.png",
        wait_for_text=["avg_score", "completion_tokens"],
        size=HIGH,
    )
    assert "tea-taster (critic/score)" in text


def test_the_traces_of_a_run(browser: Browser, shown: Shown, images: Path) -> None:
    """A run's tab Traces has its trace, with task, answer and the critic's average."""
    text = browser.page_shot(
        shown.run("boiling-water", "traces"),
        images / "run-traces.png",
        wait_for_text=["Why is tea not as good", "Reviewer"],
        size=WIDE,
    )
    assert "1 of 1" in text
    assert "0.67" in text


def test_the_table_of_traces(browser: Browser, shown: Shown, images: Path) -> None:
    """Each trace says the task, the answer or why there is none, tokens and state."""
    text = browser.page_shot(
        shown.pages.traces,
        images / "traces-list.png",
        wait_for_text=["How many honey bees", "Error", "Reviewer"],
        size=WIDE,
    )
    for task in TASKS:
        assert task.objective[:30] in text
    for answer in (
        "About 8.3 minutes.",
        "stopped: budget_steps",
        "RuntimeError: scripted-large is out",
    ):
        assert answer in text
    assert str(shown.traces["sunlight"].info.token_usage["total_tokens"]) in text


def test_the_tree_and_a_tool_call(browser: Browser, shown: Shown, images: Path) -> None:
    """A trace shows its tree, and of a tool call the arguments and the result."""
    text = browser.page_shot(
        shown.trace("moonlight"),
        images / "trace-tree.png",
        click=[shown.span("moonlight", "calculate", 0)],
        wait_for_text=["384400000/299792458", "1.28222"],
    )
    for name in ("astronomer", "step 2", "decide", "scripted-large", "act", "search_almanac"):
        assert name in text


def test_the_conversation(browser: Browser, shown: Shown, images: Path) -> None:
    """A model call is a chat with roles, its tools, its model and its tokens."""
    text = browser.page_shot(
        shown.trace("moonlight"),
        images / "trace-chat.png",
        click=[shown.span("moonlight", "scripted-large", -1)],
        wait_for_text=["System", "User", "Assistant"],
        size=HIGH,
    )
    assert "Tools (3)" in text.replace("\n", " ")
    assert "You answer questions at a desk" in text
    assert "About 1.28 seconds." in text


def test_native_tool_calls_and_pictures(browser: Browser, shown: Shown, tmp_path: Path) -> None:
    """Tool calls of a provider's own protocol are shown as such, with the tool's answer."""
    text = browser.page_shot(
        shown.trace("weather"),
        tmp_path / "tool-calls.png",
        click=[shown.span("weather", "gpt-4o-mini", 0)],
        wait_for_text=["System", "User", "Tool"],
        size=HIGH,
    )
    for piece in ("weather", "Oslo", "rain, 4 degrees", "It rains in", "Reasoning", "Be brief."):
        assert piece in text
    assert "base64" not in text, "the picture is shown, not its bytes"


def test_the_error(browser: Browser, shown: Shown, images: Path) -> None:
    """A failed trace opens on its exception, with type, message and stack."""
    text = browser.page_shot(
        shown.trace("equator-walk"),
        images / "trace-error.png",
        wait_for_text=["exception.type", "exception.stacktrace"],
    )
    assert "RuntimeError" in text
    assert "out of service" in text
    assert "Traceback (most recent call last)" in text


def test_the_feedback(browser: Browser, shown: Shown, images: Path) -> None:
    """A critic's span has its verdict as feedback."""
    text = browser.page_shot(
        shown.trace("boiling-water"),
        images / "trace-feedback.png",
        click=[shown.span("boiling-water", "Reviewer", 0)],
        wait_for_text=["Feedback (1)", "does not mention 70, almanac, 8849"],
    )
    assert "0.25" in text


def test_agents_inside_a_run_are_nested_in_the_table(
    browser: Browser, mlflow_server: MlflowServer, experiment_name: str, tmp_path: Path
) -> None:
    """The page of the parent's experiment shows the agents' runs below it."""
    client = mlflow_server.client
    experiment = client.create_experiment(experiment_name)
    top = client.create_run(experiment, run_name="evening shift").info.run_id
    with logged(mlflow_server.uri, parent_run_id=top) as processor:
        for task in TASKS[:2]:
            run_task(task)
        assert processor.force_flush(FLUSH_S) is True
    client.set_terminated(top)
    page = Pages(mlflow_server.uri, experiment).runs
    names = {run.info.run_name for run in client.search_runs([experiment])} - {"evening shift"}
    text = browser.page_shot(page, wait_for_text=["evening shift"])
    assert not [name for name in names if name in text]
    browser.page_shot(page, click=[EXPAND], wait_for_text=["evening shift", *names])
