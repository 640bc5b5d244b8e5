"""All that this package costs, beside what users would pick instead: `./dev bench`.

Everything is measured in fresh processes, in rounds in which all take turns, with one real `mlflow
server`; figures are medians. `GATES` are ratios within one run, and what they may be at most:
`./dev gate` measures only those, and fails if one is above its bound.

    python -m benchmarks.suite [--gate] [--rounds N] [--report]

--report writes the tables and the plots into docs/; it needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from benchmarks.contenders import CONTENDERS
from benchmarks.one_run import ROOT, Load, Run
from benchmarks.startup import QITOS, import_ms
from tests.integration.server import MlflowServer

ATTEMPTS = 3
"""For a gate: a real cost is there every time, a noisy neighbour is not."""


class Measurable(Protocol):
    """A key of `Samples`, and how it is measured."""

    def measure(self, uri: str) -> dict[str, float]: ...


Samples = dict[Measurable, list[dict[str, float]]]


@dataclass(frozen=True)
class Import:
    """`import qitos`, in one of the environments of benchmarks/startup.py."""

    environment: str

    def measure(self, uri: str) -> dict[str, float]:
        """CPU time; one process says little, so it is the best of some."""
        return {"import_ms": min(import_ms(QITOS[self.environment])[1] for _ in range(5))}


@dataclass(frozen=True)
class Idle:
    """The bridge without a processor: benchmarks/bridge_idle.py."""

    def measure(self, uri: str) -> dict[str, float]:
        command = [sys.executable, "-m", "benchmarks.bridge_idle"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=False)
        return {"ratio": json.loads(done.stdout)["ratio"]}


@dataclass(frozen=True)
class One:
    """What ratios are to that are ratios already."""

    def measure(self, uri: str) -> dict[str, float]:
        return {"ratio": 1.0}


class Row(NamedTuple):
    """A line of the table: one figure of several contenders."""

    what: str
    field: str
    load: Load
    contenders: tuple[str, ...]
    added: bool = False
    """Without what the contender's base has."""


class Axis(NamedTuple):
    """A row for each value of something in the load, and a plot of them."""

    file: str
    what: str
    field: str
    parameter: str
    label: str
    values: tuple[float, ...]
    contenders: tuple[str, ...]
    load: Load = Load()
    added: bool = False

    def rows(self) -> Iterator[Row]:
        for value in self.values:
            changed: dict[str, Any] = {self.parameter: value}
            load = replace(self.load, **changed)
            what = f"{self.what}; {self.label} {value:,}"
            yield Row(what, self.field, load, self.contenders, self.added)


class Gate(NamedTuple):
    """A ratio, and what it may be at most."""

    what: str
    field: str
    mine: Measurable
    other: Measurable
    bound: float
    added: bool = False


ALL = ("plugin", "batch", "otlp", "mlflow", "wandb", "blocking")
SENDING = ("plugin", "otlp", "mlflow")
THREAD, PROCESS = "agent's thread, µs a span", "whole process, µs a span"
HUNDRED = Load(steps=100)
LARGE = Load(payload=200_000)
STARTS = Load(steps=1, agents=8, repeat=10)

AXES = (
    Axis("thread-payload", THREAD, "own_us", "payload", "payload in bytes",
         (4_000, 40_000, 200_000), ALL, added=True),
    Axis("process-payload", PROCESS, "cpu_us", "payload", "payload in bytes",
         (4_000, 40_000, 200_000), ALL),
    Axis("process-steps", PROCESS, "cpu_us", "steps", "steps", (25, 100, 200, 400),
         ("plugin", "otlp", "mlflow", "wandb")),
    Axis("thread-pause", THREAD, "own_us", "step_s", "pause in a step in s", (0.001, 0.01, 0.1),
         ("plugin", "batch"), added=True),
    Axis("process-pause", PROCESS, "cpu_us", "step_s", "pause in a step in s", (0.001, 0.01, 0.1),
         ("plugin", "otlp")),
    Axis("process-tools", PROCESS, "cpu_us", "tools", "calls of tools a step", (1, 5, 20), SENDING),
    Axis("thread-agents", THREAD, "own_us", "agents", "threads with a trace each", (1, 2, 4, 8),
         ("plugin", "batch", "otlp", "mlflow"), added=True),
    Axis("process-agents", PROCESS, "cpu_us", "agents", "threads with a trace each", (1, 2, 4, 8),
         SENDING),
    Axis("delivered", "from the end until all is on the server, s", "delivered_s", "agents",
         "threads with a trace each", (1, 2, 4, 8), SENDING),
)  # fmt: skip

ROWS = (
    Row("start of a trace, 8 at once, ms", "start_ms", STARTS, ("plugin", "batch", "mlflow")),
    Row("peak memory added, 100 steps, MiB", "peak_mb", HUNDRED, ALL[:-1], added=True),
    Row("written to disk, 100 steps, MB", "written_mb", HUNDRED, ALL[:-1]),
    Row("exit of the process without a flush, 100 steps, s", "exit_s",
        replace(HUNDRED, flush=False), ALL[:-1]),
    Row("requests, 8 agents", "requests", Load(agents=8, proxy=True), SENDING),
)  # fmt: skip

