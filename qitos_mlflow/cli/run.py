"""`qitos-mlflow run`: becomes python with a script, with logging on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import click

from qitos_mlflow._startup import OFF
from qitos_mlflow.cli import _options
from qitos_mlflow.cli.plugins import startup_line_is_active
from qitos_mlflow.errors import QitosMlflowError

STARTUP_DIRECTORY = Path(__file__).with_name("startup")
"""On PYTHONPATH, it does what the start-up line does."""


@click.command(
    # Everything from the script's name on is the script's, options included.
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS] [--]",
)
@click.option("-m", "as_module", is_flag=True, help="TARGET is a module, as with python -m.")
@_options.tracking_uri()
@_options.experiment_name
@_options.setting("run_name", "Name of the MLflow runs", "the trace's name, by default the agent's")
@click.option(
    "--tag",
    "tags",
    metavar="KEY=VALUE",
    multiple=True,
    callback=_options.tags,
    help="A tag of the runs. Repeat the option for more tags.",
)
@click.argument("target")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(
    as_module: bool,
    tracking_uri: str | None,
    experiment_name: str | None,
    run_name: str | None,
    tags: tuple[tuple[str, str], ...],
    target: str,
    args: tuple[str, ...],
) -> None:
    """Start an agent's script with logging on.

    TARGET is the script and ARGS are its arguments, as with python. Its output, exceptions and exit
    code are those of a plain python call. Agents in processes that it starts are logged too: the
    settings are passed on in environment variables.
    """
    if not (as_module or Path(target).exists()):
        raise QitosMlflowError(
            f"there is no script {target!r} in {Path.cwd()}; "
            f"to start a module: qitos-mlflow run -m {Path(target).stem}"
        )
    variables = {
        "QITOS_TRACE_PLUGINS": selection(os.environ.get("QITOS_TRACE_PLUGINS", "")),
        "MLFLOW_TRACKING_URI": tracking_uri,
        "QITOS_MLFLOW_EXPERIMENT_NAME": experiment_name,
        "QITOS_MLFLOW_RUN_NAME": run_name,
        "QITOS_MLFLOW_TAGS": json.dumps(dict(tags)) if tags else None,
    }
    # The options that this python has been started with, such as -X dev.
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if getattr(sys.stdout, "write_through", False):  # Of which there is no flag.
        options.append("-u")
    if not startup_line_is_active():
        path = [str(STARTUP_DIRECTORY), os.environ.get("PYTHONPATH")]
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        # With these, python imports no `sitecustomize`, or ignores PYTHONPATH.
        options = [option for option in options if option not in {"-S", "-E", "-I"}]
        os.environ.pop("_QITOS_MLFLOW_PYTHON", None)  # Of an outer `run`, in another Python.
    os.environ.update({name: value for name, value in variables.items() if value})
    if not as_module and target.startswith("-"):  # For python this is an option.
        target = f"./{target}"
    command = [sys.executable, *options, *(["-m"] if as_module else []), target, *args]
    if os.name == "nt":  # Where exec starts another process and ends this one at once.
        sys.exit(subprocess.call(command))  # noqa: S603 - this is what the command is for
    os.execv(sys.executable, command)  # noqa: S606 - the same


def selection(before: str) -> str:
    """`QITOS_TRACE_PLUGINS` with mlflow added; the plugins selected before stay selected."""
    names = [name.strip().lower() for name in before.split(",") if name.strip()]
    names = [name for name in names if name not in {*OFF, "no:mlflow"}]
    if names and all(name.startswith("no:") for name in names):
        names.insert(0, "all")
    if not {"mlflow", "all", "*"} & set(names):
        names.append("mlflow")
    return ",".join(names)
