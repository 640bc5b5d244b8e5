"""Prompts that are loaded while a trace goes on, and what is left of them afterwards."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from weakref import WeakValueDictionary

import pytest

from qitos_mlflow import MlflowTraceProcessor, tracing
from qitos_mlflow.mlflow_plugin.fluent import versions
from qitos_mlflow.recording import recorder
from qitos_mlflow.tracing import create_trace


@pytest.fixture
def processor(tmp_path: Path) -> Iterator[MlflowTraceProcessor]:
    """One that delivers nothing; all goes to MLflow's default place."""
    made = MlflowTraceProcessor(offline=True, spool_dir=tmp_path / "spool")
    tracing.add_trace_processor(made)
    yield made
    tracing.remove_trace_processor(made)
    made.shutdown()
    shutil.rmtree(tmp_path / "spool")


def load(name: str) -> None:
    """What the wrapper around MLflow's `load_prompt` does with a prompt."""
    versions._note(SimpleNamespace(name=name, version=1))


def test_prompts_go_with_their_traces(
    processor: MlflowTraceProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many traces there are; what is loaded outside of any is not kept at all."""
    monkeypatch.setattr(recorder, "ENDED_TRACES", 5)
    monkeypatch.setattr(versions, "_loaded", WeakValueDictionary())  # Without other tests' traces.
    for number in range(50):
        with create_trace(f"trace {number}"):
            load("prompt")
        load("after")
    gc.collect()
    assert 0 < len(versions._loaded) < 10
    assert {prompt.name for one in versions._loaded.values() for prompt in one} == {"prompt"}


def test_the_outer_trace_goes_on_after_the_inner_one(processor: MlflowTraceProcessor) -> None:
    """As where an agent is the tool of another one."""
    with create_trace("outer") as outer:
        with create_trace("inner") as inner:
            load("of the inner one")
        load("of the outer one")
    names = [
        [prompt.name for prompt in versions._loaded[trace.trace_id]] for trace in (outer, inner)
    ]
    assert names == [["of the outer one"], ["of the inner one"]]
