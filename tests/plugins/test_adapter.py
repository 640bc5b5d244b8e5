"""The adapter: every event to every plugin, whatever one of them does."""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable, Generator
from typing import Any

import pluggy
import pytest

from qitos_mlflow import _forks
from qitos_mlflow.plugins import adapter as adapter_module
from qitos_mlflow.plugins.adapter import HOOKS, PluginTraceProcessor
from qitos_mlflow.tracing import (
    Span,
    SpanType,
    StepSpanData,
    Trace,
    TraceProcessor,
    TracingMode,
    TracingProvider,
)
from tests.fakes.clock import Clock
from tests.interrupts import ctrl_c

# As a plugin's author has it: nothing of ours is imported.
hookimpl = pluggy.HookimplMarker("qitos")

TRACE = Trace("t", "run")
SPAN = Span("t", "s", StepSpanData(1))


def another_span() -> Span:
    """A span that no processor has seen: the same one twice in a row would be one event."""
    return Span("t", "s", StepSpanData(1))


RECORD = {"kind": "span", "trace_id": "t", "data": {"step_number": 1}}

CALLS: dict[str, Callable[[PluginTraceProcessor], Any]] = {
    "qitos_wants_trace": lambda processor: processor.wants_trace(),
    "qitos_trace_start": lambda processor: processor.on_trace_start(TRACE),
    "qitos_span_start": lambda processor: processor.on_span_start(SPAN),
    "qitos_span_end": lambda processor: processor.on_span_end(SPAN),
    "qitos_trace_end": lambda processor: processor.on_trace_end(TRACE),
    "qitos_record": lambda processor: processor.on_record(RECORD),
    "qitos_force_flush": lambda processor: processor.force_flush(),
    "qitos_shutdown": lambda processor: processor.shutdown(),
}


def plugin(hook: str, body: Callable[..., Any], **options: Any) -> Any:
    """An object with one implementation."""

    class Plugin:
        pass

    setattr(Plugin, hook, staticmethod(hookimpl(body, **options)))
    return Plugin()


class Hearing:
    """A plugin that implements everything, and keeps the events."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, Any]] = []

    @hookimpl
    def qitos_wants_trace(self) -> bool:
        self.heard.append(("qitos_wants_trace", None))
        return True

    @hookimpl
    def qitos_trace_start(self, trace: Any) -> None:
        self.heard.append(("qitos_trace_start", trace))

    @hookimpl
    def qitos_span_start(self, span: Any) -> None:
        self.heard.append(("qitos_span_start", span))

    @hookimpl
    def qitos_span_end(self, span: Any) -> None:
        self.heard.append(("qitos_span_end", span))

    @hookimpl
    def qitos_trace_end(self, trace: Any) -> None:
        self.heard.append(("qitos_trace_end", trace))

    @hookimpl
    def qitos_record(self, record: Any) -> None:
        self.heard.append(("qitos_record", record))

    @hookimpl
    def qitos_force_flush(self) -> bool:
        self.heard.append(("qitos_force_flush", None))
        return True

    @hookimpl
    def qitos_shutdown(self) -> None:
        self.heard.append(("qitos_shutdown", None))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.heard]


def test_every_hook_is_called() -> None:
    """Every hook is called through the processor's method for it."""
    hearing = Hearing()
    processor = PluginTraceProcessor({"hearing": hearing})
    assert isinstance(processor, TraceProcessor)
    for hook in HOOKS:
        CALLS[hook](processor)
    assert hearing.names == list(HOOKS) == list(CALLS)


