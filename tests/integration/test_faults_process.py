"""The agent's process is killed, forks, ends early, runs out of disk: what was recorded arrives.

Real processes and a real server; docs/faults.md has the whole table.
"""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.integration.agents import Agent, Report
from tests.integration.faults import (
    CROWDED_MS,
    RETRYING,
    assert_ended_in_time,
    assert_not_held,
    assert_nothing_left,
    execute,
    leftover,
)
from tests.integration.logged import run_script
from tests.integration.proxy import Fault, Hang, Proxy, Refuse
from tests.integration.server import MlflowServer
from tests.integration.stored import (
    StoredRun,
    assert_exactly_once,
    assert_losses_are_counted,
    assert_survived_kill,
    ledger,
    runs_of,
    stored_runs,
)
from tests.waiting import eventually

Runs = Callable[[], list[StoredRun]]
Start = Callable[..., Agent]
MIB = 1024 * 1024
LARGEST_BYTES = 64_000
"""More than an agent writes down for its test, which must go on where no segment can grow. Much
less than it records: what the next segment takes, five seconds later, leaves enough to be lost."""

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
    from tests.integration.agent_script import Config, Gates, Holds, run

    processor = MlflowTraceProcessor({experiment!r}, tracking_uri={uri!r})
    add_trace_processor(processor)
    run(Config(failing_steps=[1], scores=[0.5], run_dirs=True), 1, Gates(Config(), Holds("")))
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
    agents = [logging_agent(traces=100, steps=10, tool_sleep_s=0.002) for _ in range(2)]
    for agent in agents:
        agent.wait_for("start")
        time.sleep(random.uniform(0.0, 0.3))
        agent.signal(signal.SIGKILL)
    reports = [agent.finish() for agent in agents]
    proxy.set(None)
    execute("qitos-mlflow sync")
    for report in reports:
        assert report.returncode == -signal.SIGKILL
        assert_survived_kill(report, runs_of(report, runs()))


def test_sigterm_ends_the_process_as_ever(logging_agent: Start, control: Agent, runs: Runs) -> None:
    """The package handles no signals; what was recorded before is delivered later."""
    agents = {
        moment: logging_agent(gates=[moment], steps=4, traces=100, tool_sleep_s=0.002)
        for moment in ("start", "mid", "end", "at random")
    }
    for moment, agent in agents.items():
        if moment == "at random":
            agent.wait_for("start")
            time.sleep(random.uniform(0.0, 0.3))
        else:
            agent.wait_for(moment)
        agent.signal(signal.SIGTERM)
    reports = {moment: agent.finish() for moment, agent in agents.items()}
    execute("qitos-mlflow sync")
    for moment, report in reports.items():
        assert report.returncode == -signal.SIGTERM
        assert_not_held(report, control.finish())
        mine = runs_of(report, runs())
        assert_survived_kill(report, mine)
        if moment != "at random":
            [run] = mine
            assert (run.status, run.tags["qitos.killed"]) == ("KILLED", "the process died")


FORKS: list[dict[str, Any]] = [
    {"fork_at": "next", "child_exits": True, "traces": 2},
    {"fork_at": "next", "traces": 2},
    {"fork_at": "mid"},
    {"fork_at": "mid", "child_traces": 0},
]
"""The child works on and exits, or flushes; it is forked in a tool, to work or for nothing."""