GATES = (
    Gate("whole process beside OTLP/HTTP, 100 steps", "cpu_us",
         Run("plugin", HUNDRED), Run("otlp", HUNDRED), 4.0, added=True),
    Gate("whole process beside OTLP/HTTP, 400 steps", "cpu_us",
         Run("plugin", Load(steps=400)), Run("otlp", Load(steps=400)), 4.0, added=True),
    Gate("agent's thread beside BatchSpanProcessor, 4 KB", "own_us",
         Run("plugin"), Run("batch"), 1.2, added=True),
    Gate("agent's thread beside BatchSpanProcessor, 200 KB", "own_us",
         Run("plugin", LARGE), Run("batch", LARGE), 1.2, added=True),
    Gate("import qitos with the package and no destination, beside without", "import_ms",
         Import("no destination"), Import("without the package"), 1.15),
    Gate("start of a trace beside OpenTelemetry's, 8 at once", "start_ms",
         Run("plugin", STARTS), Run("batch", STARTS), 14.0),
    Gate("an idle bridge beside none", "ratio", Idle(), One(), 1.05),
    Gate("peak memory added beside OTLP/HTTP, 100 steps", "peak_mb",
         Run("plugin", HUNDRED), Run("otlp", HUNDRED), 1.5, added=True),
)  # fmt: skip


def needed(rows: Iterable[Row], gates: Iterable[Gate]) -> list[Measurable]:
    """All that has to be measured, each once, in the order of the tables."""
    found: list[Measurable] = []
    for row in rows:
        for contender in row.contenders:
            run = Run(contender, row.load)
            found += [run.base(), run] if row.added else [run]
    for gate in gates:
        for one in (gate.mine, gate.other):
            found += [one.base()] if gate.added and isinstance(one, Run) else []
            found.append(one)
    return list(dict.fromkeys(found))


def measure(uri: str, wanted: Iterable[Measurable], rounds: int, samples: Samples) -> None:
    """Measure all of them by turns, and add what was found to `samples`."""
    wanted = list(wanted)
    for number in range(rounds):
        began_s = time.monotonic()
        for one in wanted:
            samples.setdefault(one, []).append(one.measure(uri))
        took_s = time.monotonic() - began_s
        print(f"round {number + 1} of {rounds}: {took_s:.0f} s", file=sys.stderr, flush=True)


def figure(samples: Samples, one: Measurable, field: str, added: bool) -> float:
    """The median, and if `added` without the base's."""
    values = [sample[field] for sample in samples[one]]
    if added and isinstance(one, Run):
        base = statistics.median(sample[field] for sample in samples[one.base()])
        return max(0.0, statistics.median(values) - base)
    return statistics.median(values)


def ratio(samples: Samples, gate: Gate) -> float:
    """What a gate's ratio is."""
    mine = figure(samples, gate.mine, gate.field, gate.added)
    return mine / figure(samples, gate.other, gate.field, gate.added)


def check(uri: str, rounds: int, samples: Samples) -> bool:
    """Whether all gates hold; those that do not are measured some more, up to `ATTEMPTS` times."""
    failed = list(GATES)
    for _ in range(ATTEMPTS):
        missing = needed((), failed)
        measure(uri, missing, rounds, samples)
        failed = [gate for gate in failed if ratio(samples, gate) > gate.bound]
        if not failed:
            break
    print(gate_table(samples))
    for gate in failed:
        print(f"TOO MUCH: {gate.what}: {ratio(samples, gate):.2f}, at most {gate.bound}")
    return not failed


def gate_table(samples: Samples) -> str:
    """The ratios and their bounds."""
    lines = ["| ratio | measured | at most |", "|---|---|---|"]
    lines += [f"| {gate.what} | {ratio(samples, gate):.2f} | {gate.bound} |" for gate in GATES]
    return "\n".join(lines)


def shown(value: float) -> str:
    """Three digits are as many as repeat."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(samples: Samples, rows: Iterable[Row]) -> str:
    """A row for each figure, a column for each contender."""
    lines = [
        "| measured | " + " | ".join(CONTENDERS[name].title for name in ALL) + " |",
        "|---" * (len(ALL) + 1) + "|",
    ]
    for row in rows:
        found = {
            name: figure(samples, Run(name, row.load), row.field, row.added)
            for name in row.contenders
        }
        cells = (shown(found[name]) if name in found else "" for name in ALL)
        lines.append(f"| {row.what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def machine(rounds: int) -> str:
    """Where this was measured, how often, and with what."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    versions = ("mlflow", "qitos", "opentelemetry-sdk", "wandb")
    return ", ".join(
        [
            f"{time.strftime('%Y-%m-%d')}: {os.cpu_count()} cores ({(models or ['unknown'])[0]})",
            f"load {os.getloadavg()[2]:.1f}",
            "one round" if rounds == 1 else f"medians of {rounds} rounds",
            f"Python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in versions),
        ]
    )


def main() -> int:
    """Measure, print, and write the report if it is wanted."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--gate", action="store_true", help="only the ratios with a bound")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--report", action="store_true", help="into docs/")
    given = arguments.parse_args()
    samples: Samples = {}
    with tempfile.TemporaryDirectory() as directory:
        server = MlflowServer(Path(directory), "--workers", "2")
        server.start()
        try:
            if given.gate:
                return 0 if check(server.uri, given.rounds, samples) else 1
            rows = [*(row for axis in AXES for row in axis.rows()), *ROWS]
            measure(server.uri, needed(rows, GATES), given.rounds, samples)
        finally:
            server.stop()
    tables = [machine(given.rounds), gate_table(samples), table(samples, rows)]
    print(*tables, sep="\n\n")
    if given.report:
        from benchmarks.report import write

        write(samples, AXES, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
