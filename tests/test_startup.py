"""The watcher that waits for `import qitos`: present, out of the way, and never in it."""

from __future__ import annotations

import sys

import pytest

from qitos_mlflow import _after_import, _startup
from tests.hosts import BUILTIN_TRACING, run_on

VARIABLE = "QITOS_TRACE_PLUGINS"


@pytest.fixture
def finders(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The finders without one of ours; the variable is not set, and qitos not imported."""
    monkeypatch.delenv(VARIABLE)
    monkeypatch.delitem(sys.modules, "qitos", raising=False)
    monkeypatch.setitem(_after_import._waiting, "qitos", {})
    finders = [finder for finder in sys.meta_path if finder is not _after_import._Finder]
    monkeypatch.setattr(sys, "meta_path", list(finders))
    return finders


def test_installed_once_however_often(finders: list[object]) -> None:
    """Installing puts one finder in front, once, which finds nothing but what is waited for."""
    _startup.install()
    _startup.install()
    assert sys.meta_path[1:] == finders
    assert len(_after_import._waiting["qitos"]) == 1
    assert sys.meta_path[0].find_spec("json") is None
    assert sys.meta_path[0].find_spec("qitos.engine") is None


@pytest.mark.parametrize("value", ["none", " None ", "OFF", "0", "", "  "])
def test_turned_off(finders: list[object], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """With nothing to be loaded there is nothing to wait for."""
    monkeypatch.setenv(VARIABLE, value)
    _startup.install()
    assert sys.meta_path == finders


@pytest.mark.parametrize("value", ["mlflow", "all", "no:mlflow", "none-such"])
def test_not_turned_off(finders: list[object], monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """Anything else is for the loader to understand."""
    monkeypatch.setenv(VARIABLE, value)
    _startup.install()
    assert len(sys.meta_path) == len(finders) + 1


def test_qitos_is_imported_as_ever() -> None:
    """The import of qitos gives the real package, leaves no watcher, and turns the bridge on."""
    run_on(
        None,
        """
        import sys
        from qitos_mlflow import _startup, bridge
        _startup.install()
        assert not bridge.installed
        import qitos
        assert qitos.__spec__.loader is not None and qitos.__version__ == "0.3.0"
        assert not [f for f in sys.meta_path if getattr(f, "qitos_watcher", False)]
        assert bridge.installed
        """,
        QITOS_TRACE_PLUGINS="all",
    )


def test_installed_after_qitos() -> None:
    """Where qitos is imported already, installing turns everything on at once, and no watcher."""
    run_on(
        None,
        """
        import os, sys, qitos
        os.environ["QITOS_TRACE_PLUGINS"] = "all"
        import qitos_mlflow.auto
        from qitos_mlflow import bridge, tracing
        assert bridge.installed and len(tracing.processors()) == 1
        import qitos.tracing
        assert not [f for f in sys.meta_path if getattr(f, "qitos_watcher", False)]
        """,
        QITOS_TRACE_PLUGINS="none",
    )


def test_asking_for_qitos_without_importing_it() -> None:
    """`find_spec` finds the host as it would without us, and its import later is not missed."""
    run_on(
        BUILTIN_TRACING,
        """
        import sys
        from importlib.util import find_spec
        from qitos_mlflow import bridge
        import qitos_mlflow.auto
        assert find_spec("qitos").origin.endswith("__init__.py")
        assert "qitos" not in sys.modules
        import qitos
        assert bridge.installed
        """,
        QITOS_TRACE_PLUGINS="all",
    )


def test_a_broken_installation_is_one_line_and_does_not_stop_the_agent() -> None:
    """When our own code cannot be imported, qitos can, and one line says that logging is off."""
    printed = run_on(
        None,
        """
        import sys
        sys.modules["qitos_mlflow.wiring"] = None
        import qitos_mlflow.auto
        import qitos
        print(qitos.__version__)
        """,
        QITOS_TRACE_PLUGINS="all",
    )
    assert "0.3.0" in printed
    assert printed.count("qitos-mlflow: not active:") == 1


def test_without_qitos() -> None:
    """Without qitos its import fails as it always did."""
    run_on(
        None,
        """
        import sys
        from pathlib import Path
        import qitos_mlflow.auto
        import qitos_mlflow.wiring  # Which may be found in the same directory.
        sys.path[:] = [entry for entry in sys.path if not Path(entry, "qitos").exists()]
        try:
            import qitos
        except ImportError as error:
            assert error.name == "qitos", error
        else:
            raise AssertionError("imported")
        """,
        QITOS_TRACE_PLUGINS="all",
    )
