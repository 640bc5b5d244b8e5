"""The harness itself: a fault that is not what it says would prove nothing."""

from __future__ import annotations

import asyncio
import errno
import gc
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from tests.integration.agent_script import Holds
from tests.integration.agents import Agent
from tests.integration.proxy import Cut, Hang, Latency, Proxy, Refuse, Status
from tests.integration.server import MlflowServer

SEARCH = "/api/2.0/mlflow/experiments/search"
TIMEOUT_S = 20.0
IMPATIENT_S = 0.3


@pytest.fixture
def session() -> Iterator[requests.Session]:
    """A client that keeps its connections open, as MLflow's does."""
    with requests.Session() as session:
        session.trust_env = False
        yield session


def search(session: requests.Session, proxy: Proxy) -> requests.Response:
    """One API call with a body, through the proxy."""
    return session.post(proxy.uri + SEARCH, json={"max_results": 1}, timeout=TIMEOUT_S)


def test_requests_pass_unchanged_until_a_fault_is_set(
    proxy: Proxy, mlflow_server: MlflowServer, session: requests.Session
) -> None:
    """Answers through the proxy are the server's, several on one connection, and all counted."""
    direct = session.post(mlflow_server.uri + SEARCH, json={"max_results": 1}, timeout=TIMEOUT_S)
    answers = [search(session, proxy) for _ in range(3)]
    assert [answer.content for answer in answers] == [direct.content] * 3
    assert proxy.connections == 1
    seen = proxy.wait_for(lambda seen: seen[-1].status)  # Noted once the answer is out.
    assert [(r.method, r.path, r.status) for r in seen] == [("POST", SEARCH, 200)] * 3


def test_large_and_empty_answers_pass(proxy: Proxy, session: requests.Session) -> None:
    """A megabyte comes through whole in both directions, and so does an answer without a body."""
    url = f"{proxy.uri}/api/2.0/mlflow-artifacts/artifacts/harness/file"
    data = bytes(range(256)) * 4096
    assert session.put(url, data=data, timeout=TIMEOUT_S).status_code == 200
    assert session.get(url, timeout=TIMEOUT_S).content == data
    assert session.head(f"{proxy.uri}/health", timeout=TIMEOUT_S).content == b""
    assert session.get(f"{proxy.uri}/health", timeout=TIMEOUT_S).text == "OK"


def test_requests_without_a_length_are_read_to_their_end(session: requests.Session) -> None:
    """A chunked request is one request, with all its chunks."""
    proxy = Proxy(keep_raw=True)
    try:
        proxy.set(Status(200))
        session.post(proxy.uri, data=iter([b"one", b"two"]), timeout=TIMEOUT_S)
        assert proxy.requests[0].raw.endswith(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")
        assert len(proxy.requests) == 1
    finally:
        proxy.close()


def test_refuse_is_a_closed_port(proxy: Proxy, session: requests.Session) -> None:
    """Connections are refused, open ones are reset, and it all works again afterwards."""
    search(session, proxy)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S) as idle:
        proxy.wait_for(lambda _: proxy.connections == 2)
        proxy.set(Refuse())
        with pytest.raises(ConnectionResetError):
            idle.recv(1)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S)
    proxy.set(None)
    assert search(session, proxy).status_code == 200


def test_refuse_resets_what_was_accepted_a_moment_ago() -> None:
    """It has no handler yet, and asyncio leaves it open if the port is closed now."""
    proxy = Proxy()

    async def accept_and_refuse() -> socket.socket:
        idle = socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S)
        for _ in range(2):  # The loop sees it, and accepts.
            await asyncio.sleep(0)
        await proxy._set(Refuse(), "", None, 1)
        return idle

    try:
        with proxy._run(accept_and_refuse()) as idle, pytest.raises(ConnectionResetError):
            idle.recv(1)
    finally:
        proxy.close()


