"""Damaged answers by the thousand, over real sockets: nothing is raised, given up, lost or doubled.

Each example delivers a run with its spans and a file. Some of the server's answers are damaged, or
come from something before it (tests/fakes/damage.py). What is on the server in the end is what
there is without any damage.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.server.http import Request
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.sink import operations
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink
from tests.delivery.test_nth_call_fails import a_trace
from tests.fakes.damage import AFTER, INSTEAD, Damage
from tests.fakes.mlflow_rest import HEADER, MlflowRest
from tests.fakes.raw_server import KEPT, RawServer, http, raw_server

MIB = 1024 * 1024
MEMORY_BYTES = 200 * MIB
HANG_S = 20.0
"""Longer than a send of `SEND_S` may take on the slowest machine."""
SEND_S = 5.0
RECORDS = a_trace(0)

Damages = list[tuple[int, Damage, int]]
"""So many requests later, the answer is damaged like this; and a seed."""

_damages: st.SearchStrategy[Damages] = st.lists(
    st.tuples(
        st.integers(0, 2), st.sampled_from([*AFTER, *AFTER, *INSTEAD]), st.integers(0, 2**32)
    ),
    min_size=8,
    max_size=20,
)


class DamagedServer:
    """MLflow behind a socket; damages answers in turn."""

    def __init__(self) -> None:
        self.mlflow = MlflowRest()
        self.damaged = 0
        self._damages: Damages = []

    def begin(self, damages: Damages) -> None:
        """Serve an empty database, with these damages to come."""
        self.mlflow, self._damages = MlflowRest(), damages

    def __call__(self, request: Request) -> list[bytes]:
        if request.path == "/elsewhere":
            return [http(b"", "404 Not Found")]
        later, damage, seed = self._damages[0] if self._damages else (1, AFTER[0], 0)
        if later:
            if self._damages:
                self._damages[0] = later - 1, damage, seed
            return [http(*self._carried_out(request)), KEPT]
        del self._damages[0]
        self.damaged += 1
        carried_out = damage in AFTER
        answer = self._carried_out(request) if carried_out else (b"", "200 OK", "application/json")
        return damage(*answer, random.Random(seed))

    def _carried_out(self, request: Request) -> tuple[bytes, str, str]:
        try:
            answer = self.mlflow(request)
        except (AttributeError, KeyError):  # After a redirect, without its body.
            return b"", "405 Method Not Allowed", "text/plain"
        return answer.content, f"{answer.status_code} X", answer.headers["Content-Type"]


def deliver(server: RawServer, transport: RestTransport) -> None:
    """Deliver the run, however often that takes."""
    sink = MlflowSink(HEADER, transport)
    sink.prepare(RECORDS)
    while True:
        began = time.monotonic()
        try:
            assert sink.send(SEND_S) == [], "a good record was given up"
        except RetryLater:
            pass
        else:
            return
        finally:
            assert time.monotonic() - began < HANG_S


@contextmanager
def bounded_memory() -> Iterator[None]:
    """The process grows by no more than `MEMORY_BYTES` in the block, at any time."""
    Path("/proc/self/clear_refs").write_text("5")  # The peak begins anew.
    before = _memory("VmRSS")
    yield
    assert _memory("VmHWM") - before < MEMORY_BYTES


def _memory(name: str) -> int:
    text = Path("/proc/self/status").read_text()
    return int(text.partition(f"{name}:")[2].split()[0]) * 1024


def fuzz(monkeypatch: pytest.MonkeyPatch, examples: int) -> int:
    """Deliver a run in each example; returns how many answers were damaged."""
    monkeypatch.setattr(operations, "LATE_S", 0.0)  # No run is created late here.
    damaged = DamagedServer()

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_damages)
    def each(damages: Damages) -> None:
        damaged.begin(list(damages))
        transport = RestTransport(server.uri)
        deliver(server, transport)
        transport.close()
        assert damaged.mlflow.logged() == expected

    with raw_server(damaged) as server:
        damaged.begin([])
        transport = RestTransport(server.uri)
        deliver(server, transport)
        transport.close()
        expected = damaged.mlflow.logged()
        with bounded_memory():
            each()
    return damaged.damaged


def test_no_damaged_answer_loses_anything(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever comes back, the records arrive once, and nothing but our own words is logged."""
    assert fuzz(monkeypatch, 30) > 100
    assert {record.name for record in caplog.records} <= {"qitos_mlflow"}


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_10000_damaged_answers_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for all kinds of damage in all places, within bounded memory."""
    assert fuzz(monkeypatch, 1_200) >= 10_000