def test_a_real_trace_reaches_the_plugins() -> None:
    """Plugins get the host's own objects, in the order of events."""
    hearing = Hearing()
    provider = TracingProvider([PluginTraceProcessor({"hearing": hearing})])
    with provider.create_trace("run") as trace:
        span = trace.create_span(None, StepSpanData(1)).start()  # type: ignore[arg-type]
        span.finish()
    assert hearing.heard == [
        ("qitos_trace_start", trace),
        ("qitos_span_start", span),
        ("qitos_span_end", span),
        ("qitos_trace_end", trace),
    ]


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_raising_plugin_harms_nobody(hook: str, place: str, swallowed: list[Any]) -> None:
    """What a plugin raises in any hook reaches neither the caller nor the other plugins."""
    error = RuntimeError("mine")

    def fail() -> None:
        raise error

    hearing = Hearing()
    plugins = {"hearing": hearing, "raising": plugin(hook, fail)}
    if place == "first":
        plugins = dict(reversed(plugins.items()))
    CALLS[hook](PluginTraceProcessor(plugins))
    assert hearing.names == [hook]
    assert swallowed == [(f"trace plugin raising, hook {hook}", error)]
    swallowed.clear()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("old_style", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.filterwarnings("ignore::pluggy.PluggyTeardownRaisedWarning")
def test_a_raising_wrapper_harms_nobody(
    hook: str, when: str, old_style: bool, swallowed: list[Any]
) -> None:
    """A hook wrapper that raises, before or after its yield, is as contained as any other."""

    def wrap() -> Generator[None, Any, Any]:
        if when == "before":
            raise RuntimeError("mine")
        yield
        raise RuntimeError("mine")

    option = {"hookwrapper": True} if old_style else {"wrapper": True}
    hearing, other = Hearing(), Hearing()
    plugins = {"a": hearing, "raising": plugin(hook, wrap, **option), "b": other}
    CALLS[hook](PluginTraceProcessor(plugins))
    assert hearing.names == other.names == [hook]
    assert [where for where, _ in swallowed] == [f"trace plugin raising, hook {hook}"]
    swallowed.clear()


def test_a_wrapper_wraps_its_own_plugin() -> None:
    """A wrapper runs around its plugin's implementation, and may change its answer, no other's."""

    class Wrapping:
        heard: list[str] = []  # noqa: RUF012

        @hookimpl(wrapper=True)
        def qitos_force_flush(self) -> Generator[None, Any, Any]:
            self.heard.append("before")
            assert (yield) == [False]
            self.heard.append("after")
            return [True]

        @hookimpl(specname="qitos_force_flush")
        def flush(self) -> bool:
            self.heard.append("within")
            return False

    assert PluginTraceProcessor({"wrapping": Wrapping()}).force_flush() is True
    assert Wrapping.heard == ["before", "within", "after"]
    unwilling = plugin("qitos_force_flush", lambda: False)
    assert PluginTraceProcessor({"a": Wrapping(), "b": unwilling}).force_flush() is False


def test_interrupts_go_through() -> None:
    """Ctrl-C inside a plugin still stops the program."""
    processor = PluginTraceProcessor({"p": plugin("qitos_span_end", lambda: ctrl_c())})
    with pytest.raises(KeyboardInterrupt):
        processor.on_span_end(SPAN)


def test_a_sleeping_plugin_leaves_the_others_alone() -> None:
    """While one plugin blocks one thread, the others get the events of other threads."""
    asleep, wake = threading.Event(), threading.Event()

    def sleep(span: Span) -> None:
        if span.span_id == "slow":
            asleep.set()
            wake.wait(10)

    hearing = Hearing()
    processor = PluginTraceProcessor({"asleep": plugin("qitos_span_end", sleep), "b": hearing})
    slow = Span("t", "slow", StepSpanData(1))
    thread = threading.Thread(target=processor.on_span_end, args=(slow,))
    thread.start()
    assert asleep.wait(10)
    processor.on_span_end(SPAN)
    assert hearing.heard == [("qitos_span_end", SPAN)]
    wake.set()
    thread.join()
    assert hearing.heard[1:] == [("qitos_span_end", slow)]


def test_failures_are_logged_with_the_name(
    caplog: pytest.LogCaptureFixture, swallowed: list[Any]
) -> None:
    """The log names plugin, hook and error, once however often it happens."""

    def fail(span: Span) -> None:
        raise RuntimeError("no disk")

    processor = PluginTraceProcessor({"unlucky": plugin("qitos_span_end", fail)})
    with caplog.at_level(logging.WARNING, "qitos_mlflow"):
        for _ in range(3):
            processor.on_span_end(another_span())
    (record,) = caplog.records
    for part in ("unlucky", "qitos_span_end", "RuntimeError", "no disk"):
        assert part in record.getMessage()
    assert len(swallowed) == 3
    swallowed.clear()


def test_order_of_calls() -> None:
    """Plugins are called as registered, but `tryfirst` ones before and `trylast` ones after."""
    order: list[str] = []

    def note(name: str, **options: Any) -> Any:
        return plugin("qitos_span_end", lambda span: order.append(name), **options)

    processor = PluginTraceProcessor(
        {
            "last": note("last", trylast=True),
            "a": note("a"),
            "b": note("b"),
            "first": note("first", tryfirst=True),
        }
    )
    processor.on_span_end(SPAN)
    assert order == ["first", "a", "b", "last"]


@pytest.mark.parametrize(
    ("answers", "wants"),
    [
        ([], False),
        ([True], True),
        ([None], True),
        ([False], False),
        ([False, False], False),
        ([False, True], True),
        ([False, "absent"], True),
    ],
)
def test_wants_trace(answers: list[Any], wants: bool) -> None:
    """A trace is wanted unless every plugin says it is not; no plugins want nothing."""
    plugins = {
        str(number): object()
        if answer == "absent"
        else plugin("qitos_wants_trace", lambda answer=answer: answer)
        for number, answer in enumerate(answers)
    }
    assert PluginTraceProcessor(plugins).wants_trace() is wants


def test_adding_to_records_asks_for_no_trace() -> None:
    """A plugin that only adds to what others record does not make the agent pay for a trace."""
    adds = plugin("qitos_record", lambda: None)
    assert PluginTraceProcessor({"adds": adds}).wants_trace() is False
    unwilling = plugin("qitos_wants_trace", lambda: False)
    assert PluginTraceProcessor({"adds": adds, "no": unwilling}).wants_trace() is False
    assert PluginTraceProcessor({"adds": adds, "hears": Hearing()}).wants_trace() is True


def test_what_plugins_say_of_a_record() -> None:
    """Each plugin's addition comes with its name; None is none, and each gets its own copy."""

    def spoil(record: dict[str, Any]) -> dict[str, Any]:
        record["data"].clear()
        return {"tags": {"a": "1"}}

    plugins = {
        "spoils": plugin("qitos_record", spoil),
        "silent": plugin("qitos_record", lambda: None),
        "counts": plugin("qitos_record", lambda record: {"metrics": {"n": len(record["data"])}}),
    }
    assert PluginTraceProcessor(plugins).on_record(RECORD) == [
        ("trace plugin spoils, hook qitos_record", {"tags": {"a": "1"}}),
        ("trace plugin counts, hook qitos_record", {"metrics": {"n": 1}}),
    ]


def test_a_plugin_that_fails_to_answer_wants_the_trace(swallowed: list[Any]) -> None:
    """Rather a trace too many than one lost."""

    def fail() -> bool:
        raise RuntimeError

    assert PluginTraceProcessor({"p": plugin("qitos_wants_trace", fail)}).wants_trace() is True
    swallowed.clear()


@pytest.mark.parametrize(
    ("answers", "flushed"),
    [([], True), ([True, None], True), ([False, True], False), ([True, False], False)],
)
def test_force_flush(answers: list[Any], flushed: bool) -> None:
    """True only if no plugin says False; each is asked."""
    asked: list[Any] = []

    def answering(answer: Any) -> Any:
        return plugin("qitos_force_flush", lambda: asked.append(answer) or answer)

    plugins = {str(number): answering(answer) for number, answer in enumerate(answers)}
    assert PluginTraceProcessor(plugins).force_flush() is flushed
    assert asked == answers


def test_force_flush_that_fails_is_false(swallowed: list[Any]) -> None:
    """A plugin that raises while flushing has not flushed, and the others are still asked."""
    hearing = Hearing()

    def fail() -> bool:
        raise RuntimeError

    plugins = {"p": plugin("qitos_force_flush", fail), "hearing": hearing}
    assert PluginTraceProcessor(plugins).force_flush() is False
    assert hearing.names == ["qitos_force_flush"]
    swallowed.clear()


def test_force_flush_passes_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each plugin gets the seconds that are left, never less than zero."""
    clock = Clock()
    given: list[float | None] = []

    def flush(timeout_s: float | None) -> None:
        given.append(timeout_s)
        clock.now += 3

    monkeypatch.setattr(adapter_module, "time", clock)
    processor = PluginTraceProcessor(
        {str(number): plugin("qitos_force_flush", flush) for number in range(3)}
    )
    processor.force_flush(5)
    assert given == [5, 2, 0]
    given.clear()
    processor.force_flush()
    assert given == [None] * 3


def test_register_and_unregister() -> None:
    """`register` returns the hooks; an unregistered plugin is returned and gets no more events."""
    hearing = Hearing()
    processor = PluginTraceProcessor()
    assert processor.register(hearing, "hearing") == processor.hooks("hearing") == HOOKS
    assert processor.plugins == {"hearing": hearing}
    processor.on_span_end(SPAN)
    assert processor.unregister("hearing") is hearing
    assert processor.unregister("hearing") is None
    processor.on_span_end(SPAN)
    assert hearing.names == ["qitos_span_end"]
    assert processor.hooks("hearing") == ()
    processor.register(hearing, "again")
    assert processor.plugins == {"again": hearing}


def test_names_and_plugins_are_registered_once() -> None:
    """A name or a plugin that is taken is refused, and the one there stays."""
    hearing = Hearing()
    processor = PluginTraceProcessor({"hearing": hearing})
    with pytest.raises(ValueError, match="hearing"):
        processor.register(Hearing(), "hearing")
    with pytest.raises(ValueError, match="already, as 'hearing'"):
        processor.register(hearing, "other")
    processor.on_span_end(SPAN)
    assert hearing.names == ["qitos_span_end"]


def test_plugins_that_equal_everything() -> None:
    """Plugins that cannot be hashed, or claim to equal each other, are still different plugins."""

    class Equal(Hearing):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    one, other = Equal(), Equal()
    processor = PluginTraceProcessor({"one": one, "other": other})
    processor.on_span_end(another_span())
    assert one.names == other.names == ["qitos_span_end"]
    assert processor.unregister("other") is other
    processor.on_span_end(another_span())
    assert one.names == ["qitos_span_end"] * 2


def test_unknown_hooks_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A plugin made for a later version loads, and a warning names the hook that is not called."""

    class Newer(Hearing):
        @hookimpl
        def qitos_span_heartbeat(self, span: Any) -> None:
            raise AssertionError

    newer = Newer()
    with caplog.at_level(logging.WARNING, "qitos_mlflow"):
        processor = PluginTraceProcessor({"newer": newer})
    (record,) = caplog.records
    assert "newer implements qitos_span_heartbeat" in record.getMessage()
    processor.on_span_end(SPAN)
    assert newer.names == ["qitos_span_end"]


def test_hooks_that_may_not_exist_are_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """For a hook that a plugin marks as optional there is no warning."""
    newer = plugin("qitos_span_pulse", lambda: None, optionalhook=True)
    with caplog.at_level(logging.WARNING, "qitos_mlflow"):
        PluginTraceProcessor({"patient": newer, "other": Hearing()})
    assert caplog.records == []


def test_a_plugin_without_hooks_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """For a plugin whose functions are not marked, a warning says how to mark them."""

    class Unmarked:
        def qitos_span_end(self, span: Any) -> None:
            raise AssertionError

    with caplog.at_level(logging.WARNING, "qitos_mlflow"):
        processor = PluginTraceProcessor({"unmarked": Unmarked()})
    (record,) = caplog.records
    assert "unmarked" in record.getMessage()
    assert 'HookimplMarker("qitos")' in record.getMessage()
    processor.on_span_end(SPAN)


def test_wrong_arguments_are_refused() -> None:
    """A plugin that asks for arguments a hook does not have is refused as a whole."""

    class Wrong(Hearing):
        @hookimpl
        def qitos_trace_end(self, trace: Any, verdict: Any) -> None:
            raise AssertionError

    wrong = Wrong()
    processor = PluginTraceProcessor()
    with pytest.raises(pluggy.PluginValidationError, match="verdict"):
        processor.register(wrong, "wrong")
    assert processor.plugins == {}
    processor.on_span_end(SPAN)
    assert wrong.heard == []


def test_registering_while_events_come() -> None:
    """Plugins may come and go on one thread during events on others; one that stays misses none."""
    stays = Hearing()
    processor = PluginTraceProcessor({"stays": stays})
    together = threading.Barrier(2)

    def change() -> None:
        together.wait()
        for number in range(20):
            processor.register(Hearing(), f"passing {number}")
            processor.unregister(f"passing {number}")

    thread = threading.Thread(target=change)
    thread.start()
    together.wait()
    for _ in range(500):
        processor.on_span_end(another_span())
    thread.join()
    assert len(stays.heard) == 500
    assert processor.plugins == {"stays": stays}


# -- a processor that was added twice ------------------------------------------------------------


def one_span(provider: TracingProvider) -> None:
    with provider.create_trace("run") as trace:
        trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()


@pytest.mark.parametrize("mode", [TracingMode.ENABLED, TracingMode.ENABLED_WITHOUT_DATA])
def test_a_processor_added_twice_passes_each_event_on_once(mode: TracingMode) -> None:
    """Each plugin gets each event once, in every mode, also with another processor in between."""
    hearing, other = Hearing(), Hearing()
    processor = PluginTraceProcessor({"hearing": hearing})
    between = PluginTraceProcessor({"other": other})
    one_span(TracingProvider([processor, between, processor, processor], mode))
    assert hearing.names == other.names
    assert hearing.names == [
        "qitos_trace_start",
        "qitos_span_start",
        "qitos_span_end",
        "qitos_trace_end",
    ]


def test_added_once_more_in_mid_trace() -> None:
    """A processor that is added again while a trace goes on repeats nothing from then on."""
    hearing = Hearing()
    processor = PluginTraceProcessor({"hearing": hearing})
    provider = TracingProvider([processor])
    with provider.create_trace("run") as trace:
        span = trace.create_span(SpanType.STEP, StepSpanData(1)).start()
        provider.add_processor(processor)
        span.finish()
    assert hearing.names.count("qitos_span_end") == hearing.names.count("qitos_trace_end") == 1


def test_what_is_equal_is_not_the_same_event() -> None:
    """Spans of one id, and two threads with one span each, are events of their own."""
    hearing = Hearing()
    processor = PluginTraceProcessor({"hearing": hearing})
    spans = [another_span() for _ in range(2)]
    for span in spans:
        processor.on_span_start(span)
        processor.on_span_end(span)
    assert len(hearing.heard) == 4
    thread = threading.Thread(target=processor.on_span_end, args=[spans[1]])
    thread.start()
    thread.join()
    assert len(hearing.heard) == 5


def test_a_new_object_in_the_place_of_the_last_one() -> None:
    """No event is kept in memory, and one that gets the address of the last one is still new."""
    count = 0

    def counted(span: Span) -> None:
        nonlocal count
        count += 1

    processor = PluginTraceProcessor({"counting": plugin("qitos_span_end", counted)})
    addresses = set()
    for _ in range(100):
        span = another_span()
        addresses.add(id(span))
        processor.on_span_end(span)
        gone = weakref.ref(span)
        del span
        assert gone() is None
    assert count == 100
    assert len(addresses) < 100, "no address was used again: this test shows nothing"


def test_events_that_know_no_weak_references() -> None:
    """A host's slotted objects are passed on."""

    class Bare:
        __slots__ = ("data",)

    hearing = Hearing()
    processor = PluginTraceProcessor({"hearing": hearing})
    for item in (Bare(), Bare()):
        processor.on_span_end(item)  # type: ignore[arg-type]
    assert len(hearing.heard) == 2


# -- loaded later ----------------------------------------------------------------------------


class HearsNames:
    """Notes the names of the traces that it hears of."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @hookimpl
    def qitos_trace_start(self, trace: Any) -> None:
        self.heard.append(trace.name)


def test_plugins_are_loaded_by_their_first_use() -> None:
    """Not before, and once: the trace that is the first use is the first that they hear of."""
    hearing, loads = HearsNames(), []

    def load(adapter: PluginTraceProcessor) -> None:
        loads.append(adapter.wants_trace())  # A plugin whose import runs an agent.
        adapter.register(hearing, "hearing")

    processor = PluginTraceProcessor(load=load)
    assert processor.force_flush()
    assert loads == []
    for name in ("one", "two"):
        processor.on_trace_start(Trace(name, name))
    assert processor.wants_trace()
    assert (loads, hearing.heard) == ([False], ["one", "two"])
    assert processor.plugins == {"hearing": hearing}


@pytest.mark.parametrize("use", ["wants", "event", "plugins"])
def test_other_threads_wait_until_the_plugins_are_loaded(use: str) -> None:
    """A trace that begins while another thread loads them is not lost."""
    hearing, loading, loaded = HearsNames(), threading.Event(), threading.Event()

    def load(adapter: PluginTraceProcessor) -> None:
        adapter.register(HearsNames(), "first")
        loading.set()
        assert loaded.wait(20)
        adapter.register(hearing, "second")

    processor = PluginTraceProcessor(load=load)
    uses: dict[str, Callable[[], Any]] = {
        "wants": processor.wants_trace,
        "event": lambda: processor.on_trace_start(Trace("t", "meanwhile")),
        "plugins": lambda: processor.plugins["second"],
    }
    found: list[Any] = []
    first = threading.Thread(target=processor.wants_trace)
    other = threading.Thread(target=lambda: found.append(uses[use]()))
    first.start()
    assert loading.wait(20)
    other.start()
    other.join(0.05)
    assert not found
    loaded.set()
    for thread in (first, other):
        thread.join(20)
    assert found == [{"wants": True, "event": None, "plugins": hearing}[use]]
    assert hearing.heard == ["meanwhile"] * (use == "event")


def test_a_thread_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that loads may wait for an import of one that waits: after a while that goes on."""
    monkeypatch.setattr(adapter_module, "LOAD_WAIT_S", 0.05)
    loading, over = threading.Event(), threading.Event()
    processor = PluginTraceProcessor(load=lambda _: (loading.set(), over.wait(20)))
    thread = threading.Thread(target=processor.wants_trace)
    thread.start()
    assert loading.wait(20)
    processor.on_trace_start(TRACE)
    assert processor._wait_s == 0, "each event would wait"
    assert not processor.wants_trace()
    over.set()
    thread.join(20)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_child_forked_amid_the_loading_loads_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that loads, and its lock, are the parent's."""
    monkeypatch.setattr(_forks, "FORK_WAIT_S", 0.05)
    loading, over = threading.Event(), threading.Event()
    parent = os.getpid()

    def load(adapter: PluginTraceProcessor) -> None:
        loading.set()
        assert os.getpid() != parent or over.wait(20)
        adapter.register(HearsNames(), "hearing")

    processor = PluginTraceProcessor(load=load)
    thread = threading.Thread(target=processor.wants_trace)
    thread.start()
    assert loading.wait(20)
    if (child := os.fork()) == 0:
        os._exit(0 if processor.wants_trace() else 1)
    over.set()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join(20)


def test_loading_that_is_interrupted_is_done_again() -> None:
    """Ctrl-C while the plugins are imported ends the run, and the next run has them."""
    hearing, tries = HearsNames(), []

    def load(adapter: PluginTraceProcessor) -> None:
        tries.append(None)
        if len(tries) == 1:
            ctrl_c()
        adapter.register(hearing, "hearing")

    processor = PluginTraceProcessor(load=load)
    with pytest.raises(KeyboardInterrupt):
        processor.wants_trace()
    assert processor.wants_trace()
    assert processor.plugins == {"hearing": hearing}


def test_loading_that_fails_is_reported_once(swallowed: list[tuple[str, BaseException]]) -> None:
    """What raises is no plugin's: the agent runs without any."""

    def load(_: PluginTraceProcessor) -> None:
        raise ValueError("broken")

    processor = PluginTraceProcessor(load=load)
    assert not processor.wants_trace()
    assert not processor.wants_trace()
    assert [where for where, _ in swallowed] == ["plugins.load"]
    swallowed.clear()


def test_shut_down_before_they_are_loaded_they_never_are() -> None:
    """A processor that was shut down takes no trace, and has nothing to deliver."""
    loads: list[object] = []
    processor = PluginTraceProcessor(load=loads.append)
    processor.shutdown()
    processor.on_trace_start(TRACE)
    assert not processor.wants_trace()
    assert loads == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_waits_until_the_plugins_are_loaded() -> None:
    """A child that is forked amid their imports could never import them itself."""
    loading, loaded = threading.Event(), threading.Event()

    def load(adapter: PluginTraceProcessor) -> None:
        loading.set()
        assert loaded.wait(20)
        adapter.register(HearsNames(), "hearing")

    processor = PluginTraceProcessor(load=load)
    thread = threading.Thread(target=processor.wants_trace)
    thread.start()
    assert loading.wait(20)
    os.register_at_fork(before=loaded.set)  # Called before the one that waits.
    if (child := os.fork()) == 0:
        os._exit(0 if "hearing" in processor._managers else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    thread.join(20)
