"""For hours, in minutes: hundreds of kills, thousands of traces, outages longer than any timeout.

Run with ``-m soak``; CI does. What each shows in short is in test_faults*.py. With two workers of
pytest-xdist each begins with one of the two longest tests: conftest.py sees to that.
"""

from __future__ import annotations

import random
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from tests.integration.agent_script import Config
from tests.integration.agents import Agent, Report
from tests.integration.faults import execute
from tests.integration.forked import Parent
from tests.integration.proxy import Cut, Fault, Latency, Proxy, Refuse, Status
from tests.integration.server import MlflowServer
from tests.integration.stored import StoredRun, assert_exactly_once, assert_survived_kill

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]

Runs = Callable[[], list[StoredRun]]
Start = Callable[..., Agent]

MIB = 1024 * 1024
KILLS = 200
FAULTS: list[Fault | None] = [None, None, Refuse(), Status(503), Cut(20), Latency(50)]

PROCESSES, TRACES, STEPS = 4, 250, 20
"""1,000 traces of 125 spans; the server takes 1.5 ms for each span."""
MEMORY_BYTES = 64 * MIB
"""What an agent's process may take beyond one with a processor that does nothing."""
GROWTH_BYTES = 16 * MIB
"""What it may grow by in the second half of its life: noise of the allocator."""


class Memory:
    """Resident memory of processes over time, sampled until `stop`."""

    def __init__(self, agents: list[Agent]) -> None:
        self.samples: dict[int, list[int]] = {agent.pid: [] for agent in agents}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()

    def growth_bytes(self, pid: int) -> int:
        """The most it had in the second half beyond the most it had in the first."""
        samples = self.samples[pid]
        middle = len(samples) // 2
        return max(samples[middle:]) - max(samples[:middle])

    def _sample(self) -> None:
        while not self._stop.wait(0.25):
            for pid, samples in self.samples.items():
                try:
                    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                except (OSError, IndexError):
                    continue
                if pages:
                    samples.append(pages * 4096)


@contextmanager
def writes_locked(server: MlflowServer) -> Iterator[None]:
    """Nothing else can write the server's database; it can be read."""
    with closing(sqlite3.connect(server.database, timeout=30, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield


@pytest.fixture
def control_report(run_agent: Start) -> Report:
    """What a process takes whose processor does nothing."""
    return run_agent(way="control", traces=TRACES // 5, steps=STEPS, truth="").finish()


def check_memory(memory: Memory, reports: list[Report], control: Report) -> None:
    """No process took more than promised, nor more and more."""
    own_bytes = control.points["done"]["peak_rss_bytes"]
    for report in reports:
        assert report.points["done"]["peak_rss_bytes"] <= own_bytes + MEMORY_BYTES
    for pid in memory.samples:
        assert memory.growth_bytes(pid) <= GROWTH_BYTES, memory.samples[pid]


def check_runs(reports: list[Report], runs: list[StoredRun]) -> None:
    """Nothing is lost and nothing is there twice."""
    of_trace = {run.trace_id: run for run in runs}
    for report in reports:
        assert report.returncode == 0, report.stderr
        assert_exactly_once(report, [of_trace.pop(trace) for trace in report.trace_ids()])
    assert not of_trace


def test_four_processes_into_one_server(
    logging_agent: Start, control_report: Report, runs: Runs
) -> None:
    """All that four busy agents record at once arrives, in constant memory."""
    agents = [
        logging_agent({"flush_timeout_s": 1500.0}, traces=TRACES, steps=STEPS, flush=True)
        for _ in range(PROCESSES)
    ]
    memory = Memory(agents)
    reports = [agent.finish(1600) for agent in agents]
    memory.stop()
    assert [report.flushed for report in reports] == [True] * PROCESSES
    check_runs(reports, runs())
    check_memory(memory, reports, control_report)


def test_two_processes_without_a_server(
    proxy: Proxy, logging_agent: Start, control_report: Report, runs: Runs
) -> None:
    """With the server away from start to end, one sync afterwards delivers it all.

    Nothing that one of them does depends on how many others there are, as it does with a server.
    """
    proxy.set(Refuse())
    agents = [logging_agent({"exit_timeout_s": 1.0}, traces=TRACES, steps=STEPS) for _ in range(2)]
    memory = Memory(agents)
    reports = [agent.finish(600) for agent in agents]
    memory.stop()
    assert runs() == []
    proxy.set(None)
    execute("qitos-mlflow sync", timeout_s=1500)
    check_runs(reports, runs())
    check_memory(memory, reports, control_report)


@pytest.mark.parametrize("outage", ["frozen", "locked"])
def test_an_outage_longer_than_a_request(
    outage: str, mlflow_server: MlflowServer, logging_agent: Start, runs: Runs
) -> None:
    """Requests that the server finishes after we gave them up leave no second run."""
    logging_agent().finish()  # The experiment exists from here on.
    agent = logging_agent({"exit_timeout_s": 60.0}, gates=["ready", "over"])
    agent.wait_for("ready")
    if outage == "frozen":
        mlflow_server.freeze()
        agent.go()
        time.sleep(25)
        mlflow_server.thaw()
    else:
        with writes_locked(mlflow_server):
            agent.go()
            time.sleep(15)
    agent.wait_for("over")
    agent.go()
    report = agent.finish()
    assert_exactly_once(report, [run for run in runs() if run.trace_id in report.trace_ids()])
    assert len(runs()) == 2


def test_200_kills(proxy: Proxy, experiment_name: str, tmp_path: Path, runs: Runs) -> None:
    """Killed at random moments, with the server well or not: all but the last moments is there."""
    options = {"tracking_uri": proxy.uri, "experiment_name": experiment_name}
    config = Config(options=options, traces=100, steps=6, tool_sleep_s=0.01)
    reports: list[Report] = []
    with (
        Parent(tmp_path / "a") as one,
        Parent(tmp_path / "b") as other,
        ThreadPoolExecutor(2) as pool,
    ):
        for _ in range(KILLS // 2):
            proxy.set(random.choice(FAULTS))
            reports += pool.map(
                lambda parent: parent.kill_one(config, random.uniform(0.0, 0.4)), (one, other)
            )
    assert len(reports) == KILLS
    proxy.set(None)
    execute("qitos-mlflow sync", timeout_s=900)
    of_trace = {run.trace_id: run for run in runs()}
    lost_s = []
    for report in reports:
        found = [of_trace.pop(trace) for trace in report.trace_ids() if trace in of_trace]
        lost_s.append(assert_survived_kill(report, found))
    assert not of_trace
    assert sorted(lost_s)[KILLS * 95 // 100] <= 0.05