@pytest.mark.parametrize("reachable", [True, False])
def test_fork(
    reachable: bool, proxy: Proxy, logging_agent: Start, control: Agent, runs: Runs
) -> None:
    """Parent and child each deliver their own, the child also when it leaves by `os._exit`.

    A child that records nothing leaves no files; one that cannot deliver does.
    """
    timeout_s, spool = 30.0 if reachable else 1.0, os.environ["QITOS_MLFLOW_SPOOL_DIR"]
    options = {"exit_timeout_s": timeout_s, "flush_timeout_s": timeout_s}
    agents = [logging_agent(options, steps=3, gates=["start"], **fork) for fork in FORKS]
    for agent in agents:
        agent.wait_for("start")
    if not reachable:
        proxy.set(Refuse())
    for agent in agents:
        agent.go()
    reports = [agent.finish() for agent in agents]
    for report, agent in zip(reports, agents, strict=True):
        assert report.points["joined"]["status"] == 0
        assert_not_held(report, control.finish())
        assert_ended_in_time(report, control.finish(), timeout_s)
        assert_ended_in_time(ended(report, "child", "joined"), control.finish(), timeout_s)
        left = [*Path(spool).glob(f"*-{report.points['child']['pid']}-*")]
        assert reachable or bool(left) == (agent.config.child_traces > 0)
        if reachable:
            assert report.stderr == ""
        else:
            agent.wait_for_error(RETRYING)
    if not reachable:
        proxy.set(None)
        execute("qitos-mlflow sync")
    for report, fork in zip(reports, FORKS, strict=True):
        mine = runs_of(report, runs())
        assert_exactly_once(report, mine)
        assert len(mine) == fork.get("traces", 1) + fork.get("child_traces", 1)
    assert len(runs()) == 6 + 3


@pytest.mark.parametrize(
    ("method", "reachable"),
    [
        ("fork", True),
        ("fork", False),
        ("spawn", False),
        pytest.param("spawn", True, marks=pytest.mark.soak),
        pytest.param("forkserver", True, marks=pytest.mark.soak),
    ],
)
def test_multiprocessing(
    method: str, reachable: bool, proxy: Proxy, logging_agent: Start, run_agent: Start, runs: Runs
) -> None:
    """Workers deliver before they end, however they are started; what they cannot, is left."""
    timeout_s = 30.0 if reachable else 1.0
    options = {"exit_timeout_s": timeout_s}
    config = {"gates": ["over"], "workers": 2, "start_method": method}
    agent = logging_agent(options, **config)
    control = run_agent(way="control", truth="", **config)  # A worker's end takes longer, too.
    for one in (agent, control):
        one.wait_for("over")
    if not reachable:
        proxy.set(Refuse())
    for one in (agent, control):
        one.go()
    report, usual = agent.finish(), control.finish()
    assert report.points["workers"]["codes"] == [0, 0]
    assert_not_held(report, usual, CROWDED_MS)
    assert_ended_in_time(report, usual, timeout_s)
    assert_ended_in_time(last_worker(report), last_worker(usual), timeout_s)
    if reachable:
        assert report.stderr == ""
    else:
        agent.wait_for_error(RETRYING)
        proxy.set(None)
        execute("qitos-mlflow sync")
    assert_exactly_once(report, runs())
    assert len(runs()) == 3