def test_hang_accepts_and_never_answers(proxy: Proxy, session: requests.Session) -> None:
    """A request that hangs is seen, gets no byte, and is closed when the fault ends."""
    proxy.set(Hang())
    with pytest.raises(requests.ReadTimeout):
        session.get(f"{proxy.uri}/health", timeout=(TIMEOUT_S, IMPATIENT_S))

    failures: list[Exception] = []

    def hang() -> None:
        try:
            search(session, proxy)
        except requests.RequestException as error:
            failures.append(error)

    waiting = threading.Thread(target=hang)
    waiting.start()
    proxy.wait_for_requests(1, path=SEARCH)
    proxy.set(None)
    waiting.join(TIMEOUT_S)
    assert [type(failure) for failure in failures] == [requests.ConnectionError]
    assert [request.status for request in proxy.requests] == [None, None]
    assert search(session, proxy).status_code == 200


def test_status_answers_without_forwarding(session: requests.Session) -> None:
    """The status, its body and `Retry-After` are the test's; there need not be a server."""
    proxy = Proxy()
    try:
        proxy.set(Status(429, retry_after="7", body=b"slow down"))
        answer = search(session, proxy)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "7")
        assert answer.content == b"slow down"
        proxy.set(Status(503))
        answer = search(session, proxy)
        assert (answer.status_code, "Retry-After" in answer.headers) == (503, False)
        assert answer.json()["error_code"] == "TEMPORARILY_UNAVAILABLE"
    finally:
        proxy.close()


@pytest.mark.parametrize("after_bytes", [0, 10, 200])
def test_cut_loses_the_answer_not_the_request(
    after_bytes: int,
    proxy: Proxy,
    mlflow_server: MlflowServer,
    session: requests.Session,
    experiment_name: str,
) -> None:
    """The client gets so many bytes and no more, but the server did what it was asked."""
    proxy.set(Cut(after_bytes))
    url = f"{proxy.uri}/api/2.0/mlflow/experiments/create"
    with pytest.raises(requests.RequestException):
        session.post(url, json={"name": experiment_name}, timeout=TIMEOUT_S).json()
    assert mlflow_server.client.get_experiment_by_name(experiment_name) is not None
    assert len(proxy.requests) == 1


def test_cut_gives_exactly_the_bytes_asked_for(proxy: Proxy) -> None:
    """What arrives before the end of the connection is as long as the test said."""
    proxy.set(Cut(17))
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=TIMEOUT_S) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        got = b""
        while part := connection.recv(4096):
            got += part
    assert got == b"HTTP/1.1 200 OK\r\n"


def test_latency_delays_answers(proxy: Proxy, session: requests.Session) -> None:
    """An answer is held back for as long as asked, and is otherwise the server's."""
    proxy.set(Latency(400))
    began_s = time.monotonic()
    assert search(session, proxy).status_code == 200
    assert time.monotonic() - began_s >= 0.4


def test_a_fault_can_be_for_some_paths_and_some_times(
    proxy: Proxy, session: requests.Session
) -> None:
    """Only matching requests meet the fault, and only as many as asked for."""
    proxy.set(Status(500), only="experiments", times=2)
    codes = []
    for _ in range(3):
        codes.append(search(session, proxy).status_code)
        codes.append(session.get(f"{proxy.uri}/health", timeout=TIMEOUT_S).status_code)
    assert codes == [500, 200, 500, 200, 200, 200]
    assert sum(request.fault is not None for request in proxy.requests) == 2
    proxy.forget()
    assert (proxy.requests, proxy.connections) == ([], 0)


def test_wait_for_gives_up(proxy: Proxy) -> None:
    """Waiting for what never comes ends with what was seen instead."""
    with pytest.raises(TimeoutError, match="had seen"):
        proxy.wait_for_requests(1, timeout_s=0.05)


def test_the_bytes_of_requests_can_be_kept(
    mlflow_server: MlflowServer, session: requests.Session
) -> None:
    """A proxy that is asked to keeps head and body, for tests of what may go over the wire."""
    proxy = Proxy(mlflow_server.port, keep_raw=True)
    try:
        session.post(proxy.uri + SEARCH, json={"filter": "x"}, timeout=TIMEOUT_S)
        assert proxy.requests[0].raw.startswith(b"POST " + SEARCH.encode())
        assert proxy.requests[0].raw.endswith(b'{"filter": "x"}')
    finally:
        proxy.close()


