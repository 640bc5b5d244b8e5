"""Where runs go: the user's experiment, and the user's run as their parent, as scripts are written.

Each script runs in a process of its own, with the package installed and nothing set in its code.
"""

from __future__ import annotations

import json
import sys
import textwrap
import uuid
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.integration.logged import AGENT, LONG_SCRIPT_TIMEOUT_S, LoggedRun, run_script, runs_of
from tests.integration.server import MlflowServer

pytestmark = pytest.mark.timeout(300)
"""The first test that reads what a script has logged waits for the whole script."""

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


def script(body: str, server: MlflowServer, **environ: str) -> None:
    """Run `body` with a server configured."""
    guarded = MAIN + textwrap.indent(textwrap.dedent(body), "    ")
    long_s = LONG_SCRIPT_TIMEOUT_S
    run_script(AGENT, RUN, guarded, timeout_s=long_s, MLFLOW_TRACKING_URI=server.uri, **environ)


def task(run: LoggedRun) -> str:
    return run.params["task"].removeprefix("task ")


def tasks(runs: Iterable[LoggedRun]) -> list[str]:
    return sorted(task(run) for run in runs)


def children(client: MlflowClient, name: str) -> list[LoggedRun]:
    """All runs of the experiment but the one at its top, whose children they are."""
    runs = runs_of(client, name)
    [top] = [run for run in runs if PARENT not in run.tags]
    assert {run.tags[PARENT] for run in runs if run is not top} == {top.id}
    assert {run.status for run in runs} == {"FINISHED"}
    return [run for run in runs if run is not top]


# -- the experiment --------------------------------------------------------------------------