def test_a_script_shorter_than_the_connection(
    mlflow_server: MlflowServer, experiment_name: str, runs: Runs
) -> None:
    """What a script records in its only 50 ms is delivered as it ends."""
    run_script(SHORT.format(experiment=experiment_name, uri=mlflow_server.uri))
    [run] = runs()
    assert (run.status, ledger(run)) == ("FINISHED", (2, 2, ""))
    assert len(run.points["step/number"]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux enforces RLIMIT_AS")
def test_a_far_limit_of_memory(
    mlflow_server: MlflowServer, experiment_name: str, runs: Runs
) -> None:
    """Schedulers of clusters set one for each job: the process delivers as without."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40))"
    run_script(limit, SHORT.format(experiment=experiment_name, uri=mlflow_server.uri))
    [run] = runs()
    assert (run.status, ledger(run)) == ("FINISHED", (2, 2, ""))


def test_a_first_record_while_the_interpreter_ends(
    mlflow_server: MlflowServer, experiment_name: str, runs: Runs
) -> None:
    """Also where no thread can be started any more, which is so from Python 3.12 on."""
    late = SHORT.replace("    work()", "    import atexit; atexit.register(work)")
    run_script(late.format(experiment=experiment_name, uri=mlflow_server.uri))
    [run] = runs()
    assert (run.status, ledger(run)) == ("FINISHED", (2, 2, ""))
    assert len(run.points["step/number"]) == 2


def test_work_pending_at_exit(
    mlflow_server: MlflowServer, logging_agent: Start, control: Agent, runs: Runs
) -> None:
    """With the server away, the process ends at its default deadline and says what it leaves."""
    with closing(Proxy(mlflow_server.port)) as refusing, closing(Proxy(mlflow_server.port)) as mute:
        faults: dict[Proxy, Fault] = {refusing: Refuse(), mute: Hang()}
        agents = [
            logging_agent({"tracking_uri": proxy.uri}, gates=["done"], traces=3) for proxy in faults
        ]
        for agent, (proxy, fault) in zip(agents, faults.items(), strict=True):
            agent.wait_for("start")
            proxy.set(fault)
        for agent in agents:
            agent.wait_for("done")
            agent.go()
        reports = [agent.finish() for agent in agents]
        for proxy in faults:
            proxy.set(None)
        for report in reports:
            assert_not_held(report, control.finish())
            assert_ended_in_time(report, control.finish(), 5.0)
            execute(leftover(report)[2])
            assert_exactly_once(report, runs_of(report, runs()))


def test_work_of_two_processors_pending_at_exit(
    mlflow_server: MlflowServer,
    logging_agent: Start,
    control: Agent,
    experiment_name: str,
    runs: Runs,
) -> None:
    """However many processors there are, the process has one exit deadline."""
    exit_timeout_s = 1.0
    too = f"{experiment_name} too"
    with closing(Proxy(mlflow_server.port)) as refusing, closing(Proxy(mlflow_server.port)) as mute:
        faults: dict[Proxy, Fault] = {refusing: Refuse(), mute: Hang()}
        agents = []
        for proxy in faults:
            options = {"tracking_uri": proxy.uri, "exit_timeout_s": exit_timeout_s}
            also = {**options, "experiment_name": too}
            agents.append(logging_agent(options, also=also, gates=["start"]))
        for agent, (proxy, fault) in zip(agents, faults.items(), strict=True):
            agent.wait_for("start")
            proxy.set(fault)
            agent.go()
        reports = [agent.finish() for agent in agents]
        for proxy in faults:
            proxy.set(None)
        for report in reports:
            assert_not_held(report, control.finish())
            assert_ended_in_time(report, control.finish(), exit_timeout_s)
        left = [leftover(report) for report in reports]
        printed = "".join(execute(command) for _, _, command in left)
    for report, (_, _, command) in zip(reports, left, strict=True):
        assert len(shlex.split(command)[2:]) == 1  # Both record to one pipeline.
        assert_exactly_once(report, runs_of(report, runs()))
    assert len(stored_runs(mlflow_server.database, too)) == len(runs()) == 2
    delivered = re.findall(r"(\d+) records? delivered", printed)
    assert sum(map(int, delivered)) == sum(records for records, _, _ in left)


def test_the_clock_set_back(logging_agent: Start, control: Agent, runs: Runs) -> None:
    """No wait is for the wall clock: a day back, at whatever moment, holds up and loses nothing."""
    agents = [
        logging_agent(traces=2, steps=4, clock_back_s=86_400.0, clock_back_at=moment)
        for moment in ("ready", "mid", "end")
    ]
    for report in [agent.finish() for agent in agents]:
        assert_not_held(report, control.finish())
        assert_ended_in_time(report, control.finish(), 5.0)
        assert_nothing_left(report)
        assert_exactly_once(report, runs_of(report, runs()))
    assert len(runs()) == 2 * 3


@pytest.mark.parametrize(
    ("place", "server"),
    [
        ("unwritable", "there"),
        ("unwritable", "comes back"),
        ("full", "comes back"),
        pytest.param("full", "there", marks=pytest.mark.soak),
    ],
)
def test_no_disk_for_the_spool(
    place: str,
    server: str,
    tmp_path: Path,
    small_disk: Callable[[int], Path],
    proxy: Proxy,
    logging_agent: Start,
    control: Agent,
    runs: Runs,
) -> None:
    """From a run's start, its middle or its end on: the agent goes on, delivery from memory does.

    Only what memory cannot hold until the server is back is lost.
    """
    options = {"exit_timeout_s": 30.0, **({"queue_bytes": 100_000} if server != "there" else {})}
    agents = {}
    for moment in ("ready", "mid", "end"):
        spool = small_disk(4 * MIB) if place == "full" else tmp_path / moment / "spool"
        agents[spool] = logging_agent(
            {**options, "spool_dir": str(spool)},
            traces=2,
            steps=10,
            payload_bytes=12_000,
            gates=[moment, "over"],
        )
    for spool, agent in agents.items():
        [moment, _] = agent.config.gates
        agent.wait_for(moment)
        if server != "there":
            proxy.set(Refuse())
        if place == "full":
            fill(spool)
        elif moment == "ready":
            spool.parent.touch()
        else:
            forbid_growth(agent, spool)
    for agent in agents.values():
        agent.go()
    for agent in agents.values():
        agent.wait_for("over")
        agent.wait_for_error("cannot be written")
        if server != "there":
            agent.wait_for_error(RETRYING)
    proxy.set(None)
    for agent in agents.values():
        agent.go()
        report = agent.finish()
        assert_not_held(report, control.finish())
        if server == "there":
            assert_nothing_left(report)
            assert_exactly_once(report, runs_of(report, runs()))
        else:
            beneath_a_file = place == "unwritable" and "ready" in agent.config.gates
            reason = "spool_unwritable" if beneath_a_file else "disk_full"
            assert report.returncode == 0, report.stderr
            assert " kept but not delivered" not in report.stderr
            assert_losses_are_counted(report, runs_of(report, runs()), reason)
    assert len(runs()) == 2 * 3


def test_neither_disk_nor_server(
    small_disk: Callable[[int], Path], proxy: Proxy, logging_agent: Start, control: Agent
) -> None:
    """The process ends in time all the same, and says how much is lost."""
    exit_timeout_s = 1.0
    spool = small_disk(1 * MIB)
    options = {"spool_dir": str(spool), "exit_timeout_s": exit_timeout_s}
    agent = logging_agent(options, traces=2, steps=4, gates=["ready"])
    agent.wait_for("ready")
    proxy.set(Refuse())
    fill(spool)
    agent.go()
    report = agent.finish()
    assert_not_held(report, control.finish())
    assert_ended_in_time(report, control.finish(), exit_timeout_s)
    lost = re.search(r"(\d+) records lost: neither the server nor the spool", report.stderr)
    assert lost, report.stderr
    assert int(lost[1]) >= len(report.spans())


def fill(disk: Path) -> None:
    """Leave no byte on it."""
    with (disk / "filler").open("wb", buffering=0) as file, pytest.raises(OSError, match="space"):
        while True:
            file.write(bytes(4096))


def forbid_growth(agent: Agent, spool: Path) -> None:
    """Let the agent's files become no larger than its segment is already: writing it fails.

    As on a disk that goes bad under an open file, for which permissions come too late.
    """
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("only Linux lets one process limit the files of another")
    # The agent records faster than its thread writes: there need not be a file yet.
    [part] = eventually(lambda: [*spool.glob("*.seg")])
    eventually(lambda: part.stat().st_size > LARGEST_BYTES)
    resource.prlimit(agent.pid, resource.RLIMIT_FSIZE, (LARGEST_BYTES, LARGEST_BYTES))


def test_nothing_is_imported_once_requests_are_sent(
    mlflow_server: MlflowServer, experiment_name: str
) -> None:
    """A fork waits for what a sink imports while it is opened; later imports it might split."""
    done = run_script(IMPORTS.format(experiment=experiment_name, uri=mlflow_server.uri))
    assert done.stdout == "True []\n"


def ended(report: Report, last: str, gone: str) -> Report:
    """Of a process that another one awaited: it ended between these points."""
    exit_s = report.points[gone]["time_s"] - report.points[last]["time_s"]
    return replace(report, exit_s=exit_s)


def last_worker(report: Report) -> Report:
    """Of the process of multiprocessing that ended last."""
    workers = [point for point in report.points if point.startswith("worker-")]
    return ended(report, max(workers, key=lambda one: report.points[one]["time_s"]), "workers")
