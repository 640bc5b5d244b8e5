"""What the package costs a Python process that uses it, and one that does not.

The start-up line, `import qitos_mlflow`, and what they load, each in fresh processes, beside
`import json` of the standard library.

    python benchmarks/startup.py
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

ROUNDS = 21

LINE = Path(__file__).parent.parent / "startup" / "qitos_mlflow.pth"

CASES = {
    "import json": "import json",
    "start-up line": LINE.read_text(),
    "import qitos_mlflow": "import qitos_mlflow",
    "MlflowTraceProcessor": "from qitos_mlflow import MlflowTraceProcessor",
}


def cost_ms(statement: str) -> float:
    """Milliseconds of `statement` in a fresh process, start-up files off."""
    code = (
        "import time, sys\n"
        "sys.modules.pop('qitos_mlflow', None); sys.modules.pop('qitos_mlflow._startup', None)\n"
        f"t = time.perf_counter(); exec({statement!r}); t = time.perf_counter() - t\n"
        "assert 'mlflow' not in sys.modules\n"
        "print(t * 1e3)"
    )
    # With compiled files, as pip leaves them.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Print the median of each."""
    for name, statement in CASES.items():
        values = [cost_ms(statement) for _ in range(ROUNDS)]
        print(f"{name:24} {statistics.median(values):8.3f} ms (best {min(values):.3f})")


if __name__ == "__main__":
    main()
