"""A plugin's author cannot end the agent, stop another plugin or stop delivery. Real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import orjson
import pytest

from qitos_mlflow.delivery import find_segments, waiting_records
from tests.integration.logged import AGENT, ROOT, LoggedRun, only_run, run_script
from tests.integration.server import MlflowServer
from tests.integration.test_activation import RUN
from tests.waiting import eventually

HOOKS = (
    *("wants_trace()", "trace_start(trace)", "span_start(span)", "span_end(span)"),
    *("trace_end(trace)", "record(record)", "force_flush(timeout_s)", "shutdown()"),
)
RAISES = {
    "raise SystemExit": "SystemExit",
    "sys.exit(3)": "SystemExit",
    "raise asyncio.CancelledError": "CancelledError",
    "raise GeneratorExit": "GeneratorExit",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise Unheard": "Unheard",
}
HOSTILE = """
import asyncio, sys
import pluggy

hookimpl = pluggy.HookimplMarker("qitos")

class Unheard(BaseException):
    __class__ = __traceback__ = property(lambda self: sys.exit())

    def __str__(self):
        raise SystemExit

"""
HEARS = """
import pluggy

hookimpl = pluggy.HookimplMarker("qitos")

@hookimpl
def qitos_span_end(span): print("heard", span.data.type, flush=True)
"""


def install(site: Path, name: str, source: str, *lines: str) -> str:
    """A distribution with one plugin, for `PYTHONPATH`; `lines` follow in its entry points."""
    info = site / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    entries = [f"[qitos.trace_plugins]\n{name} = {name}", *lines]
    (info / "entry_points.txt").write_text("\n".join(entries))
    return os.pathsep.join([str(site), str(ROOT)])


@pytest.fixture
def environ(mlflow_server: MlflowServer) -> dict[str, str | None]:
    """As a user sets them: a server and an experiment."""
    return {
        "MLFLOW_TRACKING_URI": mlflow_server.uri,
        "MLFLOW_EXPERIMENT_NAME": f"foreign code {uuid.uuid4().hex[:12]}",
    }


def complete_run(server: MlflowServer, environ: dict[str, str | None]) -> LoggedRun:
    """The one run of the experiment, which has everything."""
    run = only_run(server.client, str(environ["MLFLOW_EXPERIMENT_NAME"]))
    assert (run.status, run.tags["stop_reason"]) == ("FINISHED", "final")
    assert run.tags["qitos.spans.recorded"] == run.tags["qitos.spans.delivered"] == "11"
    return run


OFFLINE = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "QITOS_MLFLOW_OFFLINE": "1"}


def recorded(spool: Path, kind: str) -> list[dict[str, object]]:
    """The records of this kind in a spool."""
    found = (waiting_records(paths) for paths in find_segments(spool))
    every = [orjson.loads(record) for records in found for record in records]
    return [record for record in every if record["kind"] == kind]


@pytest.mark.parametrize("statement", RAISES)
def test_whatever_a_plugin_raises_stays_with_it(tmp_path: Path, statement: str) -> None:
    """In each hook: the agent goes on, another plugin hears all, everything is recorded."""
    hooks = "".join(f"@hookimpl\ndef qitos_{hook}: {statement}\n" for hook in HOOKS)
    install(tmp_path / "site", "a_hostile", HOSTILE + hooks)
    path = install(tmp_path / "site", "hears", HEARS)
    done = run_script(AGENT, RUN, PYTHONPATH=path, **OFFLINE)
    assert done.stdout.count("heard") == len(recorded(tmp_path / "spool", "span")) == 11
    assert [end["status"] for end in recorded(tmp_path / "spool", "trace_end")] == ["FINISHED"]
    for hook in ("trace_start", "span_start", "span_end", "trace_end", "record"):
        said = f"trace plugin a_hostile, hook qitos_{hook} failed: {RAISES[statement]}"
        assert done.stderr.count(said) == 1


BROKEN_FILES = {
    "no value": b"[console_scripts]\nno value\n",
    "no value beside ours": b"[qitos.trace_plugins]\nno value\n",
    "not UTF-8": b"[console_scripts]\na = b:\xff\n",
}


@pytest.mark.parametrize("broken", BROKEN_FILES)
def test_malformed_entry_points_of_a_package_stop_nothing(
    mlflow_server: MlflowServer, environ: dict[str, str | None], tmp_path: Path, broken: str
) -> None:
    """The other plugins load and everything is delivered; one line names what is left out."""
    path = install(tmp_path / "site", "broken", "")
    info = tmp_path / "site" / "broken-1.0.dist-info"
    (info / "entry_points.txt").write_bytes(BROKEN_FILES[broken])
    path = install(tmp_path / "more", "hears", HEARS) + os.pathsep + path
    done = run_script(AGENT, RUN, PYTHONPATH=path, **environ)
    complete_run(mlflow_server, environ)
    assert done.stdout.count("heard") == 11
    # Nothing of a package without plugins is left out.
    assert done.stderr.count(f"entry points in {info} are left out") == (broken != "no value")


LATE = """
import threading

