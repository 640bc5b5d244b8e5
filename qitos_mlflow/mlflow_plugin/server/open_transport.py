"""Which transport reaches a destination. Imports mlflow only if the destination needs it."""

from __future__ import annotations

import os

from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.tracking_uri import absolute, is_http, working_directory
from qitos_mlflow.mlflow_plugin.server.transport import Transport


def open_transport(uri: str | None, cwd: str | None = None) -> Transport:
    """The transport for `uri`; None means MLflow's default as of the directory `cwd`."""
    if uri is None or not is_http(uri):
        from qitos_mlflow.mlflow_plugin.server import mlflow_client

        cwd = cwd or working_directory()
        store = absolute(uri, cwd) if uri else mlflow_client.default_tracking_uri(cwd)
        return mlflow_client.StoreTransport(store)
    if not _needs_mlflow():
        return RestTransport(uri)
    from qitos_mlflow.mlflow_plugin.server.mlflow_client import mlflow_requester

    return RestTransport(uri, mlflow_requester(uri))


def _needs_mlflow() -> bool:
    """Whether http destinations need mlflow's own client, by its settings or its plugins."""
    for name in ("MLFLOW_TRACKING_AUTH", "MLFLOW_TRACKING_AWS_SIGV4"):
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            return True
    from importlib_metadata import entry_points

    providers = entry_points(group="mlflow.request_header_provider")
    return any(not provider.value.startswith("mlflow.") for provider in providers)
