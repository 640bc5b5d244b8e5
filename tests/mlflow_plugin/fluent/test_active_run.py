"""MLflow's stack of active runs during a trace, with MLflow's real stack."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest

from qitos_mlflow.mlflow_plugin.fluent import pending_run
from qitos_mlflow.mlflow_plugin.fluent.active_run import ActiveRun, let_go
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun, before_alarm_s
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef

VARIABLE = "MLFLOW_TRACKING_URI"
SERVER = "http://mlflow.test:5000"
LOCAL = "sqlite:////nowhere/runs.db"
TIMEOUT_S = 30.0


def ref(run_id: str = "run-1") -> RunRef:
    return RunRef(run_id, "7", "a name", "mlflow-artifacts:/7", 1_790_000_000_000)


def active_id() -> str | None:
    """Id of MLflow's active run on this thread."""
    run = mlflow.active_run()
    return None if run is None else str(run.info.run_id)


@pytest.fixture(autouse=True)
def _own_stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow logs to the server, and the stack is as empty afterwards as before."""
    monkeypatch.setenv(VARIABLE, SERVER)
    stack = mlflow.tracking.fluent._active_run_stack.get()
    assert stack == []
    yield
    stack.clear()


@pytest.fixture
def pending() -> PendingRun:
    """A run that the server has not created yet."""
    return PendingRun()


def test_active_from_its_creation_to_the_end_of_its_trace(pending: PendingRun) -> None:
    """A run becomes active at the first event after it was created, and is gone with its trace."""
    run = ActiveRun(pending, SERVER)
    run.follow()
    assert active_id() is None
    pending.created(ref())
    assert active_id() is None
    run.follow()
    run.follow()
    assert active_id() == "run-1"
    active = mlflow.active_run()
    assert (active.info.experiment_id, active.info.run_name) == ("7", "a name")
    assert (active.info.status, active.info.start_time) == ("RUNNING", 1_790_000_000_000)
    run.leave(open=False)
    assert active_id() is None
    run.follow()
    assert active_id() is None


def test_left_open_it_stays_active(pending: PendingRun) -> None:
    """Left open, the run stays until it is ended; the next one stands on top of it."""
    pending.created(ref())
    first = ActiveRun(pending, SERVER)
    first.follow()
    first.leave(open=True)
    second = PendingRun()
    second.created(ref("run-2"))
    ActiveRun(second, SERVER).leave(open=True)
    assert [run.info.run_id for run in mlflow.tracking.fluent._active_run_stack.get()] == [
        "run-1",
        "run-2",
    ]


def test_only_on_the_thread_of_the_trace(pending: PendingRun) -> None:
    """Events on other threads put the run on no stack."""
    pending.created(ref())
    run = ActiveRun(pending, SERVER)
    with ThreadPoolExecutor(1) as other:
        other.submit(run.follow).result()
        assert other.submit(active_id).result() is None
    assert active_id() is None


def test_a_trace_that_ends_elsewhere_leaves_nothing_behind(pending: PendingRun) -> None:
    """The run comes off its thread's stack also when the trace ends on another one."""
    pending.created(ref())
    run = ActiveRun(pending, SERVER)
    run.follow()
    with ThreadPoolExecutor(1) as other:
        other.submit(lambda: run.leave(open=False)).result()
    assert active_id() is None


def test_the_callers_own_runs_stay_where_they_are(pending: PendingRun) -> None:
    """What others have on the stack, below and above, is left alone, in whatever order they end."""
    stack = mlflow.tracking.fluent._active_run_stack.get()
    below, above = (mlflow.ActiveRun(mlflow.entities.Run(info, None)) for info in infos())
    stack.append(below)
    pending.created(ref())
    run = ActiveRun(pending, SERVER)
    run.follow()
    stack.append(above)
    run.leave(open=False)
    assert stack == [below, above]


def infos() -> list[mlflow.entities.RunInfo]:
    return [
        mlflow.entities.RunInfo(name, "0", "", "RUNNING", 0, None, "active")
        for name in ("below", "above")
    ]


def test_tasks_of_one_thread_take_turns(pending: PendingRun) -> None:
    """Of traces that go on in one thread, the one whose event came last has the active run."""
    pending.created(ref("one"))
    second = PendingRun()
    second.created(ref("two"))
    one, two = ActiveRun(pending, SERVER), ActiveRun(second, SERVER)
    for run, name in ((one, "one"), (two, "two"), (one, "one"), (one, "one"), (two, "two")):
        run.follow()
        assert active_id() == name
    with ThreadPoolExecutor(1) as other:
        other.submit(one.follow).result()
    assert active_id() == "two"
    stack = mlflow.tracking.fluent._active_run_stack.get()
    own = mlflow.ActiveRun(mlflow.entities.Run(infos()[1], None))
    stack.append(own)
    one.follow()
    assert active_id() == "above"
    stack.remove(own)
    two.leave(open=False)
    assert active_id() == "one"
    one.leave(open=False)
    assert active_id() is None


