"""MLflow as a trace plugin: hook calls in, records to `recording`; records back in, calls out.

    plugin                  the hooks, and which of several plugins logs a run
    open_trace              one trace on the agent's thread
    processor               registering by hand
    feedback                scores of runs that have ended; evaluators: those of QitOS
    evaluations, benchmarks one run for many tasks: of the user's, and of the host's own runners
    destination             where runs go, how they are logged, what MLflow adds to a pipeline
    fluent/                 MLflow's active run, its own spans, what is around a trace
    sink/, mapping/         records to calls; on the sending thread
    server/                 one call to MLflow

Only `server.mlflow_client` imports mlflow.
"""

from __future__ import annotations

# Settle which tracing API is used before the modules below need it: settling imports qitos, which
# sets off the start-up line, which loads the plugin from here.
from qitos_mlflow.tracing import host_has_tracing as _settled  # noqa: F401
