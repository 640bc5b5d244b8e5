"""A URI can be shown and written to disk without the credentials in it."""

from __future__ import annotations

import pytest

from qitos_mlflow.redaction.uris import without_credentials


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://user:pass@host:1/p?a=b@c", "http://host:1/p?a=b@c"),
        ("http://host/a@b", "http://host/a@b"),
        ("sqlite:////home/a@b/x.db", "sqlite:////home/a@b/x.db"),
        ("mysql+pymysql://u:p@x@host/d", "mysql+pymysql://host/d"),
    ],
)
def test_credentials_are_left_out_of_a_destination(uri: str, shown: str) -> None:
    """User and password are left out, and nothing else."""
    assert without_credentials(uri) == shown
