"""A store as MLflow makes it, without the seconds that its migrations take each time."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from mlflow.store.db.utils import _initialize_tables
from sqlalchemy import Engine, create_engine, event


def make_store(database: Path) -> None:
    """Write a sqlite database that has MLflow's tables and nothing in them.

    For tests that are not about how a store is made.
    """
    database.write_bytes(_made_by_mlflow())


def copy_tables(engine: Engine) -> None:
    """In place of MLflow's `_initialize_tables`, which makes them by migrations."""
    with engine.connect() as connection:
        _, _, file = next(connection.exec_driver_sql("PRAGMA database_list"))
    make_store(Path(file))


@functools.cache
def _made_by_mlflow() -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        database = Path(directory, "mlflow.db")
        engine = create_engine(f"sqlite:///{database}")
        # Or it waits for the disk a hundred times; the file is read right away, and deleted.
        event.listen(engine, "connect", lambda one, _: one.execute("PRAGMA synchronous = OFF"))
        _initialize_tables(engine)
        engine.dispose()
        return database.read_bytes()
