"""A spool of format 1 becomes on a real server what its own writer made of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from tests.integration.server import MlflowServer

DATA = Path(__file__).parents[1] / "data" / "spool_v1"
EXPECTED: list[dict[str, Any]] = json.loads((DATA / "expected.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def delivered(
    shared_server: MlflowServer, tmp_path_factory: pytest.TempPathFactory
) -> MlflowClient:
    """What `qitos-mlflow sync` brings to a server that has nothing of it."""
    spool = tmp_path_factory.mktemp("spool_v1")
    for path in DATA.iterdir():
        if path.suffix != ".json":
            shutil.copy(path, spool)
    command = ("-m", "qitos_mlflow.cli", "sync", "--tracking-uri", shared_server.uri, str(spool))
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "2 segments finished" in done.stdout
    assert not [path for path in spool.iterdir() if path.suffix in (".seg", ".ack")]
    client: MlflowClient = shared_server.client
    return client


def run_of(client: MlflowClient, trace_id: str) -> Any:
    """The run of a trace."""
    experiment = client.get_experiment_by_name("qitos-runs")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`qitos.trace_id` = '{trace_id}'")
    return run


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda one: one["status"])
def test_runs_are_those_of_version_0_1_0(delivered: MlflowClient, expected: dict[str, Any]) -> None:
    """Status, name, params and totals are the same, also of a run that began on another server."""
    run = run_of(delivered, expected["tags"]["qitos.trace_id"])
    assert (run.info.status, run.info.run_name) == (expected["status"], expected["name"])
    assert run.data.params.items() <= expected["params"].items()
    metrics = dict(run.data.metrics)
    metrics.pop("total_cost")  # Later versions say what a run cost.
    assert metrics == pytest.approx(expected["metrics"])
    elsewhere = expected["status"] == "KILLED"  # Its first part is on a server that is gone.
    tags = {key: tag for key, tag in expected["tags"].items() if not key.startswith("qitos.spans")}
    assert tags.items() <= run.data.tags.items()
    assert ("qitos.partial" in run.data.tags) is elsewhere
    if not elsewhere:
        assert run.data.params == expected["params"]
        assert expected["tags"].items() <= run.data.tags.items()


@pytest.mark.parametrize("expected", [one for one in EXPECTED if one["status"] == "FINISHED"])
def test_traces_are_those_of_version_0_1_0(
    delivered: MlflowClient, expected: dict[str, Any]
) -> None:
    """State, tags, previews, cost, feedback and the tree of spans are the same."""
    wanted = expected["trace"]
    trace = delivered.get_trace("tr-" + expected["tags"]["qitos.trace_id"].replace("-", ""))
    assert str(trace.info.state).endswith(wanted["state"])
    assert wanted["tags"].items() <= trace.info.tags.items()
    found = dict(trace.info.trace_metadata)
    known = dict(wanted["metadata"])
    # MLflow's versions write JSON in different ways, and have different prices.
    usage, cost = "mlflow.trace.tokenUsage", "mlflow.trace.cost"
    assert json.loads(found.pop(usage)) == json.loads(known.pop(usage))
    assert json.loads(found.pop(cost)).keys() == json.loads(known.pop(cost)).keys()
    known.pop("mlflow.trace.session")  # The task: later versions make no session of it.
    assert known.items() <= found.items()
    assert (trace.info.request_preview, trace.info.response_preview) == ("find it", "42")
    assert [[one.name, one.value] for one in trace.info.assessments] == wanted["assessments"]
    spans = sorted(trace.data.spans, key=lambda span: span.start_time_ns)
    shown = [[span.name, span.span_type, str(span.status.status_code)] for span in spans]
    assert shown == wanted["spans"]
