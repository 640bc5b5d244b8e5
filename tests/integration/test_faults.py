"""The server fails in every way at every moment: the agent goes on, and everything arrives once.

Real agents in processes of their own, a real server behind a proxy that fails on command.
docs/spool.md has the whole table.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.integration.agents import Agent
from tests.integration.faults import (
    FAULTS,
    assert_ended_in_time,
    assert_not_held,
    execute,
    fault,
    leftover,
)
from tests.integration.proxy import Proxy
from tests.integration.server import MlflowServer
from tests.integration.stored import StoredRun, assert_exactly_once


@pytest.mark.parametrize("name", [*FAULTS, "locked"])
@pytest.mark.parametrize("moment", ["ready", "mid"])
def test_a_fault_that_passes(
    name: str,
    moment: str,
    proxy: Proxy,
    mlflow_server: MlflowServer,
    logging_agent: Callable[..., Agent],
    control: Agent,
    runs: Callable[[], list[StoredRun]],
) -> None:
    """A fault at the start or amid a run holds nothing up, and nothing is missing afterwards."""
    # With mlflow in use, the start of a trace may wait for its run.
    used = moment == "ready"
    agent = logging_agent(traces=2, steps=4, import_mlflow=used, gates=[moment, "over"])
    agent.wait_for(moment)
    with fault(name, proxy, mlflow_server):
        agent.go()
        agent.wait_for("over")
        if name not in {"refused", "locked"}:
            proxy.wait_for(lambda seen: any(request.fault for request in seen))
    agent.go()
    report = agent.finish()
    assert_not_held(report, control.finish())
    assert_ended_in_time(report, control.finish(), 5.0)
    assert "qitos-mlflow sync" not in report.stderr
    assert_exactly_once(report, runs())


@pytest.mark.parametrize("name", [*FAULTS, "locked"])
def test_a_fault_that_lasts_beyond_the_end(
    name: str,
    proxy: Proxy,
    mlflow_server: MlflowServer,
    logging_agent: Callable[..., Agent],
    control: Agent,
    runs: Callable[[], list[StoredRun]],
) -> None:
    """The process ends in time and says what is left; the command it names delivers that."""
    exit_timeout_s = 1.0
    agent = logging_agent({"exit_timeout_s": exit_timeout_s}, traces=2, steps=4, gates=["end"])
    agent.wait_for("end")
    with fault(name, proxy, mlflow_server):
        agent.go()
        report = agent.finish()
    assert_not_held(report, control.finish())
    assert_ended_in_time(report, control.finish(), exit_timeout_s)
    records, traces, command = leftover(report)
    assert 0 < records <= len(report.spans()) + 5 * len(report.trace_ids())
    assert 0 < traces <= len(report.trace_ids())
    assert f"{records} record" in execute(command)
    assert_exactly_once(report, runs())
