"""`qitos_mlflow.context`: where it holds, what it adds up to, what it refuses. No server."""

from __future__ import annotations

import asyncio
import contextvars
import io
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.pool import ThreadPool
from typing import Any

import pytest

from qitos_mlflow import _guard, context
from qitos_mlflow._threads import OwnThread
from qitos_mlflow.mlflow_plugin.fluent.carried import current
from qitos_mlflow.mlflow_plugin.fluent.context import MAX_TRACES, Begun
from qitos_mlflow.mlflow_plugin.fluent.pending_run import PendingRun
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef
from qitos_mlflow.mlflow_plugin.server import pages

WAIT_S = 20.0
REF = RunRef("r1", "7", "agent", "mlflow-artifacts:/7/r1/artifacts", 0)
CALLER = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def here() -> str | None:
    """The user of the context that this is in."""
    given: context | None = current.get()
    return None if given is None else given.user


def on_a_thread(call: Callable[[], Any]) -> Any:
    """What `call` returns on a thread that is started here."""
    answers: list[Any] = []
    thread = threading.Thread(target=lambda: answers.append(call()))
    thread.start()
    thread.join(WAIT_S)
    return answers[0]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    """A pool that many share. Its threads are started by whichever submits first."""
    with ThreadPoolExecutor(4) as pool:
        yield pool


# -- where it holds --------------------------------------------------------------------------


async def _in_a_task() -> str | None:
    return await asyncio.create_task(asyncio.to_thread(here))


async def _in_an_executor() -> str | None:
    return await asyncio.get_running_loop().run_in_executor(None, here)


def _in_a_pool_of_its_own() -> str | None:
    with ThreadPoolExecutor(1) as own:
        return next(own.map(lambda _: here(), [0]))


def _in_a_multiprocessing_pool() -> str | None:
    with ThreadPool(1) as own:
        return own.apply(here)


