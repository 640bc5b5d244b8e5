"""Whose tracing it is: ours where the host has none, else the host's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow import _forks, tracing
from qitos_mlflow.tracing import TracingMode, _host
from tests.fakes.recorder import Recorder
from tests.hosts import BUILTIN_TRACING, run_on, run_without_host


@pytest.fixture(autouse=True)
def _provider_as_it_was() -> Iterator[None]:
    provider = tracing.get_tracing_provider()
    before = provider.mode, list(tracing.processors())
    yield
    tracing.set_tracing_mode(before[0])
    tracing.set_trace_processors(before[1])


def test_host_without_tracing_gets_ours() -> None:
    """On QitOS 0.3.0, which has no tracing, the names are ours."""
    assert tracing.host_has_tracing is False
    assert tracing.Span.__module__ == "qitos_mlflow.tracing.models"


def test_host_with_tracing_gets_its_own() -> None:
    """On a host with tracing every name is the host's, also those its package does not have."""
    run_on(
        BUILTIN_TRACING,
        """
        from qitos_mlflow import tracing
        from qitos_mlflow.tracing import _host
        assert tracing.host_has_tracing
        for name in _host.OURS:
            assert getattr(tracing, name).__module__.startswith("qitos.tracing"), name
        import qitos.tracing
        assert tracing.get_tracing_provider() is qitos.tracing.get_tracing_provider()
        """,
    )


def test_no_host_at_all(tmp_path: Path) -> None:
    """Without any QitOS installed, tracing is ours and works."""
    run_without_host(
        tmp_path,
        """
        from qitos_mlflow import tracing
        assert not tracing.host_has_tracing
        with tracing.create_trace("run") as trace:
            trace.create_span(tracing.SpanType.STEP, tracing.StepSpanData(1)).start().finish()
        assert len(trace.spans) == 1
        assert "qitos" not in sys.modules
        """,
    )


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise RuntimeError('broken build')", "RuntimeError: broken build"),
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("def trace(): ...", "it has no Span, SpanData"),
    ],
)
def test_unusable_tracing_of_a_host(tmp_path: Path, body: str, why: str) -> None:
    """A host's tracing that raises, or is something else, is one warning; then ours is used."""
    package = tmp_path / "host" / "qitos"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "tracing.py").write_text(body)
    printed = run_on(
        tmp_path / "host",
        """
        from qitos_mlflow import tracing
        assert not tracing.host_has_tracing
        from qitos_mlflow.tracing import Span, create_trace
        with create_trace("run"): pass
        """,
    )
    assert printed.count("cannot be used") == 1
    assert why in printed


def test_host_lacking_a_kind_of_span(tmp_path: Path) -> None:
    """What a host's tracing lacks beside the essentials is ours; the rest is the host's."""
    package = tmp_path / "host" / "qitos"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    essentials = ["Span", "SpanData", "SpanType", "Trace", "TraceProcessor", "TracingMode"]
    functions = ["get_tracing_provider", "add_trace_processor", "create_trace"]
    (package / "tracing.py").write_text(
        "".join(f"class {name}: pass\n" for name in essentials)
        + "".join(f"def {name}(*args): pass\n" for name in functions)
        + "MCPSpanData = None\n"  # As after an import that failed there.
    )
    run_on(
        tmp_path / "host",
        """
        from qitos_mlflow import tracing
        assert tracing.host_has_tracing
        assert tracing.Span.__module__ == "qitos.tracing"
        assert tracing.MCPSpanData.__module__ == "qitos_mlflow.tracing.span_data"
        """,
    )


def test_importing_settles_nothing() -> None:
    """Importing the package imports no host; the first name used does."""
    run_on(
        BUILTIN_TRACING,
        """
        import sys
        import qitos_mlflow.tracing as tracing
        assert "qitos" not in sys.modules
        tracing.Span
        assert "qitos.tracing" in sys.modules
        """,
    )


def test_settling_may_lead_back_here() -> None:
    """A host whose import uses our names, as the start-up line does, finds them complete."""
    printed = run_on(
        BUILTIN_TRACING,
        """
        import sys
        import wrapt
        def at_import(module):
            from qitos_mlflow.plugins.adapter import PluginTraceProcessor
            from qitos_mlflow.tracing import TraceProcessor
            assert issubclass(PluginTraceProcessor, TraceProcessor)
            print("led back")
        wrapt.register_post_import_hook(at_import, "qitos")
        from qitos_mlflow.plugins.adapter import PluginTraceProcessor
        import qitos.tracing
        assert issubclass(PluginTraceProcessor, qitos.tracing.TraceProcessor)
        """,
    )
    assert "led back" in printed


def test_unknown_names() -> None:
    """A name that does not exist is an AttributeError; those that do are listed."""
    with pytest.raises(AttributeError, match="no_such_name"):
        tracing.no_such_name  # type: ignore[attr-defined]  # noqa: B018
    assert {"Span", "create_trace", "processors", "host_has_tracing"} <= set(dir(tracing))


