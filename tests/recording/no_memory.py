"""Each allocation of memory in each callback fails once: nothing is raised, each loss is counted.

A program, because Python itself may not survive it:

    python -m tests.recording.no_memory SPOOL

It prints what is raised or lost without a count, and at last whether there were losses.
"""

from __future__ import annotations

import os
import resource
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.recording.normalize import read
from qitos_mlflow.recording.pipelines import RecordPipeline
from qitos_mlflow.tracing import GenerationSpanData, SpanType, TracingProvider

_testcapi: Any = import_module("_testcapi")

CALLBACKS = ("on_trace_start", "on_span_start", "on_span_end", "on_trace_end")
KINDS = {"trace_start", "span_start", "span", "trace_end"}
ALLOCATIONS = 200
"""More than a callback makes."""


def run(processor: MlflowTraceProcessor, failing: str, at: int) -> str:
    """Record one trace; returns what is wrong if that allocation of that callback fails."""
    before = lost(processor)
    trace = TracingProvider([]).create_trace("an agent", metadata={"agent_name": "a"})
    messages = [{"role": "user", "content": "x" * 100}]
    span = trace.create_span(SpanType.GENERATION, GenerationSpanData(input_content=messages))
    for callback in CALLBACKS:
        call, item = getattr(processor, callback), trace if "trace" in callback else span
        raised = None
        if callback == failing:
            _testcapi.set_nomemory(at, at + 1)
        try:
            call(item)
        except BaseException as error:
            raised = error
        finally:
            _testcapi.remove_mem_hooks()
        if raised is not None:
            return f"{raised!r} is raised"
    missing = KINDS - taken(processor)
    return f"{missing} lost without a count" if missing and not lost(processor) - before else ""


def pipelines(processor: MlflowTraceProcessor) -> list[Any]:
    """Those of the processor."""
    return list(processor.mlflow_plugin.recorder._pipelines)


def lost(processor: MlflowTraceProcessor) -> Counter[str]:
    """What is counted as lost so far, by reason."""
    return sum((Counter(one.stats.dropped) for one in pipelines(processor)), Counter())


def taken(processor: MlflowTraceProcessor) -> set[str]:
    """The kinds of records in the queues, which are empty then."""
    kinds = set()
    for one in pipelines(processor):
        while not one._queue.empty:
            kinds.add(read(one._queue._items.get_nowait().payload)[0]["kind"])
    return kinds


def main() -> None:
    """Print what is wrong, and whether there were losses."""
    # A process without a limit uses an encoder that would end it, because its memory has no end.
    resource.setrlimit(resource.RLIMIT_AS, (1 << 40, -1))
    # No threads, which would fail as well: what is offered stays in the queue.
    RecordPipeline._wake = lambda self: None  # type: ignore[method-assign]
    processor = MlflowTraceProcessor(offline=True, spool_dir=Path(sys.argv[1]))
    run(processor, "", 0)
    for callback in CALLBACKS:
        for at in range(ALLOCATIONS):
            if wrong := run(processor, callback, at):
                sys.stdout.write(f"{callback}, allocation {at}: {wrong}\n")
    sys.stdout.write(f"losses: {lost(processor)['no_memory'] > 100}\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
