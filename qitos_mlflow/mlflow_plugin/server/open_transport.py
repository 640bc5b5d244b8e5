"""Which transport reaches a destination. Imports mlflow only if the destination needs it."""

from __future__ import annotations

from qitos_mlflow.mlflow_plugin.server.tracking_uri import absolute, is_http, working_directory
from qitos_mlflow.mlflow_plugin.server.transport import Transport


def open_transport(uri: str | None, cwd: str | None = None) -> Transport:
    """The transport for `uri`; None means MLflow's default as of the directory `cwd`."""
    if is_http(uri):
        from qitos_mlflow.mlflow_plugin.server.rest import RestTransport, needs_mlflow

        assert uri is not None
        if not needs_mlflow():
            return RestTransport(uri)
        from qitos_mlflow.mlflow_plugin.server.mlflow_client import mlflow_requester

        return RestTransport(uri, mlflow_requester(uri))
    from qitos_mlflow.mlflow_plugin.server.mlflow_client import StoreTransport, default_tracking_uri

    cwd = cwd or working_directory()
    return StoreTransport(absolute(uri, cwd) if uri else default_tracking_uri(cwd))
