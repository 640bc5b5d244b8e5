"""A stand-in Engine: the order of callbacks of a later host, and what the oldest one lacks."""

from qitos.engine.engine import Engine

__all__ = ["Engine"]
