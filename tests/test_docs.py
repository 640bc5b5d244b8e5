"""What the documentation says of settings is what the code has."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from qitos_mlflow.settings import Settings, env_names

SETTINGS_PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
ROWS = [line for line in SETTINGS_PAGE.read_text("utf-8").splitlines() if line.startswith("| `")]


@pytest.mark.parametrize("option", fields(Settings), ids=lambda option: option.name)
def test_each_setting_is_documented_with_variables_and_meaning(option: object) -> None:
    """docs/settings.md has a row for every setting, with its variables and its help."""
    name = option.name  # type: ignore[attr-defined]
    row = next((row for row in ROWS if row.startswith(f"| `{name}` |")), None)
    assert row is not None
    assert option.metadata["help"] in row  # type: ignore[attr-defined]
    for variable in env_names(name):
        assert f"`{variable}`" in row


def test_no_setting_is_documented_that_does_not_exist() -> None:
    """docs/settings.md has no row for anything else."""
    documented = {row.split("`")[1] for row in ROWS}
    assert documented == {option.name for option in fields(Settings)}
