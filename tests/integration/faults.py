"""What the tests of faults share: the faults, the promises in each, the command that is shown."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.integration.agents import ROOT, Agent, Report
from tests.integration.proxy import (
    Cut,
    Fault,
    Hang,
    Latency,
    Proxy,
    Refuse,
    Request,
    Status,
)
from tests.integration.server import MlflowServer

FAULTS: dict[str, Fault] = {
    "refused": Refuse(),
    "hanging": Hang(),
    "503": Status(503),
    "429": Status(429),
    "429-retry-after": Status(429, retry_after="1"),
    "router": Status(404, body=b"404 page not found\n", content_type="text/plain"),
    "cut": Cut(after_bytes=20),
    "latency": Latency(500),
}
START_MS, ELSEWHERE_MS = 2100.0, 5.0
"""What callbacks may hold the agent's thread at most: at the start of a trace, anywhere else."""
SWITCH_MS = sys.getswitchinterval() * 1000
"""Python hands the interpreter from one busy thread to the next so often, wherever they are."""
CROWDED_MS = 200.0
"""In the place of both if several processes share two cores; waiting for a server takes longer."""
GRACE_S = 0.5
"""So much later than its deadline the process may be gone."""


RETRYING = "not delivered yet ("
"""What an agent that meets a failing server says on stderr, once a minute."""


@contextlib.contextmanager
def fault(name: str, proxy: Proxy, server: MlflowServer) -> Iterator[Callable[[Agent], object]]:
    """The named fault, until the end of the block.

    Gives what blocks until an agent has met it.
    """
    if name == "locked":
        with server.locked_database():
            since_s = time.monotonic()

            def held_up(seen: list[Request]) -> list[Request]:
                return [one for one in seen if one.arrived_s >= since_s]

            yield lambda _: proxy.wait_for(held_up)
            answers = {request.status for request in held_up(proxy.wait_for(held_up))}
            assert all(status is None or status >= 500 for status in answers), answers
        return
    proxy.set(FAULTS[name])
    if name == "refused":  # The kernel does that, and the proxy sees nothing of it.
        yield lambda agent: agent.wait_for_error(RETRYING)
    else:
        yield lambda _: proxy.wait_for(lambda seen: any(one.fault for one in seen))
    proxy.set(None)


def assert_not_held(
    report: Report, control: Report, elsewhere_ms: float = ELSEWHERE_MS + SWITCH_MS
) -> None:
    """No callback held the agent's thread for longer than promised.

    On a machine that is busy with other things, for no longer than three times what a processor
    that does nothing was held in its place.
    """
    slack_ms = 3 * max(control.worst_ms.values())
    for callback, worst_ms in report.worst_ms.items():
        limit_ms = START_MS if callback == "on_trace_start" else elsewhere_ms
        assert worst_ms <= max(limit_ms, slack_ms), (report.points, control.worst_ms)


def assert_ended_in_time(report: Report, control: Report, deadline_s: float) -> None:
    """The process ended well, as soon after its last line as its exit deadline says."""
    assert report.returncode == 0, report.stderr
    assert report.exit_s is not None
    assert control.exit_s is not None
    assert report.exit_s <= deadline_s + GRACE_S + 2 * control.exit_s


def assert_nothing_left(report: Report) -> None:
    """The process has delivered all that it recorded; a machine may be too slow for that."""
    assert report.returncode == 0, report.stderr
    assert not re.search(r"records? (lost: |of \d+ traces? \w+ kept)", report.stderr), report.stderr


def leftover(report: Report) -> tuple[int, int, str]:
    """What the last line on stderr says is left: records, traces, and the command."""
    line = report.stderr.splitlines()[-1]
    match = re.search(
        r"(\d+) records? of (\d+) traces? .*: ((?:\w+=\S+ )?qitos-mlflow sync .*)$", line
    )
    assert match, report.stderr
    return int(match[1]), int(match[2]), match[3]


def execute(command: str, timeout_s: float = 60.0) -> str:
    """Run a command line as it was shown to the user; returns what it says."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
