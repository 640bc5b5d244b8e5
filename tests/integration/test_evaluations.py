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

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.tracing.client import TracingClient

from qitos_mlflow.mlflow_plugin.mapping.ids import digest
from tests.integration.browser import Browser, Pages
from tests.integration.logged import AGENT, ROOT, run_script
from tests.integration.server import MlflowServer

PARENT = "mlflow.parentRunId"
TASKS = 200

SWEEP = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
from qitos_mlflow import evaluation
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer

def run(number, sweep):
    usage = {"prompt_tokens": 10 + number, "completion_tokens": 5, "total_tokens": 15 + number}
    def last():
        while number >= 100 and not os.path.exists("go"):
            time.sleep(0.05)
        return answer(FINAL, usage=usage)
    steps = [answer(ADD, usage=usage)] * (number % 4) + [last]
    with sweep.task(f"t{number}", category=f"level {number % 2}") as task:
        ModelAgent(Model(*steps)).run("solve", render=False, trace=False)
        task.result(number % 3 > 0, reward=number / 1000)
"""
"""Task `number` takes ``number % 4 + 1`` steps, and every third one is not solved. From 100 on the
model does not answer before there is a file `go`."""

THREADS = """
done = set(sys.argv[1:])
todo = [number for number in range(200) if f"t{number}" not in done]
with evaluation("sweep", key="the sweep", benchmark="numbers", split="test",
                params={"model": {"name": "scripted"}}, tasks=range(200)) as sweep:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: run(number, sweep), todo))
"""

PROCESSES = """
import multiprocessing

def part(numbers):
    with evaluation("sweep", benchmark="numbers", split="test") as sweep:
        for number in numbers:
            run(number, sweep)

if __name__ == "__main__":
    done = set(sys.argv[1:])
    todo = [number for number in range(200) if f"t{number}" not in done]
    with evaluation("sweep", key="the sweep", benchmark="numbers", split="test",
                    params={"model": {"name": "scripted"}}, tasks=200) as sweep:
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=part, args=(todo[n::4],)) for n in range(4)]
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
    return "verdict/success" in run.data.metrics


def expected_numbers(tasks: Sequence[int]) -> dict[str, float]:
    """What the parent of a sweep over these tasks must have."""

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
    found |= {"not_run": TASKS - len(tasks), **rate("", tasks), "stop/final": len(tasks)}
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


