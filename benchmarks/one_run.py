"""One measurement of the suite: an agent's work, recorded by one contender, in a fresh process.

The agent sends all messages so far with each model call: `payload` bytes at the start, and two more
messages each step. A small trace goes before what is measured, so that imports and connections are
not in it. Linux only: memory and bytes written are read from /proc.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.contenders import CONTENDERS, STORES_SPANS, OpenSpan, Server

ROOT = Path(__file__).parents[1]
WAIT_S = 600.0
MESSAGE_CHARS = 300


@dataclass(frozen=True)
class Load:
    """What the agents of a run do."""

    steps: int = 25
    payload: int = 4_000
    """Of the messages at the start of a conversation (bytes)."""
    tools: int = 1
    """Calls of tools in a step. A step has five spans and one for each of them."""
    agents: int = 1
    """At once, each in a thread of its own."""
    repeat: int = 1
    """Traces of each agent, one after the other."""
    step_s: float = 0.02
    """A step waits so long for its first tool: an agent that never waits is none."""
    flush: bool = True
    """Wait until all is delivered; else the process ends, which takes as long as it takes."""
    proxy: bool = False
    """A proxy counts the requests; it costs time."""

    @property
    def spans(self) -> int:
        """In all traces."""
        return self.agents * self.repeat * (1 + self.steps * (5 + self.tools))


@dataclass(frozen=True)
class Run:
    """A contender at work."""

    contender: str
    load: Load = Load()

    def base(self) -> Run:
        """What is there without what it adds."""
        return replace(self, contender=CONTENDERS[self.contender].base)

    def measure(self, uri: str) -> dict[str, float]:
        """Its figures, from a new process that works with the server at `uri`."""
        return measure(uri, self)


def text(number: int, chars: int = MESSAGE_CHARS) -> str:
    """A text of its own for each number."""
    return f"{number}: " + ("What is to be done next? " * (chars // 25 + 1))[:chars]


def work(span: OpenSpan, load: Load) -> None:
    """An agent's spans."""
    pieces = max(1, load.payload // 2000)
    messages = [
        {"role": "user", "content": text(-number, load.payload // pieces)}
        for number in range(pieces)
    ]
    with span("agent", "worker"):
        for number in range(load.steps):
            with span("step", f"step {number}"):
                answer = text(2 * number + 1)
                with span("decide", "decide"), span("generation", "m", [*messages], answer):
                    pass
                messages.append({"role": "assistant", "content": answer})
                with span("act", "act"):
                    for tool in range(load.tools):
                        with span("tool", "work", {"a": tool}, "done"):
                            if tool == 0:
                                time.sleep(load.step_s)
                messages.append({"role": "user", "content": text(2 * number + 2)})
                with span("reduce", "reduce"):
                    pass


def own_processes() -> list[str]:
    """Folders in /proc of this process and of those it started."""
    children = [path.read_text().split() for path in Path("/proc/self/task").glob("*/children")]
    return ["/proc/self", *(f"/proc/{pid}" for found in children for pid in found)]


def cpu_s() -> float:
    """CPU time of this process and of those it started (seconds)."""
    ticks = 0
    for folder in own_processes()[1:]:
        ticks += sum(map(int, Path(folder, "stat").read_text().rpartition(")")[2].split()[11:15]))
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def total(file: str, key: str) -> int:
    """The sum of a number in /proc over these processes."""
    found = 0
    for folder in own_processes():
        lines = Path(folder, file).read_text().splitlines()
        found += sum(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))
    return found


def measure_here(contender: str, server: Server, load: Load) -> None:
    """Print the figures of this process as one line of JSON, and end it."""
    import qitos  # noqa: F401 - as any agent does

    trace, flush = CONTENDERS[contender].make(server)
    own_s: list[float] = []
    starts_s: list[float] = []

    def agent(load: Load) -> None:
        began_s = time.thread_time()
        for _ in range(load.repeat):
            wall_s = time.perf_counter()
            with trace() as span:
                starts_s.append(time.perf_counter() - wall_s)
                work(span, load)
        own_s.append(time.thread_time() - began_s)

    agent(replace(load, steps=5, repeat=1))
    flush()
    own_s.clear()
    starts_s.clear()
    began_s, written = cpu_s(), total("io", "write_bytes")
    threads = [threading.Thread(target=agent, args=(load,)) for _ in range(load.agents)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended_s = time.monotonic()
    if load.flush:
        flush()
    found = {
        "ended_s": ended_s,
        "delivered_s": time.monotonic() - ended_s,
        "cpu_us": (cpu_s() - began_s) / load.spans * 1e6,
        "own_us": sum(own_s) / load.spans * 1e6,
        "start_ms": statistics.median(starts_s) * 1e3,
        "peak_mb": total("status", "VmHWM") / 1024,
        "written_mb": (total("io", "write_bytes") - written) / 1e6,
    }
    print(json.dumps(found), flush=True)
    if load.flush:
        os._exit(0)


def measure(uri: str, run: Run) -> dict[str, float]:
    """The figures of one run in a new process, with an experiment of its own."""
    from mlflow import MlflowClient

    from benchmarks.visibility import count_spans
    from tests.integration.proxy import Proxy

    name = f"benchmark {run.contender} {uuid.uuid4().hex[:8]}"
    experiment_id = MlflowClient(uri).create_experiment(name)
    load = run.load
    proxy = Proxy(int(uri.rpartition(":")[2])) if load.proxy else None
    server = Server(proxy.uri if proxy else uri, name, experiment_id)
    command = [sys.executable, "-m", "benchmarks.one_run", run.contender]
    done = subprocess.run(
        [*command, json.dumps(server), json.dumps(asdict(load))],
        cwd=ROOT,
        env={**os.environ, "QITOS_TRACE_PLUGINS": "none"},
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["exit_s"] = time.monotonic() - found.pop("ended_s")
    if proxy:
        found["requests"] = len(proxy.requests)
        proxy.close()
    if run.contender in STORES_SPANS and load.flush:
        warm_up = replace(load, steps=5, repeat=1, agents=1)
        extra = 0 if run.contender == "plugin" else load.agents * load.repeat + 1
        expected = load.spans + warm_up.spans + extra
        there = count_spans(uri, experiment_id)
        assert there == expected, f"{run}: {there} of {expected} spans are on the server"
    return found


if __name__ == "__main__":
    arguments: list[Any] = [json.loads(argument) for argument in sys.argv[2:]]
    measure_here(sys.argv[1], Server(*arguments[0]), Load(**arguments[1]))
