"""The MLflow plugin: hook calls in, records out to delivery; records back in, calls to MLflow out.

On the agent's thread: `plugin` (hooks), `capture` (span -> bytes), `active_run`. On the worker:
`refine` (bytes -> redacted record). On the shipper: `sink` (records -> calls, mapped by the pure
`metrics` and `spans`), `rest` and `store` (calls -> MLflow). Only `store` imports mlflow;
`readback`, for the commands, does too.
"""

from __future__ import annotations

# Settle whose tracing it is before the modules below look at it: settling imports qitos, which
# sets off the start-up line, which loads the plugin from here.
from qitos_mlflow.tracing import host_has_tracing as _settled  # noqa: F401
