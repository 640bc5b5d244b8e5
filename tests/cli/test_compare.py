"""`qitos-mlflow compare`, end to end: runs on a store and a server, and what is said of them."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from math import comb
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag

from qitos_mlflow.cli import compare as module
from qitos_mlflow.cli import main
from qitos_mlflow.mlflow_plugin.server.http import Request
from tests.cli.conftest import Run
from tests.fakes.raw_server import KEPT, http, raw_server
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
            tags |= {"qitos.benchmark": "gaia", "qitos.split": "test"}
            client.log_batch(
                run,
                [Metric(key, values[number], 1, 0) for key, values in metrics.items()],
                [Param("task", f"task-{number:02}")],
                [RunTag(*tag) for tag in tags.items()],
            )
            client.set_terminated(run)
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


def compared(*args: str, **environ: str) -> Result:
    """What `qitos-mlflow compare args…` says, run in this process."""
    return CliRunner().invoke(main, ["compare", *args], env={"COLUMNS": "200", **environ})


def test_two_evaluations(store: str, evaluation: Evaluation) -> None:
    """Nine tasks were won and one was lost; each task took fewer tokens."""
    first, second = evaluation("before", BEFORE), evaluation("after", AFTER)
    options = ("--tracking-uri", store, "--log", second)
    done = compared(*options, "--json", first, second)
    assert done.exit_code == 0, done.output
    [found] = json.loads(done.output)
    assert [task["task"] for task in found["lost"]] == ["task-00"]
    assert [task["task"] for task in found["won"]] == [f"task-{n:02}" for n in range(5, 14)]
    success, tokens = found["metrics"]["success"], found["metrics"]["total_tokens"]
    assert (success["n"], success["first"], success["second"]) == (20, 0.25, 0.65)
    assert success["p"] == pytest.approx(2 * (comb(10, 0) + comb(10, 1)) / 2**10)
    assert tokens["difference"] == pytest.approx(-29.0)
    assert tokens["low"] < -29.0 < tokens["high"] < 0.0
    assert tokens["p"] == pytest.approx(2 / 2**20), "all twenty went down"

    shown = compared(*options, first, second).output
    table = [" ".join(line.split()) for line in shown.splitlines()]
    head = "metric pairs first second difference 95 % interval p test"
    assert head in table
    assert any(line.startswith("success 20 0.25 0.65 +0.4 ") for line in table)
    assert "1 task solved by the first only: gaia/test/task-00" in table
    assert any(line.startswith("9 tasks solved by the second only: gaia/test/") for line in table)
    logged = {
        one.path: Path(MlflowClient(store).download_artifacts(second, one.path)).read_text("utf-8")
        for one in MlflowClient(store).list_artifacts(second)
    }
    assert logged.keys() == {"comparison.json", "comparison.txt"}, "twice is as once"
    assert json.loads(logged["comparison.json"]) == [found]
    assert logged["comparison.txt"].strip() == shown.strip()

    narrow = compared("--tracking-uri", store, first, second, COLUMNS="60").output
    assert all(len(line) <= 60 for line in narrow.splitlines() if "task" not in line)


def test_three_evaluations_some_without_a_common_task(store: str, evaluation: Evaluation) -> None:
    """Each is compared with the first one. An infinity, which is logged for one task, is none."""
    values = [float("inf"), float("-inf"), float("nan"), 1.0, 2.0]
    first = evaluation("first", {"loss": [1.0] * 5})
    second = evaluation("second", {"loss": values})
    client = MlflowClient(store)
    parent = client.create_run(client.get_run(first).info.experiment_id).info.run_id
    tags = {PARENT: parent, "qitos.trace_id": "t", "qitos.task_id": "another"}
    client.set_terminated(
        client.create_run(client.get_run(first).info.experiment_id, tags=tags).info.run_id
    )
    done = compared("--tracking-uri", store, "--json", first, second, parent)
    assert done.exit_code == 0, done.output
    one, other = json.loads(done.output, parse_constant=pytest.fail)
    assert (one["metrics"]["loss"]["n"], one["metrics"]["loss"]["second"]) == (2, 1.5)
    assert (other["metrics"], len(other["only_first"])) == ({}, 5)
    assert (
        "No task has a metric in both." in compared("--tracking-uri", store, first, parent).output
    )


def test_agents_below_two_runs_and_whole_experiments(
    shared_server: MlflowServer, cli: Run, experiment_name: str
) -> None:
    """Runs that agents have logged are paired by their task; tasks without a partner are named.

    Of an evaluation, it counts what the benchmark says: the agents themselves find all solved.
    """
    server = shared_server.ensure_running()
    script = """
        import mlflow, qitos_mlflow
        mlflow.set_experiment(NAME)
        made = []
        for tasks in (("a", "b", "c"), ("a", "b", "d")):
            with mlflow.start_run() as run:
                for task in tasks:
                    ModelAgent(Model(FINAL)).run(task, render=False, trace=False)
            made.append(run.info.run_id)
        mlflow.set_experiment(f"{NAME} 2")
        ModelAgent(Model(FINAL)).run("a", render=False, trace=False)
        mlflow.set_experiment(f"{NAME} 3")
        for name, solved in (("one", "a"), ("two", "ab")):
            with qitos_mlflow.evaluation(name, benchmark="gaia") as sweep:
                for task in "abc":
                    with sweep.task(task) as one:
                        ModelAgent(Model(FINAL)).run(task, render=False, trace=False)
                        one.result(success=task in solved)
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
    experiment = server.client.get_experiment_by_name(f"{experiment_name} 3").experiment_id
    one, two = server.client.search_runs(
        [experiment], "tags.`qitos.evaluation` LIKE '%'", order_by=["attributes.start_time"]
    )
    [made] = json.loads(compared(*uri, "--json", one.info.run_id, two.info.run_id).output)
    success = made["metrics"]["success"]
    assert (success["n"], success["first"], success["second"]) == (3, 1 / 3, 2 / 3)
    assert [(task["benchmark"], task["task"]) for task in made["won"]] == [("gaia", "b")]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["only one"], "give at least two evaluations"),
        (["nowhere", "nowhere"], "no run and no experiment 'nowhere'"),
        (["it's", "0"], 'no run and no experiment "it\'s"'),
        (["Default", "Default"], "'Default' has no runs of agents to compare"),
        (
            ["{run}", "{run}", "--metric", "typo"],
            "no task has the metric 'typo' in two evaluations",
        ),
        (["{run}", "{run}", "--log", "nowhere"], "no run 'nowhere' to log the comparison to"),
        (["--tracking-uri", "http://127.0.0.1:9", "a", "b"], "http://127.0.0.1:9: "),
    ],
)
def test_what_cannot_be_compared(
    args: list[str], said: str, store: str, evaluation: Evaluation
) -> None:
    """One line says why, and soon."""
    run = evaluation("one", {"success": [1.0]})
    done = compared("--tracking-uri", store, *(arg.format(run=run) for arg in args))
    assert done.exit_code == 2
    assert done.output.splitlines()[-1].startswith(f"qitos-mlflow: {said}")


