"""What an installation brings, and takes away again when it is removed."""

from __future__ import annotations

import email
import shutil
import zipfile
from pathlib import Path

from tests.packaging.conftest import Environment

STARTUP_FILES = ["qitos_mlflow.pth", "qitos_mlflow.start"]
WATCHES = "import sys; print(any(getattr(f, 'qitos_watcher', False) for f in sys.meta_path))"


def test_the_wheel_holds_the_package_and_the_startup_files_and_no_more(
    wheel: Path, source_tree: Path
) -> None:
    """The wheel has every module, the start-up files beside the package, and no test."""
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if ".dist-info/" in name}
    package = source_tree / "qitos_mlflow"
    modules = {path.relative_to(source_tree).as_posix() for path in package.rglob("*.py")}
    assert names - info == modules | {*STARTUP_FILES, "qitos_mlflow/py.typed"}
    assert any(name.endswith("/licenses/LICENSE") for name in info)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    """The entry point of the plugin, the command and the supported Pythons are declared."""
    with zipfile.ZipFile(wheel) as archive:
        (info,) = {name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        metadata = email.message_from_bytes(archive.read(f"{info}/METADATA"))
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert metadata["Name"] == "qitos-mlflow"
    assert metadata["Requires-Python"] == ">=3.10"
    assert "[qitos.trace_plugins]\nmlflow = " in entry_points
    assert "qitos-mlflow = " in entry_points


def test_install_and_uninstall(environment: Environment, wheel: Path) -> None:
    """Installed, Python waits for `import qitos` unless turned off; uninstalled, nothing stays."""
    environment.pip("install", "--no-deps", str(wheel))
    assert environment.startup_files() == STARTUP_FILES
    assert environment.run("-c", WATCHES) == "True\n"
    for off in ("none", "", " Off ", "0"):
        assert environment.run("-c", WATCHES, QITOS_TRACE_PLUGINS=off) == "False\n"
    assert environment.run("-S", "-c", WATCHES) == "False\n"

    environment.pip("uninstall", "--yes", "qitos-mlflow")
    assert list(environment.site_packages.glob("qitos*")) == []
    assert environment.run("-c", WATCHES) == "False\n"


def test_an_editable_installation_has_the_startup_files_too(
    environment: Environment, source_tree: Path
) -> None:
    """An editable installation logs in the same way as a normal one."""
    environment.pip("install", "--no-deps", "--editable", str(source_tree))
    assert set(STARTUP_FILES) <= set(environment.startup_files())
    where = "import qitos_mlflow; print(qitos_mlflow.__file__)"
    assert environment.run("-c", where).strip() == str(source_tree / "qitos_mlflow/__init__.py")
    assert environment.run("-c", WATCHES) == "True\n"


def test_a_startup_file_without_its_package_is_silent(
    environment: Environment, wheel: Path
) -> None:
    """A half-removed installation harms no Python process: none fails, none prints."""
    environment.pip("install", "--no-deps", str(wheel))
    shutil.rmtree(environment.site_packages / "qitos_mlflow")
    assert environment.run("-c", "print('fine')") == "fine\n"
