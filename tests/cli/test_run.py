"""`qitos-mlflow run`: the program that it starts sees no difference to python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import qitos_mlflow
from qitos_mlflow.cli.run import STARTUP_DIRECTORY, selection
from tests.cli.conftest import Run, runs_in
from tests.integration.made_store import make_store

ROOT = Path(qitos_mlflow.__file__).parents[1]

PROGRAM = """\
import os, sys, threading
here = sys.modules["__main__"]
print(__name__, __file__, sys.argv, sys.path[0], here.__dict__ is globals())
print(__package__, getattr(__spec__, "name", None), type(__builtins__).__name__, __doc__)
import beside
def late():
    threading.main_thread().join()
    print("thread", __name__, "done")
threading.Thread(target=late).start()
import atexit; atexit.register(lambda: print("at exit", beside.__name__))
def end(how):
    if how == "raise": raise KeyError("x")
    if how == "chain":
        try: raise KeyError("x")
        except KeyError as error: raise OSError("pipe") from error
    if how == "eof": raise EOFError
    if how == "exit": sys.exit(3)
    if how == "exit-text": sys.exit("goodbye")
    if how == "interrupt": raise KeyboardInterrupt
    if how == "kill": os._exit(9)
    if how == "click":
        import click
        raise click.UsageError("not yours")
    if how == "hook":
        sys.excepthook = lambda *about: print("hook", about[0].__name__, about[2].tb_lineno)
        raise ValueError
end(sys.argv[1])
"""

ENDS = [
    "normal",
    "raise",
    "chain",
    "eof",
    "exit",
    "exit-text",
    "kill",
    "click",
    "hook",
]


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """The same program as a script, a module, a package, a directory, and one that is broken."""
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "program.py").write_text(PROGRAM)
    for package in ("package", "directory"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__main__.py").write_text(PROGRAM)
        (tmp_path / package / "beside.py").write_text("")
    (tmp_path / "-dash.py").write_text(PROGRAM)
    (tmp_path / "broken.py").write_text("x = = 1\n")
    (tmp_path / "empty").mkdir()
    return tmp_path


@pytest.mark.parametrize("end", ENDS)
def test_a_script_sees_no_difference(programs: Path, python: Run, cli: Run, end: str) -> None:
    """Output, traceback and exit code of a script are python's own, however it ends."""
    wanted = python("program.py", end, "--flag", "--", "-h")
    got = cli("run", "program.py", end, "--flag", "--", "-h")
    assert (got.stdout, got.stderr, got.returncode) == (
        wanted.stdout,
        wanted.stderr,
        wanted.returncode,
    )


@pytest.mark.parametrize(
    "args",
    [
        ("-m", "program", "exit", "-m", "--tracking-uri"),
        ("-m", "package", "normal"),
        ("-m", "package.__main__", "normal"),
        ("directory", "exit"),
        ("./program.py", "normal"),
        ("--", "-dash.py", "exit"),
        ("broken.py",),
        ("empty",),
        ("-m", "program.py"),
        ("-m", "no_such.module"),
        ("-m", "email"),
    ],
    ids=" ".join,
)
def test_modules_and_directories_too(
    programs: Path, python: Run, cli: Run, args: tuple[str, ...]
) -> None:
    """`-m module`, packages, directories and what cannot be started act as under python."""
    wanted = python(*(arg.replace("-dash", "./-dash") for arg in args if arg != "--"))
    got = cli("run", *args)
    assert (got.stdout, got.stderr, got.returncode) == (
        wanted.stdout,
        wanted.stderr,
        wanted.returncode,
    )


def test_an_interrupt_ends_the_process_as_python_does(
    programs: Path, python: Run, cli: Run
) -> None:
    """KeyboardInterrupt leaves with python's own exit status, not with click's."""
    wanted, got = python("program.py", "interrupt"), cli("run", "program.py", "interrupt")
    assert (got.stdout, got.returncode) == (wanted.stdout, wanted.returncode)
    assert got.stderr.endswith("KeyboardInterrupt\n")


