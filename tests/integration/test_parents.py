"""Where runs go: the user's experiment, and the user's run as their parent, as scripts are written.

Each script runs in a process of its own, with the package installed and nothing set in its code.
"""

from __future__ import annotations

import textwrap
import uuid
from collections import Counter

import pytest
from mlflow import MlflowClient

from tests.integration.logged import AGENT, LoggedRun, run_script, runs_of
from tests.integration.server import MlflowServer

PARENT = "mlflow.parentRunId"

RUN = """
def run(task):
    ModelAgent(Model(FINAL)).run(f"task {task}", render=False, trace=False)
    return task
"""
MAIN = """
if __name__ == "__main__":
    import asyncio, concurrent.futures, multiprocessing, os, subprocess, sys, threading
    import mlflow
"""
"""Guards what the processes of a pool must not do again."""


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def name() -> str:
    """Of an experiment that no other test logs to."""
    return f"parents {uuid.uuid4().hex[:12]}"


def script(body: str, server: MlflowServer, *, inside: str = "", **environ: str) -> str:
    """Run `body` with a server configured, and `inside` in the block that it ends with.

    Returns what the script says on stderr.
    """
    main = textwrap.dedent(body) + textwrap.indent(textwrap.dedent(inside), "    ")
    guarded = MAIN + textwrap.indent(main, "    ")
    return run_script(AGENT, RUN, guarded, MLFLOW_TRACKING_URI=server.uri, **environ).stderr


def tasks(runs: list[LoggedRun]) -> set[str]:
    return {run.params["task"].removeprefix("task ") for run in runs}


def children(client: MlflowClient, name: str) -> list[LoggedRun]:
    """All runs of the experiment but the one at its top, whose children they are."""
    runs = runs_of(client, name)
    [top] = [run for run in runs if PARENT not in run.tags]
    assert {run.tags[PARENT] for run in runs if run is not top} == {top.id}
    assert {run.status for run in runs} == {"FINISHED"}
    return [run for run in runs if run is not top]


# -- the experiment --------------------------------------------------------------------------


