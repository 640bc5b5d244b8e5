"""A store as MLflow makes it, without the seconds that its migrations take each time."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from mlflow.store.db import utils
from sqlalchemy import create_engine


def make_store(database: Path) -> None:
    """Write a sqlite database that has MLflow's tables and nothing in them.

    For tests that are not about how a store is made.
    """
    database.write_bytes(_made_by_mlflow())


@functools.cache
def _made_by_mlflow() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        database = Path(directory, "mlflow.db")
        engine = create_engine(f"sqlite:///{database}")
        utils._initialize_tables(engine)
        engine.dispose()
        return database.read_bytes()
