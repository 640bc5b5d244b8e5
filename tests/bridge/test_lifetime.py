"""What a run that is over keeps alive: nothing, wherever its context or its exception went."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextvars import Context, copy_context
from typing import Any

import pytest
from qitos import Decision

from qitos_mlflow import tracing
from tests.bridge.agents import ScriptAgent, act, toolbox


class Content(dict[str, Any]):
    """What a tool returned, and what a caller holds: can be referred to weakly."""


@pytest.fixture
def listened_to(installed: None) -> Iterator[None]:
    """The bridge, with a processor attached that keeps nothing."""
    processor = tracing.NoOpTraceProcessor()
    tracing.add_trace_processor(processor)
    yield
    tracing.remove_trace_processor(processor)


def test_a_context_copied_in_a_run_keeps_only_where_it_stands(listened_to: None) -> None:
    """What other steps of the run came to is freed with it, a task it started may live on."""
    contexts: list[Context] = []
    outputs: list[weakref.ref[Content]] = []

    def load() -> Content:
        content = Content(text="much of it")
        outputs.append(weakref.ref(content))
        return content

    def start_a_task() -> None:
        contexts.append(copy_context())

    tools = toolbox(load=load, start_a_task=start_a_task)
    script = [act("load"), act("start_a_task"), act("load"), Decision.final("x")]
    ScriptAgent(*script, tools=tools).run("sum", render=False)
    gc.collect()
    assert contexts
    assert [output() for output in outputs] == [None, None]


def test_runs_that_start_one_another_keep_none_before_them(listened_to: None) -> None:
    """Each begins in a context copied in the one before, as with `loop.call_later`."""
    contexts: list[Context] = []
    outputs: list[weakref.ref[Content]] = []

    def work() -> Content:
        contexts.append(copy_context())
        content = Content(text="much of it")
        outputs.append(weakref.ref(content))
        return content

    def run() -> None:
        agent = ScriptAgent(act("work"), Decision.final("x"), tools=toolbox(work=work))
        agent.run("sum", render=False)

    run()
    for _ in range(3):
        contexts.pop().run(run)
    gc.collect()
    assert [output() for output in outputs[:-1]] == [None, None, None]


def test_what_an_exception_passed_is_freed_with_it(listened_to: None) -> None:
    """Local variables of the caller's go when the exception goes, not when the collector comes."""
    held: list[weakref.ref[Content]] = []

    class Failing(ScriptAgent):
        def init_state(self, task: str, **kwargs: Any) -> Any:
            raise ValueError(task)

    def caller() -> None:
        sandbox = Content()
        held.append(weakref.ref(sandbox))
        Failing().run("boom", render=False)

    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="boom"):
            caller()
        assert held[0]() is None
    finally:
        gc.enable()