WAYS: dict[str, Callable[[], str | None]] = {
    "here": here,
    "a thread": lambda: on_a_thread(here),
    "a thread of a thread": lambda: on_a_thread(lambda: on_a_thread(here)),
    "a pool": _in_a_pool_of_its_own,
    "a pool on a thread": lambda: on_a_thread(_in_a_pool_of_its_own),
    "a multiprocessing pool": _in_a_multiprocessing_pool,
    "a task on a thread": lambda: asyncio.run(_in_a_task()),
    "an executor": lambda: asyncio.run(_in_an_executor()),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_holds_for_what_is_started_inside(way: str) -> None:
    """On threads, in pools, in tasks; and nowhere else."""
    assert WAYS[way]() is None
    with context(user="ann"):
        assert WAYS[way]() == "ann"
    assert WAYS[way]() is None


def test_a_thread_that_outlives_the_block_keeps_it() -> None:
    """A handler may answer before the agent that it has started begins."""
    may_go, answers = threading.Event(), []

    def work() -> None:
        may_go.wait(WAIT_S)
        answers.append(here())

    with context(user="ann"):
        thread = threading.Thread(target=work)
        thread.start()
    may_go.set()
    thread.join(WAIT_S)
    assert answers == ["ann"]


def test_a_pools_threads_are_nobodys(pool: ThreadPoolExecutor) -> None:
    """The task is inside, not the thread: another request's task on it is in its own context."""
    with context(user="ann"):
        assert [*pool.map(lambda _: here(), range(8))] == ["ann"] * 8
    assert [*pool.map(lambda _: here(), range(8))] == [None] * 8
    with context(user="bob"):
        assert [*pool.map(lambda _: here(), range(8))] == ["bob"] * 8


def test_a_worker_that_brings_its_tasks_own_context_is_in_that_one() -> None:
    """As anyio's workers do, which run the handlers of FastAPI."""
    with context(user="ann"):
        assert on_a_thread(lambda: contextvars.Context().run(here)) is None


def test_requests_at_the_same_time_never_mix(pool: ThreadPoolExecutor) -> None:
    """Two hundred requests that share a pool and start threads, each with agents in all places."""

    async def handle(user: str) -> set[str | None]:
        loop = asyncio.get_running_loop()
        with context(user=user):
            return {
                here(),
                *await asyncio.gather(
                    asyncio.to_thread(here),
                    asyncio.to_thread(on_a_thread, here),
                    loop.run_in_executor(pool, here),
                    loop.run_in_executor(pool, on_a_thread, here),
                ),
            }

    async def outside() -> set[str | None]:
        loop = asyncio.get_running_loop()
        return {await asyncio.to_thread(here), await loop.run_in_executor(pool, here)}

    async def serve() -> list[set[str | None]]:
        requests = [handle(str(n)) for n in range(200)]
        return await asyncio.gather(*requests, *(outside() for _ in range(50)))

    found = asyncio.run(serve())
    assert found == [{str(n)} for n in range(200)] + [{None}] * 50


@pytest.mark.skipif(not hasattr(os, "fork"), reason="has no fork")
def test_a_forked_process_is_outside() -> None:
    """A pool's first task forks its processes, which serve other requests after it."""
    with context(user="ann"), ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        assert pool.submit(here).result(WAIT_S) is None


def test_our_own_threads_are_outside() -> None:
    """A pipeline's threads may be started by any request and serve all."""
    found: list[str | None] = []

    class Own(OwnThread):
        def work(self) -> None:
            found.append(here())

    with context(user="ann"):
        thread = Own("qitos-mlflow-test")
        thread.start()
        thread.join(WAIT_S)
    assert found == [None]


def test_a_thread_is_left_as_it_was() -> None:
    """A thread object has nothing of ours in the place of its `run` once it runs."""
    with context(user="ann"):
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join(WAIT_S)
    assert "run" not in vars(thread)


# -- what it adds up to ----------------------------------------------------------------------


def test_the_inner_one_adds_and_comes_first() -> None:
    """What it does not give is the outer one's."""
    with (
        context(session="s", user="ann", tags={"a": 1, "b": 1}, metadata={"x": 1}, run_name="out"),
        context(user="bob", tags={"b": 2}, metadata={"y": 2}, parent_run_id="p") as inner,
    ):
        assert inner.run_settings() == {"run_name": "out", "user_id": "bob"}
        assert inner.start_fields() == {
            "more_metadata": {"x": 1, "y": 2},
            "group_id": "s",
            "added": {"tags": {"a": "1", "b": "2"}},
        }
        assert inner.parent_run_id == "p"


def begun(number: int, uri: str | None = "http://ann:secret@mlflow.test:5000/") -> Begun:
    """A trace, by its number."""
    return Begun(f"q{number}", f"tr-{number}", PendingRun(), uri, None)


def test_it_knows_what_has_begun_inside() -> None:
    """The trace at once, the run and the page once the run is created; of inner contexts, too."""
    first, second = begun(1), begun(2)
    with context() as outer:
        outer.begin(first)
        with context() as inner:
            inner.begin(second)
    assert (outer.trace_ids, inner.trace_ids) == (["tr-1", "tr-2"], ["tr-2"])
    assert (outer.run_ids, outer.url) == ([], None)
    first.run.created(REF)
    assert outer.run_ids == ["r1"]
    assert outer.url == "http://mlflow.test:5000/#/experiments/7/traces?selectedEvaluationId=tr-1"
    assert inner.run_ids == []


def test_the_page_is_the_runs_if_no_trace_is_logged() -> None:
    """In the workspace of the run."""
    with context() as request:
        request.begin(begun(1)._replace(trace_id=None, workspace="team a"))
    request.begun[0].run.created(REF)
    page = "http://mlflow.test:5000/#/experiments/7/runs/r1?workspace=team%20a"
    assert (request.trace_ids, request.url) == ([], page)


def test_a_store_has_no_page() -> None:
    """Only an http(s) server has one."""
    with context() as request:
        for number, uri in enumerate((None, "sqlite:///mlflow.db", "databricks")):
            request.begin(begun(number, uri))
    for one in request.begun:
        one.run.created(REF)
    assert request.url is None


def test_it_does_not_grow() -> None:
    """A block may last as long as the process."""
    with context() as request:
        for number in range(MAX_TRACES + 5):
            request.begin(begun(number))
    assert len(request.trace_ids) == MAX_TRACES


# -- as a decorator --------------------------------------------------------------------------


def test_each_call_of_a_function_is_inside_a_context_of_its_own() -> None:
    """Functions and coroutine functions keep name, arguments and result."""

    @context(user="ann")
    def handle(number: int) -> tuple[int, str | None, Any]:
        """Handle a request."""
        return number, here(), current.get()

    @context(user="bob")
    async def handle_async(number: int) -> tuple[int, str | None, Any]:
        await asyncio.sleep(0)
        return number, here(), current.get()

    async def both() -> list[tuple[int, str | None, Any]]:
        return await asyncio.gather(handle_async(1), handle_async(2))

    first, second = handle(1), handle(number=2)
    assert (handle.__name__, handle.__doc__) == ("handle", "Handle a request.")
    assert (first[:2], second[:2]) == ((1, "ann"), (2, "ann"))
    assert first[2] is not second[2]
    assert asyncio.iscoroutinefunction(handle_async)
    third, fourth = asyncio.run(both())
    assert (third[:2], fourth[:2]) == ((1, "bob"), (2, "bob"))
    assert third[2] is not fourth[2]
    assert here() is None


def test_a_generator_cannot_be_decorated() -> None:
    """Its context would be that of whatever takes its items."""

    def stream() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match=r"the generator .*stream: use `with"):
        context(user="ann")(stream)


