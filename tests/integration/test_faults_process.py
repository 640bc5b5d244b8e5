"""The agent's process is killed, forks, ends early, runs out of disk: what was recorded arrives.

Real processes and a real server; docs/spool.md has the whole table.
"""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.agents import Agent
from tests.integration.faults import (
    assert_ended_in_time,
    assert_not_held,
    execute,
    leftover,
)
from tests.integration.logged import run_script
from tests.integration.proxy import Fault, Hang, Proxy, Refuse
from tests.integration.server import MlflowServer
from tests.integration.stored import (
    StoredRun,
    assert_exactly_once,
    assert_survived_kill,
    ledger,
    spans_by_trace,
)

Runs = Callable[[], list[StoredRun]]
Start = Callable[..., Agent]

FORKING = """
    import os, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Forking with threads is the point here.
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor
    from tests.integration.agent_script import Config, Gates, run

    processor = MlflowTraceProcessor({experiment!r}, tracking_uri={uri!r})
    add_trace_processor(processor)
    run(Config(task_name="before"), 1, Gates([]))
    child = os.fork()
    if child == 0:
        run(Config(task_name="child"), 1, Gates([]))
        {leave}
    run(Config(task_name="parent"), 1, Gates([]))
    assert os.waitpid(child, 0)[1] == 0
"""

POOL = """
    import multiprocessing, sys, warnings
    warnings.simplefilter("ignore", DeprecationWarning)
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor
    from tests.integration.agent_script import Config, Gates, run

    def attach():
        add_trace_processor(MlflowTraceProcessor({experiment!r}, tracking_uri={uri!r}))

    def work(number):
        if {method!r} != "fork":  # A new interpreter knows nothing of the parent's processors.
            attach()
        run(Config(task_name="worker"), number, Gates([]))

    if __name__ == "__main__":
        attach()
        run(Config(task_name="parent"), 1, Gates([]))
        context = multiprocessing.get_context({method!r})
        workers = [context.Process(target=work, args=(n,)) for n in range(1, 4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
"""


SHORT = """
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.tracing import SpanType, StepSpanData, add_trace_processor, create_trace

    add_trace_processor(MlflowTraceProcessor({experiment!r}, tracking_uri={uri!r}))

    def work():
        with create_trace("short") as trace:
            for number in range(2):
                trace.create_span(SpanType.STEP, StepSpanData(number)).start().finish()

    work()
"""

IMPORTS = """
    import sys, threading

    connected, late = False, []

    def audit(event, args):
        global connected
        if threading.current_thread().name.startswith("qitos-mlflow"):
            connected = connected or event == "socket.connect"
            if connected and event == "import":
                late.append(args[0])

    sys.addaudithook(audit)
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor
    from tests.integration.agent_script import Config, Gates, run

    processor = MlflowTraceProcessor({experiment!r}, tracking_uri={uri!r})
    add_trace_processor(processor)
    run(Config(failing_steps=[1], scores=[0.5], run_dirs=True), 1, Gates([]))
    assert processor.force_flush(60.0)
    print(connected, late)
"""


@pytest.mark.parametrize("reachable", [True, False])
def test_killed_at_any_moment(
    reachable: bool,
    proxy: Proxy,
    logging_agent: Start,
    runs: Runs,
) -> None:
    """After SIGKILL all but the last moment is there, and the run says that its process died."""
    if not reachable:
        proxy.set(Refuse())
    for _ in range(3):
        agent = logging_agent(traces=100, steps=10, tool_sleep_s=0.002)
        agent.wait_for("start")
        time.sleep(random.uniform(0.0, 0.5))
        agent.signal(signal.SIGKILL)
        report = agent.finish()
        assert report.returncode == -signal.SIGKILL
        proxy.set(None)
        execute("qitos-mlflow sync")
        mine = [run for run in runs() if run.trace_id in report.trace_ids()]
        assert_survived_kill(report, mine)
        if not reachable:
            proxy.set(Refuse())


def test_sigterm_ends_the_process_as_ever(logging_agent: Start, runs: Runs) -> None:
    """The package handles no signals; what was recorded before is delivered later."""
    agent = logging_agent(gates=["mid"], steps=4)
    agent.wait_for("mid")
    agent.signal(signal.SIGTERM)
    report = agent.finish()
    assert report.returncode == -signal.SIGTERM
    execute("qitos-mlflow sync")
    assert_survived_kill(report, runs())
    [run] = runs()
    assert (run.status, run.tags["qitos.killed"]) == ("KILLED", "the process died")