def test_objects_of_main_can_be_pickled_into_spawned_processes(tmp_path: Path, cli: Run) -> None:
    """The script is the real `__main__`: multiprocessing's spawn finds its functions."""
    (tmp_path / "spawns.py").write_text(
        "import multiprocessing\n"
        "def double(x): return 2 * x\n"
        "if __name__ == '__main__':\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(double, [21]))\n"
    )
    got = cli("run", "spawns.py")
    assert (got.stdout, got.returncode) == ("[42]\n", 0), got.stderr


def test_settings_reach_the_script_and_what_it_starts(tmp_path: Path, cli: Run) -> None:
    """The options arrive as the environment variables that the script's children inherit."""
    (tmp_path / "show.py").write_text(
        "import json, os, subprocess, sys\n"
        "if sys.argv[1:]: subprocess.run([sys.executable, __file__], check=True)\n"
        "else: print(json.dumps({k: v for k, v in os.environ.items() if 'MLFLOW' in k"
        " or k == 'QITOS_TRACE_PLUGINS'}))\n"
    )
    options = ("--tracking-uri", "sqlite:///x.db", "--experiment-name", "e", "--run-name", "r")
    got = cli("run", *options, "--tag", "env=dev", "--tag", "a=b=c", "--", "show.py", "child")
    seen = json.loads(got.stdout)
    assert seen["MLFLOW_TRACKING_URI"] == "sqlite:///x.db"
    assert seen["QITOS_MLFLOW_EXPERIMENT_NAME"] == "e"
    assert seen["QITOS_MLFLOW_RUN_NAME"] == "r"
    assert seen["QITOS_TRACE_PLUGINS"] == "mlflow"
    assert json.loads(seen["QITOS_MLFLOW_TAGS"]) == {"env": "dev", "a": "b=c"}


SHOW = """\
import subprocess, sys
import qitos
print("qitos_mlflow.wiring" in sys.modules, [p for p in sys.path if p.endswith("startup")])
if not sys.argv[1:]: sys.stdout.flush(); subprocess.run([sys.executable, __file__, "c"], check=True)
"""


SAFE_PATH = ("-P",) if sys.version_info >= (3, 11) else ()


@pytest.mark.parametrize("options", [(), ("-S",), ("-E", *SAFE_PATH)], ids=" ".join)
def test_where_no_start_up_file_runs_the_script_and_its_children_are_logged(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    """As with `pip install --target`: a python in whose site-packages there is no start-up line."""
    (tmp_path / "show.py").write_text(SHOW)
    (tmp_path / "sitecustomize.py").write_text("print('hidden')\n")
    places = [sysconfig.get_path("purelib"), str(ROOT)]
    start = (
        "import runpy, sys\n"
        f"sys.path += {places}\n"
        "sys.argv = ['qitos-mlflow', 'run', 'show.py']\n"
        "runpy.run_module('qitos_mlflow.cli')"
    )
    python = getattr(sys, "_base_executable", sys.executable)
    done = subprocess.run(
        [python, *options, "-c", start],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *places])},
        capture_output=True,
        text=True,
        check=False,
    )
    hidden = "" if options else "hidden\n"  # Once more, by the first python.
    assert done.stdout == hidden + 2 * "hidden\nTrue []\n", done.stderr
    assert done.stderr == ""


