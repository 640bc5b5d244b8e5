"""`python -m qitos_mlflow.cli`, the same if the `qitos-mlflow` script is not on the PATH."""

from __future__ import annotations

from qitos_mlflow.cli import main

main(prog_name="qitos-mlflow")
