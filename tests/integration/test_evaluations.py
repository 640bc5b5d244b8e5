"""Evaluations with real agents and a real server: one parent, a child a task, numbers to the digit.

What the numbers must be is computed here from what each task is known to do.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.tracing.client import TracingClient

from qitos_mlflow.cli import main
from qitos_mlflow.mlflow_plugin.mapping.ids import digest
from tests.integration.browser import Browser, Pages
from tests.integration.logged import AGENT, ROOT, run_script
from tests.integration.server import MlflowServer
from tests.integration.stored import stored_runs

PARENT = "mlflow.parentRunId"
VERDICT = "verdict/success"

SWEEP = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from qitos_mlflow import evaluation
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer

TASKS, KEY, DONE = int(os.environ["TASKS"]), os.environ.get("KEY"), set(sys.argv[1:])
todo = [number for number in range(TASKS) if f"t{number}" not in DONE]

def run(number, sweep):
    usage = {"prompt_tokens": 10 + number, "completion_tokens": 5, "total_tokens": 15 + number}
    def last():
        while number >= TASKS // 2 and not os.path.exists("go"):
            time.sleep(0.05)
        return answer(FINAL, usage=usage)
    steps = [answer(ADD, usage=usage)] * (number % 4) + [last]
    with sweep.task(f"t{number}", category=f"level {number % 2}") as task:
        ModelAgent(Model(*steps)).run("solve", render=False, trace=False)
        task.result(number % 3 > 0, reward=number / 1000)

def whole():
    params = {"model": {"name": "scripted"}}
    return evaluation(
        "sweep", key=KEY, benchmark="numbers", split="test", params=params, tasks=range(TASKS)
    )
"""
"""Task `number` takes ``number % 4 + 1`` steps, and every third one is not solved. In the second
half the model does not answer before there is a file `go`."""

THREADS = """
with whole() as sweep, ThreadPoolExecutor(8) as pool:
    list(pool.map(lambda number: run(number, sweep), todo))
Path("over").touch()
"""

PROCESSES = """
import multiprocessing

def part(numbers):
    with evaluation("sweep", benchmark="numbers", split="test") as sweep:
        for number in numbers:
            run(number, sweep)

if __name__ == "__main__":
    with whole() as sweep:
        context = multiprocessing.get_context("spawn")
        many = 4 if TASKS > 100 else 2
        processes = [context.Process(target=part, args=(todo[n::many],)) for n in range(many)]
        [process.start() for process in processes]
        [process.join() for process in processes]
        assert {process.exitcode for process in processes} == {0}
"""


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def name() -> str:
    """Of an experiment that no other test logs to."""
    return f"evaluations {uuid.uuid4().hex[:12]}"


def runs_in(client: MlflowClient, name: str) -> list[Run]:
    experiment = client.get_experiment_by_name(name)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))


def family(client: MlflowClient, name: str) -> tuple[Run, list[Run]]:
    """The one run at the top of an experiment, and all others, which are its children."""
    runs = runs_in(client, name)
    [top] = [run for run in runs if PARENT not in run.data.tags]
    assert {run.data.tags[PARENT] for run in runs if run is not top} <= {top.info.run_id}
    return top, [run for run in runs if run is not top]


def judged(run: Run) -> bool:
    return VERDICT in run.data.metrics


