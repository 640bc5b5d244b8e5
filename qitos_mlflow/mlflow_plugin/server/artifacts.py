"""Files of runs that do not go to the tracking server itself.

MLflow's own client would follow the server to any place: a directory of this machine, a bucket,
another web server, with the credentials that this process has for the tracking server.
"""

from __future__ import annotations

from contextlib import closing
from urllib.parse import quote, urlsplit

from qitos_mlflow.delivery import RetryLater, importing
from qitos_mlflow.delivery.sink import progressed
from qitos_mlflow.mlflow_plugin.server.http import REQUEST_TIMEOUT_S, Request, SessionRequester
from qitos_mlflow.mlflow_plugin.server.transport import PutOff, readable
from qitos_mlflow.mlflow_plugin.server.verdict import answer_to, verdict
from qitos_mlflow.redaction.redact import without_credentials

SERVED = "/api/2.0/mlflow-artifacts/artifacts"
"""Where MLflow's servers take files."""


def write_elsewhere(
    artifact_uri: str,
    path: str,
    data: bytes,
    tracking_uri: str,
    timeout_s: float = REQUEST_TIMEOUT_S,
    *,
    trusted: bool,
    files: bool = True,
) -> None:
    """Write a file to a place that is not on the tracking server. May import mlflow.

    Args:
        artifact_uri: the place, as the server has it.
        path: the file's name below it.
        data: its content.
        tracking_uri: of the server.
        timeout_s: longest wait for another web server.
        trusted: credentials of this process are meant for the tracking server, ...
        files: ... and files may go where it says.

    Raises:
        PutOff: they may not.
    """
    place, server = urlsplit(artifact_uri), urlsplit(tracking_uri)
    web = place.scheme in ("http", "https", "mlflow-artifacts")
    on_disk = place.scheme in ("", "file")
    # ``runs:`` and ``models:`` lead on to any other place.
    leads_on = place.scheme in ("runs", "models") or (web and not place.hostname)
    if leads_on or not (files and (trusted or web or on_disk)):
        where, address = without_credentials(artifact_uri), without_credentials(tracking_uri)
        named = "" if trusted else f"MLFLOW_TRACKING_URI={address} "
        raise PutOff(
            "NO_ARTIFACTS",
            f"the server has files go to {readable(where)}, which is not the server itself: if you "
            f"trust it and the records, run `{named}qitos-mlflow sync --trust`",
        )
    if not web:
        with importing():  # mlflow.
            from qitos_mlflow.mlflow_plugin.server.mlflow_client import write_artifact

        write_artifact(artifact_uri, path, data, tracking_uri)
        return
    scheme = place.scheme if place.scheme != "mlflow-artifacts" else server.scheme
    below = "" if place.scheme != "mlflow-artifacts" else SERVED
    origin = f"{scheme}://{place.netloc}"
    own = trusted and (scheme, place.netloc) == (server.scheme, server.netloc.rpartition("@")[2])
    target = f"{scheme}://{server.netloc}" if own else origin  # It may have user and password.
    where = f"{below}{place.path.rstrip('/')}/{quote(path)}"
    headers = {"Content-Type": "application/octet-stream"}
    request = Request("PUT", where, timeout_s, data, headers)
    with closing(SessionRequester(target, {}, trusted=own)) as send:
        answer = answer_to(request, send, without_credentials(origin))
    if not 200 <= answer.status_code < 300:  # It need not be MLflow.
        raise verdict(request, answer, origin) or RetryLater(f"HTTP {answer.status_code}")
    progressed()
