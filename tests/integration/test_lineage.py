"""What MLflow itself writes about code, model and prompts is on agents' runs and traces, too."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Trace

from tests.integration.logged import AGENT, run_script, runs_of
from tests.integration.made_store import make_store
from tests.integration.server import MlflowServer

URL = "https://git.example.test/team/agent.git"


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def name() -> str:
    """Of an experiment that no other test logs to."""
    return f"lineage {uuid.uuid4().hex[:12]}"


@pytest.fixture(autouse=True)
def checkout() -> str:
    """The directory in which scripts run is a repository; its commit."""

    def git(*arguments: str) -> str:
        author = ("-c", "user.name=A", "-c", "user.email=a@example.test")
        done = subprocess.run(
            ["git", *author, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    Path("kept.txt").write_text("as committed")
    git("init", "-q", "-b", "topic")
    git("add", "kept.txt")
    git("commit", "-q", "-m", "first")
    git("remote", "add", "origin", URL.replace("//", "//me:s3cr3t@"))
    return git("rev-parse", "HEAD")


def traces_of(client: MlflowClient, experiment: str, filter_string: str = "") -> dict[str, Trace]:
    """The traces of an experiment, by name."""
    found = client.get_experiment_by_name(experiment)
    traces = client.search_traces(
        locations=[found.experiment_id], filter_string=filter_string or None
    )
    return {trace.info.tags["mlflow.traceName"]: trace for trace in traces}


def test_the_code_is_named_as_mlflow_names_it(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, checkout: str
) -> None:
    """Run and trace have what MLflow gives its own run and trace, and whether files are changed.

    Tags that are given win.
    """
    Path("kept.txt").write_text("changed")
    run_script(
        AGENT,
        f"""
        import mlflow
        mlflow.set_experiment({name!r})
        with mlflow.start_run(run_name="mlflow's"):
            pass
        with mlflow.start_span("mlflow's"):
            pass
        agent.run("t", render=False, trace=False)
        import qitos_mlflow
        tags = {{"mlflow.source.git.commit": "abc"}}
        qitos_mlflow.autolog(experiment_name="{name} given", tags=tags)
        agent.run("t", render=False, trace=False)
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    runs = {run.name: run.tags for run in runs_of(client, name)}
    traces = {key: trace.info.trace_metadata for key, trace in traces_of(client, name).items()}
    for found in (runs, traces):
        theirs = found.pop("mlflow's")
        [ours] = found.values()
        code = {"commit": checkout, "branch": "topic", "repoURL": URL, "dirty": "true"}
        expected = {f"mlflow.source.git.{key}": text for key, text in code.items()}
        assert {key: ours.get(key) for key in expected} == expected
        # MLflow 3.12 keeps the password, and does not find the branch of a relative path.
        of_mlflow = {key for key in theirs if key.startswith("mlflow.source.git")}
        assert "mlflow.source.git.commit" in of_mlflow
        assert all(theirs[key] == expected[key] for key in of_mlflow if "s3cr3t" not in theirs[key])
    # A build that has no repository any more names its commit by a tag.
    [given] = runs_of(client, f"{name} given")
    assert given.tags["mlflow.source.git.commit"] == "abc"
    assert given.tags["mlflow.source.git.branch"] == "topic"


def test_it_is_that_of_the_process_that_recorded(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, checkout: str, tmp_path: Path
) -> None:
    """Records that another process delivers later, from elsewhere, name the recorder's commit."""
    run_script(
        AGENT,
        'agent.run("t", render=False, trace=False)',
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        MLFLOW_EXPERIMENT_NAME=name,
        QITOS_MLFLOW_OFFLINE="1",
    )
    done = subprocess.run(
        [sys.executable, "-m", "qitos_mlflow.cli", "sync"],
        cwd=tmp_path.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    [run] = runs_of(client, name)
    assert run.tags["mlflow.source.git.commit"] == checkout, done.stderr
    [trace] = traces_of(client, name).values()
    assert trace.info.trace_metadata["mlflow.source.git.commit"] == checkout


def test_the_active_model(mlflow_server: MlflowServer, client: MlflowClient, name: str) -> None:
    """Traces belong to the model that is active where they begin, also in a thread of a pool."""
    run_script(
        AGENT,
        f"""
        import concurrent.futures, mlflow
        mlflow.set_experiment({name!r})
        run = lambda task: agent.run(task, render=False, trace=False)
        run("before")
        with mlflow.set_active_model(name="astronomer") as model:
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                pool.submit(run, "inside").result()
        print(model.model_id)
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    experiment = client.get_experiment_by_name(name)
    [model] = client.search_logged_models([experiment.experiment_id])
    found = client.search_traces(locations=[experiment.experiment_id])
    models = {
        trace.info.request_preview: trace.info.trace_metadata.get("mlflow.modelId")
        for trace in found
    }
    assert sorted(models.values(), key=str) == sorted([None, model.model_id], key=str)
    [inside] = [preview for preview, of in models.items() if of]
    assert "inside" in inside


def test_the_active_model_by_its_variable(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """MLFLOW_ACTIVE_MODEL_ID is enough; mlflow is not even imported."""
    model = client.create_logged_model(client.create_experiment(name))
    run_script(
        AGENT,
        """
        import sys
        agent.run("t", render=False, trace=False)
        assert "mlflow" not in sys.modules
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        MLFLOW_EXPERIMENT_NAME=name,
        MLFLOW_ACTIVE_MODEL_ID=model.model_id,
    )
    [trace] = traces_of(client, name).values()
    assert trace.info.trace_metadata["mlflow.modelId"] == model.model_id


PROMPTED = """
    import mlflow
    from tests.bridge.agents import FINAL, ScriptAgent, act, toolbox
    from qitos import Decision

    def ask(name):
        return mlflow.genai.load_prompt(f"prompts:/{{name}}/1").template

    mlflow.set_experiment({experiment!r})
    for each in ({prompt!r}, "{prompt}-b", "{prompt}-c"):
        mlflow.genai.register_prompt(each, "Be {{{{how}}}}.")
    ask("{prompt}-c")
    script = [act("ask", name={prompt!r}), act("ask", name="{prompt}-b"), Decision.final("done")]
    ScriptAgent(*script, tools=toolbox(ask=ask)).run("t", render=False, trace=False)
    ask("{prompt}-c")
"""


@pytest.mark.parametrize("store", ["server", "sqlite"])
def test_prompts_are_linked(
    store: str, mlflow_server: MlflowServer, name: str, tmp_path: Path
) -> None:
    """Those that a tool loads are named by run and trace, and the trace is found by them."""
    uri = mlflow_server.uri
    if store == "sqlite":
        make_store(tmp_path / "prompts.db")
        uri = f"sqlite:///{tmp_path}/prompts.db"
    client = MlflowClient(uri)
    prompt = f"prompt-{uuid.uuid4().hex[:8]}"
    run_script(
        PROMPTED.format(experiment=name, prompt=prompt),
        MLFLOW_TRACKING_URI=uri,
        _MLFLOW_SERVER_ARTIFACT_ROOT=str(tmp_path),
    )
    expected = [{"name": prompt, "version": "1"}, {"name": f"{prompt}-b", "version": "1"}]
    [run] = runs_of(client, name)
    assert json.loads(run.tags["mlflow.linkedPrompts"]) == expected
    [trace] = traces_of(client, name).values()
    assert json.loads(trace.info.tags["mlflow.linkedPrompts"]) == expected
    assert traces_of(client, name, f"prompt = '{prompt}-b/1'").keys() == {"script"}
    assert not traces_of(client, name, f"prompt = '{prompt}-c/1'")
