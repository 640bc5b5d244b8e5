"""The ways in: each in a process of its own, with the package installed and QitOS as it is."""

from __future__ import annotations

import json
import os
import sys
import uuid
from pathlib import Path

import pytest
from mlflow import MlflowClient

from tests.hosts import BUILTIN_TRACING
from tests.integration.logged import (
    AGENT,
    ROOT,
    Done,
    LoggedRun,
    found_in,
    only_run,
    run_script,
    runs_of,
)
from tests.integration.made_store import make_store
from tests.integration.server import MlflowServer

RUN = """
result = agent.run("sum", return_state=True, render=False, trace=False)
assert result.state.final_result == "42"
"""
LOG_TO_STDERR = "import logging; logging.basicConfig(level=logging.INFO)"


@pytest.fixture
def client(mlflow_server: MlflowServer) -> MlflowClient:
    """Reads back from the server."""
    return mlflow_server.client


@pytest.fixture
def environ(mlflow_server: MlflowServer) -> dict[str, str | None]:
    """MLflow's own variables, as a user sets them: a server and an experiment."""
    return {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "MLFLOW_EXPERIMENT_NAME": f"activation {uuid.uuid4().hex[:12]}",
    }


def one_run(client: MlflowClient, environ: dict[str, str | None]) -> LoggedRun:
    """The one run that was logged, which is complete."""
    run = only_run(client, str(environ["MLFLOW_EXPERIMENT_NAME"]))
    assert (run.status, run.tags["stop_reason"]) == ("FINISHED", "final")
    assert run.metrics["total_steps"] == 2
    return run


def files_below(directory: Path) -> set[str]:
    """Every file and directory below `directory`."""
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


# -- installed -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [(), ("-W", "error")], ids=["", "warnings are errors"])
def test_installed_with_a_destination(
    client: MlflowClient, environ: dict[str, str | None], options: tuple[str, ...]
) -> None:
    """A plain QitOS script is logged, without a change to it, where MLflow's variables say."""
    done = run_script(AGENT, RUN, options=options, **environ)
    assert one_run(client, environ).metrics["total_tokens"] == 30
    said = [line for line in done.stderr.splitlines() if "traces have no cost" not in line]
    assert said == []  # The oldest servers cause a message about what is left out.


