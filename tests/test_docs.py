"""What the documentation says of settings, tests and the spool is what the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import qitos_mlflow
from qitos_mlflow.delivery.spool import counts, paths
from qitos_mlflow.settings import Settings, env_names

TESTS = Path(__file__).parent
SECURITY_PAGE = TESTS.parent / "SECURITY.md"
FAULTS_PAGE = TESTS.parent / "docs" / "faults.md"
SETTINGS_PAGE = Path(__file__).parent.parent / "docs" / "settings.md"
SPOOL_PAGE = (TESTS.parent / "docs" / "spool.md").read_text("utf-8")
PACKAGE = Path(qitos_mlflow.__file__).parent
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


def test_each_test_that_is_documented_exists() -> None:
    """docs/faults.md names no test that there is not, and has no row without a test."""
    code: dict[str, str] = {}
    for path in TESTS.rglob("test_*.py"):
        code[path.name] = code.get(path.name, "") + path.read_text("utf-8")
    page = FAULTS_PAGE.read_text("utf-8")
    named = re.findall(r"`(?:tests/\w+/)?(test_\w+\.py|…)(?:::(test_\w+))?`", page)
    assert named
    for file, name in named:
        among = code["test_faults_process.py" if file == "…" else file]
        assert not name or f"def {name}(" in among, (file, name)
    held_by = re.findall(r"^\| .*\| (.*) \|$", page, re.MULTILINE)
    assert [cell for cell in held_by if not re.match(r"`.*test_|the same|test$", cell)] == []


def test_each_row_of_the_threat_model_has_tests() -> None:
    """SECURITY.md names, in each row about who may do what, files with tests that there are."""
    page = SECURITY_PAGE.read_text("utf-8").partition("## What runs")[0]
    held_by = re.findall(r"^\| .*\| (.*) \|$", page, re.MULTILINE)[1:]
    assert len(held_by) >= 6
    for cell in held_by:
        assert re.sub(r"`tests/[\w/]+\.py`(, )?", "", cell) == "", cell
        named = re.findall(r"`(.*?)`", cell)
        assert [name for name in named if not (TESTS.parent / name).is_file()] == []


def test_every_path_with_content_is_among_those_to_exempt() -> None:
    """docs/transport.md names all that is sent to a server, for the rules of a firewall."""
    page = " ".join((TESTS.parent / "docs" / "transport.md").read_text("utf-8").split())
    named = tuple(re.findall(r"`(/[\w./-]+)`", page.partition(" Exempt ")[2].partition(" from")[0]))
    servers = PACKAGE / "mlflow_plugin" / "server"
    code = "".join(path.read_text("utf-8") for path in servers.glob("*.py"))
    paths = set(re.findall(r'"(/(?:api|v1|ajax-api)/.*?)[?{"]', code))
    assert len(paths) > 10
    assert {path for path in paths if not path.startswith(named)} == set()


def test_each_directory_of_tests_says_what_it_proves() -> None:
    """docs/development.md has a row for each directory with tests, and for no other."""
    page = (TESTS.parent / "docs" / "development.md").read_text("utf-8")
    there = {
        f"tests/{path.parent.relative_to(TESTS).as_posix()}" for path in TESTS.rglob("test_*.py")
    }
    assert set(re.findall(r"^\| `(tests/[\w/]+)` \|", page, re.MULTILINE)) == there - {"tests/."}


def test_each_reason_of_a_loss_is_documented() -> None:
    """docs/spool.md has a row for each reason that the spool counts, and for no other word."""
    cells = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", SPOOL_PAGE, re.MULTILINE)
    documented = set(re.findall(r"\w+", " ".join(cells)))
    values = {name: value for name, value in vars(counts).items() if name.isupper()}
    assert {value for value in values.values() if isinstance(value, str)} <= documented
    code = "".join(path.read_text("utf-8") for path in PACKAGE.rglob("*.py"))
    assert {reason for reason in documented if f'"{reason}"' not in code} == set()


def test_each_file_of_the_spool_is_documented(tmp_path: Path) -> None:
    """The files of a segment that docs/spool.md names are those that the spool knows."""
    cells = re.findall(r"^\| (`<stem>.*?) \|", SPOOL_PAGE, re.MULTILINE)
    names = re.findall(r"`<stem>(.*?)`", " ".join(cells))
    files = {f"host-1-abc-ff{name.replace('<base>', '0' * 16)}" for name in names}
    for file in files:
        (tmp_path / file).touch()
    [found] = paths.find_segments(tmp_path)
    assert {path.name for path in found.files()} == files
    own = (found.part(0), found.ack, found.own, found.ship, found.dead, found.bad, found.lost)
    assert {path.name for path in own} <= files
