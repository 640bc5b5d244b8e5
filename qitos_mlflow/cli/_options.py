"""Options that several commands share, with one meaning in all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def a_tracking_uri(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Accept the same URIs as the setting `tracking_uri`."""
    from qitos_mlflow.redaction.redact import without_credentials
    from qitos_mlflow.settings import usable_uri

    if value is None:
        return None
    if not value.strip():
        raise click.BadParameter("it is empty; give a URI such as http://localhost:5000")
    try:
        return usable_uri(value)
    except ValueError as error:
        shown = without_credentials(value.strip())
        raise click.BadParameter(f"{shown!r}: {error}") from None


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


def not_empty(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Accept any text but an empty one."""
    if value is not None and not value.strip():
        raise click.BadParameter("it is empty; leave the option out for the default")
    return value


def seconds(ctx: click.Context, param: click.Parameter, value: str) -> float:
    """Accept a number of seconds. Infinity and NaN are none: such a wait never ends."""
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"{value!r} is not a number of seconds, such as 30")
    return number


def tracking_uri(
    otherwise: str = "MLFLOW_TRACKING_URI, else MLflow's local store",
) -> Callable[[F], F]:
    """`--tracking-uri`, where the runs are; `otherwise` describes the default."""
    return click.option(
        "--tracking-uri",
        metavar="URI",
        callback=a_tracking_uri,
        help=f"MLflow server or store that holds the runs.  [default: {otherwise}]",
    )


def experiment_name(command: F) -> F:
    """`--experiment-name`, the experiment the runs are in."""
    return click.option(
        "--experiment-name",
        metavar="NAME",
        callback=not_empty,
        help="MLflow experiment of the runs, created if missing.  "
        "[default: QITOS_MLFLOW_EXPERIMENT_NAME, else MLFLOW_EXPERIMENT_NAME, else qitos]",
    )(command)
