"""Whether a tracking server answers."""

from __future__ import annotations

from typing import NamedTuple

TIMEOUT_S = 2.0
"""A healthy server answers within milliseconds; the user waits for this."""


class Answer(NamedTuple):
    """`reachable` is None if there is no server to ask; `detail` is shown to the user."""

    uri: str
    reachable: bool | None
    detail: str


def ask(uri: str | None, *, trusted: bool) -> Answer:
    """Ask the server at `uri` for its version and an experiment, else its health.

    Blocks up to 2 * `TIMEOUT_S`. Only a `trusted` server gets credentials.
    """
    from qitos_mlflow.cli._spool import DEFAULT_STORE
    from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
    from qitos_mlflow.redaction.redact import without_credentials
    from qitos_mlflow.settings import usable_uri

    if uri is None:
        return Answer(DEFAULT_STORE, None, "it needs no server")
    shown = without_credentials(uri)
    if not is_http(uri):
        try:
            usable_uri(uri)
        except ValueError as error:
            return Answer(shown, False, str(error))
        return Answer(shown, None, "not an http server, not checked")
    from contextlib import closing

    from urllib3.exceptions import HTTPError

    from qitos_mlflow.delivery import RetryLater
    from qitos_mlflow.mlflow_plugin.server.http import UNAUTHORISED, Request, SessionRequester
    from qitos_mlflow.mlflow_plugin.server.verdict import verdict

    try:
        with closing(SessionRequester(uri, trusted=trusted)) as send:
            question = Request("GET", "/version", TIMEOUT_S)
            path = "/api/2.0/mlflow/experiments/search?max_results=1"
            experiments = Request("GET", path, TIMEOUT_S, answer="experiments")
            version = send(question)
            if version.status_code in UNAUTHORISED:
                return Answer(shown, True, str(verdict(question, version, shown)))
            if version.ok and len(version.content) < 40:  # A longer text is a web page.
                # What records need may be refused all the same.
                problem = verdict(experiments, send(experiments), shown)
                but = f", but: {problem}" if problem else ""
                return Answer(shown, True, f"MLflow {version.text.strip()}{but}")
            health = send(Request("GET", "/health", TIMEOUT_S))
    except RetryLater as error:  # Of a plugin of MLflow's.
        return Answer(shown, False, error.reason)
    except ValueError as error:  # Its text has the password in it.
        kind = type(error).__name__
        return Answer(shown, False, f"{kind}: check the URI and MLflow's credential settings")
    except (OSError, HTTPError) as error:
        return Answer(shown, False, _cause_of(error))
    return Answer(shown, health.ok, f"HTTP {health.status_code}")


def _cause_of(error: BaseException) -> str:
    """Such as "Connection refused", without the layers around it."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