def test_the_caller_may_end_it(pending: PendingRun) -> None:
    """A run that the caller has taken off the stack is not missed at the end of its trace."""
    pending.created(ref())
    run = ActiveRun(pending, SERVER)
    run.follow()
    mlflow.tracking.fluent._active_run_stack.get().pop()
    run.leave(open=False)
    assert active_id() is None


@pytest.mark.parametrize("uri", [None, "http://elsewhere.test", LOCAL])
def test_not_where_the_callers_own_calls_go_elsewhere(pending: PendingRun, uri: str | None) -> None:
    """While MLflow logs somewhere else, its calls could not find the run: it is not active."""
    pending.created(ref())
    run = ActiveRun(pending, uri)
    run.follow()
    run.leave(open=True)
    assert active_id() is None


@pytest.mark.parametrize("uri", [None, "http://user:secret@left.test"])
def test_left_open_where_the_callers_calls_do_not_go(
    pending: PendingRun, uri: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A run to go on in that MLflow's own calls will not find: one warning with both places."""
    pending.created(ref())
    for adopt_uri in (False, True):
        run = ActiveRun(pending, uri, adopt_uri=adopt_uri)
        run.follow()
        run.leave(open=True)
        assert (SERVER in caplog.text) is adopt_uri
    place = "MLflow's local store" if uri is None else "http://left.test"
    assert place in caplog.text
    assert "secret" not in caplog.text
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    ("mlflows", "ours"),
    [
        (f"{SERVER}/", SERVER),
        ("sqlite:///runs.db", "sqlite:///{cwd}/runs.db"),
        ("./runs", "{cwd}/runs"),
    ],
)
def test_the_same_place_in_other_words(
    pending: PendingRun,
    mlflows: str,
    ours: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: object,
) -> None:
    """A relative path and a trailing slash name the same place as what they stand for."""
    monkeypatch.setenv(VARIABLE, mlflows)
    pending.created(ref())
    ActiveRun(pending, ours.format(cwd=tmp_path)).follow()
    assert active_id() == "run-1"


# -- before the run exists -------------------------------------------------------------------


def test_left_open_before_it_exists(pending: PendingRun) -> None:
    """A run left open is active at once; a call that asks for its id waits until it is created."""
    ActiveRun(pending, SERVER).leave(open=True)
    asked, done = threading.Event(), threading.Event()

    def create() -> None:
        asked.wait(TIMEOUT_S)
        pending.created(ref())
        done.set()

    creator = threading.Thread(target=create)
    creator.start()
    run = mlflow.active_run()
    asked.set()
    assert run.info.run_id == "run-1"
    assert done.wait(TIMEOUT_S)
    creator.join()
    assert run.info.experiment_id == "7"


def test_a_local_store_is_waited_for(pending: PendingRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run of a local store, which is never out of reach, is active before it exists."""
    monkeypatch.setenv(VARIABLE, LOCAL)
    run = ActiveRun(pending, LOCAL)
    run.follow()
    assert mlflow.active_run() is not None
    pending.created(ref())
    assert active_id() == "run-1"
    run.leave(open=False)
    assert active_id() is None


def test_a_server_out_of_reach_is_not_waited_for() -> None:
    """Once the server is known not to answer, a run that does not exist is not made active."""
    run = ActiveRun(PendingRun(lambda: True), SERVER)
    run.leave(open=True)
    assert mlflow.active_run() is None


def test_a_run_that_does_not_come_is_replaced(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call that has waited in vain goes on as it would have without us, in a run of MLflow's."""
    uri = f"sqlite:///{tmp_path}/runs.db"
    monkeypatch.setenv(VARIABLE, uri)
    monkeypatch.setattr(pending_run, "CREATION_WAIT_S", 0.01)
    pending = PendingRun()
    run = ActiveRun(pending, uri)
    run.leave(open=True)
    mlflow.log_metric("custom", 1)
    pending.created(ref())
    replaced = active_id()
    assert replaced != "run-1"
    assert mlflow.get_run(replaced).data.metrics == {"custom": 1}
    assert "not created in" in caplog.text
    mlflow.end_run()
    assert mlflow.get_run(replaced).info.status == "FINISHED"


def test_all_that_wait_get_the_run() -> None:
    """Each thread that waits for a run goes on once it exists, also if that is said twice."""
    pending = PendingRun()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(pending.wait, TIMEOUT_S) for _ in range(4)]
        pending.created(ref())
        pending.created(ref())
        assert [one.result(TIMEOUT_S / 2) for one in waiting] == [ref()] * 4
    assert pending.wait(0.0) == ref()


def test_waiting_ends_with_hope() -> None:
    """No call waits on for a run once its server is out of reach."""
    lost = threading.Event()
    pending = PendingRun(lost.is_set)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(pending.wait, TIMEOUT_S)
        lost.set()
        assert waiting.result(TIMEOUT_S / 2) is None


# -- parents ---------------------------------------------------------------------------------


class OutOfTime(Exception):
    """What a limit of a task's time raises."""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no such alarms")
