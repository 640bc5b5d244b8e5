"""The hook specifications: documented, and the same in code and documentation."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from qitos_mlflow.plugins import hookspecs
from qitos_mlflow.plugins.adapter import HOOKS
from tests.plugins.test_adapter import CALLS

PAGE = Path(__file__).parents[2] / "docs" / "plugins.md"
SECTIONS = ("When", "Thread", "Blocking", "Return", "Raise", "Since")


def test_the_hooks_promised() -> None:
    """The hooks are those that plugin authors were promised, under pluggy's project name."""
    assert hookspecs.PROJECT == "qitos"
    promised = {"qitos_trace_start", "qitos_span_start", "qitos_span_end", "qitos_trace_end"}
    assert promised | {"qitos_force_flush", "qitos_shutdown"} <= set(HOOKS)


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_says_all_there_is_to_know(hook: str) -> None:
    """When, on which thread, may it block, what of its return, what if it raises, since when."""
    text = inspect.getdoc(getattr(hookspecs, hook)) or ""
    found = re.findall(r"^(\w+): +\S", text, re.MULTILINE)
    assert tuple(found) == SECTIONS


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_exercised(hook: str) -> None:
    """The tests of the adapter call every hook there is."""
    assert hook in CALLS


def test_the_page_has_every_hook_with_its_arguments() -> None:
    """The table in docs/plugins.md lists exactly the hooks there are, with their arguments."""
    listed = re.findall(r"^\| `(qitos_\w+\(.*?\))` \|", PAGE.read_text(), re.MULTILINE)
    actual = [
        f"{hook}({', '.join(inspect.signature(getattr(hookspecs, hook)).parameters)})"
        for hook in HOOKS
    ]
    assert listed == actual


def test_the_example_of_the_page_works(tmp_path: Path) -> None:
    """The worked example in docs/plugins.md, as it stands there, is a plugin that does its job."""
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor
    from qitos_mlflow.tracing import SpanType, ToolSpanData, TracingProvider

    source = re.search(r"```python\n(# slow_tools\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert source is not None
    namespace: dict[str, object] = {}
    exec(compile(source[1], "slow_tools.py", "exec"), namespace)
    factory = namespace["SlowTools"]
    assert callable(factory)
    example = factory(limit_s=0.0)
    provider = TracingProvider([PluginTraceProcessor({"slow-tools": example})])
    with provider.create_trace("run") as trace:
        data = ToolSpanData(tool_name="grep")
        trace.create_span(SpanType.TOOL, data).start().finish()
        assert [name for name, _ in example.slow[trace.trace_id]] == ["grep"]
    assert example.slow == {}
