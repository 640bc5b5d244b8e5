"""A real server, a proxy that fails on command, real agents, and a local store to log to."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.integration.agents import Agent
from tests.integration.made_store import make_store
from tests.integration.proxy import Proxy
from tests.integration.server import MlflowServer
from tests.integration.stored import StoredRun, never_rerun, stored_runs, stray_traces

if TYPE_CHECKING:
    from tests.integration.browser import Browser


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``browser`` where there is none; in CI one that is missing is a failure."""
    if item.get_closest_marker("browser") and not os.environ.get("CI"):
        pytest.importorskip("playwright", reason="playwright is not installed")
        from tests.integration.browser import chromium

        if chromium() is None:
            pytest.skip("no Chromium is installed")


LONGEST = ("test_four_processes_into_one_server", "test_two_processes_without_a_server")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the two longest soak tests begin at once: the first of two workers gets the first half.

    Each of them takes as long as its server, which has one thread.
    """
    longest = [item for item in items if item.name in LONGEST]
    if len(longest) == 2:
        first, second = longest
        rest = [item for item in items if item not in longest]
        middle = len(items) // 2 - 1
        items[:] = [first, *rest[:middle], second, *rest[middle:]]


FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let fixtures know whether their test has failed."""
    report = yield
    item.stash[FAILED] = report.failed
    return report


@pytest.fixture
def mlflow_server(shared_server: MlflowServer) -> Iterator[MlflowServer]:
    """The shared MLflow server, up; a test may stop, freeze or kill it."""
    yield shared_server.ensure_running()
    if shared_server.running:
        shared_server.thaw()


@pytest.fixture
def experiment_name(request: pytest.FixtureRequest) -> str:
    """An experiment that no other test logs to: the server's database is shared."""
    return f"{request.node.name} {uuid.uuid4().hex[:8]}"


@pytest.fixture
def proxy(mlflow_server: MlflowServer) -> Iterator[Proxy]:
    """A proxy before the server; it passes everything until the test sets a fault."""
    proxy = Proxy(mlflow_server.port)
    yield proxy
    proxy.close()


@pytest.fixture
def local_store(tmp_path: Path) -> str:
    """Tracking URI of a local sqlite store of the test's own, without an experiment."""
    make_store(tmp_path / "mlflow.db")
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a real file system of so many bytes: ``small_disk(256 * 1024)``. Needs root."""
    mounted: list[Path] = []

    def mount(size_bytes: int) -> Path:
        directory = tmp_path / f"small-disk-{len(mounted)}"
        directory.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "small-disk", str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"only root may mount a small file system: {done.stderr.strip()}")
        mounted.append(directory)
        return directory

    yield mount
    for directory in mounted:  # Lazily: a process that a test killed may still hold a file open.
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.fixture
def run_agent(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    """Start a real agent in a process of its own: ``run_agent(traces=3, steps=5, …)``.

    The options are `tests.integration.agent_script.Config`'s. What still runs at the end is killed.
    """
    agents: list[Agent] = []

    def start(**config: Any) -> Agent:
        agent = Agent(tmp_path / f"agent-{len(agents)}", **config)
        agents.append(agent)
        return agent

    yield start
    for agent in agents:
        agent.kill()


@pytest.fixture
def logging_agent(
    run_agent: Callable[..., Agent], proxy: Proxy, experiment_name: str
) -> Callable[..., Agent]:
    """``run_agent`` that logs through the proxy; ``options`` are added to the processor's."""

    def start(options: dict[str, Any] | None = None, **config: Any) -> Agent:
        where = {"tracking_uri": proxy.uri, "experiment_name": experiment_name}
        return run_agent(options={**where, **(options or {})}, **config)

    return start


@pytest.fixture
def control(run_agent: Callable[..., Agent]) -> Agent:
    """An agent with a processor that does nothing, as this machine runs it beside the test's."""
    return run_agent(way="control", traces=2, steps=4, truth="")


@pytest.fixture
def runs(
    mlflow_server: MlflowServer, experiment_name: str, request: pytest.FixtureRequest
) -> Iterator[Callable[[], list[StoredRun]]]:
    """What the server has stored of this test now; in the end there is no trace without a run."""
    yield lambda: stored_runs(mlflow_server.database, experiment_name)
    if request.node.stash[FAILED]:
        return  # It may have ended in the middle of things, and may be run again.
    with never_rerun():
        assert stray_traces(mlflow_server.database, experiment_name) == []


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """A headless Chromium, for tests marked ``browser``."""
    from tests.integration.browser import open_browser

    with open_browser() as browser:
        yield browser
