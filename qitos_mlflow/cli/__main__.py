"""`python -m qitos_mlflow.cli`, the same if the `qitos-mlflow` script is not on the PATH."""

from __future__ import annotations

import sys

from qitos_mlflow.cli import main

sys.exit(main(prog_name="qitos-mlflow"))