def started(body: str, server: MlflowServer, name: str, *done: str) -> subprocess.Popen[str]:
    """A sweep in a process group of its own."""
    script = Path.cwd() / "sweep.py"
    script.write_text(textwrap.dedent(SWEEP + body), "utf-8")
    environ = {key: value for key, value in os.environ.items() if key != "QITOS_TRACE_PLUGINS"}
    environ |= {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": server.uri}
    environ |= {"MLFLOW_EXPERIMENT_NAME": name, "QITOS_MLFLOW_EXIT_TIMEOUT_S": "60"}
    command = [sys.executable, script.name, *done]
    return subprocess.Popen(
        command, env=environ, start_new_session=True, text=True, stderr=subprocess.PIPE
    )


def finished(process: subprocess.Popen[str]) -> None:
    try:
        _, said = process.communicate(timeout=300)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said


@pytest.mark.timeout(600)
@pytest.mark.parametrize("body", [THREADS, PROCESSES], ids=["8 threads", "4 processes"])
def test_a_sweep_that_is_killed_and_resumed(
    body: str, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """One parent goes on, with each of 200 tasks done once, and its numbers to the digit."""
    process = started(body, mlflow_server, name)
    try:
        while sum(map(judged, runs_in(client, name))) < TASKS // 2:
            assert process.poll() is None
            time.sleep(1)  # To read 100 runs is work for the server, too.
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    sync = [sys.executable, "-m", "qitos_mlflow.cli", "sync", "--tracking-uri", mlflow_server.uri]
    subprocess.run(sync, check=True, capture_output=True, timeout=120)

    parent, children = family(client, name)
    assert parent.info.status == "KILLED"
    assert len(children) > TASKS // 2  # Those in the middle of which it was killed.
    assert {run.info.status for run in children if not judged(run)} == {"KILLED"}
    done = [run.data.tags["qitos.task_id"] for run in children if judged(run)]
    assert sorted(done) == sorted(f"t{number}" for number in range(TASKS // 2))
    unfinished = len(children) - len(done)
    half = {**expected_numbers(range(TASKS // 2)), "eval/unfinished": unfinished}
    assert numbers_of(parent) == pytest.approx(half, rel=1e-12)

    Path("go").touch()
    finished(started(body, mlflow_server, name, *done))
    again, children = family(client, name)
    assert again.info.run_id == parent.info.run_id
    assert again.info.status == "FINISHED"
    done = [run.data.tags["qitos.task_id"] for run in children if judged(run)]
    assert sorted(done) == sorted(f"t{number}" for number in range(TASKS))
    assert numbers_of(again) == pytest.approx(expected_numbers(range(TASKS)), rel=1e-12)
    assert again.data.tags["mlflow.runType"] == "genai_evaluate"
    assert again.data.params["model.name"] == "scripted"
    [used] = again.inputs.dataset_inputs
    assert used.dataset.name == "numbers:test"
    path = client.download_artifacts(again.info.run_id, "evaluation_results.json")
    table = json.loads(Path(path).read_text("utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert {row["task"]: row["success"] for row in rows} == {
        f"t{number}": number % 3 > 0 for number in range(TASKS)
    }
    # The parent's page lists the traces of its children.
    tracing = TracingClient(mlflow_server.uri)
    found = tracing.search_traces(
        experiment_ids=[again.info.experiment_id],
        filter_string=f"attributes.run_id = '{again.info.run_id}'",
        max_results=500,
        include_spans=False,
    )
    ids = {trace.info.tags["qitos.task_id"]: trace.info.tags for trace in found}
    assert len(ids) == TASKS
    pair = digest("request", "numbers", "test", "t7", "0", size=16).hex()
    assert ids["t7"]["mlflow.eval.requestId"] == pair


def done_in(body: str, **environ: str) -> str:
    """Run a script with these agents; returns what it says on stderr."""
    return run_script(AGENT, RUN, body, **environ).stderr


RUN = """
from qitos_mlflow import evaluation

def run(task):
    return ModelAgent(Model(FINAL)).run(task, render=False, trace=False)
"""


def test_a_run_of_the_users_has_the_numbers_of_its_agents(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Without a call of ours; what it has itself stays."""
    done_in(
        f"""
        import mlflow
        mlflow.set_experiment({name!r})
        with mlflow.start_run(run_name="mine"):
            mlflow.log_metric("n", 7)
            [run(f"task {{number}}") for number in range(3)]
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    parent, children = family(client, name)
    found = numbers_of(parent)
    assert (found["n"], found["eval/n"], found["eval/success_rate"]) == (7, 3, 1)
    assert found["eval/steps_total"] == sum(run.data.metrics["total_steps"] for run in children)
    assert "mlflow.runType" not in parent.data.tags
    assert not client.list_artifacts(parent.info.run_id)


def test_an_evaluation_is_the_run_that_is_open(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """As with `mlflow.genai.evaluate`; whatever has opened it ends it."""
    done_in(
        f"""
        import mlflow
        mlflow.set_experiment({name!r})
        with mlflow.start_run(run_name="mine"):
            with evaluation("e", benchmark="b") as sweep, sweep.task("a") as task:
                run("a")
                task.result(False)
            mlflow.log_metric("after", 1)
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    parent, [child] = family(client, name)
    assert (parent.info.run_name, parent.info.status) == ("mine", "FINISHED")
    assert parent.data.metrics["after"] == 1
    assert (parent.data.metrics["eval/success_rate"], child.data.metrics["success"]) == (0, 1)


@pytest.mark.parametrize("variable", ["QITOS_MLFLOW_PARENT_RUN_ID", "MLFLOW_RUN_ID"])
def test_a_launcher_creates_the_run(
    variable: str, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Two processes, on whatever machines, share it."""
    top = client.create_run(client.create_experiment(name))
    for task in "ab":
        body = f"""
            with evaluation("e", key="both") as sweep, sweep.task({task!r}):
                run({task!r})
            """
        environ = {variable: top.info.run_id, "MLFLOW_TRACKING_URI": mlflow_server.uri}
        done_in(textwrap.dedent(body), **environ)
    client.set_terminated(top.info.run_id)
    parent, children = family(client, name)
    assert parent.info.run_id == top.info.run_id
    assert (len(children), parent.data.metrics["eval/n"]) == (2, 2)


MACHINE = """
with evaluation("sweep", key="shared", tasks=15) as sweep:
    [run(number, sweep) for number in range(int(sys.argv[1]), 15, 3)]
"""


def test_machines_that_begin_at_once_share_one_run(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """They know nothing of each other but the key."""
    processes = [started(MACHINE, mlflow_server, name, str(number)) for number in range(3)]
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
        with evaluation("e", benchmark="b", dataset="d", tasks=3) as sweep:
            with sweep.task("a") as task:
                run("a")
                task.result(True)
            with sweep.task("b") as task:
                task.skip()
        """
    environ = {"MLFLOW_TRACKING_URI": local_store, "QITOS_MLFLOW_EXPERIMENT_NAME": name}
    done_in(textwrap.dedent(body), **environ, QITOS_MLFLOW_OFFLINE="1")
    sync = [sys.executable, "-m", "qitos_mlflow.cli", "sync", "--tracking-uri", local_store]
    subprocess.run(sync, check=True, capture_output=True, timeout=120)
    parent, children = family(MlflowClient(local_store), name)
    assert len(children) == 2
    found = numbers_of(parent)
    wanted = {"n": 1, "skipped": 1, "not_run": 1, "success_rate": 1}
    assert {key: found[f"eval/{key}"] for key in wanted} == wanted
    assert parent.info.status == "FINISHED"
    [used] = parent.inputs.dataset_inputs
    assert used.dataset.name == "d"


@pytest.mark.browser
def test_the_page_of_evaluations_shows_it(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, browser: Browser, tmp_path: Path
) -> None:
    """With its dataset and its success rate; its traces are the agents'."""
    body = """
        with evaluation("the sweep", benchmark="numbers", tasks=2) as sweep:
            for task_id in ("first task", "second task"):
                with sweep.task(task_id) as task:
                    run(task_id)
                    task.result(True)
        """
    environ = {"MLFLOW_TRACKING_URI": mlflow_server.uri, "MLFLOW_EXPERIMENT_NAME": name}
    done_in(textwrap.dedent(body), **environ)
    parent, _ = family(client, name)
    pages = Pages(mlflow_server.uri, parent.info.experiment_id)
    names = ["the sweep", "numbers"]
    browser.page_shot(pages.evaluations, tmp_path / "list.png", wait_for_text=names)
    own, texts = pages.run(parent.info.run_id, "traces"), ["first task", "second task"]
    browser.page_shot(own, tmp_path / "run.png", wait_for_text=texts)
    assert browser.errors == []