def test_the_order_that_decides_the_experiment(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """As given, the parent's, what was set, what the variables say; asked for each agent."""
    made = {part: client.create_experiment(f"{name} {part}") for part in ("set", "id", "parent")}
    script(
        f"""
        run("variable")
        mlflow.set_experiment({name + " set"!r})
        run("set")
        program = {AGENT + RUN!r} + "run('process')"
        subprocess.run([sys.executable, "-c", program], check=True)
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
        part: tasks(run for run in runs_of(client, f"{name} {part}") if run.params)
        for part in ("id", "set", "parent", "given")
    }
    assert found == {
        "id": ["variable"],
        "set": ["process", "set"],
        "parent": ["parent"],
        "given": ["given"],
    }
    [given] = runs_of(client, f"{name} given")
    [top] = [run for run in runs_of(client, f"{name} parent") if run.name == "top"]
    assert given.tags[PARENT] == top.id


def test_ids_that_do_not_exist_lose_nothing(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """A line names each of them, and the run is at top level, where it would go without."""
    run_id, experiment_id = uuid.uuid4().hex, "987654321"
    variables = {"MLFLOW_RUN_ID": run_id, "MLFLOW_EXPERIMENT_ID": experiment_id}
    program = (AGENT, RUN, "run(1)")
    where = {"MLFLOW_TRACKING_URI": mlflow_server.uri, "MLFLOW_EXPERIMENT_NAME": name}
    said = run_script(*program, **where, **variables).stderr.splitlines()
    [run] = runs_of(client, name)
    assert PARENT not in run.tags
    for variable, text in variables.items():
        [line] = [line for line in said if text in line]
        assert variable in line
        assert mlflow_server.uri in line


# -- the parent ------------------------------------------------------------------------------

THREADS = {
    "this thread": "[run(task) for task in tasks]",
    "threads": """
        threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        """,
    "pool": """
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            list(pool.map(run, tasks))
        """,
    "asyncio": """
        async def main():
            await asyncio.gather(*(asyncio.to_thread(run, task) for task in tasks))
        asyncio.run(main())
        """,
    "joblib": """
        from joblib import Parallel, delayed
        Parallel(n_jobs=2, prefer="threads")(delayed(run)(task) for task in tasks)
        """,
}
PROCESSES = {
    "loky": """
        from joblib import Parallel, delayed
        Parallel(n_jobs=2)(delayed(run)(task) for task in tasks)
        """,
    "spawn": """
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            pool.map(run, tasks)
            pool.close()
            pool.join()
        """,
    "forkserver": """
        context = multiprocessing.get_context("forkserver")
        with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
            list(pool.map(run, tasks))
        """,
    "fork": """
        with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            list(pool.map(run, tasks))
        """,
    "plain fork": """
        def forked():  # In a process of a process, from a thread in which no run is open.
            if (pid := os.fork()) == 0:
                if (pid := os.fork()) == 0:
                    [run(task) for task in tasks]
                    os._exit(not all(one.force_flush(60) for one in tracing.processors()))
                os._exit(os.waitpid(pid, 0)[1] != 0)
            return os.waitpid(pid, 0)[1]
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(forked).result() == 0
        """,
}
"""How agents are run for all of `tasks`."""


def inside_a_run(ways: dict[str, str]) -> str:
    """A part of a script: a run, and in it agents for all that is expected of these ways."""
    inside = [
        f"tasks = {tasks}\n{textwrap.dedent(ways[way]).strip()}\n"
        for way, tasks in expected_of(ways).items()
    ]
    return 'with mlflow.start_run(run_name="top"):\n' + textwrap.indent("".join(inside), "    ")


def expected_of(ways: dict[str, str]) -> dict[str, list[str]]:
    """The tasks of each way; without joblib there are no ways of joblib."""
    without_joblib = find_spec("joblib") is None
    return {
        way: [f"{way} {number:02}" for number in range(30 if way == "pool" else 3)]
        for way, code in ways.items()
        if not (without_joblib and "joblib" in code)
    }


PARTS = {
    "threads": inside_a_run(THREADS),
    "processes": inside_a_run(PROCESSES),
    "each thread": """
        shared, both = concurrent.futures.ThreadPoolExecutor(1), threading.Barrier(2)

        def work(own):
            with mlflow.start_run(run_name=own):
                both.wait(60)
                shared.submit(run, f"{own} shared").result()
                with concurrent.futures.ProcessPoolExecutor(1) as pool:
                    pool.submit(run, f"{own} process").result()
                both.wait(60)

        threads = [threading.Thread(target=work, args=(own,)) for own in ("one", "two")]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        """,
    "outlives": """
        def in_thread(task):
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                return pool.submit(run, task).result()

        fork = multiprocessing.get_context("fork")
        with concurrent.futures.ProcessPoolExecutor(1, fork) as pool:
            with mlflow.start_run(run_name="first") as first:
                pool.submit(in_thread, "in first").result()
            with mlflow.start_run(run_name="second"):
                pool.submit(in_thread, "in second").result()
            with mlflow.start_run(run_id=first.info.run_id):
                pool.submit(in_thread, "in first again").result()
        """,
    "sampled": """
        class Traced(ModelAgent):
            @mlflow.trace
            def decide(self, *args, **more):
                return super().decide(*args, **more)

        for ratio in "01":
            os.environ["MLFLOW_TRACE_SAMPLING_RATIO"] = ratio
            for n in range(2):
                Traced(Model(FINAL)).run(f"task {ratio}{n}", render=False, trace=False)
        """,
}
"""What one process does one after another, each part in an experiment of its own."""


@pytest.fixture(scope="module")
def parts(shared_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One process that has done all of `PARTS`; the begin of its experiments' names."""
    name, directory = f"parents {uuid.uuid4().hex[:12]}", tmp_path_factory.mktemp("parents")
    body = [
        f"mlflow.set_experiment({name + ' ' + part!r})\n{textwrap.dedent(code).strip()}\n"
        for part, code in PARTS.items()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        spool = {"QITOS_MLFLOW_SPOOL_DIR": str(directory / "spool")}
        begin = "from qitos_mlflow import tracing\n"
        script(begin + "".join(body), shared_server.ensure_running(), **spool)
    return name


@pytest.mark.parametrize("part", ["threads", "processes"])
def test_what_runs_inside_a_run_is_its_child(part: str, client: MlflowClient, parts: str) -> None:
    """On whichever thread and in whichever process it is started; in the parent's experiment."""
    expected = expected_of({"threads": THREADS, "processes": PROCESSES}[part])
    assert tasks(children(client, f"{parts} {part}")) == sorted(chain(*expected.values()))


def test_each_thread_has_the_run_that_is_open_around_it(client: MlflowClient, parts: str) -> None:
    """Also in a pool that threads share, and in processes that they start."""
    runs = runs_of(client, f"{parts} each thread")
    names = {run.id: run.name for run in runs if PARENT not in run.tags}
    found = {task(run): names[run.tags[PARENT]] for run in runs if PARENT in run.tags}
    assert found == {f"{own} {way}": own for own in ("one", "two") for way in ("shared", "process")}


def test_a_pool_of_processes_that_outlives_a_run_is_not_its_child(
    client: MlflowClient, parts: str
) -> None:
    """Nor that of the next one, which cannot be known there: until the first one is continued."""
    runs = runs_of(client, f"{parts} outlives")
    names = {run.id: run.name for run in runs}
    found = {task(run): names.get(run.tags.get(PARENT, "")) for run in runs if run.params}
    assert found == {"in first": "first", "in second": None, "in first again": "first"}


def test_a_parent_of_another_process_or_machine(
    mlflow_server: MlflowServer, client: MlflowClient, name: str
) -> None:
    """Its id in the environment is enough; mlflow is not even imported."""
    top = client.create_run(client.create_experiment(name), run_name="top")
    run_script(
        AGENT,
        RUN,
        "import sys; run(1); run(2); assert 'mlflow' not in sys.modules",
        MLFLOW_TRACKING_URI=mlflow_server.uri,
        QITOS_MLFLOW_PARENT_RUN_ID=top.info.run_id,
    )
    client.set_terminated(top.info.run_id)
    assert tasks(children(client, name)) == ["1", "2"]


def test_a_project_of_mlflow(
    mlflow_server: MlflowServer, client: MlflowClient, name: str, tmp_path: Path
) -> None:
    """`mlflow run` makes a run for the program, whose agents are its children."""
    project = tmp_path / "project"
    project.mkdir()
    entry = {"main": {"command": f"{sys.executable} program.py"}}
    (project / "MLproject").write_text(json.dumps({"name": "top", "entry_points": entry}))
    program = """
        run("without a word of MLflow")
        import mlflow
        with mlflow.start_run():
            run("inside")
        """
    (project / "program.py").write_text(AGENT + RUN + textwrap.dedent(program))
    run_script(
        f"""
        import mlflow
        mlflow.projects.run("project", experiment_name={name!r}, env_manager="local")
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    assert tasks(children(client, name)) == ["inside", "without a word of MLflow"]


# -- sampling --------------------------------------------------------------------------------


def test_traces_are_sampled_and_runs_are_not(client: MlflowClient, parts: str) -> None:
    """Without its tree, an agent leaves no spans of MLflow's own either."""
    runs = runs_of(client, f"{parts} sampled")
    assert tasks(runs) == ["00", "01", "10", "11"]
    assert {run.metrics["total_steps"] for run in runs} == {1}
    found = client.search_traces(locations=[runs[0].experiment_id])
    logged = {run.tags["qitos.trace_id"] for run in runs if task(run)[0] == "1"}
    assert {trace.info.tags["qitos.trace_id"] for trace in found} == logged
    for trace in found:  # The spans of MLflow's tracer are in there.
        assert "decide" in {span.name.rpartition(".")[2] for span in trace.data.spans}