def test_installed_with_a_destination_set_in_code(
    mlflow_server: MlflowServer, client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """`mlflow.set_tracking_uri` in the script is a destination too, and is followed."""
    environ["MLFLOW_TRACKING_URI"] = None
    setting = f"import mlflow; mlflow.set_tracking_uri({mlflow_server.uri!r})"
    run_script(AGENT, setting, RUN, **environ)
    one_run(client, environ)


def test_installed_without_a_destination(tmp_path: Path) -> None:
    """Nothing is created on disk, and one line says how to turn logging on, however many runs."""
    home = tmp_path / "home"
    work = tmp_path / "work"
    work.mkdir()
    home.mkdir()
    os.chdir(work)
    done = run_script(
        LOG_TO_STDERR,
        AGENT,
        RUN,
        "ModelAgent(Model(FINAL)).run('again', render=False, trace=False)",
        "import sys; print('mlflow' in sys.modules)",
        HOME=str(home),
        XDG_STATE_HOME=str(home / "state"),
        QITOS_MLFLOW_SPOOL_DIR=None,
    )
    assert files_below(home) == set()
    assert files_below(work) == {"script.py"}
    lines = [line for line in done.stderr.splitlines() if "qitos_mlflow" in line]
    assert len(lines) == 1
    assert lines[0].startswith("INFO:")
    assert "MLFLOW_TRACKING_URI" in lines[0]
    assert "QITOS_TRACE_PLUGINS=mlflow" in lines[0]
    assert done.stdout.splitlines()[-1] == "False"


# -- the environment variable ----------------------------------------------------------------


def test_asked_for_by_name_it_logs_to_the_local_store(tmp_path: Path) -> None:
    """`QITOS_TRACE_PLUGINS=mlflow` and nothing else: the run is in MLflow's default store."""
    make_store(tmp_path / "mlflow.db")
    run_script(AGENT, RUN, QITOS_TRACE_PLUGINS="MLflow ")
    run = only_run(MlflowClient(f"sqlite:///{tmp_path}/mlflow.db"), "qitos")
    assert (run.name, run.status, run.metrics["total_tokens"]) == ("asker", "FINISHED", 30)


@pytest.mark.parametrize("value", ["none", "", " OFF "])
def test_turned_off_nothing_is_loaded(value: str, environ: dict[str, str | None]) -> None:
    """`none` and an empty value: of the package no more than the start-up line is ever imported."""
    done = run_script(
        AGENT,
        RUN,
        """
        import json, sys
        ours = [name for name in sys.modules if name.startswith(("qitos_mlflow", "pluggy"))]
        finders = [str(finder) for finder in sys.meta_path]
        print(json.dumps([ours, finders, "qitos.tracing" in sys.modules]))
        """,
        QITOS_TRACE_PLUGINS=value,
        **environ,
    )
    ours, finders, tracing = json.loads(done.stdout.splitlines()[-1])
    assert set(ours) <= {"qitos_mlflow", "qitos_mlflow._startup"}
    assert not [finder for finder in finders if "qitos" in finder.lower()]
    assert not tracing


def test_an_unknown_name_is_one_warning(environ: dict[str, str | None]) -> None:
    """A name that no plugin has is warned of once, with the names there are; the agent runs."""
    done = run_script(AGENT, RUN, QITOS_TRACE_PLUGINS="mlfow", **environ)
    assert done.stderr.count("\n") == 1
    assert "mlfow" in done.stderr
    assert "installed are: mlflow" in done.stderr


def test_taken_out_by_name(client: MlflowClient, environ: dict[str, str | None]) -> None:
    """`no:mlflow` logs nothing although there is a destination."""
    run_script(AGENT, RUN, QITOS_TRACE_PLUGINS="no:mlflow", **environ)
    assert runs_of(client, str(environ["MLFLOW_EXPERIMENT_NAME"])) == []


# -- by hand ---------------------------------------------------------------------------------

AUTOLOG = "import qitos_mlflow; qitos_mlflow.autolog()"


@pytest.mark.parametrize(
    "parts", [[AUTOLOG, AGENT], [AGENT, AUTOLOG]], ids=["before-qitos", "after-qitos"]
)
def test_autolog(parts: list[str], client: MlflowClient, environ: dict[str, str | None]) -> None:
    """One line before or after `import qitos`, also where no plugin is to be loaded by itself."""
    run_script(*parts, RUN, QITOS_TRACE_PLUGINS="none", **environ)
    one_run(client, environ)


def test_autolog_again_otherwise_and_off(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """Twice is once; other settings replace the first; `disable` ends it, but no run half-way."""
    name = str(environ["MLFLOW_EXPERIMENT_NAME"])
    run_script(
        AUTOLOG,
        AGENT,
        f"""
        from qitos.tracing import create_trace

        def run(task):
            ModelAgent(Model(ADD, FINAL)).run(task, render=False, trace=False)

        qitos_mlflow.autolog()
        run("one")
        qitos_mlflow.autolog(experiment_name={name + " other"!r}, tags={{"number": 2}})
        run("two")
        with create_trace("three"):
            qitos_mlflow.autolog(disable=True)
            qitos_mlflow.autolog(disable=True)
        run("four")
        """,
        **environ,
    )
    assert only_run(client, name).params["task"] == "one"
    second, third = runs_of(client, f"{name} other")
    assert (second.params["task"], second.tags["number"]) == ("two", "2")
    assert (third.name, third.status) == ("three", "FINISHED")


@pytest.mark.parametrize("order", ["before", "after"])
def test_where_start_up_files_do_not_run(
    order: str, client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """`import qitos_mlflow.auto` does the same for an isolated Python without site-packages."""
    path = [str(Path(entry).resolve()) for entry in [str(ROOT), *sys.path]]
    paths = f"import sys; sys.path[:0] = {path!r}; assert 'qitos_mlflow' not in sys.modules"
    parts = ["import qitos_mlflow.auto", AGENT]
    if order == "after":
        parts.reverse()
    run_script(paths, *parts, RUN, options=["-I", "-S"], **environ)
    one_run(client, environ)


BY_HAND = """
from qitos.tracing import add_trace_processor
from qitos_mlflow import MlflowTraceProcessor
add_trace_processor(MlflowTraceProcessor(tags={"way": "by hand"}))
"""
TAGGED_AUTOLOG = "import qitos_mlflow; qitos_mlflow.autolog(tags={'way': 'autolog'})"


@pytest.mark.parametrize(
    ("parts", "plugins", "way"),
    [
        ([TAGGED_AUTOLOG, AGENT], None, "autolog"),
        ([AGENT, TAGGED_AUTOLOG], "mlflow", "autolog"),
        ([AGENT, BY_HAND], None, "by hand"),
        ([AGENT, BY_HAND], "all", "by hand"),
        ([TAGGED_AUTOLOG, AGENT, BY_HAND], "none", "by hand"),
        ([AGENT, BY_HAND, TAGGED_AUTOLOG], "mlflow", "by hand"),
    ],
)
def test_whatever_is_combined_there_is_one_run(
    parts: list[str],
    plugins: str | None,
    way: str,
    client: MlflowClient,
    environ: dict[str, str | None],
) -> None:
    """A processor by hand goes before autolog, and autolog before the installed plugin."""
    run_script(*parts, RUN, QITOS_TRACE_PLUGINS=plugins, **environ)
    assert one_run(client, environ).tags["way"] == way


# -- a host with tracing of its own ----------------------------------------------------------


def standin(content: str) -> str:
    """A script's part: an agent of the stand-in, with `content` in all that it gives and gets."""
    return f"""
    import qitos.tracing
    from qitos.core import Action, Decision, Tools
    from qitos.engine.engine import Agent, Engine

    content = {content!r}

    def look_up(name):
        return f"the secret of {{name}}"

    agent = Agent(
        "standing in",
        Tools(look_up=look_up),
        Decision("act", [Action("look_up", {{"name": content}})], rationale=content),
        Decision("final", final_answer=f"the answer of {{content}}"),
    )
    """


ON_STANDIN = {"PYTHONPATH": os.pathsep.join([str(BUILTIN_TRACING), str(ROOT)])}


def run_on_standin(*parts: str, content: str = "the sphinx", **environ: str | None) -> Done:
    """Run the stand-in's agent after these parts of a script."""
    parts = (standin(content), *parts, "Engine(agent).run(content)")
    return run_script(*parts, **ON_STANDIN, **environ)


def test_a_host_with_tracing_gets_our_spans_through_its_provider(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """The host's own processors hear what ours hears, and the plugin is one of the provider's."""
    done = run_on_standin(
        """
        class Listener(qitos.tracing.TraceProcessor):
            def on_trace_start(self, trace): print(type(trace).__module__, trace.name)
            def on_trace_end(self, trace): pass
            def on_span_start(self, span): print(span.data.type)
            def on_span_end(self, span): pass
        qitos.tracing.add_trace_processor(Listener())
        """,
        **environ,
    )
    heard = done.stdout.splitlines()
    assert heard[0] == "qitos.tracing.models standing in"
    assert [kind for kind in heard[1:] if kind in ("agent", "step", "tool")] == [
        *("agent", "step", "tool", "step")
    ]
    run = one_run(client, environ)
    assert (run.name, run.tags["tool/name"]) == ("standing in", "look_up")


CELLS = """
import qitos_mlflow, qitos.tracing
from qitos.tracing.mlflow_processor import MlflowTraceProcessor

class Other(qitos.tracing.TraceProcessor):
    def __init__(self):
        self.heard = []
    def on_trace_start(self, trace): self.heard.append("start")
    def on_trace_end(self, trace): self.heard.append("end")
    def on_span_start(self, span): pass
    def on_span_end(self, span): pass

first, last = Other(), Other()
qitos.tracing.add_trace_processor(first)
for cell in range(4):
    processor = qitos_mlflow.MlflowTraceProcessor(tags={"way": "the cell"})
    qitos.tracing.add_trace_processor(processor)
qitos.tracing.add_trace_processor(last)
"""

CELLS_DONE = """
assert processor.force_flush() is True
assert first.heard == last.heard == ["start", "end"]
others = [one for one in qitos_mlflow.tracing.processors() if isinstance(one, Other)]
assert others == [first, last]
"""


def test_a_cell_that_runs_four_times(client: MlflowClient, environ: dict[str, str | None]) -> None:
    """Equal processors log each run once, with one line; the last one's flush is the run's."""
    done = run_script(AGENT, CELLS, RUN, CELLS_DONE, **environ)
    assert done.stderr.count("replaces the earlier one") == 1
    assert one_run(client, environ).tags["way"] == "the cell"


def test_a_cell_that_runs_four_times_on_a_host_with_tracing(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """The same where `add_trace_processor` is the host's own."""
    cells = CELLS.replace("from qitos.tracing.mlflow_processor import MlflowTraceProcessor\n", "")
    done = run_script(
        standin("the sphinx"),
        cells,
        "Engine(agent).run(content)",
        CELLS_DONE,
        **ON_STANDIN,
        **environ,
    )
    assert done.stderr.count("replaces the earlier one") == 1
    assert one_run(client, environ).tags["way"] == "the cell"


def test_how_traces_end_on_a_host_that_does_not_say(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """What leaves a trace is known without the host's help; what was being handled is not it."""
    run_on_standin(
        """
        import contextlib

        def trace(name, error=None):
            with contextlib.suppress(ValueError, KeyboardInterrupt):
                with qitos.tracing.create_trace(name):
                    if error is not None:
                        raise error

        trace("failed", ValueError("bad"))
        trace("interrupted", KeyboardInterrupt())
        try:
            raise ConnectionError("first try")
        except ConnectionError:
            trace("second try")
            trace("failed again", ValueError("worse"))
            Engine(agent).run("third try")
        """,
        **environ,
    )
    runs = runs_of(client, str(environ["MLFLOW_EXPERIMENT_NAME"]))
    assert sorted((run.name, run.status) for run in runs) == [
        ("failed", "FAILED"),
        ("failed again", "FAILED"),
        ("interrupted", "KILLED"),
        ("second try", "FINISHED"),
        ("standing in", "FINISHED"),
        ("standing in", "FINISHED"),
    ]


def test_a_hand_off_is_part_of_its_run(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """An agent that hands off to another is one run, although the host traces hand-offs alone."""
    run_script(
        standin("the sphinx"),
        """
        handing = Agent("first", Tools(), Decision("handoff", meta={"handoff_target": "second"}))
        Engine(handing, agents={"second": agent}).run(content)
        """,
        **ON_STANDIN,
        **environ,
    )
    run = only_run(client, str(environ["MLFLOW_EXPERIMENT_NAME"]))
    assert (run.name, run.status, run.metrics["total_steps"]) == ("first", "FINISHED", 2)


def test_autolog_before_a_host_with_tracing_is_imported(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """Autolog finds the host's tracing, and registers there, before the host is imported."""
    parts = (TAGGED_AUTOLOG, standin("the sphinx"), "Engine(agent).run(content)")
    run_script(*parts, **ON_STANDIN, **environ)
    assert one_run(client, environ).tags["way"] == "autolog"


def test_its_disabled_mode_logs_nothing(
    client: MlflowClient, environ: dict[str, str | None], tmp_path: Path
) -> None:
    """With the host's tracing disabled there is no run, and nothing in the spool."""
    run_on_standin("qitos.tracing.set_tracing_disabled(True)", **environ)
    assert runs_of(client, str(environ["MLFLOW_EXPERIMENT_NAME"])) == []
    assert not (tmp_path / "spool").exists()


def test_its_mode_without_data_logs_numbers_only(
    mlflow_server: MlflowServer,
    client: MlflowClient,
    environ: dict[str, str | None],
    tmp_path: Path,
) -> None:
    """Without data the metrics and the tree arrive; the content is in no file, here or there."""
    mode = "qitos.tracing.set_tracing_mode(qitos.tracing.TracingMode.ENABLED_WITHOUT_DATA)"
    content = f"sphinx-{uuid.uuid4().hex}"
    run_on_standin(mode, content=content, **environ)
    run_on_standin(mode, content=content, QITOS_MLFLOW_OFFLINE="1", **environ)
    run = one_run(client, environ)
    assert run.points("step/number") == [(0, 0), (1, 1)]
    assert run.metrics["total_tool_calls"] == 1
    assert found_in([tmp_path / "spool", mlflow_server.directory], run.id)
    assert not found_in([tmp_path / "spool", mlflow_server.directory], content)


def test_it_stands_down_for_the_hosts_own_processor(
    client: MlflowClient, environ: dict[str, str | None]
) -> None:
    """Where the host's own MLflow processor is at work ours logs nothing, and says so once."""
    done = run_on_standin(
        """
        from qitos.tracing.mlflow_processor import MlflowTraceProcessor
        theirs = MlflowTraceProcessor()
        qitos.tracing.add_trace_processor(theirs)
        Engine(agent).run('first')
        assert theirs.notified > 0
        """,
        **environ,
    )
    assert runs_of(client, str(environ["MLFLOW_EXPERIMENT_NAME"])) == []
    assert done.stderr.count("logs nothing") == 1
    assert "qitos.tracing.mlflow_processor.MlflowTraceProcessor" in done.stderr


# -- plugins of others -----------------------------------------------------------------------

BROKEN = {
    "at-import": "raise RuntimeError('broken at import')",
    "exits": "raise SystemExit(3)",
    "at-registration": "@hookimpl\ndef qitos_span_end(span, more): pass",
    "in-every-hook": "".join(
        f"@hookimpl\ndef qitos_{name}: raise ValueError('broken in {name}')\n"
        for name in (
            "wants_trace()",
            "trace_start(trace)",
            "span_start(span)",
            "span_end(span)",
            "trace_end(trace)",
            "force_flush(timeout_s)",
            "shutdown()",
        )
    ),
    "sleeps": "import time\n@hookimpl\ndef qitos_span_end(span): time.sleep(0.02)",
}


def install_broken_plugins(directory: Path) -> None:
    """Put distributions with plugins that fail in every way into `directory`."""
    for name, body in BROKEN.items():
        module = name.replace("-", "_")
        source = f"import pluggy\nhookimpl = pluggy.HookimplMarker('qitos')\n{body}\n"
        (directory / f"{module}.py").write_text(source)
        info = directory / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[qitos.trace_plugins]\n{name} = {module}\n")


def test_plugins_that_fail_harm_nobody(
    client: MlflowClient, environ: dict[str, str | None], tmp_path: Path
) -> None:
    """Raising at import, at registration or in every hook, or sleeping: agent and run go on."""
    site = tmp_path / "site"
    site.mkdir()
    install_broken_plugins(site)
    path = os.pathsep.join([str(site), str(ROOT)])
    done = run_script(AGENT, RUN, PYTHONPATH=path, **environ)
    run = one_run(client, environ)
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"] == "11"
    for name, error in (("at-import", "broken at import"), ("exits", "SystemExit")):
        (line,) = [line for line in done.stderr.splitlines() if f"plugin {name} of" in line]
        assert error in line
    assert done.stderr.count("was not loaded") == 3
    # Named with the hook, once each in spite of eleven spans.
    for hook in ("trace_start", "span_start", "span_end", "trace_end"):
        assert done.stderr.count(f"trace plugin in-every-hook, hook qitos_{hook} failed") == 1
    assert "trace plugin sleeps" not in done.stderr