def test_another_python_that_the_script_starts_is_left_alone(tmp_path: Path) -> None:
    """The packages of the script's Python may be of another version, or built for another one."""
    base = getattr(sys, "_base_executable", sys.executable)
    subprocess.run([base, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    other = next((tmp_path / "venv").glob("*/python"))
    (tmp_path / "show.py").write_text(
        "import subprocess, sys\n"
        f"print('qitos_mlflow.auto' in sys.modules, {str(ROOT)!r} in sys.path, flush=True)\n"
        "for child in sys.argv[1:]: subprocess.run([child, __file__], check=True)\n"
    )
    places = [sysconfig.get_path("purelib"), str(ROOT)]
    start = (
        "import runpy, sys\n"
        f"sys.path += {places}\n"
        f"sys.argv = ['qitos-mlflow', 'run', 'show.py', sys.executable, {str(other)!r}]\n"
        "runpy.run_module('qitos_mlflow.cli')"
    )
    environ = {**os.environ, "QITOS_TRACE_PLUGINS": "none", "_QITOS_MLFLOW_PYTHON": "outer"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(
        [base, "-c", start], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("True True\nTrue True\nFalse False\n", "")


def test_unbuffered_output_stays_so(tmp_path: Path, python: Run) -> None:
    """`python -u` is among the options that are passed on."""
    (tmp_path / "show.py").write_text("import sys; print(sys.stdout.write_through)\n")
    for option, unbuffered in (("-u", "True\n"), ("-B", "False\n")):
        got = python(option, "-m", "qitos_mlflow.cli", "run", "show.py", PYTHONUNBUFFERED="")
        assert (got.stdout, got.stderr) == (unbuffered, "")


def test_the_start_up_directory_is_silent_in_a_python_without_the_package(tmp_path: Path) -> None:
    """What a script starts may be a Python that cannot import the package, or has no QitOS."""
    shutil.copytree(STARTUP_DIRECTORY, tmp_path / "a" / "b" / "c")
    environ = {**os.environ, "PYTHONPATH": str(tmp_path / "a" / "b" / "c")}
    command = [sys.executable, "-I", "-S", "-c", "import sys; sys.path.insert(0, sys.argv[1])"]
    command[-1] += "; import sitecustomize; print(sys.path[0] == sys.argv[1])"
    done = subprocess.run(
        [*command, environ["PYTHONPATH"]], env=environ, capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", "mlflow"),
        ("none", "mlflow"),
        ("other", "other,mlflow"),
        ("MLflow, other", "mlflow,other"),
        ("all", "all"),
        ("no:other", "all,no:other"),
        ("no:mlflow", "mlflow"),
    ],
)
def test_the_plugin_is_selected_whatever_was_before(before: str, after: str) -> None:
    """`run` selects the MLflow plugin, and keeps what was chosen before."""
    assert selection(before) == after


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nowhere.py",), "there is no script 'nowhere.py'"),
        ((), "Missing argument 'TARGET'"),
        (("--tag", "env", "program.py"), "'env' is not a tag; write it as key=value"),
        (("--tracking-uri", "localhost:5000", "program.py"), "mean http://localhost:5000?"),
        (("--tracking-uri", "htp://x", "program.py"), "MLflow has no store 'htp'"),
        (("--tracking-uri", "http://", "program.py"), "names no host"),
        (("--tracking-uri", " ", "program.py"), "it is empty"),
        (("--experiment-name", " ", "program.py"), "it is empty"),
    ],
)
def test_bad_input_is_named(programs: Path, cli: Run, args: tuple[str, ...], message: str) -> None:
    """The error names the wrong value and the next step; exit code 2, no traceback."""
    got = cli("run", *args)
    assert got.returncode == 2
    assert message in got.stderr
    assert "Traceback" not in got.stderr
    assert got.stdout == ""


def test_an_agent_that_knows_nothing_of_it_is_logged(tmp_path: Path, cli: Run) -> None:
    """A plain QitOS script becomes an MLflow run where, and as what, the options say."""
    (tmp_path / "agent.py").write_text(
        "from qitos_mlflow.cli._demo_agent import DeskAgent, ScriptedModel, answer\n"
        "model = ScriptedModel('scripted-small', [answer('Easy.', 'yes')])\n"
        "result = DeskAgent('asker', model, []).run(task='Well?', trace=False, render=False)\n"
        "print(result)\n"
    )
    store = f"sqlite:///{tmp_path}/mlflow.db"
    make_store(tmp_path / "mlflow.db")
    options = ("--tracking-uri", store, "--experiment-name", "e", "--run-name", "r")
    tag = ("--tag", "env=dev=1")
    wait = {"QITOS_MLFLOW_EXIT_TIMEOUT_S": "90", "QITOS_MLFLOW_LOCAL_EXIT_TIMEOUT_S": "0"}
    got = cli("run", *options, *tag, "agent.py", **wait)
    assert (got.stdout, got.stderr, got.returncode) == ("yes\n", "", 0)
    assert [(run.name, run.tags["env"]) for run in runs_in(store, "e")] == [("r", "dev=1")]
