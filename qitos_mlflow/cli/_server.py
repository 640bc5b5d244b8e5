"""Whether a tracking server answers."""

from __future__ import annotations

from typing import NamedTuple

TIMEOUT_S = 2.0
"""A server that is well answers within milliseconds; a person waits for this."""


class Answer(NamedTuple):
    """`reachable` is None where there is no server to ask; `detail` is for people."""

    uri: str
    reachable: bool | None
    detail: str


def ask(uri: str | None) -> Answer:
    """Ask the server at `uri` for its version, or else its health. Blocks some `TIMEOUT_S`."""
    from qitos_mlflow.cli._spool import DEFAULT_STORE
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
    from qitos_mlflow.redaction.uris import without_credentials
    from qitos_mlflow.settings import usable_uri

    if uri is None:
        return Answer(DEFAULT_STORE, None, "local, no server needed")
    shown = without_credentials(uri)
    if not is_http(uri):
        try:
            usable_uri(uri)
        except ValueError as error:
            return Answer(shown, False, str(error))
        return Answer(shown, None, "not an http server, so not asked")
    from configparser import Error as BadCredentialsFile
    from contextlib import closing

    from urllib3.exceptions import HTTPError

    from qitos_mlflow.mlflow_plugin.server.http import SessionRequester

    try:
        with closing(SessionRequester(uri)) as request:
            version = request("GET", "/version", None, {}, TIMEOUT_S)
            if version.ok and len(version.text) < 40:  # Otherwise it is somebody's web page.
                return Answer(shown, True, f"MLflow {version.text.strip()}")
            health = request("GET", "/health", None, {}, TIMEOUT_S)
    except (ValueError, BadCredentialsFile) as error:  # Its text holds what was configured.
        kind = type(error).__name__
        return Answer(shown, False, f"{kind}: check the URI and MLflow's settings of credentials")
    except (OSError, HTTPError) as error:
        return Answer(shown, False, _cause(error))
    return Answer(shown, health.ok, f"HTTP {health.status_code}")


def _cause(error: BaseException) -> str:
    """The innermost reason, such as "Connection refused", without the wrapping of each layer."""
    while True:
        inner = getattr(error, "reason", None) or next(
            (arg for arg in error.args if isinstance(arg, BaseException)), None
        )
        if not isinstance(inner, BaseException):
            break
        error = inner
    text = getattr(error, "strerror", None) or str(error).rpartition(": ")[2]
    return text or type(error).__name__