def test_the_experiment_that_was_set(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """`mlflow.set_experiment` is all there is to do; processes started then go there, too."""
    program = f"{AGENT}\n{RUN}\nrun(2)"
    script(
        f"""
        mlflow.set_experiment({name!r})
        run(1)
        subprocess.run([sys.executable, "-c", {program!r}], check=True)
        """,
        mlflow_server,
    )
    assert tasks(runs_of(client, name)) == {"1", "2"}


def test_the_order_that_decides_the_experiment(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """As given, the parent's, what was set, what the variables say."""
    made = {part: client.create_experiment(f"{name} {part}") for part in ("set", "id", "parent")}
    script(
        f"""
        run("variable")
        mlflow.set_experiment({name + " set"!r})
        run("set")
        with mlflow.start_run(experiment_id={made["parent"]!r}, run_name="top"):
            run("parent")
            import qitos_mlflow
            qitos_mlflow.autolog(experiment_name={name + " given"!r})
            run("given")
        """,
        mlflow_server,
        MLFLOW_EXPERIMENT_ID=made["id"],
        MLFLOW_EXPERIMENT_NAME=f"{name} named",
    )
    found = {
        run.params["task"]: part
        for part in ("id", "set", "parent", "given")
        for run in runs_of(client, f"{name} {part}")
        if run.params
    }
    assert found == {
        "task variable": "id",
        "task set": "set",
        "task parent": "parent",
        "task given": "given",
    }
    [given] = runs_of(client, f"{name} given")
    [top] = [run for run in runs_of(client, f"{name} parent") if run.name == "top"]
    assert given.tags[PARENT] == top.id


def test_a_variable_that_names_no_experiment_loses_nothing(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """One line names it, and the run goes where it would go without."""
    said = script(
        "run(1)", mlflow_server, MLFLOW_EXPERIMENT_ID="987654321", MLFLOW_EXPERIMENT_NAME=name
    )
    assert tasks(runs_of(client, name)) == {"1"}
    [line] = [line for line in said.splitlines() if "987654321" in line]
    assert "MLFLOW_EXPERIMENT_ID" in line
    assert mlflow_server.uri in line


# -- the parent ------------------------------------------------------------------------------

INSIDE = {
    "this thread": "run(0); run(1)",
    "threads": """
        threads = [threading.Thread(target=run, args=(n,)) for n in range(4)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        """,
    "a pool": """
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(run, range(30)))
        """,
    "tasks": """
        async def main():
            await asyncio.gather(*(asyncio.to_thread(run, n) for n in range(4)))
        asyncio.run(main())
        """,
    "joblib": """
        from joblib import Parallel, delayed
        Parallel(n_jobs=2, prefer="threads")(delayed(run)(n) for n in range(4))
        """,
    "loky": """
        from joblib import Parallel, delayed
        Parallel(n_jobs=2)(delayed(run)(n) for n in range(4))
        """,
    "spawn": """
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.map(run, range(4))
            pool.close()
            pool.join()
        """,
    "forkserver": """
        context = multiprocessing.get_context("forkserver")
        with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
            list(pool.map(run, range(4)))
        """,
    "fork": """
        with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            list(pool.map(run, range(4)))
        """,
    "a plain fork": """
        if (pid := os.fork()) == 0:
            run(0)
            sys.exit()
        assert os.waitpid(pid, 0)[1] == 0
        """,
}


@pytest.mark.parametrize("way", INSIDE)
def test_what_runs_inside_a_run_is_its_child(
    way: str, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """On whichever thread and in whichever process it is started; in the parent's experiment."""
    if "joblib" in INSIDE[way]:
        pytest.importorskip("joblib")
    top = f"""
        mlflow.set_experiment({name!r})
        with mlflow.start_run(run_name="top"):
        """
    script(top, mlflow_server, inside=INSIDE[way])
    found = children(client, name)
    expected = {"this thread": 2, "a pool": 30, "a plain fork": 1}.get(way, 4)
    assert Counter(run.params["task"] for run in found) == Counter(
        f"task {number}" for number in range(expected)
    )


def test_a_pool_of_processes_that_outlives_a_run_is_not_its_child(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Nor that of the next one, which cannot be known there: it is at top level."""
    script(
        f"""
        mlflow.set_experiment({name!r})
        with concurrent.futures.ProcessPoolExecutor(1) as pool:
            with mlflow.start_run(run_name="first"):
                pool.submit(run, 1).result()
            with mlflow.start_run(run_name="second"):
                pool.submit(run, 2).result()
        """,
        mlflow_server,
    )
    runs = {
        run.name if not run.params else run.params["task"]: run for run in runs_of(client, name)
    }
    assert runs["task 1"].tags[PARENT] == runs["first"].id
    assert PARENT not in runs["task 2"].tags


@pytest.mark.parametrize("variable", ["MLFLOW_RUN_ID", "QITOS_MLFLOW_PARENT_RUN_ID"])
def test_a_parent_of_another_process_or_machine(
    variable: str, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Its id in the environment is enough, as `mlflow run` sets it; mlflow is not even imported."""
    top = client.create_run(client.create_experiment(name), run_name="top")
    run_script(
        AGENT,
        RUN,
        "import sys; run(1); run(2); assert 'mlflow' not in sys.modules",
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        **{variable: top.info.run_id},
    )
    client.set_terminated(top.info.run_id)
    assert tasks(children(client, name)) == {"1", "2"}


def test_a_parent_that_does_not_exist_loses_nothing(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """One line names it, and the run is at top level, where it would go without."""
    wrong = uuid.uuid4().hex
    done = run_script(
        AGENT,
        RUN,
        "run(1)",
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        MLFLOW_RUN_ID=wrong,
        MLFLOW_EXPERIMENT_NAME=name,
    )
    [run] = runs_of(client, name)
    assert PARENT not in run.tags
    [line] = [line for line in done.stderr.splitlines() if wrong in line]
    assert "MLFLOW_RUN_ID" in line


# -- sampling --------------------------------------------------------------------------------


@pytest.mark.parametrize(("ratio", "traces"), [("0", 0), ("1", 3)])
def test_traces_are_sampled_and_runs_are_not(
    ratio: str, traces: int, mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Without its tree, an agent leaves no spans of MLflow's own either."""
    script(
        f"""
        mlflow.set_experiment({name!r})

        class Traced(ModelAgent):
            @mlflow.trace
            def decide(self, *args, **more):
                return super().decide(*args, **more)

        for n in range(3):
            Traced(Model(FINAL)).run(f"task {{n}}", render=False, trace=False)
        """,
        mlflow_server,
        MLFLOW_TRACE_SAMPLING_RATIO=ratio,
    )
    runs = runs_of(client, name)
    assert tasks(runs) == {"0", "1", "2"}
    assert {run.metrics["total_steps"] for run in runs} == {1}
    found = client.search_traces(locations=[runs[0].experiment_id])
    assert len(found) == traces
    for trace in found:  # The spans of MLflow's tracer are in there.
        assert "decide" in {span.name.rpartition(".")[2] for span in trace.data.spans}
