"""`qitos-mlflow demo`, end to end: real Engine, real MLflow, correct to the digit."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from qitos_mlflow.cli._demo_agent import TASKS, DemoTask, run_task
from tests.cli.conftest import Done, Run, run_cli, runs_in
from tests.cli.test_demo_agent import STOPS
from tests.integration.logged import LoggedRun
from tests.integration.made_store import make_store
from tests.integration.proxy import Latency, Proxy
from tests.integration.server import MlflowServer

EXPERIMENT = "desk"
SLOW = {"QITOS_MLFLOW_FLUSH_TIMEOUT_S": "90"}
"""The machine that tests run on may be busy with others."""
STATUS = {"unrecoverable_error": "FAILED"}


def actions(demo: DemoTask) -> int:
    """How many tools the task calls, those of the librarian included."""
    replies = [reply for reply in (*demo.replies, *demo.librarian) if isinstance(reply, str)]
    return sum(len(json.loads(reply).get("actions", [])) for reply in replies)


@pytest.fixture(scope="module", params=["local", "server"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Where the demo of this module's tests logs to: a local store, and a real server."""
    if request.param == "local":
        database = tmp_path_factory.mktemp("store") / "demo.db"
        make_store(database)
        return f"sqlite:///{database}"
    server: MlflowServer = request.getfixturevalue("shared_server")
    return server.ensure_running().uri


@pytest.fixture(scope="module")
def logged(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Done, list[LoggedRun]]:
    """The finished command, and what MLflow has of it."""
    options = ("--tracking-uri", store, "--experiment-name", EXPERIMENT)
    spool = str(tmp_path_factory.mktemp("spool"))
    cwd = tmp_path_factory.mktemp("demo")
    done = run_cli("demo", *options, cwd=cwd, QITOS_MLFLOW_SPOOL_DIR=spool, **SLOW)
    assert done.returncode == 0, done.stderr
    return done, runs_in(store, EXPERIMENT)


def test_the_runs_are_in_mlflow_correct_to_the_digit(
    logged: tuple[Done, list[LoggedRun]],
) -> None:
    """Every task is one run, with the status, counts, tokens and scores the Engine really had."""
    runs = logged[1]
    assert [run.name for run in runs] == [demo.agent for demo in TASKS]
    for run, demo in zip(runs, TASKS, strict=True):
        stop_reason = STOPS.get(demo.id, "final")
        assert run.status == STATUS.get(stop_reason, "FINISHED")
        assert run.params["model_name"] == "scripted-large"
        assert run.tags["stop_reason"] == stop_reason
        assert run.metrics["total_steps"] == len(demo.replies) + len(demo.librarian)
        assert run.metrics["total_tool_calls"] == actions(demo)
        records = run_task(demo).records
        if not demo.librarian:  # Whose tokens the outer result does not know of.
            assert run.metrics["total_tokens"] == sum(
                record.model_response["usage"]["total_tokens"]
                for record in records
                if record.model_response
            )
        scores = [out["score"] for r in records for out in r.critic_outputs if "score" in out]
        score = run.metrics.get("critic/avg_score")
        assert score == (sum(scores) / len(scores) if scores else None)


def test_what_is_printed_is_what_mlflow_has(
    logged: tuple[Done, list[LoggedRun]], store: str
) -> None:
    """Nothing but the table, one row a run, and how to open the page of that very store."""
    done, runs = logged
    lines = done.stdout.splitlines()
    assert lines[0].startswith("run ")
    assert lines[1 + len(TASKS)].startswith("See them ")
    head = 0
    rows = [line.split() for line in lines[head + 1 : head + 1 + len(TASKS)]]
    assert [row[:3] for row in rows] == [[r.name, r.status, r.tags["stop_reason"]] for r in runs]
    assert [row[3:6] for row in rows] == [
        [f"{run.metrics[f'total_{what}']:g}" for what in ("steps", "tool_calls", "tokens")]
        for run in runs
    ]
    assert [row[6:-1] for row in rows] == [
        [f"{score:.2f}" for name, score in run.metrics.items() if name == "critic/avg_score"]
        for run in runs
    ]
    page = f"/#/experiments/{runs[0].experiment_id}\n"
    if store.startswith("http"):
        assert done.stdout.endswith(f"See them at  {store}{page}")
    else:
        command = f"{sys.executable} -m mlflow server --backend-store-uri {store} --port 5000\n"
        assert command in done.stdout
        assert done.stdout.endswith(f"http://localhost:5000{page}")


@pytest.mark.parametrize("store", ["server"], indirect=True)
def test_two_demos_do_not_mix(logged: tuple[Done, list[LoggedRun]], store: str, cli: Run) -> None:
    """A second demo into the same experiment shows its own runs only."""
    again = cli("demo", "--tracking-uri", store, "--experiment-name", EXPERIMENT, **SLOW)
    assert again.stdout.count("astronomer") == logged[0].stdout.count("astronomer") == 2
    assert len(runs_in(store, EXPERIMENT)) == 2 * len(TASKS)


WITHOUT_NETWORK = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise OSError("no network")
sys.addaudithook(refuse)
from qitos_mlflow.cli import main
main(["demo"])
"""


def test_without_a_destination_the_local_store_is_used(tmp_path: Path, python: Run) -> None:
    """With nothing configured the runs are in MLflow's own default store, here, also offline."""
    done = python("-c", WITHOUT_NETWORK)
    assert done.returncode == 0, done.stderr
    uri = re.search(r"--backend-store-uri (\S+)", done.stdout)
    assert uri is not None
    assert len(runs_in(uri[1], "qitos")) == len(TASKS)
    made = {path.name for path in Path.cwd().iterdir()} - {"spool"}
    assert made <= {"mlflow.db", "mlruns"}


def test_without_its_server_the_demo_ends_with_the_next_step(cli: Run) -> None:
    """The demo says that the runs are kept, and which command delivers them."""
    done = cli("demo", "--tracking-uri", "http://127.0.0.1:9", QITOS_MLFLOW_FLUSH_TIMEOUT_S="1")
    assert done.returncode == 1
    assert "qitos-mlflow: not all runs were delivered in time; the rest is kept" in done.stderr
    assert "qitos-mlflow sync" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_slow_server_is_waited_for(shared_server: MlflowServer, cli: Run) -> None:
    """Each call that is answered is progress, however long all of them take."""
    proxy = Proxy(shared_server.ensure_running().port)
    proxy.set(Latency(150))
    try:
        options = ("--tracking-uri", proxy.uri, "--experiment-name", "slow")
        done = cli("demo", *options, QITOS_MLFLOW_FLUSH_TIMEOUT_S="3")
    finally:
        proxy.close()
    assert done.returncode == 0, done.stderr
