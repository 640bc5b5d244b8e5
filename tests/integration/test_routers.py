"""What stands between an agent and MLflow: routers, limits, guards, slow ways. Nothing is refused.

A real server behind the proxy, and agents of this process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from qitos_mlflow.cli import main
from qitos_mlflow.delivery import backoff, sending_thread
from qitos_mlflow.mlflow_plugin.sink import call_list, operations
from tests.bridge.agents import ADD, FINAL, Model, ModelAgent, answer, toolbox
from tests.integration.logged import LoggedRun, logged, runs_of
from tests.integration.proxy import Latency, Proxy, Status
from tests.integration.server import MlflowServer

PAGE = Status(404, body=b"404 page not found\n", content_type="text/plain")
JSON_PAGE = Status(404, body=b'{"message": "no Route matched with those values"}')
HTML_PAGE = Status(405, body=b"<html><h1>Method Not Allowed</h1></html>", content_type="text/html")
FLUSH_S = 45.0
ENDPOINTS = (
    *("experiments/create", "experiments/get-by-name", "runs/create", "runs/log-batch"),
    *("v1/traces", "api/3.0/mlflow/traces", "mlflow-artifacts", "runs/update"),
)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that fails is tried again ten times sooner: how often matters here, not when."""
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(sending_thread, "WAITED_FOR_DELAY_S", 0.1)


def agent(result: str = "") -> ModelAgent:
    """An agent of two steps that calls a tool."""
    return ModelAgent(Model(answer(ADD), answer(FINAL)), toolbox())


def finished(server: MlflowServer, experiment: str) -> list[LoggedRun]:
    """The runs of an experiment, each complete and each with a tree."""
    runs = runs_of(server.client, experiment)
    for run in runs:
        assert run.status == "FINISHED"
        assert "qitos.spans.dropped" not in run.tags, run.tags
        assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"]
    return runs


@pytest.mark.parametrize("page", [PAGE, JSON_PAGE, HTML_PAGE], ids=["text", "json", "html"])
def test_a_page_on_any_endpoint_is_asked_again(
    mlflow_server: MlflowServer, proxy: Proxy, experiment_name: str, page: Status
) -> None:
    """Some pages for each of them while MLflow answers the others, as amid a deploy."""
    for endpoint in ENDPOINTS:
        experiment = f"{experiment_name} {endpoint}"
        with logged(proxy.uri, experiment_name=experiment) as processor:
            proxy.set(page, only=endpoint, times=3)
            agent().run(task="task", return_state=True)
            assert processor.force_flush(FLUSH_S)
        assert len(finished(mlflow_server, experiment)) == 1
        assert proxy.wait_for(lambda seen: sum(bool(one.fault) for one in seen) == 3)
        proxy.forget()


@pytest.mark.parametrize("every", [2, 3])
def test_a_router_that_knows_only_some_of_its_servers(
    mlflow_server: MlflowServer, proxy: Proxy, experiment_name: str, every: int
) -> None:
    """A page for each second request delays what is sent, and loses none of it."""
    proxy.set(PAGE, every=every)
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        for number in range(6):
            agent().run(task=f"task {number}", return_state=True)
        assert processor.force_flush(FLUSH_S)
    assert len(finished(mlflow_server, experiment_name)) == 6


def test_a_flush_is_not_true_while_trees_are_missing(
    mlflow_server: MlflowServer, proxy: Proxy, experiment_name: str
) -> None:
    """A router that does not know the endpoint for spans yet is no server without traces."""
    proxy.set(PAGE, only="v1/traces")
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        agent().run(task="task", return_state=True)
        assert not processor.force_flush(3.0)
        proxy.set(None)
        assert processor.force_flush(FLUSH_S)
    assert len(finished(mlflow_server, experiment_name)) == 1


@pytest.mark.parametrize(
    "answer",
    [
        PAGE,
        HTML_PAGE,
        Status(403, body=b"<html>Blocked</html>", content_type="text/html"),
        Status(500, body=b"<html>Internal Server Error</html>", content_type="text/html"),
        Status(503, body=b"disabled: --no-serve-artifacts", content_type="text/plain"),
    ],
    ids=["404", "405", "403", "500", "503"],
)
def test_a_gateway_that_takes_no_files_holds_up_no_run(
    mlflow_server: MlflowServer,
    proxy: Proxy,
    experiment_name: str,
    monkeypatch: pytest.MonkeyPatch,
    answer: Status,
) -> None:
    """The rest of each run arrives, no flush is true, and `sync` delivers the files later."""
    monkeypatch.setattr(operations, "SIGHTINGS_S", 0.1)
    proxy.set(answer, only="mlflow-artifacts")
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        for number in range(2):
            agent().run(task=f"task {number}", return_state=True)
            assert not processor.force_flush(FLUSH_S)
    runs = finished(mlflow_server, experiment_name)
    assert len(runs) == 2
    for run in runs:
        assert run.tags["qitos.values.dropped"].startswith("artifact_put_off=")
        assert mlflow_server.client.list_artifacts(run.id) == []
    again = CliRunner().invoke(main, ["sync"])
    assert again.exit_code == 1, again.output
    assert "records not delivered; run it again later: qitos-mlflow sync" in again.output
    shown = CliRunner().invoke(main, ["status"]).output
    assert "NO_ARTIFACTS" in shown
    assert "Deliver the records of dead processes: qitos-mlflow sync " in shown
    proxy.set(None)
    done = CliRunner().invoke(main, ["sync"])
    assert done.exit_code == 0, done.output
    for run in finished(mlflow_server, experiment_name):
        assert mlflow_server.client.list_artifacts(run.id)
    assert "NO_ARTIFACTS" not in CliRunner().invoke(main, ["status"]).output


