"""Tracking URIs: what kind of destination one is, and the same one as seen from any directory."""

from __future__ import annotations

import os
from pathlib import Path


def working_directory() -> str:
    """The current directory; the root if it has been removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - a str is wanted
    except OSError:
        return os.path.sep


def absolute(uri: str, cwd: str) -> str:
    """`uri` with a relative path made absolute, so that it means the same in any directory."""
    if is_http(uri):
        return uri.rstrip("/")  # One server, one name.
    scheme, mark, rest = uri.partition(":")
    if scheme == "sqlite" and rest.startswith("///") and not rest.startswith("////"):
        path = rest[3:]
        if path and not path.startswith(":memory:") and not Path(path).is_absolute():
            return f"sqlite:///{Path(cwd, path).as_posix()}"
    elif scheme == "file" and rest and not rest.startswith("/"):
        return Path(cwd, rest).as_uri()
    elif not mark or (len(scheme) == 1 and os.name == "nt"):
        return str(Path(cwd, uri)) if uri not in ("databricks", "uc") else uri
    return uri


def is_http(uri: str | None) -> bool:
    """True when `uri` is reached over http(s)."""
    scheme, mark, _ = (uri or "").partition(":")
    return bool(mark) and scheme.lower() in ("http", "https")
