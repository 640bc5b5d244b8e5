"""Options that several commands share, and mean the same in each of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

import click

F = TypeVar("F", bound=Callable[..., Any])

SCHEMES = frozenset(
    {"http", "https", "file", "sqlite", "mysql", "mssql", "postgresql"}
    | {"databricks", "databricks-uc", "uc"}
)
"""What MLflow itself takes; packages add others in the entry-point group below."""

STORE_GROUP = "mlflow.tracking_store"


def a_tracking_uri(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """Accept a tracking URI of a kind MLflow knows; a plain path is one too."""
    if value is None:
        return None
    value = value.strip()
    if not value:
        raise click.BadParameter("it is empty; give a URI such as http://localhost:5000")
    scheme = urlsplit(value).scheme.lower()
    if scheme in {"http", "https"} and not urlsplit(value).hostname:
        raise click.BadParameter(f"{value!r} names no host; such as http://localhost:5000")
    # One letter is a drive of Windows; "mysql+pymysql" names the driver as well.
    if len(scheme) > 1 and scheme.split("+")[0] not in SCHEMES and not _added(scheme):
        if urlsplit(value).path.split("/")[0].isdigit():
            raise click.BadParameter(f"{value!r} has no scheme; did you mean http://{value}?")
        known = ", ".join(sorted(SCHEMES))
        raise click.BadParameter(f"{value!r}: MLflow has no store {scheme!r}; it has: {known}")
    return value


def _added(scheme: str) -> bool:
    from importlib_metadata import entry_points

    return any(entry.name == scheme for entry in entry_points(group=STORE_GROUP))


def tags(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, str], ...]:
    """Take each value apart at its first equals sign."""
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


def tracking_uri(
    otherwise: str = "MLflow's own, MLFLOW_TRACKING_URI or the local store",
) -> Callable[[F], F]:
    """`--tracking-uri`, where runs are; `otherwise` says what holds without it."""
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
        help="MLflow experiment of the runs, created when missing.  "
        "[default: MLFLOW_EXPERIMENT_NAME, else qitos]",
    )(command)
