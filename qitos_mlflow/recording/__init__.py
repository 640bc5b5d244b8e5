"""Spans to records, and the pipelines that take them. Imports no MLflow.

A second durable plugin builds on this package and on `delivery`; tests/recording/jsonl_plugin.py is
one.

    recorder          all traces of one plugin; one pipeline per destination and process
    trace_recorder    one trace: host events to records
    snapshot          what a record holds of one event
    to_json, simpler  any record as containers of ours, on the agent's thread; later as JSON
    pipelines         the pipeline of records to one destination
    normalize         snapshots to redacted records, on the spooling thread, with what plugins add
    conversation      each message of a growing conversation is worked on once, on both threads
    process_exit      the end of the process
    record            the types of the records
"""
