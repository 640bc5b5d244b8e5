"""Finding and loading installed plugins; nothing they do gets out."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from qitos_mlflow._selection import VARIABLE
from qitos_mlflow.plugins import loader
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.plugins.loader import PluginInfo, load
from qitos_mlflow.tracing import Span, StepSpanData
from tests.hosts import run_on
from tests.plugins.conftest import Distributions

GOOD = """
heard = []
@hookimpl
def qitos_span_end(span):
    heard.append(span)
"""
SPAN = Span("t", "s", StepSpanData(1))


def states(infos: list[PluginInfo]) -> dict[str, str]:
    return {info.name: info.state for info in infos}


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_a_good_plugin(installed: Distributions) -> None:
    """An installed plugin is loaded, and gets spans."""
    installed.plugin("good", GOOD, distribution="acme-good")
    adapter = PluginTraceProcessor()
    (info,) = load(adapter)
    assert info == PluginInfo(
        "good", "acme-good", "1.0", "fake_acme_good", "loaded", None, ("qitos_span_end",)
    )
    adapter.on_span_end(SPAN)
    assert sys.modules["fake_acme_good"].heard == [SPAN]


@pytest.mark.parametrize(
    ("source", "why"),
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_mod"),
        ("raise RuntimeError('at import')", "RuntimeError: at import"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def broken(:", "SyntaxError"),
        (
            """
            class Mute(Exception):
                def __str__(self): return self.nothing
            raise Mute
            """,
            "Mute",
        ),
        (
            "@hookimpl\ndef qitos_span_end(span, nonsense): ...",
            "PluginValidationError",
        ),
    ],
)
def test_a_broken_plugin_is_one_warning(
    installed: Distributions, caplog: pytest.LogCaptureFixture, source: str, why: str
) -> None:
    """One warning names plugin, distribution, version and error; the plugins around it load."""
    installed.plugin("a", GOOD)
    installed.plugin("broken", source, distribution="acme-broken")
    installed.plugin("z", GOOD)
    adapter = PluginTraceProcessor()
    infos = load(adapter)
    assert states(infos) == {"a": "loaded", "broken": "failed", "z": "loaded"}
    assert list(adapter.plugins) == ["a", "z"]
    (error,) = [info.error for info in infos if info.name == "broken"]
    assert error is not None
    assert why in error
    (warning,) = warnings(caplog)
    for part in ("plugin broken of acme-broken 1.0", why):
        assert part in warning


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("fake_home:no_such_name", "AttributeError"),
        ("fake_home:fails", "RuntimeError: in the factory"),
        ("fake_home:nothing", "None instead of a plugin"),
        ("fake_home:none", "None instead of a plugin"),
        ("fake_home:needs_more", "TypeError"),
        ("not a module!", ""),
    ],
)
def test_an_entry_point_that_gives_no_plugin(
    installed: Distributions, caplog: pytest.LogCaptureFixture, value: str, why: str
) -> None:
    """A missing name, a factory that fails or gives nothing, a malformed value: one warning."""
    installed.module(
        "fake_home",
        """
        def fails(): raise RuntimeError("in the factory")
        def nothing(): return None
        none = None
        def needs_more(argument): ...
        """,
    )
    installed.add("home", f"p = {value}")
    (info,) = load(PluginTraceProcessor())
    assert info.state == "failed"
    assert info.error is not None
    assert why in info.error
    assert len(warnings(caplog)) == 1


def test_ctrl_c_while_loading_goes_through(installed: Distributions) -> None:
    """Ctrl-C during a plugin's import stops the program, and loading works the next time."""
    installed.plugin("p", "from tests.interrupts import ctrl_c; ctrl_c()")
    with pytest.raises(KeyboardInterrupt):
        load(PluginTraceProcessor())
    installed.clean()
    installed.module("fake_p", GOOD)
    assert states(load(PluginTraceProcessor())) == {"p": "loaded"}


