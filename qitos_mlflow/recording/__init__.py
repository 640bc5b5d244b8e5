"""Spans to records to bytes, and the pipelines that take them. Knows no MLflow.

On the agent's thread a span becomes bytes (`snapshot`, `to_json`). On the spooling thread the bytes
become the redacted record (`normalize`). A second durable plugin builds on this package and on
`delivery`.
"""
