"""Turning logging on and off in a process: `autolog`, `activate`, and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import qitos  # noqa: F401 - it is imported before the package is asked for anything

import qitos_mlflow
from qitos_mlflow import _startup, bridge, tracing, wiring
from qitos_mlflow.errors import SettingsError
from qitos_mlflow.mlflow_plugin.plugin import MlflowPlugin, Origin
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.tracing import create_trace
from tests.hosts import run_on
from tests.undo import deactivate


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """Nothing is on before, and nothing afterwards."""
    assert tracing.processors() == ()
    yield
    deactivate()
    assert tracing.processors() == ()


def options() -> list[dict[str, Any]]:
    """What each processor that autolog registered was configured with."""
    settings = [processor.mlflow_plugin.settings for processor in tracing.processors()]
    return [{"name": one.experiment_name, **one.tags} for one in settings]


def test_once_however_often() -> None:
    """The same call again, from any thread, changes nothing."""
    qitos_mlflow.autolog(tags={"a": 1})
    (processor,) = tracing.processors()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: qitos_mlflow.autolog(tags={"a": "1"}), range(32)))
    assert tracing.processors() == (processor,)
    assert bridge.installed


def test_other_settings_replace_the_first() -> None:
    """A call with other settings counts alone; processors of others stay where they are."""
    others = tracing.NoOpTraceProcessor()
    tracing.add_trace_processor(others)
    qitos_mlflow.autolog(experiment_name="one")
    qitos_mlflow.autolog(experiment_name="two", tags={"a": 1})
    assert tracing.processors()[0] is others
    tracing.remove_trace_processor(others)
    assert options() == [{"name": "two", "a": "1"}]


def test_a_call_that_fails_changes_nothing() -> None:
    """A value that cannot be used raises, and what was on stays on."""
    qitos_mlflow.autolog(experiment_name="one")
    with pytest.raises(SettingsError):
        qitos_mlflow.autolog(flush_timeout_s="soon")
    with pytest.raises(TypeError, match="unknown setting"):
        qitos_mlflow.autolog(flush_timeout=1)
    assert options() == [{"name": "one"}]


def test_disabled_it_is_off_and_can_be_on_again() -> None:
    """`disable=True` takes the processor out, also when it was never in; a later call counts."""
    qitos_mlflow.autolog(disable=True)
    qitos_mlflow.autolog()
    qitos_mlflow.autolog(disable=True)
    qitos_mlflow.autolog(disable=True)
    assert tracing.processors() == ()
    qitos_mlflow.autolog()
    assert options() == [{"name": None}]


def test_disabled_without_mlflow() -> None:
    """Code that turns logging off may run where mlflow is not installed; turning it on raises."""
    printed = run_on(
        None,
        """
        import sys
        from importlib.machinery import PathFinder
        class Without(PathFinder):
            def find_spec(name, path=None, target=None):
                return None if name == "mlflow" else PathFinder.find_spec(name, path, target)
        sys.meta_path[sys.meta_path.index(PathFinder)] = Without
        import qitos_mlflow
        qitos_mlflow.autolog(disable=True)
        try: qitos_mlflow.autolog()
        except qitos_mlflow.errors.MissingMlflowError: print("missing")
        """,
    )
    assert printed == "missing\n"


def test_replaced_by_set_trace_processors_it_comes_back() -> None:
    """After all processors were replaced, the same call registers it again."""
    qitos_mlflow.autolog()
    tracing.set_trace_processors([])
    qitos_mlflow.autolog()
    assert options() == [{"name": None}]


def test_disabled_in_mid_trace_it_hears_the_end() -> None:
    """A trace that is going is heard to its end; a new one that begins meanwhile is not."""
    qitos_mlflow.autolog(offline=True)
    (processor,) = tracing.processors()
    plugin = processor.mlflow_plugin
    with create_trace("going"):
        qitos_mlflow.autolog(disable=True)
        assert tracing.processors() == (processor,)
        assert not plugin.qitos_wants_trace()
        with create_trace("new"):
            assert [state.ended for state in plugin.recorder.traces] == [False]
    assert tracing.processors() == ()
    assert [state.ended for state in plugin.recorder.traces] == [True]
    processor.shutdown()
    shutil.rmtree(plugin.settings.spool_dir)  # Or the tests' own process would report it.


def test_the_installed_plugins_are_attached_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Activation loads what is installed into one processor, once, whichever way it comes."""
    monkeypatch.setenv("QITOS_TRACE_PLUGINS", "mlflow")
    for _ in range(2):
        _startup.install()
        wiring.activate()
    (adapter,) = tracing.processors()
    assert isinstance(adapter, PluginTraceProcessor)
    (plugin,) = adapter.plugins.values()
    assert isinstance(plugin, MlflowPlugin)
    assert plugin.origin is Origin.INSTALLED
    assert adapter.wants_trace()
    deactivate()
    assert tracing.processors() == ()
    assert not bridge.installed


def test_nothing_is_attached_where_nothing_is_loaded() -> None:
    """With nothing selected there is no processor, and a run costs nothing."""
    wiring.activate()
    assert tracing.processors() == ()


def test_autolog_and_the_installed_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed plugin stands down for autolog; `disable` is for both."""
    monkeypatch.setenv("QITOS_TRACE_PLUGINS", "mlflow")
    wiring.activate()
    (adapter,) = tracing.processors()
    qitos_mlflow.autolog()
    assert not adapter.wants_trace()
    assert tracing.processors()[1].wants_trace()
    qitos_mlflow.autolog(disable=True)
    assert tracing.processors() == (adapter,)
    assert adapter.plugins == {}
    assert not adapter.wants_trace()


def test_a_subclass_of_the_hosts_own_processor(caplog: pytest.LogCaptureFixture) -> None:
    """It logs to MLflow as well: autolog stands down for it, and names whose it is."""

    class MlflowTraceProcessor(tracing.NoOpTraceProcessor):
        """Stands for that of a later host."""

    class Theirs(MlflowTraceProcessor):
        """A user's extension of it."""

    qitos_mlflow.autolog()
    (autologging,) = tracing.processors()
    theirs = Theirs()
    tracing.add_trace_processor(theirs)
    assert not autologging.wants_trace()
    tracing.remove_trace_processor(theirs)
    assert autologging.wants_trace()
    assert f"{__name__}.MlflowTraceProcessor" in caplog.text


def test_a_processor_by_hand_goes_before_all() -> None:
    """For one registered by hand autolog stands down, and takes over when that one is taken out."""
    qitos_mlflow.autolog()
    (autologging,) = tracing.processors()
    by_hand = qitos_mlflow.MlflowTraceProcessor()
    tracing.add_trace_processor(by_hand)
    assert by_hand.wants_trace()
    assert not autologging.wants_trace()
    tracing.remove_trace_processor(by_hand)
    assert autologging.wants_trace()
