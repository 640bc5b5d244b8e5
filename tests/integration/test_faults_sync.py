"""What agents leave behind is finished by anyone: sync, a sidecar, the next agent. Never twice."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import orjson
import pytest

from tests.integration.agents import ROOT, Agent, Report
from tests.integration.faults import execute, leftover
from tests.integration.proxy import Fault, Hang, Latency, Proxy, Refuse, Status
from tests.integration.server import MlflowServer
from tests.integration.stored import (
    StoredRun,
    assert_exactly_once,
    assert_survived_kill,
    assert_whole,
    ledger,
    spans_by_trace,
    stored_runs,
    stray_traces,
)
from tests.waiting import eventually

Runs = Callable[[], list[StoredRun]]
Start = Callable[..., Agent]
WAIT_S = 60.0


def kill_in_mid_run(agent: Agent) -> Report:
    """SIGKILL in the middle of the agent's first run."""
    agent.wait_for("mid")
    # What was recorded within the last moments may be lost: the start of the run is older.
    segments = Path(os.environ["QITOS_MLFLOW_SPOOL_DIR"]).glob
    written = partial(segments, f"*-{agent.pid}-*.seg")
    eventually(lambda: [one for one in written() if b'"trace_start"' in one.read_bytes()])
    agent.signal(signal.SIGKILL)
    return agent.finish()


def of(report: Report, runs: list[StoredRun]) -> list[StoredRun]:
    """The runs of one agent's process."""
    return [run for run in runs if run.trace_id in report.trace_ids()]


@contextmanager
def sidecar(*options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A `qitos-mlflow sync` in the background, ended at last if it has not."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qitos_mlflow.cli", "sync", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_the_next_agent_finishes_what_a_killed_one_left(
    proxy: Proxy, logging_agent: Start, runs: Runs
) -> None:
    """No command is needed: an agent that delivers its own records also delivers leftovers."""
    proxy.set(Refuse())
    killed = kill_in_mid_run(logging_agent(gates=["mid"]))
    proxy.set(None)
    other = logging_agent(gates=["over"])
    other.wait_for("over")
    eventually(lambda: [run for run in runs() if run.status == "KILLED"])
    other.go()
    report = other.finish()
    found = runs()
    assert len(found) == 2
    assert_survived_kill(killed, of(killed, found))
    assert_exactly_once(report, of(report, found))


def test_sync_again_finds_nothing(proxy: Proxy, logging_agent: Start, runs: Runs) -> None:
    """The second of two syncs has nothing to do, and nothing is there twice."""
    proxy.set(Refuse())
    report = logging_agent({"exit_timeout_s": 0.1}, traces=2).finish()
    proxy.set(None)
    command = leftover(report)[2]
    assert "1 segment finished" in execute(command)
    assert_exactly_once(report, runs())
    assert execute("qitos-mlflow sync").strip().startswith("0 records delivered")
    assert_exactly_once(report, runs())


def test_syncs_at_once_beside_an_agent_at_work(
    proxy: Proxy, logging_agent: Start, runs: Runs
) -> None:
    """Two syncs share what dead agents left; what a living one is about is its own."""
    proxy.set(Refuse())
    dead = [logging_agent({"exit_timeout_s": 0.1}) for _ in range(3)]
    reports = [agent.finish() for agent in dead]
    proxy.set(None)
    living = logging_agent(traces=4, tool_sleep_s=0.01, gates=["mid", "over"])
    living.wait_for("mid")
    living.go()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, ["qitos-mlflow sync"] * 2))
    living.wait_for("over")
    living.go()
    reports.append(living.finish())
    execute("qitos-mlflow sync")  # The living one may have begun with some of them and ended.
    found = runs()
    for report in reports:
        assert_exactly_once(report, of(report, found))
    assert len(found) == sum(len(report.trace_ids()) for report in reports)


def test_a_sync_that_is_killed_is_done_again(
    proxy: Proxy, logging_agent: Start, runs: Runs
) -> None:
    """A crash between a request and its acknowledgement leaves nothing twice."""
    proxy.set(Refuse())
    report = logging_agent({"exit_timeout_s": 0.1}, traces=2).finish()
    proxy.set(Latency(100))
    for requests in range(2, 12, 3):
        proxy.forget()
        with sidecar():
            proxy.wait_for_requests(requests)
    proxy.set(None)
    execute(leftover(report)[2])
    assert_exactly_once(report, runs())