def test_the_server_freezes_and_thaws(
    mlflow_server: MlflowServer, session: requests.Session
) -> None:
    """A frozen server takes connections and is silent; thawed, it answers."""
    mlflow_server.freeze()
    with pytest.raises(requests.ReadTimeout):
        session.get(f"{mlflow_server.uri}/health", timeout=(TIMEOUT_S, IMPATIENT_S))
    mlflow_server.thaw()
    assert session.get(f"{mlflow_server.uri}/health", timeout=TIMEOUT_S).text == "OK"


def test_a_locked_database_holds_writes_up(
    mlflow_server: MlflowServer, session: requests.Session, experiment_name: str
) -> None:
    """While the lock is held nothing is written; afterwards it is."""
    url = f"{mlflow_server.uri}/api/2.0/mlflow/experiments/create"
    with mlflow_server.locked_database(), pytest.raises(requests.ReadTimeout):
        session.post(url, json={"name": experiment_name}, timeout=(TIMEOUT_S, 1.0))
    other = {"name": experiment_name + " again"}
    assert session.post(url, json=other, timeout=TIMEOUT_S).status_code == 200


def test_an_agent_meets_the_test_at_its_gates(run_agent: Callable[..., Agent]) -> None:
    """A QitOS agent waits at its gates, continues when the test says so, and reports events."""
    agent = run_agent(way="off", steps=3, gates=["mid", "over"])
    agent.wait_for("mid")
    agent.go()
    agent.wait_for("over")
    agent.go()
    report = agent.finish()
    assert report.returncode == 0, report.stderr
    assert list(report.points) == ["ready", "start", "mid", "end", "next", "over", "done"]
    assert report.exit_s is not None


def test_an_agent_can_be_killed_in_mid_run(run_agent: Callable[..., Agent]) -> None:
    """SIGKILL at a gate ends it there; the report says by what, and what was reached."""
    agent = run_agent(way="off", gates=["mid"])
    agent.wait_for("mid")
    agent.signal(signal.SIGKILL)
    report = agent.finish()
    assert report.returncode == -signal.SIGKILL
    assert "end" not in report.points
    assert report.exit_s is None


def test_an_agent_that_fails_to_start_says_why(run_agent: Callable[..., Agent]) -> None:
    """Waiting for a process that died ends at once, with its stderr."""
    agent = run_agent(way="by carrier pigeon")
    with pytest.raises(AssertionError, match="carrier pigeon"):
        agent.wait_for("ready")


def test_agents_of_several_threads_all_run(run_agent: Callable[..., Agent]) -> None:
    """Every run of every thread is made, with tool errors, scores and an interrupt on the way."""
    agent = run_agent(
        way="off",
        traces=6,
        threads=3,
        steps=4,
        scores=[0.5, 1.0],
        failing_steps=[1],
        payload_bytes=9,
    )
    report = agent.finish()
    assert report.returncode == 0, report.stderr
    interrupted = run_agent(way="off", traces=2, steps=4, interrupted_step=2).finish()
    assert interrupted.returncode == 0, interrupted.stderr
    assert "end" not in interrupted.points


def test_a_small_disk_fills_up(small_disk: Callable[[int], Path]) -> None:
    """What does not fit is refused by the kernel, as on a disk that is full."""
    disk = small_disk(64 * 1024)
    (disk / "fits").write_bytes(bytes(32 * 1024))
    with pytest.raises(OSError) as caught:
        (disk / "does-not").write_bytes(bytes(64 * 1024))
    assert caught.value.errno == errno.ENOSPC


def test_a_hold_is_no_garbage_that_another_thread_collects() -> None:
    """It keeps the interpreter meanwhile: what a callback waits for then is no hold of ours."""
    collected_s: list[float] = []

    def collect() -> None:
        for _ in range(5):
            began_s = time.perf_counter()
            gc.collect()
            collected_s.append(time.perf_counter() - began_s)

    def callback(processor: object, item: object) -> None:
        other = threading.Thread(target=collect)
        other.start()
        other.join()

    before = gc.callbacks.copy()
    holds = Holds("")
    try:
        holds.timed("on_span_end", callback)(None, None)
    finally:
        gc.callbacks[:] = before
    assert holds.worst_ms["on_span_end"] < sum(collected_s) * 1000 / 2
