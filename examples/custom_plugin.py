"""A trace plugin that needs only pluggy: python examples/custom_plugin.py

This script registers the plugin in code. A package declares it as an entry point instead, and
QITOS_TRACE_PLUGINS=tool-times selects it. The agent then needs no code for it:

    [project.entry-points."qitos.trace_plugins"]
    tool-times = "my_package:ToolTimes"
"""

from collections import defaultdict
from datetime import datetime
from typing import Any

import pluggy

hookimpl = pluggy.HookimplMarker("qitos")


class ToolTimes:
    """Prints, for each run, how long its tools took. A hook must be quick and may not block."""

    def __init__(self) -> None:
        self._ms: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    @hookimpl
    def qitos_span_end(self, span: Any) -> None:
        """Called on the agent's thread when a span ends; look at its type, not at its class."""
        if span.data.type == "tool":
            took = datetime.fromisoformat(span.ended_at) - datetime.fromisoformat(span.started_at)
            self._ms[span.trace_id][span.data.tool_name] += took.total_seconds() * 1000

    @hookimpl
    def qitos_trace_end(self, trace: Any) -> None:
        """Called when the run is over, however it ended."""
        for tool, spent_ms in self._ms.pop(trace.trace_id, {}).items():
            print(f"{trace.name}: {tool} took {spent_ms:.1f} ms")


if __name__ == "__main__":
    import qitos_mlflow.auto  # noqa: F401  # the start-up line does this where it runs

    # Stands in for your own agent: a real QitOS agent with a scripted model.
    from qitos_mlflow.cli._demo_agent import (
        DeskAgent,
        ScriptedModel,
        act,
        answer,
        search_almanac,
    )
    from qitos_mlflow.plugins.adapter import PluginTraceProcessor
    from qitos_mlflow.tracing import add_trace_processor

    add_trace_processor(PluginTraceProcessor({"tool-times": ToolTimes()}))
    call = ("search_almanac", {"query": "how long is a marathon", "top": 1})
    model = ScriptedModel("scripted-small", [act("Look it up.", call), answer("Yes.", "42195 m")])
    agent = DeskAgent("runner", model, [search_almanac])
    agent.run(task="How long is a marathon?", trace=False, render=False)
