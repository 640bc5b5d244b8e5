"""What is around a trace that begins, with MLflow's real stack of active runs. No server."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.pool import ThreadPool
from typing import Any

import mlflow
import pytest

from qitos_mlflow import _guard
from qitos_mlflow.mlflow_plugin.fluent.origins import INHERITED, watch
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun, run_class
from qitos_mlflow.mlflow_plugin.fluent.surroundings import (
    Surroundings,
    is_sampled,
    is_trial,
    surroundings,
)

SERVER = "http://mlflow.test:5000"
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def _server(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow logs to the server, and threads know where they were started."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", SERVER)
    watch()


@contextmanager
def open_run(run_id: str, experiment_id: str = "7") -> Iterator[None]:
    """A run of the user that is open on this thread."""
    info = mlflow.entities.RunInfo(run_id, experiment_id, "", "RUNNING", 0, None, "active")
    stack = mlflow.tracking.fluent._active_run_stack.get()
    stack.append(mlflow.ActiveRun(mlflow.entities.Run(info, None)))
    try:
        yield
    finally:
        stack.pop()


def parent() -> str | None:
    """Of a trace that begins here."""
    return surroundings(SERVER).parent_run_id


def on_a_thread(call: Callable[[], Any]) -> Any:
    """What `call` returns on a thread that is started here."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    thread.join(WAIT_S)
    return answers[0]


class Waiting:
    """A thread with a run of its own, open until the end of the block."""

    def __init__(self, run_id: str) -> None:
        self._over, self._began = threading.Event(), threading.Event()
        self._run_id = run_id
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        with open_run(self._run_id):
            self._began.set()
            self._over.wait(WAIT_S)

    def __enter__(self) -> None:
        self._thread.start()
        assert self._began.wait(WAIT_S)

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(WAIT_S)


def test_the_parent_is_the_users_innermost_open_run() -> None:
    """It brings its experiment. Nothing of it is asked of a server."""
    assert surroundings(SERVER) == Surroundings()
    with open_run("outer"), open_run("inner", "8"):
        found = surroundings(SERVER)
        assert found == Surroundings("inner", experiment_id="8")
        assert surroundings("http://elsewhere.test") == Surroundings()
    assert parent() is None


def test_runs_of_traces_are_no_parents() -> None:
    """Not an open one of another task of this thread, nor one that was left open."""
    stack = mlflow.tracking.fluent._active_run_stack.get()
    left_open = PendingRun()
    left_open.left_open = True
    ours = [run_class(mlflow.tracking.fluent)(run) for run in (PendingRun(), left_open)]
    with open_run("users"):
        stack += ours
        assert parent() == "users"
        assert on_a_thread(parent) == "users"
        del stack[-2:]
    stack += ours
    assert parent() is None
    assert on_a_thread(parent) is None
    stack.clear()


def test_a_thread_works_in_the_run_of_the_thread_that_started_it() -> None:
    """However many threads are in between, and although others have runs of their own."""
    with Waiting("another's"), open_run("here"):
        assert on_a_thread(parent) == "here"
        assert on_a_thread(lambda: on_a_thread(parent)) == "here"
        assert asyncio.run(asyncio.to_thread(parent)) == "here"
        with open_run("inner"):
            assert on_a_thread(parent) == "inner"


@pytest.mark.parametrize("make", [ThreadPoolExecutor, ThreadPool])
def test_a_pool_works_in_the_run_that_is_open_now(make: Callable[[int], Any]) -> None:
    """Its threads outlive the run in which they were started."""
    with Waiting("another's"), make(2) as pool:
        apply = getattr(pool, "apply", None) or (lambda call: pool.submit(call).result(WAIT_S))
        with open_run("first"):
            assert apply(parent) == "first"
        with open_run("second"):
            assert {apply(parent) for _ in range(4)} == {"second"}


def test_a_task_of_a_shared_pool_works_in_the_run_in_which_it_was_submitted() -> None:
    """Whichever thread has started the pool's threads; its own run comes first, as anywhere."""
    with ThreadPoolExecutor(1) as pool, Waiting("another's"):

        def submit(run_id: str) -> str | None:
            with open_run(run_id):
                return pool.submit(parent).result(WAIT_S)

        def inner() -> str | None:
            with open_run("inner"):
                return parent()

        with open_run("here"):
            assert pool.submit(parent).result(WAIT_S) == "here"
            assert on_a_thread(lambda: submit("there")) == "there"
            assert pool.submit(inner).result(WAIT_S) == "inner"
            assert pool.submit(on_a_thread, parent).result(WAIT_S) == "here"
            # A task's task comes from where the task does.
            assert pool.submit(lambda: pool.submit(parent)).result(WAIT_S).result(WAIT_S) == "here"
        assert pool.submit(parent).result(WAIT_S) == "another's"


