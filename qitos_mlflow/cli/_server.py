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
    from qitos_mlflow.mlflow_plugin.destination import is_http
    from qitos_mlflow.settings import usable_uri

    if uri is not None and not is_http(uri):
        try:
            usable_uri(uri)
        except ValueError as error:
            return Answer(uri, False, str(error))
    if uri is None or not is_http(uri):
        return Answer(uri or "MLflow's local store", None, "local, no server needed")
    import requests

    from qitos_mlflow.mlflow_plugin.exchange import SessionRequester

    request = SessionRequester(uri)
    try:
        version = request("GET", "/version", None, {}, TIMEOUT_S)
        if version.ok and len(version.text) < 40:  # Otherwise it is somebody's web page.
            return Answer(uri, True, f"MLflow {version.text.strip()}")
        health = request("GET", "/health", None, {}, TIMEOUT_S)
    except requests.RequestException as error:
        return Answer(uri, False, _cause(error))
    finally:
        request.close()
    return Answer(uri, health.ok, f"HTTP {health.status_code}")


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
