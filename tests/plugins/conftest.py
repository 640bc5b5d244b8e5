"""Fake installed distributions: a module and a `*.dist-info` in a directory on `sys.path`."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from qitos_mlflow import _guard
from qitos_mlflow.plugins import loader

GROUP = "qitos.trace_plugins.for_tests"


class Distributions:
    """Installs plugins below one directory; `clean` makes Python forget them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.modules: set[str] = set()

    def module(self, name: str, source: str) -> None:
        header = "from pluggy import HookimplMarker\nhookimpl = HookimplMarker('qitos')\n"
        (self.directory / f"{name}.py").write_text(header + textwrap.dedent(source))
        self.modules.add(name)
        importlib.invalidate_caches()

    def add(self, distribution: str, entry_points: str, version: str = "1.0") -> None:
        info = self.directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        )
        text = f"[{GROUP}]\n{textwrap.dedent(entry_points)}\n[console_scripts]\nx = y:z\n"
        (info / "entry_points.txt").write_text(text)

    def plugin(self, name: str, source: str, distribution: str | None = None) -> None:
        """A distribution with one plugin, itself a module."""
        module = f"fake_{(distribution or name).replace('-', '_')}"
        self.module(module, source)
        self.add(distribution or f"dist-{name}", f"{name} = {module}")

    def clean(self) -> None:
        for name in self.modules:
            sys.modules.pop(name, None)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Distributions]:
    """What a test adds here is all the plugins there are, and nothing has been warned of yet.

    The plugin of this very project, where it is installed, is of another group for the time.
    """
    monkeypatch.setattr(loader, "GROUP", GROUP)
    monkeypatch.setattr(_guard, "_last_logged", {})
    directory = tmp_path / "site"
    directory.mkdir()
    monkeypatch.syspath_prepend(str(directory))
    monkeypatch.delenv("QITOS_TRACE_PLUGINS", raising=False)
    distributions = Distributions(directory)
    yield distributions
    distributions.clean()