def expected_numbers(tasks: Sequence[int], missing: int = 0) -> dict[str, float]:
    """What the parent of a sweep must have, after these tasks and without some others."""

    def rate(prefix: str, of: Sequence[int]) -> dict[str, float]:
        n, good = len(of), sum(number % 3 > 0 for number in of)
        z, p = NormalDist().inv_cdf(0.975), good / n
        half = z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
        return {
            f"{prefix}success": good,
            f"{prefix}success_rate": p,
            f"{prefix}success_rate_low": (p + z**2 / (2 * n) - half) / (1 + z**2 / n),
            f"{prefix}success_rate_high": (p + z**2 / (2 * n) + half) / (1 + z**2 / n),
        }

    steps = sorted(number % 4 + 1 for number in tasks)
    tokens = sorted((15 + number) * (number % 4 + 1) for number in tasks)
    found: dict[str, float] = {"n": len(tasks), "failed": 0, "skipped": 0, "unfinished": 0}
    found |= {"not_run": missing, **rate("", tasks), "stop/final": len(tasks)}
    for key, values in (("steps", steps), ("tokens", tokens)):
        rank = math.ceil(0.95 * len(values))
        found[f"{key}_mean"] = sum(values) / len(values)
        found |= {f"{key}_p95": values[rank - 1], f"{key}_total": sum(values)}
    for level in (0, 1):
        members = [number for number in tasks if number % 2 == level]
        found[f"category/level {level}/n"] = len(members)
        found |= rate(f"category/level {level}/", members)
    return {f"eval/{key}": value for key, value in found.items()}


def numbers_of(run: Run) -> dict[str, float]:
    """All numbers of a parent but those of the clock."""
    clock = ("eval/seconds",)
    return {key: value for key, value in run.data.metrics.items() if not key.startswith(clock)}


def started(
    body: str, server: MlflowServer, name: str, *done: str, **environ: str
) -> subprocess.Popen[str]:
    """A sweep in a process group of its own."""
    script = Path.cwd() / f"sweep_{uuid.uuid4().hex[:8]}.py"  # Another one may be about to read it.
    script.write_text(textwrap.dedent(SWEEP + body), "utf-8")
    own = {key: value for key, value in os.environ.items() if key != "QITOS_TRACE_PLUGINS"}
    own |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server.uri}
    own |= {"MLFLOW_EXPERIMENT_NAME": name, "QITOS_MLFLOW_EXIT_TIMEOUT_S": "60"}
    command = [sys.executable, script.name, *done]
    return subprocess.Popen(
        command, env=own | environ, start_new_session=True, text=True, stderr=subprocess.PIPE
    )


def finished(process: subprocess.Popen[str]) -> None:
    try:
        _, said = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