@pytest.mark.parametrize("value", ["instance", "Factory", "make", "partial"])
def test_what_an_entry_point_may_name(installed: Distributions, value: str) -> None:
    """An instance is the plugin; a class, a function or a partial is called to make it."""
    installed.module(
        "fake_forms",
        """
        import functools
        class Factory:
            def __init__(self, made_by="itself"): self.made_by = made_by
            @hookimpl
            def qitos_span_end(self, span): ...
            def __call__(self): raise AssertionError("a plugin is not called")
        def make(): return Factory("make")
        partial = functools.partial(Factory, "partial")
        instance = Factory("instance")
        """,
    )
    installed.add("forms", f"p = fake_forms:{value}")
    adapter = PluginTraceProcessor()
    load(adapter)
    made_by = getattr(adapter.plugins["p"], "made_by", None)
    assert made_by == ("itself" if value == "Factory" else value)


def test_blocked_plugins_are_not_imported(
    installed: Distributions, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not selected is listed as blocked, and never imported."""
    installed.plugin("good", GOOD)
    installed.plugin("blocked", "raise AssertionError")
    adapter = PluginTraceProcessor()
    monkeypatch.setenv(VARIABLE, "good")
    infos = load(adapter)
    assert states(infos) == {"good": "loaded", "blocked": "blocked"}
    assert infos[1].error == "not selected by QITOS_TRACE_PLUGINS"
    assert "fake_blocked" not in sys.modules
    assert warnings(caplog) == []


@pytest.mark.parametrize("value", ["none", "off", "0", "", " , "])
def test_nothing_is_loaded(
    installed: Distributions, monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    """`none` loads nothing; what there is, is listed all the same."""
    installed.plugin("good", GOOD)
    monkeypatch.setenv("QITOS_TRACE_PLUGINS", value)
    adapter = PluginTraceProcessor()
    assert states(load(adapter)) == {"good": "blocked"}
    assert adapter.plugins == {}
    assert "fake_good" not in sys.modules


def test_order_is_the_variable_s(installed: Distributions, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plugins load in the order of the list; without a list, by name."""
    for name in ("c", "a", "b"):
        installed.plugin(name, GOOD)
    assert [info.name for info in load(PluginTraceProcessor())] == ["a", "b", "c"]
    monkeypatch.setenv("QITOS_TRACE_PLUGINS", "c,a")
    adapter = PluginTraceProcessor()
    load(adapter)
    assert list(adapter.plugins) == ["c", "a"]


def test_unknown_names_are_one_warning(
    installed: Distributions, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that no plugin has is one warning with the names that exist; the others load."""
    installed.plugin("good", GOOD)
    adapter = PluginTraceProcessor()
    monkeypatch.setenv(VARIABLE, "god,good")
    load(adapter)
    assert list(adapter.plugins) == ["good"]
    (warning,) = warnings(caplog)
    assert "named god is" in warning
    assert "installed are: good" in warning


def test_modules_are_no_names(
    installed: Distributions, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variable cannot import a module, only select what is installed as a plugin."""
    installed.module("fake_evil", "raise AssertionError")
    adapter = PluginTraceProcessor()
    monkeypatch.setenv(VARIABLE, "fake_evil,fake_evil:qitos")
    assert load(adapter) == []
    assert "fake_evil" not in sys.modules
    assert "installed are: none" in warnings(caplog)[0]


def test_one_name_in_two_distributions(
    installed: Distributions, caplog: pytest.LogCaptureFixture
) -> None:
    """The first distribution has the name; the other is blocked, with a warning saying how to."""
    installed.plugin("same", GOOD, distribution="b-dist")
    installed.plugin("same", GOOD, distribution="a-dist")
    adapter = PluginTraceProcessor()
    first, second = load(adapter)
    assert (first.distribution, first.state) == ("a-dist", "loaded")
    assert (second.distribution, second.state) == ("b-dist", "blocked")
    (warning,) = warnings(caplog)
    assert "name it b-dist:same" in warning
    assert list(adapter.plugins) == ["same"]


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("b-dist:same", ["fake_b_dist"]),
        ("B_Dist:SAME,a-dist:same", ["fake_b_dist", "fake_a_dist"]),
        ("no:a-dist:same", ["fake_b_dist"]),
    ],
)
def test_choosing_between_two_of_one_name(
    installed: Distributions,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    modules: list[str],
) -> None:
    """With its distribution a plugin is named without doubt; naming both loads both."""
    for distribution in ("a-dist", "b-dist"):
        installed.plugin("same", GOOD, distribution=distribution)
    adapter = PluginTraceProcessor()
    monkeypatch.setenv(VARIABLE, text)
    load(adapter)
    loaded: list[Any] = list(adapter.plugins.values())
    assert [module.__name__ for module in loaded] == modules
    assert warnings(caplog) == []


