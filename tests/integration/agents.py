"""Agent processes seen from the test: start one, meet it at its points, read its report."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.integration.agent_script import CALLBACKS, Config

ROOT = Path(__file__).parents[2]
POINT_TIMEOUT_S = 60.0
KILL_TIMEOUT_S = 5.0
FINISH_TIMEOUT_S = 100.0
"""Below pytest's own limit, so that the message is this module's, with the agent's stderr."""


@dataclass(frozen=True)
class Report:
    """How an agent process went."""

    returncode: int
    """Negative: the signal that ended it."""
    exit_s: float | None
    """From its last line of code to the end of the process; None when it did not get there."""
    points: dict[str, dict[str, Any]]
    """What it reported at each point it reached; see `Gates`."""
    stdout: str
    """Without the points."""
    stderr: str
    truth: list[dict[str, Any]]
    """Every event that was handed to the processors, in order."""

    @property
    def worst_ms(self) -> dict[str, float]:
        """For each callback, the longest time it held an agent's thread, up to the last point.

        Of this process and those it started.
        """
        worst_ms = [point["worst_ms"] for point in self.points.values()]
        return {callback: max(worst[callback] for worst in worst_ms) for callback in CALLBACKS}

    @property
    def flushed(self) -> bool | None:
        """What `force_flush` returned, when it was asked for."""
        result: bool | None = self.points["done"]["flushed"]
        return result

    def spans(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The span ends in `truth`, of one type or of all."""
        ends = [event for event in self.truth if event["callback"] == "on_span_end"]
        return [end for end in ends if kind is None or end["type"] == kind]

    def trace_ids(self) -> list[str]:
        """The traces that were started, in order."""
        return [e["trace_id"] for e in self.truth if e["callback"] == "on_trace_start"]


class Agent:
    """A process that runs QitOS agents as `Config` says, started at once.

    Args:
        directory: its working directory, created.
        env: environment variables on top of the test's own.
        config: options of `Config`.
    """

    def __init__(
        self, directory: Path, *, env: Mapping[str, str] | None = None, **config: Any
    ) -> None:
        self.config = Config(**config)
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        environment = dict(os.environ)
        # As users have it: not set. The tests' own process says "none" (tests/conftest.py).
        environment.pop("QITOS_TRACE_PLUGINS", None)
        if self.config.way == "off":
            environment["QITOS_TRACE_PLUGINS"] = "none"
        environment["MLFLOW_MODEL_CATALOG_URI"] = ""  # See server.py: local stores look up too.
        environment["PYTHONPATH"] = str(ROOT)
        environment.update(env or {})
        self._process = subprocess.Popen(
            self.command(),
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._news = threading.Condition()
        self._points: dict[str, dict[str, Any]] = {}
        self._output: dict[str, list[str]] = {"stdout": [], "stderr": []}
        self._ended_s: float | None = None
        self._threads = [
            threading.Thread(target=self._read, args=("stdout",), daemon=True),
            threading.Thread(target=self._read, args=("stderr",), daemon=True),
            threading.Thread(target=self._await_end, daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def command(self) -> list[str]:
        """What the process runs."""
        module = "tests.integration.agent_script"
        patched = ["-m", "gevent.monkey", "--module"] if self.config.gevent else ["-m"]
        return [sys.executable, *patched, module, json.dumps(asdict(self.config))]

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def wait_for(self, point: str, timeout_s: float = POINT_TIMEOUT_S) -> dict[str, Any]:
        """Block until the agent reaches `point`; returns what it reports there.

        Raises:
            AssertionError: it ended, or took longer; the text has its stderr.
        """
        with self._news:
            self._news.wait_for(
                lambda: point in self._points or self._ended_s is not None, timeout_s
            )
            assert point in self._points, f"the agent did not reach {point!r}:\n{self._stderr()}"
            return self._points[point]

    def wait_for_error(self, text: str, timeout_s: float = POINT_TIMEOUT_S) -> None:
        """Block until `text` is on its stderr.

        Raises:
            AssertionError: it ended without, or took longer.
        """
        with self._news:
            self._news.wait_for(
                lambda: text in self._stderr() or self._ended_s is not None, timeout_s
            )
            assert text in self._stderr(), f"the agent did not say {text!r}:\n{self._stderr()}"

    def go(self) -> None:
        """Let it go on from the gate at which it waits."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal to it, not to what it started."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL for it and everything it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for thread in self._threads:
            thread.join(KILL_TIMEOUT_S)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()

    def finish(self, timeout_s: float = FINISH_TIMEOUT_S) -> Report:
        """Block until the process has ended; returns its report.

        Raises:
            AssertionError: it took longer (it is killed); the text has its stderr.
        """
        deadline = time.monotonic() + timeout_s
        with self._news:
            if not self._news.wait_for(lambda: self._ended_s is not None, timeout_s):
                self.kill()
                raise AssertionError(f"the agent did not end in {timeout_s} s:\n{self._stderr()}")
        for thread in self._threads:  # A child of the agent may hold the pipes open for longer.
            thread.join(max(0.0, deadline - time.monotonic()))
        assert self._ended_s is not None
        done = self._points.get("done")
        return Report(
            returncode=self._process.returncode,
            exit_s=self._ended_s - done["time_s"] if done else None,
            points=dict(self._points),
            stdout="".join(self._output["stdout"]),
            stderr=self._stderr(),
            truth=self._truth(),
        )

    def _truth(self) -> list[dict[str, Any]]:
        path = self.directory / self.config.truth
        if not self.config.truth or not path.exists():
            return []
        return [json.loads(line) for line in path.read_text().splitlines()]

    def _stderr(self) -> str:
        return "".join(self._output["stderr"])

    def _read(self, name: str) -> None:
        with getattr(self._process, name) as stream:
            for raw in stream:
                line = raw.decode(errors="replace")
                with self._news:
                    if name == "stdout" and line.startswith('{"point"'):
                        fact = json.loads(line)
                        self._points[fact["point"]] = fact
                    else:
                        self._output[name].append(line)
                    self._news.notify_all()

    def _await_end(self) -> None:
        self._process.wait()
        with self._news:
            self._ended_s = time.monotonic()
            self._news.notify_all()
