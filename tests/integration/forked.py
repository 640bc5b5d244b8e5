"""Agents of one process after another, forked from one that has imported everything.

To kill hundreds of them takes a tenth of what as many new interpreters do.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.integration import agent_script
from tests.integration.agent_script import Config
from tests.integration.agents import ROOT, Report


class Parent:
    """A process that forks agents, one at a time; it has no threads and no processor itself.

    Args:
        directory: its working directory, created; agents have one of their own in it.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._children = 0
        directory.mkdir()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_MODEL_CATALOG_URI": ""}
        del environment["QITOS_TRACE_PLUGINS"]  # As users have it: not set.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.forked"],
            cwd=directory,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )

    def __enter__(self) -> Parent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.communicate()

    def kill_one(self, config: Config, after_s: float) -> Report:
        """Fork an agent, let it get to its point "start" and so much further, and kill it.

        Raises:
            AssertionError: it ended before; the text has its stderr.
        """
        directory = self._directory / str(self._children)
        self._children += 1
        directory.mkdir()
        assert self._process.stdin is not None
        order = {"directory": directory.name, "config": asdict(config)}
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        pid = self._read_until("forked")["pid"]
        fact = self._read_until("start", "ended")
        if fact["point"] == "start":
            time.sleep(after_s)
            os.kill(pid, signal.SIGKILL)
            fact = self._read_until("ended")
        stderr = (directory / "stderr.txt").read_text()
        assert fact["status"] == signal.SIGKILL, stderr
        truth = (directory / config.truth).read_text().splitlines()
        return Report(-signal.SIGKILL, None, {}, "", stderr, [json.loads(line) for line in truth])

    def _read_until(self, *points: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            fact: dict[str, Any] = json.loads(line)
            if fact["point"] in points:
                return fact
        raise AssertionError("the parent has ended")


def tell(point: str, **facts: Any) -> None:
    """A line on stdout, as `agent_script.Gates` writes them."""
    os.write(1, json.dumps({"point": point, **facts}).encode() + b"\n")


def warm_up() -> None:
    """Import what an agent and its processor do."""
    for module in ("processor", "sink.sink", "mapping.otlp_span", "server.connections"):
        importlib.import_module(f"qitos_mlflow.mlflow_plugin.{module}")
    agent_script.make_agent(Config(), 0, agent_script.Gates(Config(), agent_script.Holds("")))


def main() -> None:
    """Fork an agent for each line of stdin, and wait for its end."""
    warm_up()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if not child:
            tell("forked", pid=os.getpid())
            os.chdir(order["directory"])
            os.dup2(os.open("stderr.txt", os.O_WRONLY | os.O_CREAT), 2)
            sys.argv[1:] = [json.dumps(order["config"])]
            try:
                agent_script.main()
            except BaseException:
                traceback.print_exc()
            os._exit(1)  # It was to be killed before.
        tell("ended", status=os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
