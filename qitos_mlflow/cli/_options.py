"""Options that several commands share, with one meaning in all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def tags(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Split each value at its first equals sign."""
    pairs = []
    for value in values:
        key, equals, text = value.partition("=")
        if not equals or not key.strip():
            raise click.BadParameter(f"{value!r} is not a tag; write it as key=value")
        pairs.append((key.strip(), text))
    return tuple(pairs)


def setting(name: str, what: str, otherwise: str) -> Callable[[F], F]:
    """The option that gives the setting `name`.

    Args:
        name: of the setting, which also says what values there are.
        what: the help's description.
        otherwise: the help's description of the default.
    """

    def check(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
        from qitos_mlflow.settings import parsed

        if value is not None and not value.strip():  # Such as an unset shell variable.
            raise click.BadParameter("it is empty; leave the option out for the default")
        return None if value is None else parsed(name, value, f"option {param.opts[0]}")

    option = f"--{name.replace('_', '-')}"
    metavar = name.rpartition("_")[2].upper()
    return click.option(
        option, metavar=metavar, callback=check, help=f"{what}.  [default: {otherwise}]"
    )


def tracking_uri(
    otherwise: str = "MLFLOW_TRACKING_URI, else MLflow's local store",
) -> Callable[[F], F]:
    """`--tracking-uri`, where the runs are; `otherwise` describes the default."""
    return setting("tracking_uri", "MLflow server or store that holds the runs", otherwise)


experiment_name = setting(
    "experiment_name",
    "MLflow experiment of the runs, created if missing",
    "QITOS_MLFLOW_EXPERIMENT_NAME, else what MLflow itself uses, else qitos",
)
