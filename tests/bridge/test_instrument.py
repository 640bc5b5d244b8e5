"""Installing, and what it costs if no processor wants the run."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from qitos import Decision, Engine, ToolRegistry
from qitos.engine.action_executor import ActionExecutor

from qitos_mlflow import _guard, bridge, tracing
from qitos_mlflow.bridge import calls
from qitos_mlflow.bridge.patches import wrap
from tests.bridge.agents import ScriptAgent, act
from tests.fakes.recorder import Recorder
from tests.undo import uninstall

WRAPPED = [(Engine, "run"), (ActionExecutor, "_execute_one"), (ActionExecutor, "_call_tool")]


def originals() -> list[Any]:
    return [vars(owner)[name] for owner, name in WRAPPED]


def test_any_number_of_installs_wraps_once(recorder: Recorder) -> None:
    """Each of the host's functions has one wrapper of ours around it."""
    uninstall()
    before = originals()
    for _ in range(3):
        bridge.install()
        Engine(agent=ScriptAgent(Decision.final("x"))).run("sum")
    assert bridge.installed
    assert [function.__wrapped__ for function in originals()] == before


def test_the_wrapped_methods_look_like_the_originals(recorder: Recorder) -> None:
    """Signature, name and documentation of what is wrapped stay."""

    def looks() -> list[Any]:
        return [(inspect.signature(f), f.__name__, f.__doc__) for f in originals()]

    Engine(agent=ScriptAgent(Decision.final("x"))).run("sum")
    after = looks()
    uninstall()
    assert after == looks()


def test_what_can_be_done_with_the_original_methods_can_be_done_with_ours(
    installed: None,
) -> None:
    """Pickled (for a process pool), copied, referred to weakly, called by the class: all work."""
    assert inspect.isfunction(Engine.run)
    assert pickle.loads(pickle.dumps(Engine.run)) is Engine.run
    agent = ScriptAgent(Decision.final("x"))
    agent.tool_registry = ToolRegistry()  # The others are of functions that cannot be pickled.
    engine = Engine(agent=agent)
    assert inspect.ismethod(engine.run)
    assert copy.copy(engine.run) == engine.run
    assert weakref.WeakMethod(engine.run)() == engine.run
    for duplicate in (copy.deepcopy(engine.run), pickle.loads(pickle.dumps(engine.run))):
        assert duplicate.__self__ is not engine
        assert duplicate("sum").state.final_result == "x"
    assert Engine.run(engine, task="sum").state.final_result == "x"


def test_a_class_method_stays_one() -> None:
    """Called on its class or a subclass it is bound to that, by our wrapper too."""

    class Host:
        @classmethod
        def make(cls, what: str) -> tuple[type, str]:
            return cls, what

    class Sub(Host):
        pass

    seen: list[Any] = []

    def wrapper(wrapped: Any, owner: Any, args: Any, kwargs: Any) -> Any:
        seen.append((owner, args, kwargs))
        return wrapped(*args, **kwargs)

    wrap(Host, "make", wrapper)
    assert (Host.make("a"), Sub.make(what="b")) == ((Host, "a"), (Sub, "b"))
    assert seen == [(Host, ("a",), {}), (Sub, (), {"what": "b"})]
    assert copy.deepcopy(Sub.make)("c") == (Sub, "c")


@pytest.mark.parametrize("answer", [True, False, None])
def test_a_processor_that_wants_no_trace_gets_none(installed: None, answer: bool | None) -> None:
    """A run is traced for processors that say they want it or say nothing."""

    class Choosy(Recorder):
        pass

    if answer is not None:
        Choosy.wants_trace = lambda self: answer  # type: ignore[attr-defined]
    choosy = Choosy()
    tracing.add_trace_processor(choosy)
    try:
        Engine(agent=ScriptAgent(Decision.final("x"))).run("sum")
    finally:
        tracing.remove_trace_processor(choosy)
    assert len(choosy.started) == (0 if answer is False else 1)


