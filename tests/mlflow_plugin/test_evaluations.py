"""Evaluations on the agent's thread: which runs are part of one, and the records of it."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import orjson
import pytest
from qitos.benchmark import run_benchmark_tasks
from qitos.benchmark.runner import build_experiment_spec
from qitos.core.spec import RunSpec
from qitos.core.task import Task

from qitos_mlflow import MlflowTraceProcessor, context, evaluation, score, tracing
from qitos_mlflow.delivery import find_segments, waiting_records
from qitos_mlflow.mlflow_plugin import benchmarks
from qitos_mlflow.settings import EVALUATION_VARIABLE, Settings
from qitos_mlflow.tracing import create_trace

Spooled = Callable[[], list[dict[str, Any]]]


def agent(name: str = "agent") -> str:
    """What runs in an evaluation; its trace's id."""
    with create_trace(name) as trace:
        trace.metadata["success"] = True
    return str(trace.trace_id)


def of_kind(kind: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


def children(records: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings of each trace's run, by the trace's id."""
    return {record["trace_id"]: record["settings"] for record in of_kind("trace_start", records)}


def verdicts(records: list[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    """What is said of traces of agents, by the trace's id and the score's name."""
    return {
        (one["trace_id"], one["name"].removeprefix("verdict/")): one["value"]
        for one in of_kind("assessment", records)
    }


def test_an_evaluation_begins_and_ends(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """With its params and its dataset; an agent inside says which evaluation it is part of."""
    attach(experiment_name="mine")
    with evaluation(
        "gaia",
        benchmark="gaia",
        split="dev",
        params={"temperature": 0.5},
        tasks=["a", "b"],
    ):
        inside = agent()
    outside = agent()
    found = records()
    [start], [end] = of_kind("evaluation_start", found), of_kind("evaluation_end", found)
    assert start["trace_id"] == end["trace_id"]
    assert start["metadata"] == {"temperature": 0.5}
    assert start["dataset"]["name"] == "gaia:dev"
    assert start["settings"]["tags"]["qitos.evaluation.expected"] == "2"
    assert end["status"] == "FINISHED"
    within = children(found)[inside]["evaluation"]
    assert start["trace_id"] == f"evaluation {within['id']}"
    assert within["experiment_name"] == "mine"
    assert not within["places"]  # The experiment was given.
    assert "evaluation" not in children(found)[outside]
    assert EVALUATION_VARIABLE not in os.environ


def test_the_digest_of_the_tasks() -> None:
    """The same tasks in another order are the same dataset; others are not."""

    def digest(*tasks: str, **more: Any) -> str:
        made = evaluation("e", benchmark="b", tasks=list(tasks), **more)
        return made._dataset["digest"]  # type: ignore[index]

    assert digest("a", "b") == digest("b", "a") != digest("a", "c")
    given = SimpleNamespace(name="n", digest="d1", source=None)
    assert digest("a", dataset=given) == "d1"


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")]
)
def test_how_it_ends(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    error: type[BaseException],
    status: str,
) -> None:
    """An error leaves it as it is, and is its end."""
    attach()
    with pytest.raises(error), evaluation("e"):
        raise error
    assert of_kind("evaluation_end", records())[0]["status"] == status


def test_a_task_and_its_verdict(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """The verdict goes to the run of the last agent in it; all runs in it are one attempt."""
    attach()
    with evaluation("e", benchmark="b") as sweep, sweep.task(7, trial=1, category="hard") as task:
        first, last = agent(), agent()
        task.result(False, reward=0.25, prediction="42", stop_reason="not the agent's")
    found = records()
    runs = children(found)
    assert runs[first]["tags"] == runs[last]["tags"]
    tags = {key: text for key, text in runs[last]["tags"].items() if key != "qitos.attempt"}
    assert tags == {
        "qitos.benchmark": "b",
        "qitos.task_id": "7",
        "qitos.trial": "1",
        "qitos.category": "hard",
    }
    assert verdicts(found) == {(last, "success"): False, (last, "reward"): 0.25}
    [scored, _] = of_kind("assessment", found)
    assert (scored["type"], scored["source_type"], scored["source_id"]) == ("feedback", "CODE", "b")
    [result] = of_kind("evaluation_result", found)
    assert (result["trace_id"], result["added"]) == (last, {"tags": {"qitos.prediction": "42"}})


def test_a_task_without_an_agent(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Its result is a run of its own, with what is known of the agent; content can be left out."""
    attach(capture_content=False)
    with evaluation("e") as sweep:
        with sweep.task("a") as task:
            task.result(True, prediction="secret", steps=3, tokens=70, stop_reason="final")
        with sweep.task("b") as task:
            task.skip("no data")
        with pytest.raises(ValueError), sweep.task("c"):
            raise ValueError
        with pytest.raises(KeyboardInterrupt), sweep.task("d"):
            raise KeyboardInterrupt
    solved, skipped, failed = of_kind("evaluation_result", records())
    numbers = {"verdict/success": 1.0, "total_steps": 3.0, "total_tokens": 70.0}
    assert solved["added"] == {"metrics": numbers, "tags": {"stop_reason": "final"}}
    assert (solved["whole"], solved["name"], solved["status"]) == (True, "a", "FINISHED")
    assert skipped["added"] == {"metrics": {}, "tags": {"qitos.skipped": "no data"}}
    assert failed["added"]["metrics"] == {"verdict/success": 0.0}
    assert failed["status"] == "FAILED"


@pytest.mark.parametrize("mode", ["DISABLED", "ENABLED_WITHOUT_DATA"])
def test_tracing_modes_are_obeyed(
    mode: str, attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Nothing at all, or nothing of what the agent said."""
    attach()
    tracing.set_tracing_mode(tracing.TracingMode[mode])
    try:
        with evaluation("e") as sweep, sweep.task("a") as task:
            agent()
            task.result(True, prediction="secret")
    finally:
        tracing.set_tracing_mode(tracing.TracingMode.ENABLED)
    found = records()
    assert bool(found) == (mode != "DISABLED")
    assert "secret" not in json.dumps(found)


def test_threads_are_part_of_the_evaluation_in_which_they_were_started(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Two at the same time do not mix; a pool from before belongs to the only one."""
    attach()
    old = ThreadPoolExecutor(1)
    old.submit(int).result()
    wanted: dict[str, str] = {}
    both = threading.Barrier(2)

    def sweep(name: str) -> None:
        with evaluation(name) as one:
            both.wait(20)
            with ThreadPoolExecutor(2) as pool:
                for trace_id in pool.map(agent, "abc"):
                    wanted[trace_id] = one.id
            both.wait(20)

    threads = [threading.Thread(target=sweep, args=(name,)) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    with evaluation("third") as one:
        wanted[old.submit(agent).result()] = one.id
    old.shutdown()
    assert {key: run["evaluation"]["id"] for key, run in children(records()).items()} == wanted


def test_an_agent_in_a_thread_is_part_of_the_task_that_started_it(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """As with a time limit for each task: `pool.submit(agent.run).result(timeout)`."""
    attach()
    with evaluation("e") as sweep, ThreadPoolExecutor(1) as pool:
        for task_id in "ab":
            with sweep.task(task_id) as task:
                pool.submit(agent).result()
                thread = threading.Thread(target=agent)
                thread.start()
                thread.join()
                task.result(True)
    found = records()
    tasks = [run["tags"]["qitos.task_id"] for run in children(found).values()]
    assert tasks == ["a", "a", "b", "b"]
    assert not of_kind("evaluation_result", found)  # No task is without an agent.
    assert len(verdicts(found)) == 2


def test_the_innermost_of_an_evaluation_and_a_context_names_the_parent(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Inside, a context takes an agent out, such as a judge; around, it names the evaluation's."""
    attach()
    with context(parent_run_id="mine"), evaluation("e") as sweep, sweep.task("t"):
        solver = agent()
        with context(user="u"):
            helper = agent()
        with context(parent_run_id="another"):
            judge = agent()
    found = records()
    runs = children(found)
    assert runs[solver]["evaluation"]["run_id"] == runs[helper]["evaluation"]["run_id"] == "mine"
    assert "evaluation" not in runs[judge]
    parents = {one["trace_id"]: one["parent_run_id"] for one in of_kind("trace_start", found)}
    assert parents[judge] == "another"


def test_agents_that_are_logged_elsewhere_are_no_part(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On another server, the ids of the evaluation's experiment and run are others' ids."""
    attach()
    with evaluation("e"):
        inside = agent()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://another.test")
        elsewhere = agent()
    runs = children(records())
    assert "evaluation" in runs[inside]
    assert "evaluation" not in runs[elsewhere]


def test_a_run_can_be_scored_while_an_evaluation_is_open(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """The evaluation itself is no trace."""
    attach()
    with evaluation("e"):
        inside = agent()
        score(inside, "style", 0.5)
    assert verdicts(records()) == {(inside, "style"): 0.5}


def spooled_by(script: str, tmp_path: Path) -> tuple[list[dict[str, Any]], str]:
    """What a script of its own leaves in the spool, and what it prints."""
    file = tmp_path / "script.py"
    file.write_text("from qitos_mlflow import evaluation\n" + script, "utf-8")
    environ = {key: value for key, value in os.environ.items() if key != "QITOS_TRACE_PLUGINS"}
    environ |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "QITOS_MLFLOW_OFFLINE": "1"}
    command = [sys.executable, file.name]
    done = subprocess.run(
        command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    spool = Path(environ["QITOS_MLFLOW_SPOOL_DIR"])
    segments = [waiting_records(paths) for paths in find_segments(spool)]
    found = [orjson.loads(record) for segment in segments for record in segment]
    shutil.rmtree(spool)
    return found, done.stdout


def test_an_evaluation_that_comes_before_qitos_is_logged(tmp_path: Path) -> None:
    """A launcher that only starts processes may import nothing else."""
    script = """
import os
with evaluation("e", params={"a": 1}):
    print(os.environ["QITOS_MLFLOW_EVALUATION"])
"""
    found, said = spooled_by(script, tmp_path)
    assert [record["kind"] for record in found] == ["evaluation_start", "evaluation_end"]
    assert json.loads(said)["name"] == "e"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("opened", ["nullcontext(sweep)", 'evaluation("e")'])
def test_verdicts_of_forked_processes_are_recorded(opened: str, tmp_path: Path) -> None:
    """Also if no agent runs in them, and whether or not they open the evaluation again."""
    script = f"""
import multiprocessing
from contextlib import nullcontext

def work(task_id):
    with {opened} as here:
        with here.task(task_id) as task:
            task.result(True)

with evaluation("e") as sweep:
    forked = multiprocessing.get_context("fork")
    processes = [forked.Process(target=work, args=(one,)) for one in "ab"]
    [process.start() for process in processes]
    [process.join() for process in processes]
"""
    found, _ = spooled_by(script, tmp_path)
    results = of_kind("evaluation_result", found)
    assert sorted(one["settings"]["tags"]["qitos.task_id"] for one in results) == ["a", "b"]
    [start] = of_kind("evaluation_start", found)
    assert {one["settings"]["evaluation"]["id"] for one in results} == {
        start["settings"]["evaluation"]["id"]
    }
    assert len(of_kind("evaluation_end", found)) == 1


def test_asyncio_tasks_are_part_of_their_own(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Also on the threads that they use."""
    attach()
    wanted: dict[str, str] = {}

    async def one(both: Callable[[], Awaitable[None]]) -> None:
        with evaluation("e") as sweep, sweep.task("t"):
            await both()
            wanted[await asyncio.to_thread(agent)] = sweep.id
            await both()

    async def main() -> None:
        waiting = 0
        opened = asyncio.Event()

        async def both() -> None:
            nonlocal waiting, opened
            waiting += 1
            mine = opened
            if waiting % 2 == 0:
                opened = asyncio.Event()
                mine.set()
            await mine.wait()

        await asyncio.gather(one(both), one(both))

    asyncio.run(main())
    assert len(set(wanted.values())) == 2
    assert {key: run["evaluation"]["id"] for key, run in children(records()).items()} == wanted


def test_a_process_finds_its_evaluation_in_the_environment(
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that was started inside neither begins it nor ends it; a plain key does both."""
    attach()
    with evaluation("sweep", benchmark="b") as outer:
        said = os.environ[EVALUATION_VARIABLE]
    monkeypatch.setenv(EVALUATION_VARIABLE, said)
    alone = agent()
    with evaluation("sweep") as joined:
        within = agent()
    with evaluation("another") as other:
        beside = agent()
    monkeypatch.setenv(EVALUATION_VARIABLE, "our key")
    with evaluation("sweep") as keyed:
        pass
    found = records()
    ids = {key: run["evaluation"]["id"] for key, run in children(found).items()}
    assert ids == {alone: outer.id, within: outer.id, beside: other.id}
    assert joined.id == outer.id
    assert os.environ[EVALUATION_VARIABLE] == "our key"
    assert keyed.id == "our key"
    assert children(found)[alone]["tags"]["qitos.benchmark"] == "b"
    begun = [record["trace_id"] for record in of_kind("evaluation_start", found)]
    assert begun == [f"evaluation {one.id}" for one in (outer, other, keyed)]


def test_overlapping_evaluations_leave_the_variable_as_it_was(
    attach: Callable[..., MlflowTraceProcessor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the first one ends first. Meanwhile it says the innermost that is open."""
    attach()
    monkeypatch.setenv(EVALUATION_VARIABLE, "key")

    def said() -> Any:
        text = os.environ[EVALUATION_VARIABLE]
        return json.loads(text)["name"] if text.startswith("{") else text

    first, second = evaluation("first"), evaluation("second")
    seen = [said()]
    for change in (first.__enter__, second.__enter__):
        change()
        seen.append(said())
    for one in (first, second):
        one.__exit__(None, None, None)
        seen.append(said())
    assert seen == ["key", "first", "second", "second", "key"]


@pytest.mark.parametrize("text", [" ", '{"id": " "}', '{"name": 7, "run_id": []}', "[", "null"])
def test_whatever_the_variable_says_agents_are_logged(
    text: str,
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It comes from outside."""
    attach()
    monkeypatch.setenv(EVALUATION_VARIABLE, text)
    inside = agent()
    assert inside in children(records())


def test_a_process_pool_gets_its_evaluation_as_an_argument(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """`pool.submit(work, sweep, task)`: its tasks are judged there, also without an agent."""
    attach()
    with evaluation("e", benchmark="b") as sweep:
        copied = pickle.loads(pickle.dumps(sweep))
        with copied.task("a") as task:
            task.result(True)
    found = records()
    [result] = of_kind("evaluation_result", found)
    assert result["settings"]["evaluation"]["id"] == sweep.id
    assert len(of_kind("evaluation_start", found)) == len(of_kind("evaluation_end", found)) == 1


def test_the_variable_is_no_unknown_setting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It causes no warning."""
    monkeypatch.setenv(EVALUATION_VARIABLE, "key")
    Settings.resolve()
    assert EVALUATION_VARIABLE not in caplog.text


def test_without_a_processor_nothing_happens() -> None:
    """Nor does it stand in the way."""
    with evaluation("e") as sweep, sweep.task("a") as task:
        task.result(True)


@pytest.mark.parametrize(
    "wrong",
    [{"name": ""}, {"params": [1]}, {"tasks": 1.5}, {"key": " "}, {"dataset": {}}],
)
def test_a_bad_argument_is_named(wrong: dict[str, Any]) -> None:
    """At once, with what to give instead."""
    with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}=.*cannot be used"):
        evaluation(**{"name": "e", **wrong})


@pytest.mark.parametrize("wrong", [{"success": "yes"}, {"reward": float("nan")}, {"steps": [1]}])
def test_a_verdict_that_is_no_number_is_named(wrong: dict[str, Any]) -> None:
    """At once: not at the end of the sweep."""
    with evaluation("e") as sweep, sweep.task("a") as task:
        with pytest.raises(TypeError, match=f"{next(iter(wrong))}=.*cannot be used"):
            task.result(**wrong)
        task.result(prediction=Unprintable())


class Unprintable:
    """A user's object."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    __hash__ = None  # type: ignore[assignment]


def test_an_evaluation_that_was_not_begun_says_so() -> None:
    """Its tasks would be part of nothing."""
    with pytest.raises(RuntimeError, match="with evaluation"):
        evaluation("e").task("a")


# -- the host's own runners ------------------------------------------------------------------


@pytest.fixture
def wrapped() -> Iterator[None]:
    """The host's function as it was, in the end."""
    homes = [module for name, module in sys.modules.items() if name.startswith("qitos")]
    before = {m: m.run_benchmark_tasks for m in homes if hasattr(m, "run_benchmark_tasks")}
    benchmarks.wrap_runners(sys.modules["qitos.benchmark.runner"])
    yield
    for module, original in before.items():
        module.run_benchmark_tasks = original


def test_a_benchmark_of_the_host_is_an_evaluation(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, wrapped: None
) -> None:
    """Its results are the verdicts, its specifications params; what it returns is the same."""
    import qitos.benchmark

    attach()
    tasks = [
        Task(id=f"t{n}", objective="?", metadata={"level": n % 2, "benchmark": "gaia"})
        for n in range(3)
    ]
    spec = RunSpec.infer(model_name="m")

    def runner(*, task: Any, run_spec: Any, experiment_spec: Any) -> dict[str, Any]:
        if task.id != "t2":
            agent()
        return {
            "task_id": task.id,
            "benchmark": "gaia",
            "split": "dev",
            "prediction": "42",
            "success": task.id != "t0",
            "stop_reason": "final",
            "steps": 2,
            "latency_seconds": 1.5,
            "token_usage": 30,
            "cost": 0.0,
            "trace_run_dir": None,
            "run_spec_ref": "x",
            "metadata": {"reward": 0.5},
        }

    given = {"tasks": tasks, "benchmark": "gaia", "split": "dev", "run_spec": spec}
    given["experiment_spec"] = build_experiment_spec(benchmark="gaia", split="dev", run_spec=spec)
    run = qitos.benchmark.run_benchmark_tasks
    assert run is not run_benchmark_tasks
    assert run(**given, runner=runner) == run_benchmark_tasks(
        **given, runner=lambda **k: runner(**k)
    )
    run(**given)  # Nothing is run.
    found = records()
    [start] = of_kind("evaluation_start", found)
    assert start["name"] == "gaia:dev"
    assert start["metadata"]["run_spec"]["model_name"] == "m"
    assert start["metadata"]["run_spec_fingerprint"] == spec.fingerprint()
    assert start["settings"]["tags"]["qitos.evaluation.expected"] == "3"
    results = of_kind("evaluation_result", found)
    assert [one.get("whole") for one in results] == [None, None, True]  # Answers, and a task.
    assert (
        results[2]["added"]["metrics"].items() >= {"verdict/success": 1, "total_steps": 2}.items()
    )
    runs = {key: run for key, run in children(found).items() if "evaluation" in run}
    first, second = runs
    solved = {(first, "success"): False, (second, "success"): True}
    assert verdicts(found) == solved | {(one, "reward"): 0.5 for one in runs}
    tags = [run["tags"] for run in runs.values()]
    assert [(tag["qitos.task_id"], tag.get("qitos.category")) for tag in tags] == [
        ("t0", "0"),
        ("t1", "1"),
    ]


def host_module(name: str, text: str, **known: Any) -> ModuleType:
    """A module of a later host, as its source has it."""
    module = ModuleType(name)
    vars(module).update(known)
    exec(compile(text, name, "exec"), vars(module))
    return module


JOBS = """
from concurrent.futures import ThreadPoolExecutor, as_completed

def execute_example_jobs(
    *, jobs, runner, output_path, run_spec, experiment_spec, concurrency=1, resume=False
):
    specs = {"run_spec": run_spec, "experiment_spec": experiment_spec}
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [
            pool.submit(_run_example_job, runner, item=item, **specs) for item in jobs
        ]
        return [future.result() for future in futures]

def _run_example_job(runner, item, run_spec, experiment_spec):
    return runner(**item, run_spec=run_spec, experiment_spec=experiment_spec)
"""
"""As in QitOS 0.6, without its files. Whether arguments have names does not matter."""


def test_jobs_of_a_recipe_are_an_evaluation_that_resumes(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """Its output says which one; each job has its trial."""
    attach()
    module = host_module("qitos.recipes.benchmarks._shared", JOBS)
    benchmarks.wrap_runners(module)
    spec = SimpleNamespace(name="tau", benchmark_name="tau-bench", benchmark_split="test")

    def runner(**item: Any) -> dict[str, Any]:
        agent()
        return {"success": True, "metadata": {"reward": 1.0}}

    for resume in (False, True):
        jobs = ({"task_id": "t", "trial": n, "job_key": f"t::{n}"} for n in range(2))
        rows = module.execute_example_jobs(
            jobs=jobs,
            runner=runner,
            output_path="out.jsonl",
            run_spec=None,
            experiment_spec=spec,
            concurrency=2,
            resume=resume,
        )
        assert len(rows) == 2
    found = records()
    first, second = (one["settings"]["evaluation"] for one in of_kind("evaluation_start", found))
    assert first["output"] == second["output"] == str(Path.cwd() / "out.jsonl")
    assert (first["resumes"], second["resumes"]) == (False, True)
    trials = sorted(run["tags"]["qitos.trial"] for run in children(found).values())
    assert trials == ["0", "0", "1", "1"]


SWEEPS = """
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

class ExperimentRunner:
    resume = False
    output_dir = "runs"
    experiment_spec = SimpleNamespace(name="x", benchmark_name="b", benchmark_split="")

    def run(self, tasks):
        combos = [{"model.temperature": 0}, {"model.temperature": 1}]
        with ThreadPoolExecutor(2) as pool:
            futures = [pool.submit(self._run_single, c, t, "?") for c in combos for t in tasks]
            return [future.result() for future in futures]

    def _run_single(self, combo, task_id, task_text):
        work()
        stop = "error" if task_id == "bad" else "final"
        return SimpleNamespace(success=False, stop_reason=stop, metadata={"sweep": combo})
"""
"""As in QitOS 0.6, where `success` is never true."""


def test_each_combination_of_an_experiment_is_an_evaluation(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled
) -> None:
    """With the swept values as params; the host's `success` says nothing, its errors do."""
    attach()
    module = host_module("qitos.experiment.runner", SWEEPS, work=agent)
    benchmarks.wrap_runners(module)
    assert len(module.ExperimentRunner().run(["good", "bad"])) == 4
    found = records()
    starts = of_kind("evaluation_start", found)
    assert sorted(start["metadata"]["model.temperature"] for start in starts) == [0, 1]
    assert len(of_kind("evaluation_end", found)) == 2
    runs = children(found)
    by_id = {start["settings"]["evaluation"]["id"] for start in starts}
    assert {run["evaluation"]["id"] for run in runs.values()} == by_id
    said = verdicts(found)
    assert {runs[trace]["tags"]["qitos.task_id"] for trace, _ in said} == {"bad"}
    assert set(said.values()) == {False}


def test_inside_of_an_evaluation_there_is_no_second_one(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, wrapped: None
) -> None:
    """The host's runner adds its tasks to the user's."""
    import qitos.benchmark

    attach()
    spec = RunSpec.infer(model_name="m")
    row = {"task_id": "t", "benchmark": "b", "split": "s", "prediction": 1, "success": True}
    row |= {"stop_reason": None, "steps": 0, "latency_seconds": 0, "token_usage": 0, "cost": 0}
    row |= {"trace_run_dir": None, "run_spec_ref": None}
    with evaluation("mine") as own:
        qitos.benchmark.run_benchmark_tasks(
            tasks=[Task(id="t", objective="?")],
            benchmark="b",
            split="s",
            run_spec=spec,
            experiment_spec=build_experiment_spec(benchmark="b", split="s", run_spec=spec),
            runner=lambda **_: row,
        )
    found = records()
    [start] = of_kind("evaluation_start", found)
    [result] = of_kind("evaluation_result", found)
    assert start["settings"]["evaluation"]["id"] == own.id
    assert result["settings"]["evaluation"]["id"] == own.id


@pytest.mark.parametrize("begun", [False, True])
def test_a_runner_in_a_process_of_an_evaluation_adds_its_tasks(
    begun: bool,
    attach: Callable[..., MlflowTraceProcessor],
    records: Spooled,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It begins the one that a launcher of many processes names, not one that is going on."""
    attach()
    key = 'the launcher\'s "key"'
    monkeypatch.setenv(EVALUATION_VARIABLE, json.dumps({"id": key, "name": "e"}) if begun else key)
    module = host_module("qitos.recipes.benchmarks._shared", JOBS)
    benchmarks.wrap_runners(module)
    module.execute_example_jobs(
        jobs=[{"task_id": "t"}],
        runner=lambda **_: {"success": True, "metadata": {"agent": agent()}},
        output_path="out.jsonl",
        run_spec=None,
        experiment_spec=None,
    )
    found = records()
    [run] = children(found).values()
    assert run["evaluation"]["id"] == "the launcher's 'key'"
    assert run["tags"]["qitos.task_id"] == "t"
    assert len(of_kind("evaluation_start", found)) == int(not begun)
    assert list(verdicts(found).values()) == [True]


def test_an_error_of_the_hosts_runner_is_passed_on(
    attach: Callable[..., MlflowTraceProcessor], records: Spooled, wrapped: None
) -> None:
    """The task counts as not solved, and the evaluation has failed."""
    import qitos.benchmark

    attach()
    spec = RunSpec.infer(model_name="m")

    def runner(**_: Any) -> Any:
        raise LookupError("no model")

    with pytest.raises(LookupError):
        qitos.benchmark.run_benchmark_tasks(
            tasks=[Task(id="t", objective="?")],
            benchmark="b",
            split="s",
            run_spec=spec,
            experiment_spec=build_experiment_spec(benchmark="b", split="s", run_spec=spec),
            runner=runner,
        )
    found = records()
    assert of_kind("evaluation_end", found)[0]["status"] == "FAILED"
    assert of_kind("evaluation_result", found)[0]["added"]["metrics"] == {"verdict/success": 0.0}
    assert json.dumps(found)