def killed_halfway(process: subprocess.Popen[str], server: MlflowServer, name: str) -> None:
    """Kill it, and all that it has started, once the server has the first half of its tasks.

    The server is not asked: to read out many runs, again and again, is most of its work then.
    """
    wanted = int(os.environ["TASKS"]) // 2
    try:
        while sum(VERDICT in run.points for run in stored_runs(server.database, name)) < wanted:
            assert process.poll() is None
            time.sleep(0.2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def synced(uri: str) -> None:
    done = CliRunner().invoke(main, ["sync", "--tracking-uri", uri])
    assert done.exit_code == 0, done.output


SWEEPS = {
    "8 threads": (THREADS, "KEY"),
    "8 threads of a launcher": (THREADS, "QITOS_MLFLOW_PARENT_RUN_ID"),
    "processes": (PROCESSES, "KEY"),
    "processes of a launcher": (PROCESSES, "MLFLOW_RUN_ID"),
}
"""A sweep, and the variable that says what it goes on with: a key, or a run that is there."""


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("kind", "tasks"),
    [
        *(pytest.param(kind, 12) for kind in list(SWEEPS)[::3]),
        *(pytest.param(kind, 200, marks=pytest.mark.soak) for kind in SWEEPS),
    ],
)
def test_a_sweep_that_is_killed_and_resumed(
    kind: str,
    tasks: int,
    mlflow_server: MlflowServer,
    client: MlflowClient,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One parent goes on, with each task done once, and its numbers to the digit.

    Of the threads' second half, nothing reaches the server before it is over: it was away.
    """
    body, variable = SWEEPS[kind]
    given = "the sweep"
    if variable != "KEY":
        given = client.create_run(client.create_experiment(name)).info.run_id
    monkeypatch.setenv("TASKS", str(tasks))
    monkeypatch.setenv(variable, given)
    killed_halfway(started(body, mlflow_server, name), mlflow_server, name)
    synced(mlflow_server.uri)

    half = tasks // 2
    parent, children = family(client, name)
    assert len(children) > half  # Those in the middle of which it was killed.
    assert {run.info.status for run in children if not judged(run)} == {"KILLED"}
    done = [run.data.tags["qitos.task_id"] for run in children if judged(run)]
    assert sorted(done) == sorted(f"t{number}" for number in range(half))
    wanted = expected_numbers(range(half), tasks - len(children))
    wanted["eval/unfinished"] = len(children) - half
    assert numbers_of(parent) == pytest.approx(wanted, rel=1e-12)

    Path("go").touch()
    if away := body == THREADS:  # Or it does not answer.
        mlflow_server.kill() if tasks > 100 else mlflow_server.freeze()
    process = started(body, mlflow_server, name, *done)
    if away:
        while not Path("over").exists():
            assert process.poll() is None
            time.sleep(0.05)
        mlflow_server.restart() if tasks > 100 else mlflow_server.thaw()
    finished(process)
    if away and tasks > 100:
        synced(mlflow_server.uri)  # What a slow machine has not delivered by the exit deadline.
    again, children = family(client, name)
    assert again.info.run_id == parent.info.run_id
    of_user = variable != "KEY"
    assert (parent.info.status, again.info.status) == (
        ("RUNNING", "RUNNING") if of_user else ("KILLED", "FINISHED")
    )
    done = [run.data.tags["qitos.task_id"] for run in children if judged(run)]
    assert sorted(done) == sorted(f"t{number}" for number in range(tasks))
    assert numbers_of(again) == pytest.approx(expected_numbers(range(tasks)), rel=1e-12)
    assert again.data.tags["mlflow.runType"] == "genai_evaluate"
    assert again.data.params["model.name"] == "scripted"
    [used] = again.inputs.dataset_inputs
    assert used.dataset.name == "numbers:test"
    rows = table_of(client, again.info.run_id)
    assert {row["task"]: row["success"] for row in rows} == {
        f"t{number}": number % 3 > 0 for number in range(tasks)
    }
    page_lists_the_judged_traces(mlflow_server, again, tasks)


def table_of(client: MlflowClient, run_id: str) -> list[dict[str, Any]]:
    path = client.download_artifacts(run_id, "evaluation_results.json")
    table = json.loads(Path(path).read_text("utf-8"))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def page_lists_the_judged_traces(server: MlflowServer, run: Run, tasks: int) -> None:
    """What MLflow's page of an evaluation shows: its traces, each with the verdict, once."""
    found = TracingClient(server.uri).search_traces(
        experiment_ids=[run.info.experiment_id],
        filter_string=f"attributes.run_id = '{run.info.run_id}'",
        max_results=500,
        include_spans=False,
    )
    # An attempt that was killed has none.
    said = [trace.info for trace in found if trace.info.assessments]
    assert sorted(
        (info.tags["qitos.task_id"], sorted((one.name, one.value) for one in info.assessments))
        for info in said
    ) == sorted(
        (f"t{n}", [("verdict/reward", n / 1000), ("verdict/success", n % 3 > 0)])
        for n in range(tasks)
    )
    by_task = {info.tags["qitos.task_id"]: info for info in said}
    pair = digest("request", "numbers", "test", "t7", "0", size=16).hex()
    assert by_task["t7"].tags["mlflow.eval.requestId"] == pair


# -- what one process of agents comes to --------------------------------------------------------

ALL = """
import sys
import mlflow, qitos.cli
from qitos.core.task import Task
from qitos_mlflow import evaluation

def run(task):
    usage = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 1500}
    said = answer(FINAL, usage=usage, model_name="gpt-4o-mini")  # MLflow knows its price.
    return ModelAgent(Model(said)).run(task, render=False, trace=False)

def at(name):
    mlflow.set_experiment(name + " " + sys.argv[-1])

at("mine")
with mlflow.start_run(run_name="mine"):
    mlflow.log_metric("n", 7)
    with mlflow.start_run(run_name="of my own", nested=True):
        mlflow.log_metric("success", 0)
    [run(f"task {number}") for number in range(3)]

at("open")
with mlflow.start_run(run_name="mine"):
    with evaluation("e", benchmark="b") as sweep, sweep.task("a") as task:
        run("a")
        task.result(False)
    mlflow.log_metric("after", 1)

at("host")

def solve(*, task, run_spec, experiment_spec):
    return {
        "task_id": task.id, "benchmark": "gaia", "split": "dev", "prediction": run(task.objective),
        "success": task.id != "t1", "stop_reason": "final", "steps": 1, "latency_seconds": 0.5,
        "token_usage": 1500, "cost": 0.0, "trace_run_dir": None, "run_spec_ref": "x",
        "metadata": {"reward": 0.25},
    }

sys.modules["runners"] = sys.modules["__main__"]
qitos.cli.load_benchmark_tasks = lambda **_: [
    Task(id=f"t{number}", objective="?", metadata={"Level": number % 2}) for number in range(3)
]
bench = ["--benchmark", "gaia", "--split", "dev", "--runner", "runners:solve"]
assert qitos.cli.main(["bench", "run", *bench, "--output", "rows.jsonl"]) == 0

at("page")
with evaluation("the sweep", benchmark="numbers", tasks=2) as sweep:
    for task_id in ("first task", "second task"):
        with sweep.task(task_id) as task:
            run(task_id)
            task.result(True, reward=0.75)
"""


@pytest.fixture(scope="module")
def all_at(shared_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One process that has done all of `ALL`; the end of its experiments' names."""
    suffix, directory = uuid.uuid4().hex[:12], tmp_path_factory.mktemp("evaluations")
    environ = {"MLFLOW_TRACKING_URI": shared_server.ensure_running().uri}
    environ["QITOS_MLFLOW_SPOOL_DIR"] = str(directory / "spool")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        run_script(AGENT, ALL, arguments=[suffix], **environ)
    return suffix


def test_a_run_of_the_users_has_the_numbers_of_its_agents(
    mlflow_server: MlflowServer, client: MlflowClient, all_at: str
) -> None:
    """Without a call of ours; what it has itself stays, and its other children do not count."""
    parent, below = family(client, f"mine {all_at}")
    children = [run for run in below if "qitos.trace_id" in run.data.tags]
    found = numbers_of(parent)
    assert found["n"] == 7
    assert len(children) == 3
    wanted = {"n": 3, "success_rate": 1, "stop/final": 3, "steps_total": 3, "steps_mean": 1}
    wanted |= {"tokens_total": 4500, "tokens_mean": 1500, "tokens_p95": 1500}
    assert {key: found[f"eval/{key}"] for key in wanted} == wanted
    costs = [run.data.metrics["total_cost"] for run in children]
    assert found["eval/cost_total"] == pytest.approx(sum(costs), rel=1e-12)
    assert min(costs) > 0
    assert "mlflow.runType" not in parent.data.tags
    assert not client.list_artifacts(parent.info.run_id)


def test_an_evaluation_is_the_run_that_is_open(
    mlflow_server: MlflowServer, client: MlflowClient, all_at: str
) -> None:
    """As with `mlflow.genai.evaluate`; whatever has opened it ends it."""
    parent, [child] = family(client, f"open {all_at}")
    assert (parent.info.run_name, parent.info.status) == ("mine", "FINISHED")
    assert parent.data.metrics["after"] == 1
    assert (parent.data.metrics["eval/success_rate"], child.data.metrics["success"]) == (0, 1)


def test_a_benchmark_of_qitoss_own_command_is_an_evaluation(
    mlflow_server: MlflowServer, client: MlflowClient, all_at: str
) -> None:
    """`qit bench run`: its results are the verdicts, its specifications params."""
    parent, children = family(client, f"host {all_at}")
    assert (parent.info.run_name, parent.info.status) == ("gaia:dev", "FINISHED")
    found = numbers_of(parent)
    wanted = {"n": 3, "success": 2, "not_run": 0, "category/1/success_rate": 0, "stop/final": 3}
    assert {key: found[f"eval/{key}"] for key in wanted} == wanted
    assert len(parent.data.params["run_spec_fingerprint"]) > 8
    assert parent.data.params["experiment_spec.benchmark_name"] == "gaia"
    assert [one.dataset.name for one in parent.inputs.dataset_inputs] == ["gaia:dev"]
    assert {run.data.metrics["verdict/reward"] for run in children} == {0.25}
    rows = table_of(client, parent.info.run_id)
    assert {row["task"]: row["success"] for row in rows} == {"t0": True, "t1": False, "t2": True}


@pytest.mark.browser
def test_the_page_of_evaluations_shows_it(
    mlflow_server: MlflowServer,
    client: MlflowClient,
    all_at: str,
    browser: Browser,
    tmp_path: Path,
) -> None:
    """With its dataset, its traces and a column for each score; its children are below it."""
    parent, _ = family(client, f"page {all_at}")
    pages = Pages(mlflow_server.uri, parent.info.experiment_id)
    texts = ["the sweep", "numbers"]
    browser.page_shot(pages.evaluations, tmp_path / "list.png", wait_for_text=texts)
    shown = browser.page_shot(pages.runs, tmp_path / "runs.png", wait_for_text=["the sweep"])
    assert "asker" not in shown  # They are folded.
    # The page leaves out what is before the last slash: verdict/success, verdict/reward.
    texts = ["first task", "second task", "success", "reward", "0.75"]
    own = pages.run(parent.info.run_id, "traces")
    browser.page_shot(own, tmp_path / "run.png", wait_for_text=texts)
    assert browser.errors == []


# -- machines, and no machine -------------------------------------------------------------------

MACHINE = """
with evaluation("sweep", key="shared", tasks=15) as sweep:
    [run(number, sweep) for number in range(int(sys.argv[1]), 15, 3)]
"""


def test_machines_that_begin_at_once_share_one_run(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """They know nothing of each other but the key."""
    Path("go").touch()
    processes = [
        started(MACHINE, mlflow_server, name, str(number), TASKS="15") for number in range(3)
    ]
    for process in processes:
        finished(process)
    parent, children = family(client, name)
    assert parent.info.status == "FINISHED"
    assert len(children) == 15
    found = numbers_of(parent)
    assert (found["eval/n"], found["eval/not_run"], found["eval/success"]) == (15, 0, 10)


def test_offline_and_in_a_local_store(local_store: str, name: str) -> None:
    """Nothing is lost: `sync` delivers all of it, in the end with the same numbers."""
    body = """
        from qitos_mlflow import evaluation

        with evaluation("e", benchmark="b", dataset="d", tasks=3) as sweep:
            with sweep.task("a") as task:
                agent.run("a", render=False, trace=False)
                task.result(True)
            with sweep.task("b") as task:
                task.skip()
        """
    environ = {"MLFLOW_TRACKING_URI": local_store, "QITOS_MLFLOW_EXPERIMENT_NAME": name}
    run_script(AGENT, body, **environ, QITOS_MLFLOW_OFFLINE="1")
    synced(local_store)
    parent, children = family(MlflowClient(local_store), name)
    assert len(children) == 2
    found = numbers_of(parent)
    wanted = {"n": 1, "skipped": 1, "not_run": 1, "success_rate": 1}
    assert {key: found[f"eval/{key}"] for key in wanted} == wanted
    assert parent.info.status == "FINISHED"
    [used] = parent.inputs.dataset_inputs
    assert used.dataset.name == "d"
