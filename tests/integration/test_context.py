"""`qitos_mlflow.context` on a real server: what a web handler gives is on runs and traces.

Each script runs in a process of its own, with the package installed and nothing set in its code.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from mlflow import MlflowClient

from tests.integration.logged import AGENT, LoggedRun, run_script, runs_of
from tests.integration.server import MlflowServer

if TYPE_CHECKING:
    from tests.integration.browser import Browser

STATUS = "import sys; sys.argv[1:] = ['status']; from qitos_mlflow.cli import main; main()"
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

RUN = """
import asyncio, concurrent.futures, json, sys, threading
import qitos_mlflow
from qitos_mlflow import context

def run(task):
    return ModelAgent(Model(FINAL)).run(task, return_state=True, render=False, trace=False)

def say(request):
    print(json.dumps([request.trace_ids, request.run_ids, request.url]))

def flush():
    from qitos_mlflow import tracing
    assert tracing.get_tracing_provider().force_flush() is not False
"""


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def name() -> str:
    """Of an experiment that no other test logs to."""
    return f"context {uuid.uuid4().hex[:12]}"


def script(server: MlflowServer, name: str, body: str, **environ: str) -> list[Any]:
    """Run `body` with a server and an experiment configured; what it prints, as JSON."""
    done = run_script(
        *(AGENT, RUN, textwrap.dedent(body)),
        MLFLOW_TRACKING_URI=server.uri,
        QITOS_MLFLOW_EXPERIMENT_NAME=name,
        QITOS_MLFLOW_FLUSH_TIMEOUT_S="90",
        **environ,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]


def traces_of(client: MlflowClient, name: str) -> dict[str, Any]:
    """The traces of an experiment, by their ids."""
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    found = client.search_traces(locations=[experiment.experiment_id])
    return {trace.info.trace_id: trace for trace in found}


def of(trace: Any) -> tuple[str | None, str | None]:
    """Session and user of a trace."""
    metadata = trace.info.trace_metadata
    return metadata.get("mlflow.trace.session"), metadata.get("mlflow.trace.user")


def test_four_lines_in_a_web_handler(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Eight requests at once, whose agents run in pools and threads; each knows its traces."""
    said = script(
        mlflow_server,
        name,
        """
        pool = concurrent.futures.ThreadPoolExecutor(2)

        async def handle(number):
            chat, user = f"s{number % 3}", f"u{number}"
            with context(session=chat, user=user, tags={"n": number}) as request:
                way = (asyncio.to_thread, asyncio.get_running_loop().run_in_executor)[number % 2]
                await way(*([pool] if number % 2 else []), run, f"task {number}")
                thread = threading.Thread(target=run, args=(f"second {number}",))
                thread.start()
                await asyncio.to_thread(thread.join)
            return request

        async def serve():
            return await asyncio.gather(*(handle(number) for number in range(8)))

        requests = asyncio.run(serve())
        run("outside")
        flush()
        for request in requests:
            say(request)
        """,
    )
    traces, runs = traces_of(client, name), {run.id: run for run in runs_of(client, name)}
    assert (len(said), len(traces), len(runs)) == (8, 17, 17)
    for number, (trace_ids, run_ids, url) in enumerate(said):
        assert (len(trace_ids), len(run_ids)) == (2, 2)
        assert {of(traces[one]) for one in trace_ids} == {(f"s{number % 3}", f"u{number}")}
        assert {traces[one].info.tags["n"] for one in trace_ids} == {str(number)}
        assert {runs[one].tags["n"] for one in run_ids} == {str(number)}
        tasks = {runs[one].params["task"] for one in run_ids}
        assert tasks == {f"task {number}", f"second {number}"}
        assert url.startswith(mlflow_server.uri)
        assert url.endswith(f"={trace_ids[0]}")
    inside = {one for trace_ids, *_ in said for one in trace_ids}
    [outside] = traces.keys() - inside
    assert of(traces[outside])[0] is None
    assert "n" not in traces[outside].info.tags


