"""Tracking URIs: what kind of destination one is, and the same one as seen from any directory."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

from qitos_mlflow.redaction.redact import MARKER


def working_directory() -> str:
    """The current directory; the root if it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - a str is wanted
    except OSError:
        return os.path.sep


def absolute(uri: str, cwd: str | None = None) -> str:
    """`uri` with a relative path made absolute, so that it means the same in any directory.

    `cwd` is what it is relative to; None: the current directory.
    """
    if is_http(uri):
        return uri.rstrip("/")  # One server, one name.
    cwd = cwd or working_directory()
    scheme, mark, rest = uri.partition(":")
    if sqlite := re.fullmatch(r"(sqlite(?:\+\w+)?:///(?:file:)?)([^?]+)(.*)", uri, re.DOTALL):
        begin, path, query = sqlite.groups()
        if not path.startswith(":memory:") and not Path(path).is_absolute():
            return f"{begin}{_in_url(Path(cwd).as_posix())}/{path}{query}"
    elif scheme == "file" and rest and not rest.startswith("/"):
        return Path(cwd, rest).as_uri()
    elif not mark or (len(scheme) == 1 and os.name == "nt"):
        return str(Path(cwd, uri)) if uri not in ("databricks", "uc") else uri
    return uri


def _in_url(directory: str) -> str:
    """`directory` as SQLAlchemy reads it in a URL: quoted, from its version 2.1 on."""
    if not re.search("[%?]", directory):
        return directory
    new = tuple(map(int, version("sqlalchemy").split(".")[:2])) >= (2, 1)
    return quote(directory, safe=" +/:") if new else directory


def is_local(uri: str | None) -> bool:
    """True when `uri` is a store on this machine, sqlite or files; None is MLflow's default, too.

    A database server, Databricks, and stores of other packages may hang as an http server may.
    """
    scheme, mark, _ = (uri or "").partition(":")
    named = mark and len(scheme) > 1 and "/" not in scheme  # One letter is a drive of Windows.
    return scheme.split("+")[0] in ("sqlite", "file") if named else uri not in ("databricks", "uc")


def on_disk(uri: str) -> tuple[str, str, str] | None:
    """Equal for the same local store by other names; None for a store that is none."""
    if not is_local(uri):
        return None
    if sqlite := re.fullmatch(r"sqlite(?:\+\w+)?:///(?:file:)?([^?]+)(.*)", uri, re.DOTALL):
        return "sqlite", os.path.realpath(sqlite[1]), sqlite[2]
    return "file", os.path.realpath(re.sub(r"\Afile:(?://)?", "", uri)), ""


def names_place(recorded: str | None) -> bool:
    """False for a URI without a secret that was in its path: two tenants may look the same."""
    return is_local(recorded) or MARKER not in str(recorded).partition("?")[0]


@lru_cache
def is_http(uri: str | None) -> bool:
    """True when `uri` is reached over http(s)."""
    scheme, mark, _ = (uri or "").partition(":")
    return bool(mark) and scheme.lower() in ("http", "https")
