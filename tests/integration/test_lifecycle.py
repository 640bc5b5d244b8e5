"""The life of a run: MLflow's active run, the caller's own, and what of MLflow is never touched."""

from __future__ import annotations

import os
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from qitos_mlflow import tracing
from qitos_mlflow.tracing import create_trace
from tests.bridge.agents import FINAL, Model, ModelAgent, toolbox
from tests.integration.logged import AGENT, logged, only_run, run_script, runs_of
from tests.integration.proxy import Hang, Proxy, Refuse
from tests.integration.server import MlflowServer


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


# -- MLflow's active run ---------------------------------------------------------------------


@pytest.fixture
def mlflow_here(mlflow_server: MlflowServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """MLflow itself logs to the server too, to an experiment of its own; no run is active."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    assert mlflow.active_run() is None
    yield
    while mlflow.active_run() is not None:
        mlflow.end_run()


@pytest.mark.usefixtures("mlflow_here")
@pytest.mark.parametrize("times", [1, 2])
def test_a_run_left_open_goes_on(client: MlflowClient, experiment_name: str, times: int) -> None:
    """With `auto_end_run=False` the run is active after its trace, until the caller ends it.

    Also where the same processor was added twice.
    """
    with logged(None, experiment_name=experiment_name, auto_end_run=False) as processor:
        for _ in range(times - 1):
            tracing.add_trace_processor(processor)
        ModelAgent(Model(FINAL)).run("sum", render=False)
        mlflow.log_metric("custom/accuracy", 0.92)
        assert processor.force_flush() is True
        run = only_run(client, experiment_name)
        assert run.status == "RUNNING"
        assert mlflow.active_run().info.run_id == run.id
        mlflow.end_run()
        assert mlflow.active_run() is None
    run = only_run(client, experiment_name)
    assert run.status == "FINISHED"
    assert run.metrics["custom/accuracy"] == 0.92
    assert run.metrics["total_steps"] == 1


@pytest.mark.usefixtures("mlflow_here")
def test_a_run_left_open_is_in_nobodys_way(client: MlflowClient, experiment_name: str) -> None:
    """The next trace has a run of its own, a sibling, and `shutdown` leaves both open."""
    with logged(None, experiment_name=experiment_name, auto_end_run=False) as processor:
        for task in ("one", "two"):
            ModelAgent(Model(FINAL)).run(task, render=False)
        mlflow.log_metric("custom/accuracy", 0.92)
        mlflow.end_run()
        processor.shutdown()
        first, second = runs_of(client, experiment_name)
    assert (first.params["task"], first.status) == ("one", "RUNNING")
    assert (second.params["task"], second.status) == ("two", "FINISHED")
    assert second.metrics["custom/accuracy"] == 0.92
    assert "custom/accuracy" not in first.metrics
    assert "mlflow.parentRunId" not in second.tags


@pytest.mark.usefixtures("mlflow_here")
def test_what_a_tool_logs_itself_lands_in_the_run(
    client: MlflowClient, experiment_name: str
) -> None:
    """A tool's own `mlflow.log_metric` goes to the run of the trace, which is active meanwhile."""

    def measure() -> str:
        """Measure."""
        mlflow.log_metric("measured", 0.5)
        mlflow.set_tag("measured by", "the tool")
        return mlflow.active_run().info.run_id

    before = {run.id for run in runs_of(client, "Default")}
    with logged(None, experiment_name=experiment_name) as processor:
        agent = ModelAgent(Model("Thought: x\nAction: measure()", FINAL), toolbox(measure=measure))
        agent.run("sum", render=False)
        assert mlflow.active_run() is None
        assert processor.force_flush() is True
    run = only_run(client, experiment_name)
    assert run.metrics["measured"] == 0.5
    assert run.tags["measured by"] == "the tool"
    assert {run.id for run in runs_of(client, "Default")} == before


@pytest.mark.usefixtures("mlflow_here")
def test_the_callers_own_run_is_the_parent_and_stays(
    client: MlflowClient, experiment_name: str
) -> None:
    """Inside the caller's run an agent's is a child; the caller's goes on, with numbers of it."""
    with logged(None, experiment_name=experiment_name) as processor:
        own_experiment = client.create_experiment(f"{experiment_name} own")
        with mlflow.start_run(experiment_id=own_experiment) as own:
            ModelAgent(Model(FINAL)).run("sum", render=False)
            assert mlflow.active_run().info.run_id == own.info.run_id
            assert client.get_run(own.info.run_id).info.status == "RUNNING"
            mlflow.log_metric("own", 1)
        assert processor.force_flush() is True
    child = only_run(client, experiment_name)
    assert child.tags["mlflow.parentRunId"] == own.info.run_id
    assert child.status == "FINISHED"
    parent = only_run(client, f"{experiment_name} own")
    assert (parent.status, parent.params) == ("FINISHED", {})
    assert {key for key in parent.metrics if not key.startswith("eval/")} == {"own"}
    assert parent.metrics["eval/success_rate"] == child.metrics["success"] == 1.0


@pytest.mark.usefixtures("mlflow_here")
def test_shut_down_from_elsewhere_the_run_is_not_left_active(
    client: MlflowClient, experiment_name: str
) -> None:
    """A trace whose processor another thread has shut down gives MLflow's active run back."""
    with logged(None, experiment_name=experiment_name) as processor:
        with create_trace("long"):
            other = threading.Thread(target=processor.shutdown)
            other.start()
            other.join()
        assert mlflow.active_run() is None
    assert only_run(client, experiment_name).status == "FINISHED"


def test_a_server_that_hangs_holds_the_start_for_its_timeout_only(
    proxy: Proxy, client: MlflowClient, experiment_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not created in `start_timeout_s`, the run is not active, and the trace goes on without."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxy.uri)
    proxy.set(Hang())
    with logged(None, experiment_name=experiment_name, start_timeout_s=0.05) as processor:
        with create_trace("one"):
            assert mlflow.active_run() is None
        proxy.set(None)
        assert processor.force_flush(timeout_s=30) is True
    assert only_run(client, experiment_name).status == "FINISHED"


# -- MLflow's process-wide state -------------------------------------------------------------

STATE = """
    import os
    import mlflow

    def state():
        from mlflow.tracking import fluent
        from mlflow.utils import autologging_utils
        return {
            "uri": mlflow.get_tracking_uri(),
            "set": mlflow.is_tracking_uri_set(),
            "registry": mlflow.get_registry_uri(),
            "experiment": fluent._active_experiment_id,
            "autolog": dict(autologging_utils.AUTOLOGGING_INTEGRATIONS),
            "run": mlflow.active_run(),
            "trace": mlflow.get_last_active_trace_id(),
            "environ": dict(os.environ),
        }
"""


def test_mlflows_process_wide_state_is_untouched(
    mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    """Tracking URI, experiment, autolog switches and environment are what they were."""
    run_script(
        STATE,
        AGENT,
        f"""
        from qitos.tracing import add_trace_processor
        from qitos.tracing.mlflow_processor import MlflowTraceProcessor

        mlflow.set_tracking_uri("sqlite:///users.db")
        before = state()
        processor = MlflowTraceProcessor("untouched", tracking_uri={mlflow_server.uri!r})
        add_trace_processor(processor)
        agent.run(task="...", render=False)
        assert processor.force_flush() is True
        processor.shutdown()
        assert state() == before, (state(), before)
        assert not os.path.exists("users.db")
        """,
    )
    assert only_run(client, "untouched").status == "FINISHED"


def test_the_one_exception_is_a_run_to_be_continued(
    mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    """With `auto_end_run=False`, a URI given here and none set, MLflow's calls find the run."""
    run_script(
        STATE,
        AGENT,
        f"""
        from qitos.tracing import add_trace_processor
        from qitos.tracing.mlflow_processor import MlflowTraceProcessor

        add_trace_processor(MlflowTraceProcessor("continued", tracking_uri={mlflow_server.uri!r},
                                                 auto_end_run=False))
        before = state()
        result = agent.run(task="...", return_state=True)
        mlflow.log_metric("custom/accuracy", 0.92); mlflow.end_run()
        changed = {{key for key, value in state().items() if value != before[key]}}
        # MLflow's last trace is the agent's, as after one of MLflow's own.
        assert changed == {{"uri", "set", "registry", "environ", "trace"}}, changed
        """,
    )
    run = only_run(client, "continued")
    assert run.status == "FINISHED"
    assert run.metrics["custom/accuracy"] == 0.92


def test_a_run_left_open_on_a_new_local_store_goes_on(tmp_path: Path) -> None:
    """The same on MLflow's local store, which does not exist yet; tools are in the run too."""
    run_script(
        """
        from tests.bridge.agents import FINAL, Model, ModelAgent, toolbox
        from qitos_mlflow import MlflowTraceProcessor
        from qitos.tracing import add_trace_processor

        def measure():
            import mlflow
            mlflow.log_metric("measured", 0.5)

        add_trace_processor(MlflowTraceProcessor("local", auto_end_run=False))
        agent = ModelAgent(Model("Thought: x\\nAction: measure()", FINAL), toolbox(measure=measure))
        agent.run(task="...", render=False)
        import mlflow
        mlflow.log_metric("custom/accuracy", 0.92); mlflow.end_run()
        """
    )
    store = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    run = only_run(store, "local")
    assert run.status == "FINISHED"
    assert (run.metrics["measured"], run.metrics["custom/accuracy"]) == (0.5, 0.92)
    assert run.metrics["total_steps"] == 2
    assert runs_of(store, "Default") == []


def test_mlflow_imported_only_after_the_trace(
    mlflow_server: MlflowServer, client: MlflowClient
) -> None:
    """A script that imports mlflow when its agent is done finds the run that was left open."""
    run_script(
        AGENT,
        f"""
        import sys
        from qitos_mlflow import MlflowTraceProcessor
        from qitos.tracing import add_trace_processor

        add_trace_processor(MlflowTraceProcessor("after", tracking_uri={mlflow_server.uri!r},
                                                 auto_end_run=False))
        agent.run(task="...", render=False)
        assert "mlflow" not in sys.modules
        import mlflow
        mlflow.log_metric("custom/accuracy", 0.92)
        mlflow.end_run()
        """,
    )
    run = only_run(client, "after")
    assert (run.status, run.metrics["custom/accuracy"]) == ("FINISHED", 0.92)


ENDS = {
    "shut down": """
        with create_trace("one"):
            assert processor.force_flush()
            processor.shutdown()
            assert_none_is_active()
    """,
    "taken out and shut down": """
        with create_trace("one"):
            assert processor.force_flush()
            get_tracing_provider().remove_processor(processor)
            processor.shutdown()
            assert_none_is_active()
    """,
    "forked": """
        with create_trace("one"):
            assert processor.force_flush()
            child = os.fork()
            if not child:
                try:
                    assert_none_is_active()
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
    """,
    "replaced": """
        with create_trace("one"):
            assert processor.force_flush()
            set_trace_processors([])
    """,
    "disabled": """
        set_trace_processors([])
        qitos_mlflow.autolog(experiment_name=experiment)
        with create_trace("one"):
            assert get_tracing_provider().force_flush()
            qitos_mlflow.autolog(disable=True)
    """,
    "ended by Ctrl-C": """
        try:
            with create_trace("one") as trace:
                assert processor.force_flush()
                trace.metadata = Interrupting()
        except KeyboardInterrupt:
            pass
    """,
    "shut down, and its end never comes": """
        trace = create_trace("one").__enter__()
        assert processor.force_flush()
        thread = threading.Thread(target=processor.shutdown)
        thread.start()
        thread.join()
    """,
}
"""How a trace, or its part in a process, is over before mlflow is imported."""


def test_mlflow_imported_when_all_is_over(
    mlflow_server: MlflowServer, client: MlflowClient, experiment_name: str
) -> None:
    """A run that is over, or another process's, is not active in a program that imports mlflow.

    A process that has imported mlflow in the middle of a way is of no use for the others. Those
    are over one after another in one process: what any of them leaves would be active at the end.
    """
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    run_script(
        f"""
        import os, sys, threading
        import qitos_mlflow
        from qitos_mlflow import MlflowTraceProcessor
        from qitos.tracing import (
            create_trace, get_tracing_provider, set_trace_processors
        )

        class Interrupting(dict):
            def __bool__(self):
                raise KeyboardInterrupt

        def assert_none_is_active():
            assert "mlflow" not in sys.modules
            import mlflow
            assert mlflow.active_run() is None, mlflow.active_run()

        def over(ways):
            for way in ways:
                experiment = {experiment_name!r} + way
                processor = MlflowTraceProcessor(experiment)
                set_trace_processors([processor])  # A way may have left its own.
                exec(ENDS[way], globals() | {{"experiment": experiment, "processor": processor}})
            if "mlflow" not in sys.modules:
                assert_none_is_active()
            import mlflow
            assert mlflow.active_run() is None

        ENDS = {_dedented(ENDS)!r}
        first, second, *others = ENDS
        children = []
        for ways in ([first], [second], others):
            if not (child := os.fork()):
                over(ways)
                sys.exit()
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        """,
        MLFLOW_TRACKING_URI=mlflow_server.uri,
    )
    for way in ENDS:
        assert only_run(client, experiment_name + way).status == "FINISHED", way


def _dedented(bodies: dict[str, str]) -> dict[str, str]:
    return {name: textwrap.dedent(body) for name, body in bodies.items()}


def test_a_run_left_open_does_not_hold_up_the_end(
    proxy: Proxy, client: MlflowClient, experiment_name: str
) -> None:
    """MLflow's own exit handler does not wait for a server that has gone away meanwhile."""
    proxy.set(Hang(), only="/enough")

    def refuse() -> None:
        proxy.wait_for_requests(1, path="/enough")
        proxy.set(Refuse())

    refusing = threading.Thread(target=refuse)
    refusing.start()
    done = run_script(
        AGENT,
        f"""
        import contextlib, urllib.request
        import mlflow
        from qitos_mlflow import MlflowTraceProcessor
        from qitos.tracing import add_trace_processor

        processor = MlflowTraceProcessor({experiment_name!r}, auto_end_run=False)
        add_trace_processor(processor)
        agent.run(task="one", render=False)
        assert processor.force_flush() is True
        assert mlflow.active_run() is not None
        with contextlib.suppress(OSError):
            urllib.request.urlopen({proxy.uri!r} + "/enough")
        agent.run(task="two", render=False)
        """,
        MLFLOW_TRACKING_URI=proxy.uri,
        QITOS_MLFLOW_EXIT_TIMEOUT_S="1",
    )
    refusing.join()
    assert "qitos-mlflow sync" in done.stderr
    assert only_run(client, experiment_name).params["task"] == "one"