# -- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"session": 1.5}, "session=1.5 .* is a float; give a text"),
        ({"user": True}, "user=True .* is a bool"),
        ({"run_name": ["a"]}, r"run_name=\['a'\] .* is a list"),
        ({"parent_run_id": object}, "parent_run_id=.* is a type"),
        ({"tags": "a=b"}, "tags .* is a str; give a dict"),
        ({"tags": {1: "b"}}, "tags .* has the key 1; give texts"),
        ({"metadata": [("a", 1)]}, "metadata .* is a list"),
        ({"traceparent": 12}, "traceparent .* is a int; give the header's text or"),
    ],
)
def test_a_wrong_value_is_named_at_once(arguments: dict[str, Any], said: str) -> None:
    """With what to give instead."""
    with pytest.raises(TypeError, match=said):
        context(**arguments)


def test_a_number_is_an_id_and_nothing_is_nothing() -> None:
    """As web frameworks have them."""
    given = context(session=12, user="", tags={"a": None, "b": 2}, metadata=None)
    assert (given.session, given.user, given.tags) == ("12", None, {"b": "2"})


def test_it_is_entered_once() -> None:
    """Two requests in one object would mix."""
    with context() as request, pytest.raises(RuntimeError, match="make another one"):
        request.__enter__()
    assert here() is None


def test_leaving_it_elsewhere_is_said_and_harms_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """As a generator does that another thread finishes."""
    _guard._last_logged.clear()
    request = context(user="ann")
    contextvars.copy_context().run(request.__enter__)
    request.__exit__(None, None, None)
    assert here() is None
    assert "left on another thread, task" in caplog.text


@pytest.mark.parametrize("begun_inside", [True, False])
def test_a_generator_that_is_left_in_the_middle_leaves_nothing_behind(begun_inside: bool) -> None:
    """Its context is not that of what the thread does next."""

    def stream() -> Iterator[str | None]:
        with context(user="ann"):
            yield here()

    items = stream()
    if not begun_inside:
        next(items)
    with context(user="bob"):
        if begun_inside:
            next(items)
        else:
            items.close()
    assert here() is None
    items.close()
    assert here() is None


# -- the caller's trace ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (None, None),
        ("", None),
        (CALLER, CALLER),
        (f" {CALLER}\n", CALLER),
        (CALLER.encode(), CALLER),
        ({"traceparent": CALLER}, CALLER),
        ({"Traceparent": CALLER}, CALLER),
        ({"HTTP_TRACEPARENT": CALLER}, CALLER),
        ({"accept": "*/*"}, None),
        (CALLER.replace("00-", "cc-", 1) + "-what-the-future-has", CALLER.replace("00-", "cc-", 1)),
    ],
)
def test_the_header_is_taken_from_a_text_or_headers(given: Any, taken: str | None) -> None:
    """As frameworks have them."""
    assert context(traceparent=given).traceparent == taken


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        CALLER.upper(),
        CALLER + "-more",
        CALLER.replace("00-", "ff-", 1),
        CALLER.replace("4bf92f3577b34da6a3ce929d0e0e4736", "0" * 32),
        CALLER.replace("00f067aa0ba902b7", "0" * 16),
        CALLER[:-1],
        "x" * 100_000,
    ],
)
def test_a_bad_header_is_ignored_with_one_line(text: str, caplog: pytest.LogCaptureFixture) -> None:
    """A request must not fail for what its client sends, nor fill the log."""
    _guard._last_logged.clear()
    assert context(traceparent={"traceparent": text}).traceparent is None
    assert context(traceparent=text).traceparent is None
    assert caplog.text.count("traceparent that is not valid is ignored") == 1
    assert len(caplog.text) < 1000


# -- the line on a terminal ------------------------------------------------------------------


class Terminal(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def show_twice(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, uri: str | None) -> str:
    """What two runs print on `stderr`."""
    monkeypatch.setattr("sys.stderr", stderr)
    monkeypatch.setattr(pages, "_shown", [])
    pages.show_run(uri, REF)
    pages.show_run(uri, REF)
    return stderr.getvalue()


def test_a_terminal_is_shown_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As MLflow prints it: once in a process, of an http(s) server, and only on a terminal."""
    uri = "http://ann:secret@mlflow.test:5000"
    line = "🏃 View run agent at: http://mlflow.test:5000/#/experiments/7/runs/r1\n"
    assert show_twice(monkeypatch, Terminal(), uri) == line
    assert show_twice(monkeypatch, io.StringIO(), uri) == ""
    assert show_twice(monkeypatch, Terminal(), "sqlite:///mlflow.db") == ""
    assert show_twice(monkeypatch, Terminal(), None) == ""
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    assert show_twice(monkeypatch, Terminal(), uri) == ""