@pytest.mark.parametrize("leave", ["sys.exit()", "processor.force_flush(30); os._exit(0)"])
def test_fork(leave: str, mlflow_server: MlflowServer, experiment_name: str, runs: Runs) -> None:
    """Parent and child each deliver their own, the child also when it leaves by `os._exit`."""
    run_script(FORKING.format(experiment=experiment_name, uri=mlflow_server.uri, leave=leave))
    assert_finished(runs(), ["before 1", "child 1", "parent 1"])


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_multiprocessing(
    method: str, mlflow_server: MlflowServer, experiment_name: str, runs: Runs
) -> None:
    """Workers deliver before they end, however they are started; nothing is left."""
    done = run_script(POOL.format(experiment=experiment_name, uri=mlflow_server.uri, method=method))
    assert done.stderr == ""
    assert_finished(runs(), ["parent 1", "worker 1", "worker 2", "worker 3"])


def test_a_script_shorter_than_the_connection(
    mlflow_server: MlflowServer, experiment_name: str, runs: Runs
) -> None:
    """What a script records in its only 50 ms is delivered as it ends."""
    run_script(SHORT.format(experiment=experiment_name, uri=mlflow_server.uri))
    [run] = runs()
    assert (run.status, ledger(run)) == ("FINISHED", (2, 2, ""))
    assert len(run.points["step/number"]) == 2


def test_a_first_record_while_the_interpreter_ends(
    mlflow_server: MlflowServer, experiment_name: str, runs: Runs
) -> None:
    """Also where no thread can be started any more, which is so from Python 3.12 on."""
    late = SHORT.replace("    work()", "    import atexit; atexit.register(work)")
    run_script(late.format(experiment=experiment_name, uri=mlflow_server.uri))
    [run] = runs()
    assert (run.status, ledger(run)) == ("FINISHED", (2, 2, ""))
    assert len(run.points["step/number"]) == 2


@pytest.mark.parametrize("fault", [Refuse(), Hang()])
def test_work_pending_at_exit(
    fault: Fault, proxy: Proxy, logging_agent: Start, control: Agent, runs: Runs
) -> None:
    """With the server away, the process ends at its default deadline and says what it leaves."""
    agent = logging_agent(gates=["done"], traces=3)
    agent.wait_for("start")
    proxy.set(fault)
    agent.wait_for("done")
    agent.go()
    report = agent.finish()
    assert_ended_in_time(report, control.finish(), 5.0)
    proxy.set(None)
    execute(leftover(report)[2])
    assert_exactly_once(report, runs())


def test_the_clock_set_back(logging_agent: Start, control: Agent, runs: Runs) -> None:
    """No wait is for the wall clock: a day back in mid-run holds nothing up and loses nothing."""
    report = logging_agent(traces=2, steps=4, clock_back_s=86_400.0).finish()
    assert_not_held(report, control.finish())
    assert_ended_in_time(report, control.finish(), 5.0)
    assert_exactly_once(report, runs())


@pytest.mark.parametrize("place", ["full", "unwritable"])
@pytest.mark.parametrize("reachable", [True, False])
def test_no_disk_for_the_spool(
    place: str,
    reachable: bool,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    proxy: Proxy,
    logging_agent: Start,
    control: Agent,
    runs: Runs,
) -> None:
    """The agent goes on; delivery does so from memory; only what that cannot hold is lost."""
    directory = small_disk(64 * 1024) if place == "full" else tmp_path / "file" / "spool"
    if place == "unwritable":
        directory.parent.touch()
    if not reachable:
        proxy.set(Refuse())
    agent = logging_agent(
        {"spool_dir": str(directory), **({} if reachable else {"queue_bytes": 400_000})},
        traces=2,
        steps=20,
        payload_bytes=2000,
        gates=["over"],
    )
    agent.wait_for("over")
    proxy.set(None)
    agent.go()
    report = agent.finish()
    assert_not_held(report, control.finish())
    assert report.returncode == 0, report.stderr
    if reachable:
        assert_exactly_once(report, runs())
        return
    recorded = spans_by_trace(report)
    reason = "disk_full" if place == "full" else "spool_unwritable"
    lost = 0
    for run in runs():
        told, delivered, dropped = ledger(run)
        assert told == len(recorded[run.trace_id])
        # Of the tree's root, the first version is there also where the last one is lost.
        assert len(set(run.spans) & recorded[run.trace_id].keys()) - delivered in (0, 1)
        assert dropped == (f"{reason}={told - delivered}" if told > delivered else "")
        lost += told - delivered
    assert lost > 0


def test_nothing_is_imported_once_requests_are_sent(
    mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """A fork waits for what a sink imports while it is opened; later imports it might split."""
    done = run_script(IMPORTS.format(experiment=experiment_name, uri=mlflow_server.uri))
    assert done.stdout == "True []\n"


def assert_finished(runs: list[StoredRun], tasks: list[str]) -> None:
    """There is one whole run for each task and no other."""
    assert sorted(run.params["task"] for run in runs) == tasks
    for run in runs:
        assert run.status == "FINISHED"
        recorded, delivered, dropped = ledger(run)
        assert recorded == delivered == len(set(run.spans)) == len(run.spans)
        assert not dropped