def test_the_names_for_type_checkers_are_those_at_run_time() -> None:
    """The modules that `tracing` repeats for type checkers define no public name that it lacks."""
    text = Path(tracing.__file__).read_text()
    for module in re.findall(r"from (\S+) import \*", text):
        defined = {
            target.id if isinstance(target, ast.Name) else ""
            for node in ast.parse(Path(import_module(module).__file__ or "").read_text()).body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        }
        defined |= {
            name
            for name, value in vars(import_module(module)).items()
            if getattr(value, "__module__", None) == module
        }
        assert {name for name in defined if not name.startswith("_")} <= {*_host.OURS}, module


def test_processors_and_removal() -> None:
    """`processors` lists what is attached; removing takes out that one and no other."""
    mine, other = Recorder(), Recorder()
    before = tracing.processors()
    tracing.add_trace_processor(mine)
    tracing.add_trace_processor(other)
    assert tracing.processors() == (*before, mine, other)
    tracing.remove_trace_processor(mine)
    tracing.remove_trace_processor(mine)
    assert tracing.processors() == (*before, other)


def test_processors_and_removal_on_a_host() -> None:
    """On a host without such API the same holds, also for a thread just telling its processors."""
    run_on(
        BUILTIN_TRACING,
        """
        from qitos_mlflow import tracing
        heard = []
        class Recorder(tracing.NoOpTraceProcessor):
            def on_trace_start(self, trace):
                heard.append(self)
                tracing.remove_trace_processor(leaving)
            def __eq__(self, other):
                return True
        leaving, staying = Recorder(), Recorder()
        tracing.add_trace_processor(leaving)
        tracing.add_trace_processor(staying)
        with tracing.create_trace("run"):
            assert [id(p) for p in heard] == [id(leaving), id(staying)]
        (only,) = tracing.processors()
        assert only is staying
        """,
    )


@pytest.mark.parametrize("mode", list(TracingMode))
def test_content_allowed(mode: TracingMode) -> None:
    """Content is forbidden for traces made without data, whatever the mode is later."""
    recorder = Recorder()
    tracing.set_trace_processors([recorder])
    tracing.set_tracing_mode(mode)
    with tracing.create_trace("run") as trace:
        tracing.set_tracing_mode(TracingMode.ENABLED)
        span = trace.create_span(tracing.SpanType.STEP, tracing.StepSpanData(1)).start()
        span.finish()
    items: list[Any] = [trace, span, *(item for _, item in recorder.events)]
    allowed = {tracing.content_allowed(item) for item in items}
    assert allowed == {mode != TracingMode.ENABLED_WITHOUT_DATA}


@pytest.mark.parametrize("mode", ["ENABLED", "ENABLED_WITHOUT_DATA"])
@pytest.mark.parametrize("spans", [0, 2])
def test_content_allowed_on_a_host(mode: str, spans: int) -> None:
    """On a host, whose traces do not know their mode, it is found out at every event."""
    run_on(
        BUILTIN_TRACING,
        f"""
        from qitos_mlflow import tracing
        from qitos_mlflow.tracing import TracingMode, content_allowed
        allowed = []
        class Asking(tracing.TraceProcessor):
            def on_trace_start(self, trace): allowed.append(content_allowed(trace))
            def on_trace_end(self, trace): allowed.append(content_allowed(trace))
            def on_span_start(self, span): allowed.append(content_allowed(span))
            def on_span_end(self, span): allowed.append(content_allowed(span))
        tracing.add_trace_processor(Asking())
        tracing.set_tracing_mode(TracingMode.{mode})
        with tracing.create_trace("run") as trace:
            if {spans}:
                tracing.set_tracing_mode(TracingMode.ENABLED)
            for number in range({spans}):
                span = trace.create_span(tracing.SpanType.STEP, tracing.StepSpanData(number))
                span.start().finish()
        assert len(allowed) == 2 + 2 * {spans}
        assert set(allowed) == {{TracingMode.{mode} == TracingMode.ENABLED}}, allowed
        """,
    )


def test_content_allowed_of_hand_made_objects() -> None:
    """An object built by hand on a host goes by the present mode."""
    run_on(
        BUILTIN_TRACING,
        """
        from qitos_mlflow import tracing
        trace = tracing.Trace("t", "run")
        assert tracing.content_allowed(trace)
        tracing.set_tracing_mode(tracing.TracingMode.ENABLED_WITHOUT_DATA)
        assert not tracing.content_allowed(trace)
        """,
    )


def test_a_fork_waits_for_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first use imports is never half imported in a forked child; later ones are free."""
    during: list[bool] = []

    def settled() -> dict[str, object]:
        during.append(bool(_forks._under_way))
        return {}

    monkeypatch.setattr(tracing, "_known", None)
    monkeypatch.setattr(_host, "settled", settled)
    assert tracing.settled() is tracing.settled()
    assert during == [True]