def test_a_sidecar_delivers_for_agents_that_work_offline(
    mlflow_server: MlflowServer,
    run_agent: Start,
    experiment_name: str,
    runs: Runs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their runs are live on the server, and neither mlflow nor a client is loaded into them."""
    options = {"tracking_uri": mlflow_server.uri, "experiment_name": experiment_name}
    with sidecar("--follow") as follower:
        monkeypatch.setenv("QITOS_MLFLOW_OFFLINE", "1")
        agents = [run_agent(options=options, traces=2, gates=["mid"]) for _ in range(2)]
        for agent in agents:
            agent.wait_for("mid")
        eventually(lambda: len([r for r in runs() if r.status == "RUNNING" and r.points]) == 2)
        killed, other = agents
        killed.signal(signal.SIGKILL)
        other.go()
        reports = [agent.finish() for agent in agents]
        eventually(lambda: sorted(r.status for r in runs()) == ["FINISHED", "FINISHED", "KILLED"])
        follower.terminate()
        assert follower.wait(WAIT_S) == 0
    found = runs()
    assert_survived_kill(reports[0], of(reports[0], found))
    assert_exactly_once(reports[1], of(reports[1], found))
    done = reports[1].points["done"]
    assert not done["mlflow_imported"]
    assert done["slow"] == [] or max(one["held_ms"] for one in done["slow"]) < 2100


def test_sync_to_another_server(
    mlflow_server: MlflowServer,
    proxy: Proxy,
    logging_agent: Start,
    local_store: str,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """What was recorded for one server is delivered to another, with the same ledger."""
    proxy.set(Refuse())
    agent = logging_agent({"exit_timeout_s": 0.1})
    killed = kill_in_mid_run(logging_agent(gates=["mid"]))
    report = agent.finish()
    execute(f"qitos-mlflow sync --tracking-uri {local_store}")
    found = stored_runs(tmp_path / "mlflow.db", experiment_name)
    assert len(found) == 2
    assert_survived_kill(killed, of(killed, found))
    assert_exactly_once(report, of(report, found))
    assert stored_runs(mlflow_server.database, experiment_name) == []


def test_the_rest_of_a_run_goes_to_another_server(
    proxy: Proxy,
    logging_agent: Start,
    runs: Runs,
    local_store: str,
    experiment_name: str,
    tmp_path: Path,
) -> None:
    """What was begun on a server that is gone is finished on another, and says what it lacks."""
    agent = logging_agent({"exit_timeout_s": 0.1}, gates=["mid"])
    agent.wait_for("mid")
    acks = (tmp_path / "spool").glob
    eventually(
        lambda: [ack for ack in acks("*.ack") if re.search(rb'"spans":[1-9]', ack.read_bytes())]
    )
    proxy.set(Refuse())
    agent.go()
    report = agent.finish()
    said = execute(f"qitos-mlflow sync --tracking-uri {local_store}")
    assert "refused" not in said
    [first] = runs()
    [run] = stored_runs(tmp_path / "mlflow.db", experiment_name)
    assert (first.status, run.status) == ("RUNNING", "FINISHED")
    assert run.trace_id == first.trace_id
    assert run.tags["qitos.partial"] == f"begun on {proxy.uri}"
    assert first.params.items() <= run.params.items()
    recorded, delivered, dropped = ledger(run)
    assert recorded == len(report.spans())
    assert 0 < delivered < recorded
    assert dropped == f"elsewhere={recorded - delivered}"
    assert len(run.spans) == delivered
    assert len({*first.spans, *run.spans}) == recorded
    assert stray_traces(tmp_path / "mlflow.db", experiment_name) == []


def test_a_damaged_line_is_a_counted_loss(
    proxy: Proxy, logging_agent: Start, runs: Runs, tmp_path: Path
) -> None:
    """All other records arrive, and the run says how many did not."""
    proxy.set(Refuse())
    report = logging_agent({"exit_timeout_s": 0.1}).finish()
    [part] = (tmp_path / "spool").glob("*.seg")
    lines = part.read_bytes().split(b"\n")
    spans = [n for n, line in enumerate(lines) if b'"kind":"span"' in line]
    lines[spans[3]] = lines[spans[3]][:-10] + b"overwrite!"
    part.write_bytes(b"\n".join(lines))
    proxy.set(None)
    execute("qitos-mlflow sync")
    [run] = runs()
    count = len(report.spans())
    assert run.status == "FINISHED"
    assert ledger(run) == (count, count - 1, "lost_in_spool=1")
    assert len(run.spans) == count - 1


def test_the_line_of_a_start_is_damaged(
    proxy: Proxy, logging_agent: Start, runs: Runs, tmp_path: Path
) -> None:
    """The rest of the trace is a run all the same, which says what it lacks."""
    proxy.set(Refuse())
    report = logging_agent({"exit_timeout_s": 0.1}).finish()
    [part] = (tmp_path / "spool").glob("*.seg")
    data = part.read_bytes()
    assert data.count(b'"kind":"trace_start"') == 1
    part.write_bytes(data.replace(b'"kind":"trace_start"', b'"kind":"trace_stort"'))
    proxy.set(None)
    execute("qitos-mlflow sync")
    [run] = runs()
    count = len(report.spans())
    assert run.status == "FINISHED"
    assert run.tags["qitos.start_lost"] == "true"
    assert ledger(run) == (count, count, "")
    assert len(run.spans) == count


def test_a_run_is_deleted_on_the_server(
    mlflow_server: MlflowServer, proxy: Proxy, logging_agent: Start, runs: Runs, tmp_path: Path
) -> None:
    """Its agent goes on, what is left of it is kept aside, and the server is not stormed."""
    agent = logging_agent(steps=20, traces=2, gates=["mid"])
    agent.wait_for("mid")
    eventually(runs)
    [deleted] = runs()
    mlflow_server.client.delete_run(deleted.run_id)
    before = len(proxy.requests)
    agent.go()
    report = agent.finish()
    assert report.returncode == 0, report.stderr
    assert len(proxy.requests) - before < 40
    [run] = runs()
    assert_whole(run, spans_by_trace(report)[run.trace_id])
    [dead] = (tmp_path / "spool").glob("*.dead")
    letters = [orjson.loads(line) for line in dead.read_bytes().splitlines()]
    assert {orjson.loads(letter["record"])["trace_id"] for letter in letters} == {deleted.trace_id}
    assert all("must be in the 'active' state" in letter["reason"] for letter in letters)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Status(503), id="503"),
        pytest.param(Hang(), id="hanging", marks=pytest.mark.soak),
    ],
)
def test_an_unknown_cost_holds_nothing_back(
    proxy: Proxy, logging_agent: Start, runs: Runs, tmp_path: Path, fault: Fault
) -> None:
    """A server that answers all but what model calls cost gets everything in time."""
    proxy.set(fault, only="traces/metrics")
    report = logging_agent({"exit_timeout_s": 30.0}).finish()
    assert any("traces/metrics" in request.path for request in proxy.requests)
    assert_exactly_once(report, runs())
    assert list((tmp_path / "spool").glob("*.seg")) == []
