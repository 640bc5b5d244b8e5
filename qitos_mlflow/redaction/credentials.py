"""Where the credentials in a text are. Pure; the cost of a text is proportional to its length."""

from __future__ import annotations

from qitos_mlflow.redaction.commands import options
from qitos_mlflow.redaction.named import named
from qitos_mlflow.redaction.shapes import RUN_OF, shaped
from qitos_mlflow.redaction.values import Found


def find_credentials(data: bytes) -> list[Found]:
    """Every credential in `data` (UTF-8), in order; they may overlap."""
    low, runs = data.lower(), data.translate(RUN_OF)
    found = list(named(data, low, runs))
    found += [(start, end, b"") for start, end in shaped(data, low, runs)]
    found += [(start, end, b"") for start, end in options(data)]
    return sorted(found)
