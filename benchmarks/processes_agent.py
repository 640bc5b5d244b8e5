"""An agent's process of `benchmarks.processes`: agents, with the transport to be measured."""

from __future__ import annotations

import sys
from typing import Any

from qitos_mlflow._after_import import after_import
from tests.integration.agent_script import main


def choose_transport(sink: Any) -> None:
    """Let sinks have the transport that the command line names."""
    from qitos_mlflow.mlflow_plugin.server.mlflow_client import StoreTransport  # Imports mlflow.
    from qitos_mlflow.mlflow_plugin.server.rest import RestTransport

    sink.open_transport = {
        "requests": lambda uri, *_, **__: RestTransport(uri),
        "client": lambda uri, *_, **__: StoreTransport(uri),
    }[sys.argv[2]]


if __name__ == "__main__":
    if sys.argv[2] in ("requests", "client"):
        after_import("qitos_mlflow.mlflow_plugin.sink.sink", choose_transport)
    main()