def test_the_first_of_two_versions_counts(
    installed: Distributions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a distribution found twice on the path, the one that is imported is the one loaded."""
    installed.plugin("p", GOOD, distribution="twice")
    shadowed = Distributions(tmp_path / "later")
    shadowed.directory.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(shadowed.directory)])
    shadowed.add("twice", "p = other\ngone = fake_twice", version="0.5")
    assert [(info.name, info.version) for info in load(PluginTraceProcessor())] == [("p", "1.0")]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("METADATA", None),
        ("METADATA", b""),
        ("METADATA", b"\xff\xfe\x00garbage"),
        ("entry_points.txt", b"\xff\xfe qitos.trace_plugins.for_tests \xff"),
        ("entry_points.txt", b"[qitos.trace_plugins.for_tests]\nno equals sign\n= x\n"),
        ("entry_points.txt", b"[qitos.trace_plugins.for_tests]\n[no = end\n=\n\n[x"),
    ],
)
def test_a_broken_distribution_breaks_nothing(
    installed: Distributions, caplog: pytest.LogCaptureFixture, file: str, content: bytes | None
) -> None:
    """One distribution whose metadata is unreadable is one warning; the others' plugins load."""
    installed.plugin("good", GOOD)
    installed.add("a-broken", "other = nowhere")
    path = installed.directory / "a_broken-1.0.dist-info" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    adapter = PluginTraceProcessor()
    load(adapter)
    assert list(adapter.plugins) == ["good"]
    [warning] = warnings(caplog)
    assert f"entry points in {path.parent} are left out" in warning


def test_loading_again_loads_nothing_twice(installed: Distributions) -> None:
    """A second `load` into the same adapter finds everything loaded, made once, heard once."""
    installed.plugin("good", GOOD)
    installed.module("fake_counting", "made = []\ndef make(): made.append(1); return object()")
    installed.add("counting", "counting = fake_counting:make")
    adapter = PluginTraceProcessor()
    first = load(adapter)
    assert load(adapter) == first
    assert sys.modules["fake_counting"].made == [1]
    adapter.on_span_end(SPAN)
    assert sys.modules["fake_good"].heard == [SPAN]


def test_a_plugin_whose_import_loads_plugins(installed: Distributions) -> None:
    """A plugin's import that leads back to loading ends there; it is loaded once."""
    installed.plugin(
        "looping",
        f"""
        from qitos_mlflow.plugins.adapter import PluginTraceProcessor
        from qitos_mlflow.plugins.loader import load
        inner = load(PluginTraceProcessor())
        {GOOD.strip().replace(chr(10), chr(10) + " " * 8)}
        """,
    )
    adapter = PluginTraceProcessor()
    assert states(load(adapter)) == {"looping": "loaded"}
    assert sys.modules["fake_looping"].inner == []


def test_our_own_plugin_is_installed_under_its_name() -> None:
    """The project's entry point is found in the real group, in a process of its own."""
    if not _installed_here():
        pytest.skip("the project itself is not installed here")
    printed = run_on(
        None,
        """
        from qitos_mlflow.plugins.adapter import PluginTraceProcessor
        from qitos_mlflow.plugins.loader import load
        found = load(PluginTraceProcessor())
        print([(p.name, p.distribution) for p in found if p.distribution == "qitos-mlflow"])
        """,
    )
    assert "[('mlflow', 'qitos-mlflow')]" in printed


def _installed_here() -> bool:
    import importlib_metadata

    try:
        importlib_metadata.distribution("qitos-mlflow")
    except importlib_metadata.PackageNotFoundError:
        return False
    return True


def test_the_group() -> None:
    """The entry-point group and the variable are those promised."""
    assert (loader.GROUP, VARIABLE) == ("qitos.trace_plugins", "QITOS_TRACE_PLUGINS")
