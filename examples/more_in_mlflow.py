"""A plugin that adds to what is logged and needs only pluggy: python examples/more_in_mlflow.py

Needs no key and no network. docs/extending.md explains the hook. As custom_plugin.py says, a
package can declare the plugin as an entry point, so that the agent needs no code for it.
"""

import platform
from typing import Any

import pluggy

hookimpl = pluggy.HookimplMarker("qitos")


class ToolSizes:
    """Logs how much each tool returned, and on which machine the agent ran."""

    @hookimpl
    def qitos_record(self, record: dict[str, Any]) -> dict[str, dict[str, Any]] | None:
        """Called on the spooling thread, with a copy of each record before it is kept."""
        if record["kind"] == "trace_start":
            return {"tags": {"machine": platform.machine()}}
        if record["kind"] == "span" and record["type"] == "tool":
            chars = len(str(record["data"].get("output_content")))
            return {"metrics": {"tool/result_chars": chars}, "attributes": {"result_chars": chars}}
        return None


if __name__ == "__main__":
    from qitos_mlflow import MlflowTraceProcessor

    # Stands in for your own agent: a real QitOS agent with a scripted model.
    from qitos_mlflow.cli._demo_agent import (
        DeskAgent,
        ScriptedModel,
        act,
        answer,
        search_almanac,
    )
    from qitos_mlflow.tracing import add_trace_processor

    processor = MlflowTraceProcessor(experiment_name="qitos-examples")
    processor.register(ToolSizes(), "tool-sizes")
    add_trace_processor(processor)
    call = ("search_almanac", {"query": "how long is a marathon", "top": 1})
    model = ScriptedModel("scripted-small", [act("Look it up.", call), answer("Yes.", "42195 m")])
    agent = DeskAgent("runner", model, [search_almanac])
    agent.run(task="How long is a marathon?", trace=False, render=False)
    print("delivered:", processor.force_flush())
