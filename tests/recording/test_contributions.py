"""What other plugins add to a record: checked, redacted, kept with it, mapped to run and trace."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import pluggy
import pytest

from qitos_mlflow import tracing
from qitos_mlflow.mlflow_plugin.mapping.trace_facts import MAX_TAGS, added
from qitos_mlflow.mlflow_plugin.sink.trace_state import Waiting
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.recording.normalize import KINDS, normalize
from qitos_mlflow.recording.record import RECORD_VERSION
from tests.mlflow_plugin.folding import info_of, new_state
from tests.mlflow_plugin.mapping.test_span_tree import plain
from tests.mlflow_plugin.records import START_NS, Records

hookimpl = pluggy.HookimplMarker("qitos")

Said = Callable[[dict[str, Any]], Any]


class Says:
    """A plugin that returns this for every record."""

    def __init__(self, say: Said) -> None:
        self._say = say

    @hookimpl
    def qitos_record(self, record: dict[str, Any]) -> Any:
        return self._say(record)


@pytest.fixture
def attach() -> Iterator[Callable[..., None]]:
    """Attach plugins that return what the given functions return."""
    attached: list[PluginTraceProcessor] = []

    def attach_plugins(*says: Said) -> None:
        plugins = {f"says-{number}": Says(say) for number, say in enumerate(says)}
        attached.append(PluginTraceProcessor(plugins))
        tracing.add_trace_processor(attached[-1])

    yield attach_plugins
    for processor in attached:
        tracing.remove_trace_processor(processor)


def kept(record: dict[str, Any], field_bytes: int = 1_000_000) -> dict[str, Any]:
    """The record as it goes to disk."""
    data = normalize(orjson.dumps(record), field_bytes)
    assert data is not None
    record = orjson.loads(data)
    assert isinstance(record, dict)
    return record


def test_what_plugins_return_is_kept_with_the_record(attach: Callable[..., None]) -> None:
    """The parts of all plugins are merged; of the same name the later value stays."""
    attach(
        lambda record: {"tags": {"team": "blue", "site": "a"}},
        lambda record: None,
        lambda record: {"tags": {"site": "b"}, "metrics": {"n": len(record["data"])}},
    )
    attach(lambda record: {"attributes": {"seen": [1, {"deep": {2, 3}}]}})
    assert kept(Records().span("tool", tool_name="grep"))["added"] == {
        "tags": {"team": "blue", "site": "b"},
        "metrics": {"n": 1},
        "attributes": {"seen": [1, {"deep": [2, 3]}]},
    }


def test_the_record_is_seen_with_its_version(attach: Callable[..., None]) -> None:
    """A plugin can tell which form the record has."""
    seen: list[Any] = []
    attach(lambda record: seen.append(record["version"]))
    for kind in KINDS:
        kept({"kind": kind, "trace_id": "t"})
    assert seen == [RECORD_VERSION] * len(KINDS)


def test_the_record_is_seen_without_credentials(attach: Callable[..., None]) -> None:
    """What a plugin sees is redacted, and so is what it returns."""
    seen: list[Any] = []

    def say(record: dict[str, Any]) -> Any:
        seen.append(record["data"]["tool_args"])
        return {"attributes": {"header": "Authorization: Bearer abcdefghijklmnop", "api_key": "k"}}

    attach(say)
    record = kept(Records().span("tool", tool_name="get", tool_args={"password": "hunter22"}))
    assert seen == [{"password": "[redacted]"}]
    assert "abcdefghijklmnop" not in str(record)
    assert record["added"]["attributes"]["api_key"] == "[redacted]"


def test_what_a_plugin_returns_has_the_limit_of_a_field(attach: Callable[..., None]) -> None:
    """A plugin cannot make a record larger than a setting allows."""
    attach(lambda record: {"attributes": {"page": "x" * 50_000}})
    record = kept(Records().span("tool", tool_name="get"), field_bytes=2_000)
    assert len(str(record["added"])) < 2_000
    assert "50000 characters in all" in record["added"]["attributes"]["page"]


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("a text", "not a dict of dicts"),
        ({"tags": ["a"]}, "not a dict of dicts"),
        ({"params": {"a": 1}}, "params"),
        ({"tags": {"mlflow.user": "me"}}, "mlflow.user"),
        ({"attributes": {"qitos.step": 1}}, "qitos.step"),
        ({"metrics": {7: 1}}, "7"),
    ],
)
def test_what_is_returned_wrongly_is_reported(
    said: Any, complaint: str, attach: Callable[..., None], swallowed: list[Any]
) -> None:
    """A wrong return value is left out and logged with its plugin's name; others' parts stay."""
    attach(lambda record: said, lambda record: {"tags": {"team": "blue"}})
    assert kept(Records().span("tool", tool_name="get"))["added"] == {"tags": {"team": "blue"}}
    ((where, error),) = swallowed
    assert where == "trace plugin says-0, hook qitos_record"
    assert complaint in str(error)
    swallowed.clear()


def test_a_plugin_that_raises_costs_its_addition_only(
    attach: Callable[..., None], swallowed: list[Any]
) -> None:
    """The record is kept, with what the others returned."""

    def fail(record: dict[str, Any]) -> Any:
        raise RuntimeError("mine")

    attach(fail, lambda record: {"tags": {"team": "blue"}})
    assert kept(Records().start())["added"] == {"tags": {"team": "blue"}}
    assert [where for where, _ in swallowed] == ["trace plugin says-0, hook qitos_record"]
    swallowed.clear()


def test_only_events_are_asked_about(attach: Callable[..., None]) -> None:
    """Plugins are not asked about files and the start of a root."""
    attach(lambda record: {"tags": {"kind": record["kind"]}})
    make = Records()
    assert kept(make.start())["added"]["tags"] == {"kind": "trace_start"}
    assert kept(make.end())["added"]["tags"] == {"kind": "trace_end"}
    for kind in ("span_start", "artifact"):
        assert "added" not in kept({"kind": kind, "trace_id": "t", "content": "x"})


def test_additions_are_logged_with_run_and_trace() -> None:
    """Metrics at the record's step and time, tags on both, attributes on the span."""
    make = Records()
    added = {
        "attributes": {"depth": 2},
        "metrics": {"chars": 7, "ok": True, "bad": "NaN"},
        "tags": {"team": "blue", "none": None},
    }
    records = [
        make.start(added={"tags": {"commit": "abc"}}),
        {**make.span("tool", tool_name="get", step=3), "added": added},
        make.end(added={"metrics": {"total": 9}}),
    ]
    state, runs = new_state(), []
    for record in records:
        state.take(record, b"")
        runs.append(state.waiting)
        state.waiting = Waiting()
    spans = [span for run in runs for span in run.spans]
    (chars,) = [metric for metric in runs[1].metrics if metric.key == "chars"]
    assert (chars.value, chars.step, chars.timestamp_ms) == (7, 3, START_NS // 10**6 + 5)
    assert {m.key: m.value for m in runs[1].metrics}["ok"] == 1.0
    assert "bad" not in {m.key for m in runs[1].metrics}
    assert {m.key: (m.value, m.step) for m in runs[2].metrics}["total"] == (9, 3)
    assert ("team", "blue") in runs[1].tags
    assert ("commit", "abc") in runs[0].tags
    assert ("qitos.values.dropped", "bad_value=1") in runs[2].tags
    tags = info_of(state)["tags"]
    assert (tags["team"], tags["commit"]) == ("blue", "abc")
    assert "none" not in tags
    (tool,) = [span for span in spans if span.name == "get"]
    assert plain(tool)["depth"] == 2


def test_tags_of_a_trace_are_bounded() -> None:
    """A plugin with a new tag for every span does not make the trace's state grow without end."""
    make, state = Records(), new_state()
    state.take(make.start(), b"")
    for number in range(MAX_TAGS + 50):
        span = make.span("tool", tool_name="get")
        state.take({**span, "added": {"tags": {f"n{number}": "1"}}}, b"")
    assert len(state.facts.trace_tags) == MAX_TAGS


def test_names_are_cleaned() -> None:
    """Characters that MLflow does not allow in names are replaced."""
    record = {"added": {"metrics": {"a//b": 1}, "tags": {"#": "x"}, "attributes": {"": 1}}}
    ((name, _),) = added(record, "metrics").items()
    assert name.startswith("a/b-")
    ((tag, _),) = added(record, "tags").items()
    assert tag != "#"
    assert added(record, "attributes") == {"unnamed": 1}


PAGE = Path(__file__).parents[2] / "docs" / "extending.md"


def test_the_example_of_the_page_works(attach: Callable[..., None]) -> None:
    """The worked example in docs/extending.md, as it stands there, adds what it says."""
    source = re.search(r"```python\n(# tool_sizes\.py\n.*?)```", PAGE.read_text(), re.DOTALL)
    assert source is not None
    namespace: dict[str, Any] = {}
    exec(compile(source[1], "tool_sizes.py", "exec"), namespace)
    attach(namespace["ToolSizes"]().qitos_record)
    make = Records()
    assert kept(make.start())["added"]["tags"]["machine"]
    added = kept(make.span("tool", tool_name="get", output_content="1234"))["added"]
    assert added == {"metrics": {"tool/result_chars": 4}, "attributes": {"result_chars": 4}}
    assert "added" not in kept(make.span("step", step_number=1))