def late():
    threading.main_thread().join()
    exec(compile(AGENT, "agent", "exec"), globals())
    exec(compile(RUN, "run", "exec"), globals())
    print("over", flush=True)

threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("before", ["", "import qitos", AGENT])
def test_an_agent_that_a_thread_starts_after_main_has_ended_is_logged(
    mlflow_server: MlflowServer, environ: dict[str, str | None], before: str
) -> None:
    """Completely, whether or not the program has imported QitOS before."""
    done = run_script(f"AGENT, RUN = {AGENT!r}, {RUN!r}", before, LATE, **environ)
    complete_run(mlflow_server, environ)
    assert done.stdout.splitlines()[-1] == "over"
    assert "failed" not in done.stderr


INTERRUPTED = """
import signal, time

SLOW = '''
import pluggy
hookimpl = pluggy.HookimplMarker("qitos")
@hookimpl
def qitos_span_end(span):
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    while True: pass
'''
class Slow: exec(SLOW.replace("span_end(span)", "span_end(self, span)"), globals(), locals())

from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.tracing import add_trace_processor
add_trace_processor(PluginTraceProcessor({"slow": Slow()}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="has no alarms")
@pytest.mark.parametrize(
    ("handler", "ends"),
    [
        ("signal.default_int_handler", "KeyboardInterrupt"),
        ("lambda *_: sys.exit(3)", "SystemExit"),
        ("lambda number, frame: (_ for _ in ()).throw(TimeoutError())", "TimeoutError"),
    ],
)
def test_a_signal_that_arrives_in_a_plugin_reaches_the_program(
    tmp_path: Path, handler: str, ends: str
) -> None:
    """Ctrl-C, an exit that a handler asks for, and a time limit end the agent's run as ever."""
    run_script(
        INTERRUPTED,
        AGENT,
        f"""
        import sys
        signal.signal(signal.SIGALRM, {handler})
        try:
            agent.run("sum", render=False, trace=False)
        except BaseException as error:
            assert type(error).__name__ == {ends!r}, error
        else:
            raise AssertionError("the run went on")
        """,
        **OFFLINE,
    )
    [end] = recorded(tmp_path / "spool", "trace_end")
    assert end["status"] == ("FAILED" if ends == "TimeoutError" else "KILLED")


# -- SIGTERM without a handler ------------------------------------------------------------------

STAYS = """
import time
print("over", flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGTERM")
def test_sigterm_without_a_handler_keeps_what_is_written(
    mlflow_server: MlflowServer, environ: dict[str, str | None], tmp_path: Path
) -> None:
    """A run whose end is in the spool is FINISHED when it is delivered, one that goes on KILLED."""
    stay = f"def stay() -> int:\n    exec({STAYS!r})\n    return 0\n"
    goes_on = "from tests.bridge.agents import ScriptAgent, act\n"
    goes_on += (
        "ScriptAgent(act('stay'), tools=toolbox(stay=stay)).run('x', render=False, trace=False)"
    )
    ends(tmp_path, environ, "trace_end", AGENT, RUN, STAYS)
    assert complete_run(mlflow_server, environ)
    environ["MLFLOW_EXPERIMENT_NAME"] = f"{environ['MLFLOW_EXPERIMENT_NAME']} too"
    ends(tmp_path, environ, "span", AGENT, stay, goes_on)
    assert only_run(mlflow_server.client, environ["MLFLOW_EXPERIMENT_NAME"]).status == "KILLED"


def ends(tmp_path: Path, environ: dict[str, str | None], last: str, *parts: str) -> None:
    """SIGTERM ends a script that is over; then `sync` delivers it.

    Args:
        tmp_path: for the script and its spool.
        environ: of the script.
        last: the kind of a record that is in the spool by then.
        parts: of the script.
    """
    script, spool = tmp_path / "script.py", tmp_path / last
    script.write_text("\n".join(parts))
    own = {"PYTHONPATH": str(ROOT), "QITOS_MLFLOW_SPOOL_DIR": str(spool)}
    variables: dict[str, str] = {**os.environ, **environ, **own, "QITOS_MLFLOW_OFFLINE": "1"}  # type: ignore[dict-item]
    del variables["QITOS_TRACE_PLUGINS"]
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "over\n"
        eventually(lambda: recorded(spool, last))
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    sync = [sys.executable, "-m", "qitos_mlflow.cli", "sync", str(spool)]
    subprocess.run(sync, check=True, env=variables, capture_output=True)
