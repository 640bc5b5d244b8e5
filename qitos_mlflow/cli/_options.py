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


class TrackingUri(click.ParamType):
    """A tracking URI of a kind MLflow knows; a plain path is one too."""

    name = "uri"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        value = value.strip()
        if not value:
            self.fail("it is empty; give a URI such as http://localhost:5000", param, ctx)
        scheme = urlsplit(value).scheme.lower()
        if scheme in {"http", "https"} and not urlsplit(value).hostname:
            self.fail(f"{value!r} names no host; such as http://localhost:5000", param, ctx)
        # One letter is a drive of Windows, "mysql+pymysql" names the driver as well.
        if len(scheme) > 1 and scheme.split("+")[0] not in SCHEMES and not _added(scheme):
            if urlsplit(value).path.split("/")[0].isdigit():
                self.fail(f"{value!r} has no scheme; did you mean http://{value}?", param, ctx)
            known = ", ".join(sorted(SCHEMES))
            self.fail(f"{value!r}: MLflow has no store {scheme!r}; it has: {known}", param, ctx)
        return value


def _added(scheme: str) -> bool:
    from importlib_metadata import entry_points

    return any(entry.name == scheme for entry in entry_points(group=STORE_GROUP))


class Tag(click.ParamType):
    """One tag as key=value."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        key, equals, text = value.partition("=")
        if not equals or not key.strip():
            self.fail(f"{value!r} is not a tag; write it as key=value", param, ctx)
        return key.strip(), text


class Name(click.ParamType):
    """A text that is not empty."""

    name = "name"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not value.strip():
            self.fail("it is empty; leave the option out for the default", param, ctx)
        return value


def tracking_uri(otherwise: str = "MLflow's own, MLFLOW_TRACKING_URI or the local store") -> Any:
    """`--tracking-uri`, where runs are; `otherwise` says what holds without it."""
    return click.option(
        "--tracking-uri",
        type=TrackingUri(),
        help=f"MLflow server or store that holds the runs.  [default: {otherwise}]",
    )


def experiment_name(command: F) -> F:
    """`--experiment-name`, the experiment the runs are in."""
    return click.option(
        "--experiment-name",
        type=Name(),
        help="MLflow experiment of the runs, created when missing.  "
        "[default: MLFLOW_EXPERIMENT_NAME, else qitos]",
    )(command)