def test_all_that_it_says_is_logged(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Name, metadata, parent, the caller's trace; credentials are not."""
    experiment_id = client.create_experiment(name)
    parent = client.create_run(experiment_id, run_name="parent").info.run_id
    said = script(
        mlflow_server,
        name,
        f"""
        @context(session="outer", user="ann", tags={{"plan": "pro", "api_key": "sk-abc123def456"}})
        def handle():
            headers = {{"traceparent": {CALLER!r}}}
            with context(
                session="inner",
                run_name="named",
                metadata={{"channel": "mail", "task": "not the agent's"}},
                parent_run_id={parent!r},
                traceparent=headers,
            ) as request:
                run("the task")
            return request

        request = handle()
        with context(user="x" * 5000, tags={{"long": "y" * 100_000}}, traceparent="nonsense"):
            run("odd")
        flush()
        say(request)
        """,
        QITOS_MLFLOW_PARENT_RUN_ID="0" * 32,
    )
    [(trace_ids, run_ids, _)] = said
    [run] = [run for run in runs_of(client, name) if run.id in run_ids]
    assert run.name == "named"
    assert run.params["channel"] == "mail"
    assert run.params["task"] == "the task"
    assert run.tags["mlflow.parentRunId"] == parent
    assert (run.tags["plan"], run.tags["qitos.group_id"]) == ("pro", "inner")
    assert run.tags["qitos.traceparent"] == CALLER
    assert "sk-abc123def456" not in str(run.tags)
    trace = traces_of(client, name)[trace_ids[0]]
    assert of(trace) == ("inner", "ann")
    assert trace.info.tags["qitos.traceparent"] == CALLER
    [root] = [span for span in trace.data.spans if span.parent_id is None]
    if hasattr(root, "links"):  # MLflow 3.12 does not read them.
        assert CALLER.split("-")[1] in str([link.trace_id for link in root.links])
    [odd] = [run for run in runs_of(client, name) if run.params.get("task") == "odd"]
    assert odd.tags["long"].startswith("yyy")
    assert len(odd.tags["long"]) <= 8000


def test_the_settings_of_content_are_obeyed(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """With content off, metadata is left out like the trace's own; ids and tags are labels."""
    script(
        mlflow_server,
        name,
        """
        with context(user="ann", tags={"plan": "pro"}, metadata={"question": "a secret plan"}):
            result = run("task")
        qitos_mlflow.score(result, "label", "good", rationale="it said: a secret plan")
        qitos_mlflow.expect(result, "answer", "a secret plan")
        """,
        QITOS_MLFLOW_CAPTURE_CONTENT="false",
    )
    [run] = runs_of(client, name)
    [trace] = traces_of(client, name).values()
    assert run.tags["plan"] == "pro"
    assert of(trace) == (None, "ann")
    assert [one.value for one in trace.info.assessments] == ["good"]
    assert "secret plan" not in f"{run.params} {run.tags} {trace.to_json()}"


def test_without_traces_there_is_the_run(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Its page is shown, and a score that is a number is its metric. A text is kept aside."""
    [(trace_ids, run_ids, url)] = script(
        mlflow_server,
        name,
        """
        with context() as request:
            result = run("task")
        flush()
        say(request)
        qitos_mlflow.score(result, "correct", True)
        qitos_mlflow.score(result, "label", "good")
        """,
        QITOS_MLFLOW_LOG_TRACES="false",
    )
    [run] = runs_of(client, name)
    assert run.metrics["correct"] == 1
    assert "label" not in run.metrics
    assert "only numbers can be logged" in run_script(STATUS).stdout
    assert (trace_ids, run_ids) == ([], [run.id])
    assert url.endswith(f"/#/experiments/{run.experiment_id}/runs/{run.id}")


@pytest.mark.browser
def test_the_page_that_it_names_shows_the_trace(
    mlflow_server: MlflowServer, name: str, browser: Browser, tmp_path: Path
) -> None:
    """With what was said of it afterwards."""
    [(_, _, url)] = script(
        mlflow_server,
        name,
        """
        with context(session="a chat") as request:
            result = run("the question")
        qitos_mlflow.score(result, "helpful", True, source="ann")
        qitos_mlflow.expect(result, "wanted", "the answer")
        flush()
        say(request)
        """,
    )
    texts = ["a chat", "the question", "Feedback (1)", "helpful", "Expectations (1)", "the answer"]
    browser.page_shot(url, tmp_path / "trace.png", click=["Assess"], wait_for_text=texts)
    assert browser.errors == []


@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_terminal_is_shown_the_first_run(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """One line, as MLflow prints it, and none if MLflow's own switch says so."""
    shown = on_a_terminal(mlflow_server, name)
    runs: list[LoggedRun] = runs_of(client, name)
    assert len(runs) == 3
    [line] = [line for line in shown.splitlines() if "View run" in line]
    assert line.strip().rpartition("/")[2] in {run.id for run in runs}
    switch = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"
    assert "View run" not in on_a_terminal(mlflow_server, name, **{switch: "true"})


def on_a_terminal(server: MlflowServer, name: str, **environ: str) -> str:
    """What a script with three agents shows on a terminal's stderr."""
    ours, theirs = os.openpty()
    try:
        run_script(
            f"import os; os.dup2(os.open({os.ttyname(theirs)!r}, os.O_WRONLY | os.O_NOCTTY), 2)",
            *(AGENT, RUN, "for n in range(3): run(str(n))", "flush()"),
            MLFLOW_TRACKING_URI=server.uri,
            QITOS_MLFLOW_EXPERIMENT_NAME=name,
            **environ,
        )
        os.write(theirs, b"\n.\n")  # Something to read if nothing was shown.
        return os.read(ours, 65_536).decode()
    finally:
        os.close(ours)
        os.close(theirs)
