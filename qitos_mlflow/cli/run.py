"""`qitos-mlflow run`: starts a script as python itself would, with logging on."""

from __future__ import annotations

import builtins
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, NoReturn

import click

from qitos_mlflow._startup import OFF
from qitos_mlflow.cli import Handover, Refused, _options
from qitos_mlflow.cli._show import complain


@click.command(
    # Everything from the script's name on is the script's, options included.
    context_settings={"allow_interspersed_args": False},
    options_metavar="[OPTIONS] [--]",
)
@click.option("-m", "as_module", is_flag=True, help="TARGET is a module, as with python -m.")
@_options.tracking_uri()
@_options.experiment_name
@click.option(
    "--run-name",
    metavar="NAME",
    callback=_options.not_empty,
    help="Name of the MLflow runs.  [default: the trace's name, by default the agent's]",
)
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
    variables = {
        "QITOS_TRACE_PLUGINS": selection(os.environ.get("QITOS_TRACE_PLUGINS", "")),
        "MLFLOW_TRACKING_URI": tracking_uri,
        "QITOS_MLFLOW_EXPERIMENT_NAME": experiment_name,
        "QITOS_MLFLOW_RUN_NAME": run_name,
        "QITOS_MLFLOW_TAGS": json.dumps(dict(tags)) if tags else None,
    }
    os.environ.update({name: value for name, value in variables.items() if value})
    importlib.import_module("qitos_mlflow.auto")
    raise Handover(partial(launch, target, args, as_module))


def selection(before: str) -> str:
    """`QITOS_TRACE_PLUGINS` with mlflow added; the plugins selected before stay selected."""
    names = [name.strip().lower() for name in before.split(",") if name.strip()]
    names = [name for name in names if name not in {*OFF, "no:mlflow"}]
    if names and all(name.startswith("no:") for name in names):
        names.insert(0, "all")
    if not {"mlflow", "all", "*"} & set(names):
        names.append("mlflow")
    return ",".join(names)


def launch(target: str, args: Sequence[str], as_module: bool) -> None:
    """Be `python target args`: its `sys.argv`, `sys.path`, `__main__`, output and exit code."""
    try:
        code, module = load_module(target) if as_module else load_script(target)
    except Refused as refused:
        complain(str(refused))
        sys.exit(2)
    except SyntaxError as error:
        _fail(error.with_traceback(None))
    sys.argv = [str(module.__file__) if as_module else target, *args]
    sys.modules["__main__"] = module
    try:
        exec(code, module.__dict__)  # noqa: S102 - this is what the command is for
    except (SystemExit, KeyboardInterrupt):
        raise  # Python has exit codes of its own for these.
    except BaseException as error:
        frames = error.__traceback__
        _fail(error.with_traceback(frames and frames.tb_next))


def _fail(error: BaseException) -> NoReturn:
    """End as python does after an uncaught `error`, without the frames of this package."""
    sys.excepthook(type(error), error, error.__traceback__)
    raise SystemExit(1) from None


def load_script(target: str) -> tuple[CodeType, ModuleType]:
    """Code and `__main__` module of a script file, or of a directory or zip with `__main__.py`."""
    path = Path(target)
    if not path.exists():
        raise Refused(
            f"there is no script {target!r} in {Path.cwd()}; "
            f"to start a module: qitos-mlflow run -m {path.stem}"
        )
    place = os.path.join(Path.cwd(), target)  # noqa: PTH118 - "./x.py" keeps its dot, as in python
    inside = PathFinder.find_spec("__main__", [place])
    if inside is not None:
        _put_on_path(place)
        return _from_spec(inside, target)
    if path.is_dir():
        raise Refused(f"the directory {target!r} has no __main__.py; give a script in it")
    _put_on_path(str(path.resolve().parent))
    loader = SourceFileLoader("__main__", place)
    code = loader.source_to_code(loader.get_data(place), place)
    return code, _main_module(__file__=place, __loader__=loader, __package__=None, __spec__=None)


def load_module(target: str) -> tuple[CodeType, ModuleType]:
    """Code and `__main__` module for `python -m target`; packages above it are imported."""
    if target.endswith(".py"):
        raise Refused(f"{target!r} is the name of a script; start it without -m")
    _put_on_path(str(Path.cwd()))
    try:
        spec = importlib.util.find_spec(target)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{target}.__main__")
    except (ModuleNotFoundError, ValueError) as error:
        raise Refused(f"there is no module {target!r}: {error}") from error
    if spec is None:
        raise Refused(f"there is no module {target!r} that can be run")
    return _from_spec(spec, target)


def _from_spec(spec: ModuleSpec, target: str) -> tuple[CodeType, ModuleType]:
    get_code = getattr(spec.loader, "get_code", None)
    code = get_code(spec.name) if get_code is not None else None
    if code is None:
        raise Refused(f"{target!r} has no Python code that can be run")
    return code, _main_module(
        __file__=spec.origin,
        __loader__=spec.loader,
        __package__=spec.parent,
        __spec__=spec,
        __cached__=spec.cached,
    )


def _main_module(**attributes: Any) -> ModuleType:
    module = ModuleType("__main__")
    module.__dict__.update(__builtins__=builtins, **attributes)
    return module


def _put_on_path(directory: str) -> None:
    """Let imports find modules beside the script, except under `python -P`."""
    if getattr(sys.flags, "safe_path", False):
        return
    sys.path[0] = directory
