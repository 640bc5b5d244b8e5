"""Pages of runs from a server that has no last page, or pages that are too large."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from qitos_mlflow.delivery import RetryLater
from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef, StoredRun
from qitos_mlflow.mlflow_plugin.server.transport import Oversized, Unanswered
from qitos_mlflow.mlflow_plugin.sink import children
from qitos_mlflow.mlflow_plugin.sink.children import PAGE, Children, Reading, TooMany


def run(run_id: object) -> StoredRun:
    ref = RunRef(str(run_id), "7", "", "mlflow-artifacts:/7", 0)
    return StoredRun(ref, "FINISHED", 1, {"loss": 1.0}, {"qitos.task_id": "t" * 100, "other": "x"})


class Pages:
    """A transport with these pages, or failures; `asked` has how many runs were asked for."""

    def __init__(self, pages: Iterator[Any]) -> None:
        self.asked: list[int] = []
        self._pages = pages

    def search_runs(self, *args: Any, most: int, **options: Any) -> tuple[list[StoredRun], str]:
        self.asked.append(most)
        page = next(self._pages)
        if isinstance(page, Exception):
            raise page
        return page, "more"


def read(pages: Pages, times: int) -> Reading:
    parents, reading = Children(pages), Reading()  # type: ignore[arg-type]
    for _ in range(times):
        parents.read(reading, "r", ["7"], 1.0)
    return reading


def test_pages_that_repeat_themselves_are_no_answer() -> None:
    """A page with a next one has at least one run that is new."""
    with pytest.raises(RetryLater, match="in circles"):
        read(Pages(iter([[run(1)], [run(1)]])), 2)


@pytest.mark.parametrize(("name", "most"), [("MOST_RUNS", 10), ("MOST_CHARS", 1000)])
def test_pages_without_an_end_are_not_read(
    monkeypatch: pytest.MonkeyPatch, name: str, most: int
) -> None:
    """Each has a new run; memory is what limits them."""
    monkeypatch.setattr(children, name, most)
    with pytest.raises(TooMany):
        read(Pages([run(n)] for n in count()), 100)


@pytest.mark.parametrize("failure", [Oversized("too large"), Unanswered("too slow")])
def test_a_page_that_is_too_large_is_asked_for_in_parts(failure: Exception) -> None:
    """Half as many runs each time, and at least one."""
    pages = Pages(iter([failure] * 10 + [[run(1)]]))
    parents, reading = Children(pages), Reading()  # type: ignore[arg-type]
    for _ in range(10):
        with pytest.raises(type(failure)):
            parents.read(reading, "r", ["7"], 1.0)
    parents.read(reading, "r", ["7"], 1.0)
    assert pages.asked[:3] == [PAGE, PAGE // 2, PAGE // 4]
    assert pages.asked[-1] == 1


def test_what_is_not_read_of_a_run_is_not_kept() -> None:
    """Of thousands of runs the rest would not fit into memory."""
    [kept] = read(Pages(iter([[run(1)]])), 1).runs.values()
    assert kept.metrics == {}
    assert kept.tags == {"qitos.task_id": "t" * 100}