def test_waiting_ends_before_an_alarm() -> None:
    """What an alarm's handler raises is raised in the agent, not in a wait of ours."""

    def out_of_time(*_: object) -> None:
        raise OutOfTime

    tests_own = signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's.
    before = signal.signal(signal.SIGALRM, out_of_time)
    try:
        assert before_alarm_s() == math.inf
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert PendingRun().wait(min(TIMEOUT_S, before_alarm_s())) is None
        with pytest.raises(OutOfTime):
            time.sleep(TIMEOUT_S)
        signal.setitimer(signal.ITIMER_REAL, TIMEOUT_S, TIMEOUT_S)  # A profiler's.
        assert before_alarm_s() == math.inf
    finally:
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, *tests_own)


def test_a_signal_handler_may_ask_for_the_run_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits no longer than the thread that it interrupts, and both get the same run."""
    monkeypatch.setattr("qitos_mlflow.mlflow_plugin.fluent.pending_run.CREATION_WAIT_S", 0.0)
    inside: list[str] = []

    def out_of_reach() -> bool:
        if not inside:  # As if interrupted here.
            inside.append("")
            inside.append(run.info.run_id)
        return False

    pending = PendingRun(out_of_reach)
    run = pending_run.run_class(mlflow.tracking.fluent)(pending)
    pending.created(ref())
    assert run.info.run_id == ref().run_id
    assert inside[1] == ref().run_id


def test_the_uri_is_set_for_runs_that_go_on(
    pending: PendingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `adopt_uri`, and only while MLflow has none, MLflow logs to where the run is."""
    monkeypatch.delenv(VARIABLE)
    pending.created(ref())
    ActiveRun(pending, SERVER).follow()
    assert active_id() is None
    try:
        ActiveRun(pending, SERVER, adopt_uri=True).follow()
        assert (active_id(), mlflow.get_tracking_uri()) == ("run-1", SERVER)
        ActiveRun(pending, "http://elsewhere.test", adopt_uri=True).follow()
        assert mlflow.get_tracking_uri() == SERVER
    finally:
        mlflow.set_tracking_uri(None)
        monkeypatch.delenv(VARIABLE, raising=False)


# -- the end of the process ------------------------------------------------------------------


def test_what_cannot_be_ended_is_let_go() -> None:
    """At exit MLflow finds only runs on its stack that it can end at once."""
    gone = threading.Event()
    lost, absent, there = PendingRun(gone.is_set), PendingRun(), PendingRun()
    for number, pending in enumerate((lost, there)):
        pending.created(ref(f"run-{number}"))
    for pending in (lost, absent, there):
        ActiveRun(pending, SERVER).leave(open=True)
    gone.set()
    let_go()
    assert [run.info.run_id for run in mlflow.tracking.fluent._active_run_stack.get()] == ["run-1"]


def test_pushing_is_reported(pending: PendingRun) -> None:
    """`on_push` is called when the run becomes active, not before."""
    pushed: list[str | None] = []
    run = ActiveRun(pending, SERVER, on_push=lambda: pushed.append(active_id()))
    run.follow()
    assert pushed == []
    pending.created(ref())
    run.follow()
    assert pushed == ["run-1"]


# -- mlflow imported later -------------------------------------------------------------------


def in_a_process(script: str, **environ: str) -> None:
    """Run `script` where mlflow is not imported; the module's names and a `ref` are there."""
    prelude = """
import sys, threading
from qitos_mlflow.mlflow_plugin.fluent.active_run import ActiveRun
from qitos_mlflow.mlflow_plugin.fluent.origins import mlflow_in_use
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
assert "mlflow" not in sys.modules
def ref(run_id="run-1"):
    return RunRef(run_id, "7", "name", "mlflow-artifacts:/7", 1)
"""
    variables = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", prelude + script],
        env={**variables, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_imported_by_another_thread_meanwhile() -> None:
    """Any thread may import mlflow during a trace: its thread's first MLflow call is in the run."""
    in_a_process(
        f"""
left, pending = PendingRun(), PendingRun()
left.created(ref("run-0"))
before = ActiveRun(left, {SERVER!r})
before.leave(open=True)
run = ActiveRun(pending, {SERVER!r})
pending.created(ref())

def use():
    import mlflow
    assert mlflow.active_run() is None

thread = threading.Thread(target=use)
thread.start()
thread.join()
import mlflow
stack = mlflow.tracking.fluent._active_run_stack.get()
assert [one.info.run_id for one in stack] == ["run-0", "run-1"]
run.follow()
run.leave(open=False)
assert [one.info.run_id for one in stack] == ["run-0"]
stack.clear()
""",
        MLFLOW_TRACKING_URI=SERVER,
    )


def test_not_imported_at_all() -> None:
    """Nothing here imports mlflow, and an ended trace has no run on a stack that comes later."""
    in_a_process(
        f"""
pending = PendingRun()
pending.created(ref())
run = ActiveRun(pending, {SERVER!r}, adopt_uri=True)
run.follow()
run.leave(open=False)
assert not mlflow_in_use() and "mlflow" not in sys.modules
import mlflow
assert mlflow_in_use()
assert mlflow.active_run() is None and not mlflow.is_tracking_uri_set()
"""
    )
