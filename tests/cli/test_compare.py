"""`qitos-mlflow compare`, end to end: runs on a store and a server, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import comb
from pathlib import Path

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from qitos_mlflow.cli import compare as module
from qitos_mlflow.cli import main
from tests.cli.conftest import Run, run_cli
from tests.integration.logged import AGENT, run_script
from tests.integration.server import MlflowServer

PARENT = "mlflow.parentRunId"
Evaluation = Callable[[str, dict[str, list[float]]], str]


@pytest.fixture
def evaluation(store: str, experiment_name: str) -> Evaluation:
    """Makes a parent with a run for each value, in the order of the tasks; returns its id."""
    client = MlflowClient(store)
    experiment_id = client.create_experiment(experiment_name)

    def make(name: str, metrics: dict[str, list[float]]) -> str:
        parent = client.create_run(experiment_id, run_name=name).info.run_id
        for number in range(len(next(iter(metrics.values())))):
            tags = {PARENT: parent, "qitos.trace_id": f"{name}-{number}"}
            run = client.create_run(experiment_id, start_time=1000 + number).info.run_id
            tags |= {"qitos.task_id": f"task-{number:02}", "qitos.benchmark": "gaia"}
            client.log_batch(
                run,
                [Metric(key, values[number], 1, 0) for key, values in metrics.items()],
                [Param("benchmark_split", "test")],
                [RunTag(*tag) for tag in tags.items()],
            )
        return str(parent)

    return make


@pytest.fixture
def experiment_name(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


BEFORE = {
    "success": [1.0] * 5 + [0.0] * 15,
    "total_tokens": [100.0 + number for number in range(20)],
}
AFTER = {
    "success": [0.0] + [1.0] * 13 + [0.0] * 6,
    "total_tokens": [90.0 - number for number in range(20)],
}


def test_two_evaluations(cli: Run, store: str, evaluation: Evaluation) -> None:
    """Nine tasks were won and one was lost; each task took fewer tokens."""
    first, second = evaluation("before", BEFORE), evaluation("after", AFTER)
    done = cli("compare", "--tracking-uri", store, "--json", first, second)
    assert done.returncode == 0, done.stderr
    [found] = json.loads(done.stdout)
    assert [task["task"] for task in found["lost"]] == ["task-00"]
    assert [task["task"] for task in found["won"]] == [f"task-{n:02}" for n in range(5, 14)]
    success, tokens = found["metrics"]["success"], found["metrics"]["total_tokens"]
    assert (success["n"], success["first"], success["second"]) == (20, 0.25, 0.65)
    assert success["p"] == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)
    assert tokens["difference"] == pytest.approx(-29.0)
    assert tokens["low"] < -29.0 < tokens["high"] < 0.0
    assert tokens["p"] == pytest.approx(2 / 2**20), "all twenty went down"

    shown = cli("compare", "--tracking-uri", store, first, second).stdout
    table = [" ".join(line.split()) for line in shown.splitlines()]
    head = "metric pairs first second difference 95 % interval p test"
    assert head in table
    assert any(line.startswith("success 20 0.25 0.65 +0.4 ") for line in table)
    assert "1 task solved by the first only: gaia/test/task-00" in table
    assert any(line.startswith("9 tasks solved by the second only: gaia/test/") for line in table)


def test_it_is_logged_on_a_run(store: str, evaluation: Evaluation) -> None:
    """What was printed, and all of it as JSON."""
    first, second = evaluation("before", BEFORE), evaluation("after", AFTER)
    options = ("--tracking-uri", store, "--metric", "success", "--log", second)
    done = run_cli("compare", *options, first, second, first)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(store)
    assert {one.path for one in client.list_artifacts(second)} == {
        "comparison.json",
        "comparison.txt",
    }
    made = json.loads(Path(client.download_artifacts(second, "comparison.json")).read_text("utf-8"))
    assert [(one["first"], one["second"]) for one in made] == [(first, second), (first, first)]
    assert [*made[0]["metrics"]] == ["success"]
    text = Path(client.download_artifacts(second, "comparison.txt")).read_text("utf-8")
    assert text.strip() == done.stdout.strip()


def test_agents_below_two_runs_and_whole_experiments(
    shared_server: MlflowServer, cli: Run, experiment_name: str
) -> None:
    """Runs that agents have logged are paired by their task; tasks without a partner are named."""
    server = shared_server.ensure_running()
    script = """
        import mlflow
        mlflow.set_experiment(NAME)
        made = []
        for tasks in (("a", "b", "c"), ("a", "b", "d")):
            with mlflow.start_run() as run:
                for task in tasks:
                    ModelAgent(Model(FINAL)).run(task, render=False, trace=False)
            made.append(run.info.run_id)
        mlflow.set_experiment(f"{NAME} 2")
        ModelAgent(Model(FINAL)).run("a", render=False, trace=False)
        print(*made)
    """
    names = f"NAME = {experiment_name!r}"
    done = run_script(AGENT, names, script, MLFLOW_TRACKING_URI=server.uri)
    first, second = done.stdout.split()[-2:]
    uri = ("--tracking-uri", server.uri)
    found = cli("compare", *uri, "--json", first, second)
    assert found.returncode == 0, found.stderr
    [made] = json.loads(found.stdout)
    assert made["metrics"]["total_steps"]["n"] == 2
    assert [task["task"] for task in made["only_first"]] == ["c"]
    assert [task["task"] for task in made["only_second"]] == ["d"]
    whole = cli("compare", *uri, "--json", f"{experiment_name} 2", experiment_name)
    [made] = json.loads(whole.stdout)
    assert made["metrics"]["total_steps"]["n"] == 1
    trials = [(task["task"], task["trial"]) for task in made["only_second"]]
    assert trials == [("a", "1"), ("b", "0"), ("b", "1"), ("c", "0"), ("d", "0")]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("only one",), "give at least two evaluations"),
        (("nowhere", "nowhere"), "no run and no experiment 'nowhere'"),
        (("Default", "Default"), "'Default' has no runs of agents to compare"),
    ],
)
def test_what_cannot_be_compared(store: str, names: tuple[str, ...], said: str) -> None:
    done = run_cli("compare", "--tracking-uri", store, *names)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"qitos-mlflow: {said}"


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command that installs it."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    done = CliRunner().invoke(main, ["compare", "a", "b"])
    assert "pip install 'qitos-mlflow[compare]'" in done.output
    assert done.exit_code == 2
