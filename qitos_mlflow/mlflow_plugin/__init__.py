"""The MLflow plugin: hook calls in, records out to delivery; records back in, calls to MLflow out.

Where each module stands:

    agent's thread   origin (which plugin logs a run), plugin (hooks) -> going (what is kept of each
                     open trace), capture + encoding (span -> bytes), artifacts, active_run +
                     pending_run (MLflow's active run), nesting (MLflow's own spans below ours),
                     status
    worker           refine <- redaction + credentials, inlined (pictures), extension + additions
                     (other plugins), ledger (losses)
    shipper          sink -> tracestate: metrics + labels + sample (the run), spans + traceinfo +
                     attributes + chat + chat_parts + feedback + otlp (the trace); for both: ids,
                     limits. calls + cost -> shipment -> transport: rest + exchange, or store
    process          destination, pipelines (one for each destination), ending (at exit),
                     processor (registered by hand), readback (for the commands only)

Only `store` imports mlflow; `readback`, for the commands, does too.
"""

from __future__ import annotations

# Settle whose tracing it is before the modules below look at it: settling imports qitos, which
# sets off the start-up line, which loads the plugin from here.
from qitos_mlflow.tracing import host_has_tracing as _settled  # noqa: F401