INTERNAL = Status(500, body=b'{"error_code": "INTERNAL_ERROR", "message": "no table"}')


@pytest.mark.parametrize(
    ("endpoint", "answer", "times"),
    [  # So often until it is known that no item is to blame.
        ("v1/traces", Status(422, body=b'{"detail": "Cannot store OpenTelemetry spans"}'), 14),
        ("api/3.0/mlflow/traces", INTERNAL, 6),
        ("runs/update", INTERNAL, 6),
    ],
)
def test_a_server_that_fails_on_one_kind_blames_no_record(
    mlflow_server: MlflowServer,
    proxy: Proxy,
    experiment_name: str,
    monkeypatch: pytest.MonkeyPatch,
    endpoint: str,
    answer: Status,
    times: int,
) -> None:
    """All of that kind waits until the server is well."""
    monkeypatch.setattr(call_list, "FAILING_S", 0.1)
    proxy.set(answer, only=endpoint)
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        for number in range(2):
            agent().run(task=f"task {number}", return_state=True)
        proxy.wait_for(lambda seen: sum(bool(one.fault) for one in seen) >= times)
        proxy.set(None)
        assert processor.force_flush(FLUSH_S)
    assert len(finished(mlflow_server, experiment_name)) == 2


@pytest.mark.parametrize("most", [8_000, 20_000])
def test_a_proxys_limit_costs_long_fields_only(
    mlflow_server: MlflowServer, proxy: Proxy, experiment_name: str, most: int
) -> None:
    """A span that is larger than a request may be arrives with its longest fields cut."""
    proxy.set(Status(413, body=b"<html>Too Large</html>", above_bytes=most), only="v1/traces")
    long = ModelAgent(Model(answer(ADD), answer("x" * 100_000 + FINAL)), toolbox())
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        long.run(task="task", return_state=True)
        assert processor.force_flush(FLUSH_S)
    [run] = runs_of(mlflow_server.client, experiment_name)
    assert run.status == "FINISHED"
    assert "qitos.spans.dropped" not in run.tags
    assert "too_large=" in run.tags["qitos.values.dropped"]
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"]


@pytest.mark.parametrize("endpoint", ["runs/create", "runs/log-batch", "runs/update"])
def test_a_small_request_that_is_called_too_large_is_made_again(
    mlflow_server: MlflowServer, proxy: Proxy, experiment_name: str, endpoint: str
) -> None:
    """It costs no run its end, whatever a proxy says once."""
    proxy.set(Status(413, body=b"<html>Too Large</html>"), only=endpoint, times=2)
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        agent().run(task="task", return_state=True)
        assert processor.force_flush(FLUSH_S)
    [run] = finished(mlflow_server, experiment_name)
    assert "qitos.values.dropped" not in run.tags
    assert proxy.wait_for(lambda seen: sum(bool(one.fault) for one in seen) == 2)


@pytest.mark.parametrize(
    ("status", "words", "only"),
    [  # MLflow's own guard says nothing of the server's version.
        (403, "Invalid Host header - possible DNS rebinding attack detected", "api/"),
        (403, "Permission denied", ""),
        (401, "You are not authenticated. Please see https://mlflow.org", ""),
    ],
)
def test_a_guards_own_words_are_shown(proxy: Proxy, status: int, words: str, only: str) -> None:
    """The reason is in what `sync` says, and in what `status` says of the server."""
    proxy.set(Status(status, body=words.encode(), content_type="text/plain"), only=only)
    with logged(proxy.uri, exit_timeout_s=0.1, flush_timeout_s=0.1) as processor:
        agent().run(task="task", return_state=True)
        processor.shutdown()
    done = CliRunner().invoke(main, ["sync", "--patience", "0"])
    assert done.exit_code == 1
    assert words in done.output
    assert words in CliRunner().invoke(main, ["status"]).output


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> Callable[[float, str | None], None]:
    """So long for each answer, in place of ten seconds; and what MLflow's variable says."""

    def set_up(timeout_s: float, mlflows_timeout: str | None) -> None:
        monkeypatch.setattr(operations, "REQUEST_TIMEOUT_S", timeout_s)
        if mlflows_timeout is not None:
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", mlflows_timeout)

    return set_up


def test_a_slow_server_is_not_a_dead_one(
    mlflow_server: MlflowServer,
    proxy: Proxy,
    experiment_name: str,
    impatient: Callable[[float, str | None], None],
) -> None:
    """If MLflow's client may wait eight times longer, so may we. Else no answer is in time."""
    impatient(0.2, "80")
    proxy.set(Latency(300))
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        agent().run(task="task", return_state=True)
        assert processor.force_flush(FLUSH_S)
    assert len(finished(mlflow_server, experiment_name)) == 1


def test_a_slow_creation_leaves_no_second_run(
    mlflow_server: MlflowServer,
    proxy: Proxy,
    experiment_name: str,
    impatient: Callable[[float, str | None], None],
) -> None:
    """What the server has carried out after all is found and used."""
    impatient(0.5, None)
    proxy.set(Latency(1500), only="runs/create")
    with logged(proxy.uri, experiment_name=experiment_name) as processor:
        for number in range(3):
            agent().run(task=f"task {number}", return_state=True)
            assert processor.force_flush(FLUSH_S)
    with contextlib.suppress(TimeoutError):
        proxy.wait_for(lambda seen: all(one.status for one in seen), 3.0)
    assert len(finished(mlflow_server, experiment_name)) == 3
