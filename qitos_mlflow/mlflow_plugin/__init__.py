"""The MLflow plugin: hook calls in, records out to delivery; records back in, calls to MLflow out.

On the agent's thread: `plugin` (hooks), `capture` (span -> bytes), `active_run`. On the worker:
`refine` (bytes -> redacted record). On the shipper: `sink` (records -> calls, mapped by the pure
`metrics` and `spans`), `rest` and `store` (calls -> MLflow). Only `store` imports mlflow.
"""
