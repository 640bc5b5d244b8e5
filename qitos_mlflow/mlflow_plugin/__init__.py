"""MLflow as a trace plugin: hook calls in, records to `recording`; records back in, calls out.

    watches                 what is watched before any trace
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