def test_a_processor_that_cannot_say_what_it_wants_gets_the_trace(
    recorder: Recorder, swallowed: list[tuple[str, BaseException]]
) -> None:
    """A processor that fails to answer takes nothing from the others."""

    class Unsure(tracing.NoOpTraceProcessor):
        def wants_trace(self) -> bool:
            raise OSError

    unsure = Unsure()
    tracing.set_trace_processors([unsure, recorder])
    Engine(agent=ScriptAgent(Decision.final("x"))).run("sum")
    tracing.remove_trace_processor(unsure)
    recorder.only()
    swallowed.clear()


def test_tracing_that_is_off_makes_nothing(recorder: Recorder) -> None:
    """In the mode DISABLED no trace is made, and the run is the same."""
    tracing.set_tracing_disabled(True)
    try:
        assert ScriptAgent(Decision.final("x")).run("sum", render=False) == "x"
    finally:
        tracing.set_tracing_disabled(False)
    assert recorder.started == []


def test_a_run_without_listeners_is_left_alone(installed: None) -> None:
    """With no processor attached a run has no hook of ours, and tools are not wrapped."""
    tools = originals()[1:]
    seen: list[int] = []
    engine: Any = Engine(agent=ScriptAgent())
    engine.agent.script = [lambda: seen.append(len(engine.hooks)) or Decision.final("x")]
    engine.run("sum")
    assert seen == [0]
    assert originals()[1:] == tools
    assert not any(hasattr(function, "__wrapped__") for function in tools)


def test_a_host_without_the_expected_methods_is_traced_without_them(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A piece that does not fit is left out with one line; the rest works."""
    uninstall()
    monkeypatch.setattr(ActionExecutor, "_execute_one", lambda action: None)
    monkeypatch.delattr(ActionExecutor, "_call_tool")
    monkeypatch.setattr(_guard, "_last_logged", {})
    with caplog.at_level(logging.WARNING, "qitos_mlflow"):
        bridge.install()
        Engine(agent=ScriptAgent(Decision.final("x"))).run("sum")
    assert [record.getMessage() for record in caplog.records] == [
        "qitos-mlflow: cannot trace ActionExecutor._execute_one of this QitOS",
        "qitos-mlflow: cannot trace ActionExecutor._call_tool of this QitOS",
    ]
    assert recorder.tree() == ["agent", ["step", ["decide", "reduce"]]]
    uninstall()


def test_a_replacement_that_fails_is_not_made_once_more(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    swallowed: list[tuple[str, BaseException]],
) -> None:
    """The runs are traced without it, the first and the next, and each tool call once."""
    uninstall()

    def broken(owner: Any, name: str, wrapper: Any) -> None:
        if name == "_call_tool":
            raise OSError(name)
        wrap(owner, name, wrapper)

    monkeypatch.setattr(calls, "wrap", broken)
    bridge.install()
    for _ in range(2):
        ScriptAgent(act("add", a=1, b=1), Decision.final("x")).run("sum", render=False)
    assert [len(recorder.of("tool", trace.trace_id)) for trace in recorder.ended] == [1, 1]
    assert [where for where, _ in swallowed] == ["after the import of qitos.engine.action_executor"]
    swallowed.clear()


def test_installing_at_once_from_many_threads_installs_once(recorder: Recorder) -> None:
    """Threads that install and run together leave the host wrapped once."""
    uninstall()
    before = originals()
    meet = threading.Barrier(8, timeout=20)

    def install() -> None:
        meet.wait()
        bridge.install()
        Engine(agent=ScriptAgent(act("add", a=1, b=1), Decision.final("x"))).run("sum")

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(install) for _ in range(8)]:
            future.result(20)
    assert [f.__wrapped__ for f in originals()] == before
    assert len(recorder.of("tool")) == 8
    uninstall()
    assert originals() == before
