"""What a forked child inherits: neither files of its program nor the parent's runs are harmed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.integration.agents import Agent
from tests.integration.faults import assert_not_held
from tests.integration.logged import run_script, runs_of
from tests.integration.proxy import Latency, Proxy
from tests.integration.server import MlflowServer
from tests.integration.stored import StoredRun, assert_exactly_once, never_rerun
from tests.integration.stored import runs_of as of_agent

Runs = Callable[[], list[StoredRun]]
Start = Callable[..., Agent]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")

DAEMON = """
    import gc, os, sys, warnings
    from qitos_mlflow import MlflowTraceProcessor
    from qitos_mlflow.tracing import SpanType, StepSpanData, add_trace_processor, create_trace

    warnings.simplefilter("ignore", DeprecationWarning)  # Forking with threads is the point here.
    processor = MlflowTraceProcessor({experiment!r}, tracking_uri={uri!r})
    add_trace_processor(processor)

    def work(name):
        with create_trace(name) as trace:
            trace.create_span(SpanType.STEP, StepSpanData(0)).start().finish()

    work("parent's first")
    assert processor.force_flush(60)
    children = []
    for works in (False, True):
        if child := os.fork():
            children.append(child)
            continue
        os.closerange(3, 256)  # As python-daemon does.
        files = [open(f"file-{{works}}-{{number}}", "w") for number in range(40)]
        if works:
            work("child's")
            assert processor.force_flush(60)
        gc.collect()
        for file in files:
            file.write("content")
        sys.exit()  # Python writes it as the process ends.
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    work("parent's last")
"""


@pytest.mark.parametrize("place", ["server", "store"])
def test_a_daemon_has_its_files_to_itself(
    place: str,
    tmp_path: Path,
    mlflow_server: MlflowServer,
    local_store: str,
    experiment_name: str,
) -> None:
    """A child that closes all descriptors finds the files it opens then as it wrote them."""
    uri = mlflow_server.uri if place == "server" else local_store
    done = run_script(DAEMON.format(experiment=experiment_name, uri=uri))
    lines = [line for line in done.stderr.splitlines() if "mlflow.store.db" not in line]
    assert lines == []
    files = [*tmp_path.glob("file-*")]
    assert [file.read_text() for file in files] == ["content"] * 2 * 40
    with never_rerun():
        stored = runs_of(MlflowClient(uri), experiment_name)
        assert [run.name for run in stored] == ["parent's first", "child's", "parent's last"]
        assert {run.status for run in stored} == {"FINISHED"}


FORKS: list[dict[str, Any]] = [
    {"fork_at": "next", "child_exits": True},
    {"fork_at": "mid"},
    {"fork_at": "mid", "child_traces": 0, "child_exits": True},
]
"""The child works on and exits; it is forked in a tool, to work or for nothing."""


@pytest.mark.parametrize("latency_ms", [pytest.param(0, marks=pytest.mark.soak), 150])
def test_fork_under_gevent(
    latency_ms: int, proxy: Proxy, logging_agent: Start, control: Agent, runs: Runs
) -> None:
    """Greenlets of the parent, amid its requests and records, send nothing from the child."""
    if latency_ms:
        proxy.set(Latency(latency_ms))
    options = {"exit_timeout_s": 60.0, "flush_timeout_s": 60.0}
    config = {"traces": 2, "steps": 4, "tool_sleep_s": 0.05, "gevent": True}
    agents = [logging_agent(options, **config, **fork) for fork in FORKS]
    for agent, fork in zip(agents, FORKS, strict=True):
        report = agent.finish()
        assert report.returncode == 0, report.stderr
        assert report.points["joined"]["status"] == 0
        assert_not_held(report, control.finish())
        mine = of_agent(report, runs())
        assert_exactly_once(report, mine)
        assert len(mine) == 2 + fork.get("child_traces", 1)
        lines = report.stderr.splitlines()
        assert [line for line in lines if "qitos-mlflow: " in line or "<Greenlet" in line] == []
    assert len(runs()) == 3 * 2 + 2
