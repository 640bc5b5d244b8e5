"""How records should reach an http server: what each way costs many agents on one machine.

Real agents with tools that compute, so many at once, against one `mlflow server` on sqlite:

    control   a processor that does nothing
    rest      this package's own transport, in each process (the default)
    requests  the same requests through mlflow's `http_request`, in each process
    client    mlflow's whole client, in each process
    sidecar   agents that work offline, and one `qitos-mlflow sync --follow`

For each: memory of a process (resident, and its share of what several processes share), how long
the agents took beside the control, CPU time of a process, and how long after it happened a first
step and a run's end were on the server.

    python -m benchmarks.processes [--agents 1 16] [--ways control rest requests client sidecar]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

from tests.integration.agents import Agent
from tests.integration.server import MlflowServer

ROOT = Path(__file__).parents[1]
WAYS = ("control", "rest", "requests", "client", "sidecar")
COLUMNS = (
    *("RSS MiB", "PSS MiB", "all MiB", "wall s", "CPU s"),
    *("first step seen s", "end seen s", "last end seen s"),
)
POLL_S = 0.05
WAIT_S = 300.0


class BenchAgent(Agent):
    """An agent process whose records go a certain way."""

    way = ""

    def command(self) -> list[str]:
        """What the process runs."""
        config = json.dumps(asdict(self.config))
        return [sys.executable, "-m", "benchmarks.processes_agent", config, self.way]


class Visible:
    """When each trace's first step, and its end, were first seen in the server's database."""

    def __init__(self, database: Path) -> None:
        self._database = database
        self.steps: dict[str, float] = {}
        self.ends: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def wait_for_ends(self, count: int) -> None:
        """Until so many runs have ended."""
        deadline = time.monotonic() + WAIT_S
        while len(self.ends) < count and time.monotonic() < deadline:
            time.sleep(POLL_S)

    def stop(self) -> None:
        """Look no more."""
        self._stop.set()
        self._thread.join()

    def _poll(self) -> None:
        trace = "JOIN tags ON tags.run_uuid = {0}.run_uuid AND tags.key = 'qitos.trace_id'"
        first = f"SELECT tags.value FROM metrics {trace.format('metrics')}"
        ended = f"SELECT tags.value FROM runs {trace.format('runs')}"
        while not self._stop.wait(POLL_S):
            uri = f"file:{self._database}?mode=ro"
            with closing(sqlite3.connect(uri, uri=True, timeout=30)) as store:
                for query, seen in (
                    (f"{first} WHERE metrics.key = 'step/number' AND step = 0", self.steps),
                    (f"{ended} WHERE runs.status = 'FINISHED'", self.ends),
                ):
                    for (value,) in store.execute(query).fetchall():
                        seen.setdefault(value, time.monotonic())


def memory_of(pid: int) -> tuple[float, float]:
    """Resident and proportional memory of a process (MiB)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    values = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
    return tuple(int(values[name].split()[0]) / 1024 for name in ("Rss", "Pss"))  # type: ignore[return-value]


def cpu_s(pid: int) -> float:
    """CPU time of a process so far (seconds)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def sidecar(environ: dict[str, str]) -> Iterator[int]:
    """A `qitos-mlflow sync --follow`; gives its process id."""
    command = [sys.executable, "-m", "qitos_mlflow.cli", "sync", "--follow"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        try:
            yield process.pid
        finally:
            process.terminate()


def measure(way: str, count: int, server: MlflowServer, directory: Path) -> list[tuple[str, float]]:
    """Run `count` agents at once; returns medians over them, by column."""
    environ = {
        "QITOS_MLFLOW_SPOOL_DIR": str(directory / "spool"),
        "QITOS_MLFLOW_EXIT_TIMEOUT_S": "120",
        "QITOS_MLFLOW_OFFLINE": "1" if way == "sidecar" else "0",
    }
    visible = Visible(server.database)
    BenchAgent.way = way
    follow = sidecar({**os.environ, **environ, "PYTHONPATH": str(ROOT)})
    with follow if way == "sidecar" else nullcontext(0) as follower:
        agents = [
            BenchAgent(
                directory / f"agent-{number}",
                env=environ,
                way="control" if way == "control" else "code",
                options={"tracking_uri": server.uri, "experiment_name": "processes"},
                traces=2,
                steps=20,
                tool_cpu_s=0.05,
                gates=["ready", "over"],
            )
            for number in range(count)
        ]
        for agent in agents:
            agent.wait_for("ready", WAIT_S)
        used_s = [cpu_s(agent.pid) for agent in agents]
        for agent in agents:
            agent.go()
        walls = [agent.wait_for("over", WAIT_S)["wall_s"] for agent in agents]
        if way != "control":
            visible.wait_for_ends(2 * count)
        used_s = [cpu_s(a.pid) - before for a, before in zip(agents, used_s, strict=True)]
        memories = [memory_of(agent.pid) for agent in agents]
        beside = memory_of(follower)[1] if follower else 0.0
        for agent in agents:
            agent.go()
        reports = [agent.finish(WAIT_S) for agent in agents]
    visible.stop()
    steps, ends = [], []
    for report in reports:
        assert report.returncode == 0, report.stderr
        for event in report.truth:
            trace = event["trace_id"]
            if event["callback"] == "on_trace_end" and trace in visible.ends:
                ends.append(visible.ends[trace] - event["time_s"])
            is_step = event["type"] == "step" and event["callback"] == "on_span_end"
            if is_step and trace in visible.steps:  # The first one; of later ones nothing is known.
                steps.append(visible.steps.pop(trace) - event["time_s"])
    values = (
        statistics.median(rss for rss, _ in memories),
        statistics.median(pss for _, pss in memories),
        sum(pss for _, pss in memories) + beside,
        statistics.median(walls),
        statistics.median(used_s),
        statistics.median(steps or [0.0]),
        statistics.median(ends or [0.0]),
        max(ends or [0.0]),
    )
    return list(zip(COLUMNS, values, strict=True))


def main() -> None:
    """Print a table of all ways for each number of agents."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--agents", type=int, nargs="+", default=[1, 16])
    arguments.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    given = arguments.parse_args()
    print("| agents | way |", " | ".join(COLUMNS), "|")
    print("|---|---|" + "---|" * len(COLUMNS), flush=True)
    for count in given.agents:
        for way in given.ways:
            directory = Path(tempfile.mkdtemp())
            server = MlflowServer(directory / "server")
            server.start()
            try:
                found = measure(way, count, server, directory)
            finally:
                server.kill()
                shutil.rmtree(directory, ignore_errors=True)
            cells = [f"{value:.0f}" if "MiB" in name else f"{value:.2f}" for name, value in found]
            print("|", " | ".join([str(count), way, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
