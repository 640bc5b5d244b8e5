"""`qitos.tracing` served where the host has none."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import BUILTIN_TRACING, run_on, run_without_host

ALL_NAMES_ARE_OURS = """
import importlib
import qitos.tracing
from qitos_mlflow import tracing as ours
from qitos_mlflow.tracing import _host
for submodule in _host.SUBMODULES:
    home = importlib.import_module("qitos.tracing." + submodule)
    assert getattr(qitos.tracing, submodule) is home
    for name in _host.OURS:
        assert getattr(home, name) is getattr(ours, name), name
        assert getattr(qitos.tracing, name) is getattr(ours, name), name
"""


@pytest.mark.parametrize("first", ["import qitos", "", "import qitos_mlflow.tracing"])
def test_served_whatever_is_imported_first(first: str) -> None:
    """On QitOS 0.3.0 all names of all modules are ours, with qitos imported before or after."""
    run_on(
        None,
        f"""
{first}
from qitos_mlflow.tracing import compat
compat.install()
compat.install()
{ALL_NAMES_ARE_OURS}
import sys
assert sum(getattr(f, "serves_qitos_tracing", False) for f in sys.meta_path) == 1
        """,
    )


def test_attribute_of_a_host_imported_before() -> None:
    """After `install` an already imported qitos has `tracing` without any further import."""
    run_on(
        None,
        """
        import qitos
        assert not hasattr(qitos, "tracing")
        from qitos_mlflow.tracing import compat
        compat.install()
        qitos.tracing.add_trace_processor
        from tests.undo import stop_serving
        stop_serving()
        assert not hasattr(qitos, "tracing")
        try:
            import qitos.tracing
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError
        """,
    )


def test_not_served_without_install() -> None:
    """Importing our tracing alone puts nothing into the host."""
    run_on(
        None,
        """
        import importlib.util
        import qitos_mlflow.tracing
        qitos_mlflow.tracing.Span
        assert importlib.util.find_spec("qitos.tracing") is None
        """,
    )


def test_the_processor_is_imported_on_first_use() -> None:
    """The module exists at once; the processor, and what it needs, is imported when asked for."""
    run_on(
        None,
        """
        import sys
        from qitos_mlflow.tracing import compat
        compat.install()
        import qitos.tracing.mlflow_processor as module
        assert "qitos_mlflow.mlflow_plugin.processor" not in sys.modules
        assert not hasattr(module, "anything_else")
        from qitos.tracing.mlflow_processor import MlflowTraceProcessor
        from qitos.tracing import MlflowTraceProcessor as again
        from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor as ours
        assert MlflowTraceProcessor is again is ours
        assert "mlflow" not in sys.modules
        """,
    )


def test_modules_nobody_promised() -> None:
    """Other modules of a host's tracing are missing as usual."""
    run_on(
        None,
        """
        from qitos_mlflow.tracing import compat
        compat.install()
        import qitos.tracing
        for name in ("wandb_processor", "console", "json_processor", "models.more"):
            try:
                __import__(f"qitos.tracing.{name}")
            except ModuleNotFoundError as error:
                assert error.name == f"qitos.tracing.{name}", error.name
            else:
                raise AssertionError(name)
        """,
    )


@pytest.mark.parametrize("first", ["import qitos", "import qitos_mlflow.tracing", ""])
def test_a_host_with_tracing_is_left_alone(first: str) -> None:
    """Where the host has its own, its own is imported, its MLflow processor included."""
    run_on(
        BUILTIN_TRACING,
        f"""
        {first}
        from qitos_mlflow.tracing import compat
        compat.install()
        import qitos.tracing.mlflow_processor
        assert "builtin_tracing" in qitos.tracing.__file__
        assert "builtin_tracing" in qitos.tracing.mlflow_processor.__file__
        import qitos_mlflow.tracing
        assert qitos_mlflow.tracing.host_has_tracing
        """,
    )


def test_parts_a_host_lacks_are_not_made_up(tmp_path: Path) -> None:
    """Of a host's own package only the promised `mlflow_processor` is added, never its innards."""
    package = tmp_path / "host" / "qitos"
    (package / "tracing").mkdir(parents=True)
    for directory in (package, package / "tracing"):
        (directory / "__init__.py").touch()
    run_on(
        tmp_path / "host",
        """
        from qitos_mlflow.tracing import compat
        compat.install()
        import qitos.tracing.mlflow_processor
        try:
            import qitos.tracing.models
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError
        """,
    )


@pytest.mark.parametrize("place", ["0", "len(sys.meta_path)"])
def test_other_finders_come_first(place: str) -> None:
    """A finder that knows `qitos.tracing` wins, also when it was added after us, at the end."""
    run_on(
        None,
        f"""
        import sys
        from importlib.machinery import ModuleSpec
        from qitos_mlflow.tracing import _host, compat
        compat.install()
        class Other:
            @staticmethod
            def find_spec(name, path=None, target=None):
                if name == "qitos.tracing":
                    return ModuleSpec(name, Other)
            @staticmethod
            def create_module(spec): return None
            @staticmethod
            def exec_module(module): module.whose = "other"
        sys.meta_path.insert({place}, Other)
        import qitos.tracing
        assert qitos.tracing.whose == "other"
        assert _host.find_spec().loader is Other
        """,
    )


def test_finders_that_pass_on_what_others_find() -> None:
    """wrapt's finder, which asks all others, is not taken for a host with tracing."""
    run_on(
        None,
        """
        import wrapt
        from qitos_mlflow.tracing import compat
        compat.install()
        seen = []
        wrapt.register_post_import_hook(seen.append, "qitos.tracing")
        from qitos_mlflow import tracing
        assert not tracing.host_has_tracing
        import qitos.tracing
        assert seen == [qitos.tracing]
        assert qitos.tracing.Span is tracing.Span
        """,
    )


def test_no_host_at_all(tmp_path: Path) -> None:
    """Without QitOS `qitos.tracing` is missing because qitos is."""
    run_without_host(
        tmp_path,
        """
        from qitos_mlflow.tracing import compat
        compat.install()
        try:
            import qitos.tracing
        except ModuleNotFoundError as error:
            assert error.name == "qitos"
        else:
            raise AssertionError
        """,
    )


def test_contract_snippet() -> None:
    """A processor added through the served names gets traces made through ours."""
    run_on(
        None,
        """
        from qitos_mlflow.tracing import compat
        compat.install()
        from qitos.tracing import add_trace_processor
        from qitos.tracing.processor import NoOpTraceProcessor
        from qitos_mlflow import tracing
        heard = []
        class Hearing(NoOpTraceProcessor):
            def on_trace_start(self, trace): heard.append(trace.name)
        add_trace_processor(Hearing())
        with tracing.create_trace("run"): pass
        assert heard == ["run"]
        """,
    )
