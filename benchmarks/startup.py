"""What the package costs a Python process that uses it, and one that does not.

Each figure is from fresh processes with compiled files, which take turns, so that a busy machine
slows all of them. `import qitos` without the package is that with ``QITOS_TRACE_PLUGINS=none``.
Needs qitos and the installed package, whose start-up line must be active.

    python benchmarks/startup.py
    python benchmarks/startup.py --modules      # what `import qitos` has loaded, too
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROUNDS = 41

LINE = Path(__file__).parent.parent / "startup" / "qitos_mlflow.pth"

SERVER = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
"""A destination; nothing listens there, and nothing is sent before a trace."""

OFF = {"QITOS_TRACE_PLUGINS": "none"}

OWN = """
import os, qitos
del os.environ["QITOS_TRACE_PLUGINS"]
w, c = time.perf_counter(), time.process_time()
import qitos_mlflow.auto
print((time.perf_counter() - w) * 1e3, (time.process_time() - c) * 1e3)
"""
"""What the start-up line does once qitos is imported, by itself: a difference of two imports of
qitos is lost in their own spread."""

ALONE = {
    "import json": "import json",
    "start-up line": LINE.read_text(),
    "import qitos_mlflow": "import qitos_mlflow",
}
"""Statements in a process that imports nothing else."""


QITOS = {
    "without the package": OFF,
    "no destination": {},
    "MLFLOW_TRACKING_URI": SERVER,
    "QITOS_TRACE_PLUGINS=mlflow": {"QITOS_TRACE_PLUGINS": "mlflow"},
}
"""The environments in which qitos is imported."""


def run(code: str, environ: dict[str, str]) -> list[float]:
    """The numbers that `code` prints last in a fresh process."""
    # With compiled files, as pip leaves them.
    unwanted = {"PYTHONDONTWRITEBYTECODE", "MLFLOW_TRACKING_URI", "QITOS_TRACE_PLUGINS"}
    env = {key: value for key, value in os.environ.items() if key not in unwanted}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env | environ)
    return [float(text) for text in done.stdout.splitlines()[-1].split()]


def alone_ms(statement: str) -> float:
    """Milliseconds of `statement`, after the start-up line's own modules were forgotten."""
    code = (
        "import time, sys\n"
        "sys.modules.pop('qitos_mlflow', None); sys.modules.pop('qitos_mlflow._startup', None)\n"
        f"t = time.perf_counter(); exec({statement!r}); t = time.perf_counter() - t\n"
        "assert 'mlflow' not in sys.modules\n"
        "print(t * 1e3)"
    )
    return run(code, {})[0]


def import_ms(environ: dict[str, str]) -> list[float]:
    """Milliseconds and CPU milliseconds of `import qitos`, and of the start of the first trace."""
    code = (
        "import time, sys, tempfile, os\n"
        "os.environ['QITOS_MLFLOW_SPOOL_DIR'] = tempfile.mkdtemp()\n"
        "w, c = time.perf_counter(), time.process_time()\n"
        "import qitos\n"
        "print_ = [time.perf_counter() - w, time.process_time() - c]\n"
        "assert not {'qitos_mlflow.mlflow_plugin.plugin', 'mlflow'} & {*sys.modules}\n"
        "w, c = time.perf_counter(), time.process_time()\n"
        "from qitos_mlflow.bridge.live import LiveTrace, is_wanted\n"
        "trace = LiveTrace('bench', {}) if is_wanted() else None\n"
        "print_ += [time.perf_counter() - w, time.process_time() - c]\n"
        "print(*(1e3 * number for number in print_), flush=True)\n"
        "os._exit(0)"
    )
    return run(code, environ)


def modules(environ: dict[str, str]) -> set[str]:
    """The modules that `import qitos` leaves."""
    code = "import qitos, sys; print(); sys.stderr.write(' '.join(sys.modules))"
    command = [sys.executable, "-c", code]
    unwanted = {"MLFLOW_TRACKING_URI", "QITOS_TRACE_PLUGINS"}
    env = {key: value for key, value in os.environ.items() if key not in unwanted}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env | environ)
    return set(done.stderr.split())


def shown(values: Iterable[float]) -> str:
    """Median and best of some milliseconds."""
    values = list(values)
    return f"{statistics.median(values):8.2f} ms (best {min(values):7.2f})"


def main() -> None:
    """Print the median and the best of each."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--modules", action="store_true")
    given = arguments.parse_args()
    alone: dict[str, list[float]] = {name: [] for name in ALONE}
    imports: dict[str, list[list[float]]] = {name: [] for name in QITOS}
    own: list[list[float]] = []
    for _ in range(given.rounds):
        own.append(run(f"import time\n{OWN}", OFF))
        for name, statement in ALONE.items():
            alone[name].append(alone_ms(statement))
        for name, environ in QITOS.items():
            imports[name].append(import_ms(environ))
    for name, values in alone.items():
        print(f"{name:44}{shown(values)}")
    print("\nimport qitos (wall time, CPU time), and how much more of CPU time than without")
    without = [cpu for _, cpu, *_ in imports["without the package"]]
    for name, measured in imports.items():
        cpu = [one[1] for one in measured]
        more = [one - base for one, base in zip(cpu, without, strict=True)]
        print(
            f"{name:28}{shown(one[0] for one in measured)}  {shown(cpu)}  "
            f"+{statistics.median(more):.2f} (of the best +{min(cpu) - min(without):.2f})"
        )
    print(f"what is done for it{'':9}{shown(one[0] for one in own)}  {shown(o[1] for o in own)}")
    print("\nstart of the first trace of the process (wall time, CPU time)")
    for name, measured in imports.items():
        print(f"{name:28}{shown(o[2] for o in measured)}  {shown(o[3] for o in measured)}")
    if given.modules:
        before = modules(OFF)
        for name, environ in QITOS.items():
            print(f"\n{name}: {' '.join(sorted(modules(environ) - before))}")


if __name__ == "__main__":
    main()
