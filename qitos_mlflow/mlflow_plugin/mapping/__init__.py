"""Records to what MLflow stores: metrics, params, tags, spans, trace info. Pure functions.

No clock, no thread, no disk, no network: the same record always gives the same result.
"""
