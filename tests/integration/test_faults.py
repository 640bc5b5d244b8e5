"""The server fails in every way at every moment: the agent goes on, and everything arrives once.

Real agents in processes of their own, a real server behind a proxy that fails on command.
docs/faults.md has the whole table.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import pytest

from tests.integration.agents import Agent
from tests.integration.faults import (
    FAULTS,
    RETRYING,
    assert_ended_in_time,
    assert_not_held,
    assert_nothing_left,
    execute,
    fault,
    leftover,
)
from tests.integration.proxy import Proxy
from tests.integration.server import MlflowServer
from tests.integration.stored import StoredRun, assert_exactly_once, runs_of

Start = Callable[..., Agent]


@pytest.fixture
def faulty_agent(
    mlflow_server: MlflowServer, logging_agent: Start, experiment_name: str
) -> Iterator[Callable[..., tuple[Agent, list[Proxy]]]]:
    """An agent that does its runs once for each fault, each time by a proxy and processor anew."""
    with contextlib.ExitStack() as proxies:

        def start(
            names: Sequence[str], options: dict[str, Any] | None = None, **config: Any
        ) -> tuple[Agent, list[Proxy]]:
            ways = [proxies.enter_context(closing(Proxy(mlflow_server.port))) for _ in names]
            first, *others = [{**(options or {}), "tracking_uri": way.uri} for way in ways]
            then = [{"experiment_name": experiment_name, **other} for other in others]
            return logging_agent(first, then=then, **config), ways

        yield start


@pytest.mark.parametrize("moment", ["ready", "mid"])
def test_a_fault_that_passes(
    moment: str,
    mlflow_server: MlflowServer,
    faulty_agent: Callable[..., tuple[Agent, list[Proxy]]],
    control: Agent,
    runs: Callable[[], list[StoredRun]],
) -> None:
    """A fault at the start or amid a run holds nothing up, and nothing is missing afterwards."""
    names = [*FAULTS, "locked"]
    # With mlflow in use, the start of a trace may wait for its run.
    used = moment == "ready"
    config = {"traces": 2, "steps": 4, "import_mlflow": used, "gates": [moment, "over"]}
    agent, proxies = faulty_agent(names, {"exit_timeout_s": 30.0}, **config)
    for again, (name, proxy) in enumerate(zip(names, proxies, strict=True)):
        agent.wait_for(nth(moment, again))
        with fault(name, proxy, mlflow_server) as wait_until_met:
            agent.go()
            agent.wait_for(nth("over", again))
            wait_until_met(agent)
        agent.go()
    report = agent.finish()
    assert_not_held(report, control.finish())
    assert_nothing_left(report)
    assert_exactly_once(report, runs())


@pytest.mark.parametrize("names", [[*FAULTS], ["locked"]], ids=["proxies", "locked"])
def test_a_fault_that_lasts_beyond_the_end(
    names: Sequence[str],
    mlflow_server: MlflowServer,
    faulty_agent: Callable[..., tuple[Agent, list[Proxy]]],
    control: Agent,
    runs: Callable[[], list[StoredRun]],
) -> None:
    """The process ends in time and says what is left; the command it names delivers that."""
    exit_timeout_s = 1.0
    options = {"exit_timeout_s": exit_timeout_s}
    agent, proxies = faulty_agent(names, options, traces=2, steps=4, gates=["end"])
    with contextlib.ExitStack() as faults:
        met = []
        for again, (name, proxy) in enumerate(zip(names, proxies, strict=True)):
            agent.wait_for(nth("end", again))
            met.append(faults.enter_context(fault(name, proxy, mlflow_server)))
            agent.go()
        report = agent.finish()
        for wait_until_met in met:
            wait_until_met(agent)
    assert_not_held(report, control.finish())
    assert_ended_in_time(report, control.finish(), exit_timeout_s)
    records, traces, command = leftover(report)
    assert len(names) <= traces <= len(report.trace_ids())
    assert traces <= records <= len(report.spans()) + 5 * len(report.trace_ids())
    assert f"{records} record" in execute(command)
    assert_exactly_once(report, runs())


@pytest.mark.soak
def test_the_server_restarts(
    mlflow_server: MlflowServer,
    logging_agent: Callable[..., Agent],
    control: Agent,
    runs: Callable[[], list[StoredRun]],
) -> None:
    """Down while runs start, go on and end: those that outlast it deliver, sync does for others."""
    exit_timeout_s = 1.0
    options = {"tracking_uri": mlflow_server.uri}
    staying = [
        logging_agent(
            options, traces=2, steps=4, import_mlflow=moment == "ready", gates=[moment, "over"]
        )
        for moment in ("ready", "mid")
    ]
    leaving = logging_agent(
        {**options, "exit_timeout_s": exit_timeout_s}, traces=2, steps=4, gates=["end"]
    )
    for agent in [*staying, leaving]:
        agent.wait_for(agent.config.gates[0])
    mlflow_server.stop()
    for agent in [*staying, leaving]:
        agent.go()
        agent.wait_for_error(RETRYING)
    left = leaving.finish()
    assert_ended_in_time(left, control.finish(), exit_timeout_s)
    mlflow_server.start()
    for agent in staying:
        agent.wait_for("over")
        agent.go()
    reports = [agent.finish() for agent in staying]
    for report in reports:
        assert_ended_in_time(report, control.finish(), 5.0)
        assert_nothing_left(report)
    execute(leftover(left)[2])
    for report in [*reports, left]:
        assert_not_held(report, control.finish())
        assert_exactly_once(report, runs_of(report, runs()))
    assert len(runs()) == 2 * 3


def nth(point: str, again: int) -> str:
    """What `Gates` calls a point when the runs are done again for the n-th time."""
    return f"{point}-{again}" if again else point
