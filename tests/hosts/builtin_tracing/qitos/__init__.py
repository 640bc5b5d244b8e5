"""A stand-in QitOS with tracing of its own."""

__version__ = "0.0.0+standin"