class Runs:
    """A server with a run, and children of it in answers to one path that is hostile."""

    def __init__(self, path: str, hostile: Callable[[int], Iterable[bytes]]) -> None:
        self._path, self._hostile = path, hostile
        self.asked = 0

    def __call__(self, request: Request) -> Iterable[bytes]:
        if self._path in request.path:
            self.asked += 1
            return self._hostile(self.asked)
        if request.path == "/version":
            return [http(b"3.17.2", kind="text/plain"), KEPT]
        if "runs/get" in request.path:
            return [http(json.dumps({"run": stored("parent")}).encode()), KEPT]
        if "runs/search" in request.path:
            return page(1)
        return [http(b'{"experiments": []}'), KEPT]


def stored(run_id: str, task: str = "") -> dict[str, Any]:
    """A run as MLflow's servers say it."""
    info = {"run_id": run_id, "experiment_id": "7", "artifact_uri": "mlflow-artifacts:/7/r"}
    tags = {"qitos.trace_id": run_id, "qitos.task_id": task or run_id}
    return {
        "info": info | {"status": "FINISHED"},
        "data": {
            "metrics": [{"key": "success", "value": len(run_id) % 2, "timestamp": 1}],
            "tags": [{"key": key, "value": text} for key, text in tags.items()],
        },
    }