def test_pools_that_start_each_others_tasks_come_from_nowhere() -> None:
    """Looking where a thread comes from has an end."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:

        def forth() -> Any:
            return other.submit(lambda: one.submit(parent).result(WAIT_S))

        assert one.submit(forth).result(WAIT_S).result(WAIT_S) is None


def test_the_only_open_run_is_everybodys() -> None:
    """Of two, none is guessed. A run whose thread has ended does not count."""
    barrier = threading.Event()
    answers: list[str | None] = []

    def work() -> None:  # Started where no run is open.
        barrier.wait(WAIT_S)
        answers.append(parent())

    def leave_open() -> None:
        open_run("forgotten").__enter__()

    on_a_thread(leave_open)
    for runs in (["one"], ["one", "two"]):
        barrier.clear()
        thread = threading.Thread(target=work)
        thread.start()
        with Waiting(runs[0]), Waiting(runs[-1]):
            barrier.set()
            thread.join(WAIT_S)
        with Waiting(runs[0]):
            assert parent() is None  # The main thread is in nobody's pool.
    assert answers == ["one", None]


def test_a_thread_whose_starter_has_ended_has_no_run_of_a_stranger() -> None:
    """Its number may be another thread's by now."""
    children: list[threading.Thread] = []
    go, answers = threading.Event(), []

    def work() -> None:
        go.wait(WAIT_S)
        answers.append(parent())

    def start() -> None:
        children.append(threading.Thread(target=work))
        children[0].start()

    on_a_thread(start)
    with Waiting("one"), Waiting("two"):
        go.set()
        children[0].join(WAIT_S)
    assert answers == [None]


def test_the_order_of_what_names_a_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As configured, the open run, MLFLOW_RUN_ID, the run of the process that started this one."""
    from multiprocessing import process

    monkeypatch.setitem(process.current_process()._config, INHERITED, "inherited")  # type: ignore[attr-defined]
    assert surroundings(SERVER) == Surroundings(None, "inherited", "inherited")
    monkeypatch.setenv("MLFLOW_RUN_ID", "variable")
    assert surroundings(SERVER) == Surroundings("variable", experiment_of="variable")
    given = Surroundings("given", experiment_of="given")
    with open_run("open"):
        assert surroundings(SERVER).parent_run_id == "open"
        assert surroundings(SERVER, "given") == given
    assert surroundings("http://elsewhere.test") == Surroundings()
    assert surroundings("http://elsewhere.test", "given") == given


def test_mlflows_own_experiment(monkeypatch: pytest.MonkeyPatch) -> None:
    """By `set_experiment`, by its variables; an id only where MLflow itself would log to."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", " named ")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "3")
    assert surroundings(SERVER) == Surroundings(experiment_id="3", experiment_name="named")
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", "4")
    assert surroundings(SERVER) == Surroundings(experiment_id="4", experiment_name="named")
    assert surroundings("http://elsewhere.test") == Surroundings(experiment_name="named")
    with open_run("open", "5"):
        assert surroundings(SERVER).experiment_id == "5"
    for name in ("NAME", "ID"):
        monkeypatch.setenv(f"MLFLOW_EXPERIMENT_{name}", "")
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    assert surroundings(SERVER) == Surroundings()


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_traces_are_sampled(ratio: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """UUIDs, whose first bits are not random, and other ids; always the same for the same trace."""
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", str(ratio))
    for make in (uuid.uuid4, lambda: f"trace {uuid.uuid4()}"):
        traces = [str(make()) for _ in range(4000)]
        taken = [is_sampled(trace) for trace in traces]
        assert abs(sum(taken) / len(taken) - ratio) < 0.05  # Seven standard deviations.
        assert taken == [is_sampled(trace) for trace in traces]


@pytest.mark.parametrize("text", ["half", "-0.1", "1.5", "nan"])
def test_a_ratio_that_is_none_is_said(
    text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And loses nothing."""
    monkeypatch.setattr(_guard, "_last_logged", {})
    monkeypatch.setenv("MLFLOW_TRACE_SAMPLING_RATIO", text)
    assert is_sampled(str(uuid.uuid4()))
    assert f"MLFLOW_TRACE_SAMPLING_RATIO={text!r}" in caplog.text


@mlflow.trace(sampling_ratio_override=0.0)
def _left_out() -> bool:
    return is_sampled(str(uuid.uuid4()))


def test_what_mlflow_leaves_out_is_left_out() -> None:
    """A trace inside a span that MLflow's own sampler has dropped is not logged, either."""
    assert not _left_out()
    assert is_sampled(str(uuid.uuid4()))


def test_the_trial_of_an_evaluation_is_recognised() -> None:
    """On its thread and on those that it starts; what others do meanwhile is logged."""
    from mlflow.genai.utils.trace_utils import convert_predict_fn

    asked: dict[str, bool] = {}
    goes_on = threading.Event()

    def elsewhere() -> None:
        goes_on.wait(WAIT_S)
        asked["elsewhere"] = is_trial()

    def started() -> None:
        asked["started"] = is_trial()

    def predict(question: str) -> str:
        asked["here"] = is_trial()
        goes_on.set()
        other.join(WAIT_S)
        thread = threading.Thread(target=started)
        thread.start()
        thread.join(WAIT_S)
        return question

    other = threading.Thread(target=elsewhere)
    other.start()
    convert_predict_fn(predict, {"question": "why?"})
    assert asked == {"here": True, "elsewhere": False, "started": True}
    assert not is_trial()


def test_starting_threads_and_processes_stays_what_it_was() -> None:
    """Wrapped once, however many plugins there are, under the name it has."""
    start = threading.Thread.start
    watch()
    assert threading.Thread.start is start
    assert start.__name__ == "start"
    with pytest.raises(RuntimeError, match="once"):
        thread = threading.Thread(target=int)
        thread.start()
        thread.join(WAIT_S)
        thread.start()
