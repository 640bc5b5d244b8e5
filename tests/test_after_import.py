"""Functions that are called once a module is imported."""

from __future__ import annotations

import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

from qitos_mlflow import _after_import
from qitos_mlflow._after_import import after_import, imported

Make = Callable[..., str]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Makes an importable module of the given text, with a name of its own, and returns that."""
    monkeypatch.syspath_prepend(tmp_path)
    finders = [finder for finder in sys.meta_path if finder is not _after_import._Finder]
    monkeypatch.setattr(sys, "meta_path", finders)
    made: list[str] = []

    def module(text: str = "complete = True", name: str | None = None) -> str:
        name = name or f"after_import_{tmp_path.parent.name}_{len(made)}"
        made.append(name)
        tmp_path.joinpath(f"{name}.py").write_text(text)
        importlib.invalidate_caches()
        return name

    yield module
    for name in made:
        sys.modules.pop(name, None)
        _after_import._waiting.pop(name, None)


def test_imported_before(make: Make) -> None:
    """With the module imported already, the call comes at once and nothing is installed."""
    name = make()
    module = importlib.import_module(name)
    seen: list[ModuleType] = []
    after_import(name, seen.append)
    assert seen == [module]
    assert _after_import._Finder not in sys.meta_path


def test_imported_later(make: Make) -> None:
    """The call comes right after the import, once, with the complete module, before its user."""
    name = make()
    seen: list[object] = []
    after_import(name, lambda module: seen.append((module, module.complete, imported(name))))
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [(module, True, module)]
    importlib.import_module(name)
    importlib.reload(module)
    assert len(seen) == 1


def test_the_module_is_as_ever(make: Make) -> None:
    """Spec and loader are those that the module has without us."""
    name = make()
    after_import(name, lambda module: None)
    assert find_spec(name) is not None, "looking for it is no import"
    module = importlib.import_module(name)
    assert type(module.__spec__) is ModuleSpec
    assert module.__loader__ is module.__spec__.loader
    assert inspect.getsource(module).strip() == "complete = True"


def test_several_in_order_and_none_twice(make: Make) -> None:
    """All that wait are called, in order; one added again while it waits is called once."""
    name = make()
    seen: list[str] = []

    def first(_module: ModuleType) -> None:
        seen.append("first")

    after_import(name, first)
    after_import(name, lambda _: seen.append("second"))
    after_import(name, first)
    importlib.import_module(name)
    assert seen == ["first", "second"]
    after_import(name, first)
    assert seen == ["first", "second", "first"]


def test_a_failed_import_leaves_it_waiting(make: Make) -> None:
    """An import that raises calls nothing and raises what it always does; the next one counts."""
    name = make("raise RuntimeError('not yet')")
    seen: list[ModuleType] = []
    after_import(name, seen.append)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not yet"):
            importlib.import_module(name)
    assert seen == []
    make("complete = 'by now'", name)
    assert [importlib.import_module(name)] == seen


def test_a_module_that_does_not_exist() -> None:
    """A module that is missing is missing as ever."""
    after_import("no_such_module_at_all", lambda module: None)
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module("no_such_module_at_all")
    assert caught.value.name == "no_such_module_at_all"
    assert find_spec("no_such_module_at_all") is None
    del _after_import._waiting["no_such_module_at_all"]


def test_what_it_raises_stays_out_of_the_import(
    make: Make, swallowed: list[tuple[str, BaseException]]
) -> None:
    """A callback that raises is reported; the import goes on, and so do the other callbacks."""
    name = make()
    seen: list[ModuleType] = []
    after_import(name, lambda module: module.no_such_thing)
    after_import(name, seen.append)
    assert importlib.import_module(name) is seen[0]
    assert [where for where, _ in swallowed] == [f"after the import of {name}"]
    swallowed.clear()


SLOW = "import {gates} as gates\ngates.begun.set(); assert gates.go_on.wait(60)\ncomplete = True"


class _Slow:
    """A module that a thread is in the middle of importing."""

    def __init__(self, make: Make) -> None:
        gates = make("import threading\nbegun, go_on = threading.Event(), threading.Event()")
        self.gates = importlib.import_module(gates)
        self.name = make(SLOW.format(gates=gates))
        self.thread = threading.Thread(target=importlib.import_module, args=[self.name])

    def start(self) -> None:
        self.thread.start()
        assert self.gates.begun.wait(60)
        assert self.name in sys.modules
        assert imported(self.name) is None

    def finish(self) -> None:
        self.gates.go_on.set()
        self.thread.join()


def test_being_imported_by_another_thread(make: Make) -> None:
    """Adding does not wait for that import; the call comes at its end, on the importing thread."""
    slow = _Slow(make)
    slow.start()
    seen: list[object] = []
    after_import(slow.name, lambda m: seen.append((m.complete, threading.current_thread())))
    assert seen == []
    slow.finish()
    assert seen == [(True, slow.thread)]
    assert type(sys.modules[slow.name].__spec__) is ModuleSpec


def test_an_import_that_was_not_seen_to_begin(make: Make) -> None:
    """An import that went past our finder is noticed at the next import of anything."""
    slow = _Slow(make)
    seen: list[ModuleType] = []
    after_import(slow.name, seen.append)
    sys.meta_path.remove(_after_import._Finder)
    slow.start()
    sys.meta_path.insert(0, _after_import._Finder)
    importlib.import_module(make())
    assert seen == []
    slow.finish()
    assert seen == [sys.modules[slow.name]]


def test_many_threads_at_once(make: Make) -> None:
    """Of callbacks added while the import is going on, each is called exactly once."""
    slow = _Slow(make)
    slow.start()
    seen: list[int] = []

    def add(number: int) -> None:
        after_import(slow.name, lambda _: seen.append(number))

    threads = [threading.Thread(target=add, args=[number]) for number in range(32)]
    for number, thread in enumerate(threads):
        thread.start()
        if number == 16:
            slow.gates.go_on.set()
    for thread in threads:
        thread.join()
    slow.finish()
    assert sorted(seen) == list(range(32))


def test_a_module_that_imports_its_waiter(make: Make) -> None:
    """Added by the module itself in the middle of its import, the call waits for its end."""
    name = make(
        "import sys\nfrom qitos_mlflow._after_import import after_import\nseen = []\n"
        "after_import(__name__, lambda module: seen.append(module.complete))\n"
        "assert seen == []\ncomplete = True"
    )
    assert importlib.import_module(name).seen == [True]
