"""Which experiment a run goes to and which run it is a child of, as far as the server decides."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from qitos_mlflow import _guard
from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef, StoredRun
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.fakes.transport import FakeTransport
from tests.mlflow_plugin.records import MS, START_NS, Records

TIMEOUT_S = 10.0
PARENT = "mlflow.parentRunId"


@pytest.fixture(autouse=True)
def _warnings_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_guard, "_last_logged", {})


@pytest.fixture
def server() -> FakeTransport:
    server = FakeTransport()
    server.users_runs = {
        run_id: StoredRun(RunRef(run_id, "8", "", "", 0), status, end_ms, {}, {})
        for run_id, status, end_ms in (
            ("open", "RUNNING", None),
            ("continued", "RUNNING", START_NS // MS - 1),
            ("just ended", "FINISHED", START_NS // MS),
            ("ended", "FINISHED", START_NS // MS - 1),
        )
    }
    return server


def logged(
    server: FakeTransport, settings: dict[str, Any], *, start: bool = True, **fields: Any
) -> dict[str, Any]:
    """The run of a trace that is logged with these settings; without its start, if that is lost."""
    make = Records()
    settings = {"experiment_name": "qitos", **settings}
    sink = MlflowSink(b"{}", server)
    records = [make.start(settings=settings, **fields), make.end(settings=settings)]
    sink.prepare([orjson.dumps(record) for record in records[not start :]])
    assert sink.send(TIMEOUT_S) == []
    [run] = server.runs.values()
    return run


def test_an_id_goes_before_the_name(server: FakeTransport) -> None:
    """Nothing is created by the name then."""
    assert logged(server, {"experiment_id": "8"})["experiment_id"] == "8"
    assert "experiment_id" not in server.calls


def test_an_id_that_the_server_does_not_have_loses_nothing(
    server: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """The run goes to the experiment with the name, and one line says what to look at."""
    assert logged(server, {"experiment_id": "99"})["experiment_id"] == "7"
    [line] = [one for one in caplog.messages if "'99'" in one]
    assert "MLFLOW_EXPERIMENT_ID" in line
    assert "fake.test" in line


@pytest.mark.parametrize("start", [True, False])
def test_a_parent_of_another_process_brings_its_experiment(
    start: bool, server: FakeTransport
) -> None:
    """It is looked up once. Its experiment goes before MLflow's own; also without the start."""
    settings = {"experiment_of": "open", "experiment_id": "7"}
    assert logged(server, settings, start=start)["experiment_id"] == "8"
    assert server.calls[: server.calls.index("create_run")].count("stored_run") == 1


def test_a_parent_that_does_not_exist(
    server: FakeTransport, caplog: pytest.LogCaptureFixture
) -> None:
    """The run is logged where it would be without, at top level, and one line says why."""
    settings = {"experiment_of": "gone", "experiment_id": "8"}
    run = logged(server, settings, parent_run_id="gone")
    assert run["experiment_id"] == "8"
    assert PARENT not in run["tags"]
    [line] = [one for one in caplog.messages if "'gone'" in one]
    assert "MLFLOW_RUN_ID" in line


def test_a_wrong_id_for_each_request_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    """A minute: the log is not flooded, and nothing is kept of each."""
    for number in range(20):
        logged(FakeTransport(), {"experiment_of": f"gone {number}", "experiment_id": f"9{number}"})
    assert len(caplog.messages) == len(_guard._last_logged) == 2


@pytest.mark.parametrize(
    ("run_id", "parent", "experiment"),
    [
        ("open", "open", "8"),
        ("continued", "continued", "8"),
        ("just ended", "just ended", "8"),
        ("ended", None, "7"),
    ],
)
def test_an_inherited_run_is_the_parent_while_it_is_open(
    run_id: str, parent: str | None, experiment: str, server: FakeTransport
) -> None:
    """The processes of a pool outlive the run in which they were started.

    MLflow keeps the end of a run that is continued.
    """
    run = logged(server, {"inherited_run_id": run_id, "experiment_of": run_id})
    assert (run["tags"].get(PARENT), run["experiment_id"]) == (parent, experiment)


def test_a_given_experiment_stays(server: FakeTransport) -> None:
    """Then only the parent is the inherited one."""
    run = logged(server, {"inherited_run_id": "open", "experiment_name": "another"})
    server.experiments.clear()
    assert (run["tags"][PARENT], run["experiment_id"]) == ("open", "8")
    assert "has_experiment" not in server.calls


def test_a_server_that_does_not_answer_decides_nothing(server: FakeTransport) -> None:
    """Neither that there is no such run, nor that there is no such experiment."""
    make = Records()
    sink = MlflowSink(b"{}", server)
    settings = {"experiment_name": "qitos", "experiment_of": "open"}
    sink.prepare([orjson.dumps(make.start(settings=settings, parent_run_id="open"))])
    for call in ("stored_run", "has_experiment"):
        server.fail = lambda now, what, call=call: RetryLater("away") if now == call else None  # type: ignore[misc]
        with pytest.raises(RetryLater):
            sink.send(TIMEOUT_S)
    server.fail = lambda now, what: None
    assert sink.send(TIMEOUT_S) == []
    [run] = server.runs.values()
    assert (run["tags"][PARENT], run["experiment_id"]) == ("open", "8")


def test_another_process_goes_on_in_the_same_place(server: FakeTransport) -> None:
    """What the server has said is part of the acknowledged state."""
    make = Records()
    settings = {"experiment_name": "qitos", "experiment_of": "open"}
    first = MlflowSink(b"{}", server)
    first.prepare([orjson.dumps(make.start(settings=settings, parent_run_id="open"))])
    assert first.send(TIMEOUT_S) == []
    second = MlflowSink(b"{}", server, resumed=True)
    second.restore(first.state())
    second.prepare([orjson.dumps(make.end(settings=settings))])
    assert second.send(TIMEOUT_S) == []
    assert [run["status"] for run in server.runs.values()] == ["FINISHED"]
    assert server.calls.count("has_experiment") == 1


def test_ids_of_one_server_mean_nothing_on_another(server: FakeTransport) -> None:
    """Delivered elsewhere, a run goes to the experiment with the name, at top level."""
    make = Records()
    header = orjson.dumps({"tracking_uri": "http://recorded.test"})
    sink = MlflowSink(header, server, tracking_uri="http://fake.test")
    settings = {"experiment_name": "qitos", "experiment_id": "8", "inherited_run_id": "open"}
    sink.prepare([orjson.dumps(make.start(settings=settings, parent_run_id="open"))])
    assert sink.send(TIMEOUT_S) == []
    [run] = server.runs.values()
    assert (run["experiment_id"], PARENT in run["tags"]) == ("7", False)
