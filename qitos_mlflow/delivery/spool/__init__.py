"""Everything on disk: line format, writer, reader, locks, quota, dead letters.

Bytes in, bytes out; knows neither threads nor servers. docs/spool.md says what survives what.
"""