def page(number: int, token: str = "", task: str = "") -> Iterable[bytes]:
    """An answer with one run."""
    found = {"runs": [stored(f"run{number}", task)], "next_page_token": token}
    return [http(json.dumps(found).encode()), KEPT]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
CHUNK = b"100000\r\n" + b" " * 2**20 + b"\r\n"
SLOW = "Timeout"
BOMB = gzip.compress(bytes(64 * 2**20))


def dripping() -> Iterator[bytes]:
    yield HEAD + b"Content-Length: 100000\r\n\r\n"
    for _ in range(10_000):
        time.sleep(0.05)
        yield b" "


@pytest.mark.parametrize(
    ("path", "hostile", "said"),
    [
        (
            "runs/search",
            lambda n: chain([HEAD + b"Transfer-Encoding: chunked\r\n\r\n"], repeat(CHUNK)),
            " more than ",
        ),
        (
            "runs/get",
            lambda n: [http(BOMB, "200 OK", "application/json", "Content-Encoding: gzip")],
            " more than ",
        ),
        ("runs/search", lambda n: dripping(), SLOW),
        ("runs/search", lambda n: page(1, "the same for ever"), "go round in circles"),
        ("runs/search", lambda n: page(n, str(n)), "there are more than 50"),
        (
            "runs/search",
            lambda n: [http(b"", "307 T", "text/html", "Location: http://127.0.0.2:9/x"), KEPT],
            "the server moved to http://127.0.0.2:9",
        ),
        ("runs/search", lambda n: [http(b'{"runs": [5]}')], "something else than objects"),
        ("runs/get", lambda n: [http(b'{"run": {"info": {"run_id": 5}}}')], "not MLflow's"),
    ],
    ids=["chunks", "bomb", "drip", "same token", "endless pages", "redirect", "types", "id"],
)
def test_a_hostile_server_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    hostile: Callable[[int], Iterable[bytes]],
    said: str,
) -> None:
    """What it sends has limits of size, time and number, and it is followed nowhere."""
    monkeypatch.setattr("qitos_mlflow.cli._server.TIMEOUT_S", 60.0)  # It is well until then.
    if said == SLOW:
        monkeypatch.setattr("qitos_mlflow.mlflow_plugin.server.http.REQUEST_TIMEOUT_S", 0.2)
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.sink.children.MOST_RUNS", 50)
    with raw_server(Runs(path, hostile)) as server:
        done = compared("--tracking-uri", server.uri, "a" if path == "runs/get" else "parent", "b")
    assert done.exit_code == 2
    last = done.output.splitlines()[-1]
    assert last.startswith(f"qitos-mlflow: {server.uri}: ")
    assert said in last


def test_names_of_a_server_are_shown_clean() -> None:
    """A task may be called like a command for the terminal."""
    with raw_server(Runs("runs/search", lambda n: page(n, task=f"\x1b[31mred {n}\n"))) as server:
        done = compared("--tracking-uri", server.uri, "parent", "parent")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output
    assert r"not finished in the second: \x1b[31mred 1\n" in done.output


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message has the command that installs it."""
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    done = compared("a", "b")
    assert "pip install 'qitos-mlflow[compare]'" in done.output
    assert done.exit_code == 2
