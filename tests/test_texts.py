"""What a person sees has no credential and no control character in it, whoever wrote the text."""

from __future__ import annotations

import ast
import configparser
import io
import json
import logging
import netrc
import os
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import qitos_mlflow
from qitos_mlflow import _guard
from qitos_mlflow._texts import MOST_CHARS, clean, in_words, traceback_of
from tests.fakes.answers import answering

KEY = "sk-" + "proj-Zq3vT8mN5kR2wX7yB4cD9fG1hJ6lP0s"
OPAQUE = "Vq7-plainly-no-shape-91"
"""Nothing marks it as a credential but the place where it is configured."""
EVIL = f"\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e{KEY}\u2066\n2026-01-01 CRITICAL forged line"

WAYS = ("getLogger", "stderr.write", "stdout.write", "warnings.warn", "showwarning", "print")
WAYS += (
    "click.echo",
    "click.secho",
    "click.confirm",
    "click.prompt",
    "print_exc",
    "print_exception",
)
ROOT = Path(qitos_mlflow.__file__).parent


def check(*outputs: str) -> None:
    """Fail if an output has a planted secret, a control character or a line that was forged."""
    for output in outputs:
        assert KEY not in output
        assert OPAQUE not in output
        bad = {one for one in output if unicodedata.category(one) in ("Cc", "Cf", "Zl", "Zp", "Cs")}
        assert bad <= {"\n", "\t"}, ascii(output)
        assert not any(line.startswith("2026-01-01 CRITICAL") for line in output.splitlines())


@pytest.fixture
def handled() -> Iterator[io.StringIO]:
    """What handlers of the user's write: Python's own format, and all fields as JSON."""
    written = io.StringIO()

    class Fields(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            fields = {k: str(v) for k, v in vars(record).items() if k not in ("name", "msecs")}
            return json.dumps({**fields, "text": record.getMessage()}, ensure_ascii=False)

    log, before = logging.getLogger("qitos_mlflow"), logging.getLogger("qitos_mlflow").level
    handlers = [logging.StreamHandler(written) for _ in range(2)]
    handlers[1].setFormatter(Fields())
    log.setLevel(logging.DEBUG)
    for handler in handlers:
        log.addHandler(handler)
    yield written
    log.setLevel(before)
    for handler in handlers:
        log.removeHandler(handler)


def chained() -> Exception:
    """An exception that quotes secrets in its text, its cause and its context."""
    try:
        try:
            raise KeyError(f"PASSWORD={OPAQUE}")
        except KeyError as error:
            raise OSError(f"https://bob:{OPAQUE}@host/x {EVIL}") from error
    except OSError as error:
        return error


class Unprintable(Exception):
    """Its text raises."""

    def __str__(self) -> str:
        raise RuntimeError(KEY)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plain %s", EVIL),
        ("two %s and %r", f"password={OPAQUE}", EVIL),
        ("an exception %s", chained()),
        ("named %(name)s", {"name": EVIL}),
        ("too few %s %s", EVIL),
        (EVIL,),
        ("none %s", Unprintable()),
    ],
)
def test_messages(arguments: tuple[Any, ...], handled: io.StringIO) -> None:
    """Message and arguments of a record are clean for every handler, also if they do not fit."""
    _guard.log(logging.WARNING, *arguments)
    assert handled.getvalue().count("qitos-mlflow: ") >= 2
    check(handled.getvalue())
    assert len(handled.getvalue().splitlines()) == 2


@pytest.mark.parametrize("error", [chained(), Unprintable(KEY)])
def test_tracebacks(
    error: Exception, handled: io.StringIO, swallowed: list[tuple[str, BaseException]]
) -> None:
    """What is reported is clean for every handler, its traceback and its chain, too."""
    _guard.report(f"a place of {type(error)}", error)
    swallowed.clear()
    assert type(error).__name__ in handled.getvalue()
    check(handled.getvalue())


def test_a_line_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    """The last line of a process is one line, and clean."""
    _guard.say(f"left in {EVIL}")
    check(capsys.readouterr().err)
    _guard.say("x" * 10 * MOST_CHARS)
    assert len(capsys.readouterr().err) < 2 * MOST_CHARS


def parsed(text: str) -> Exception:
    """What a parser of a file with credentials raises."""
    try:
        file = configparser.ConfigParser()
        file.read_string(text)
        file.get("mlflow", "mlflow_tracking_password")
    except configparser.Error as error:
        return error
    raise AssertionError("it can be read")


@pytest.mark.parametrize(
    "error",
    [
        parsed(f"[mlflow]\nmlflow_tracking_password = a%{OPAQUE}"),
        parsed(f"[mlflow]\nmlflow_tracking_password = a%({OPAQUE})s"),
        parsed(f"[mlflow]\n{OPAQUE}"),
        netrc.NetrcParseError(f"bad follower token '{OPAQUE}'", "netrc", 3),
    ],
)
def test_parsers_of_credentials(error: Exception) -> None:
    """The texts of parsers, which quote the file, are left out, also below another exception."""
    outer = RuntimeError(f"no credentials: {error}")
    outer.__cause__ = error
    check(in_words(error), in_words(outer), traceback_of(error), traceback_of(outer))
    assert in_words(outer).startswith("RuntimeError: no credentials: ")


def test_credentials_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A credential that the environment names is found wherever it is quoted; a path is not one."""
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", OPAQUE)
    monkeypatch.setenv("SOME_TOKEN", "short")
    monkeypatch.setenv("SECRET_FILE_PASSWORD", str(Path.cwd()))
    assert clean(f"no user with {OPAQUE}; short") == "no user with [redacted]; short"
    assert clean(f"not in {Path.cwd()}") == f"not in {Path.cwd()}"


@pytest.mark.parametrize("length", [MOST_CHARS - 20, 4 * MOST_CHARS - 20, 40 * MOST_CHARS])
def test_what_is_cut_is_redacted_first(length: int) -> None:
    """A credential that straddles the bound is not shown by half."""
    shown = clean(f"{'x ' * (length // 2)}{KEY} {'y ' * length}")
    assert len(shown) < MOST_CHARS + 20
    assert KEY[:12] not in shown


def test_harmless_texts_stay() -> None:
    """Paths, addresses, other scripts and tabs stay as they are."""
    text = "22 records wait in /home/jürgen/日本/😀\t(http://host:5000/#/experiments/1)"
    assert clean(text) == text
    assert clean("a\nb") == "a\\nb"
    assert clean("a\nb", lines=True) == "a\nb"


def test_there_is_one_way_out() -> None:
    """Logging, printing and tables are used by the modules that clean what they are given."""
    ways = {
        "_guard.py": {"getLogger", "stderr.write"},
        "_startup.py": {"print"},
        "cli/_show.py": {"click.echo", "rich.console", "print"},
        # Only their fixed texts.
        "cli/spool.py": {"click.confirm"},
        "cli/demo.py": {"rich.console"},
    }
    for path in ROOT.rglob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                found |= {way for way in WAYS if called == way or called.endswith(f".{way}")}
            elif isinstance(node, ast.ImportFrom) and node.module == "rich.console":
                found.add("rich.console")
        assert found <= ways.get(str(path.relative_to(ROOT)), set()), path


AGENT = """
import logging, sys
logging.basicConfig(level=logging.DEBUG)
told = logging.Handler()
told.texts = []
told.emit = lambda record: told.texts.append(record.getMessage())
logging.getLogger("qitos_mlflow").addHandler(told)
logging.getLogger("urllib3").setLevel(logging.ERROR)
import pluggy
from qitos_mlflow.mlflow_plugin.processor import MlflowTraceProcessor
from qitos_mlflow.plugins.adapter import PluginTraceProcessor
from qitos_mlflow.tracing import GenerationSpanData, SpanType, TracingProvider

text = sys.stdin.read()
impl = pluggy.HookimplMarker("qitos")

class Broken:
    @impl
    def qitos_trace_start(self, trace):
        raise ValueError(text) from KeyError(text)
    @impl
    def qitos_record(self, record):
        return text

plugins = PluginTraceProcessor({text: Broken()})
processor = MlflowTraceProcessor(start_timeout_s=0.1, run_name=text, exit_timeout_s=0.5)
provider = TracingProvider([plugins, processor])
with provider.create_trace(text) as trace:
    span = trace.create_span(SpanType.GENERATION, GenerationSpanData(model="m", input_content=text))
    span.start()
    span.finish()
while not processor.force_flush(0.5) and "records are not delivered yet" not in str(told.texts):
    pass
"""


def run(*command: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command of Python with these environment variables."""
    kept = {name: value for name, value in os.environ.items() if name != "QITOS_TRACE_PLUGINS"}
    kept |= {"COLUMNS": "200", **variables}
    return subprocess.run(
        [sys.executable, *command],
        input=text,
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def cli(*arguments: str, **variables: str) -> str:
    """What a command shows, checked."""
    ended = run("-m", "qitos_mlflow.cli", *arguments, **variables)
    check(ended.stdout, ended.stderr)
    return ended.stdout + ended.stderr


def test_plugins_and_servers(tmp_path: Path) -> None:
    """What a plugin raises and what a server answers is clean in the log and in `status`."""
    answer = {"error_code": "INVALID_PARAMETER_VALUE", "message": f"password={OPAQUE} {EVIL}"}
    with answering(400, answer) as address:
        uri = f"http://bob:{OPAQUE}@{address}"
        ended = run("-c", AGENT, text=EVIL, MLFLOW_TRACKING_URI=uri)
        assert ended.returncode == 0, ended.stderr
        assert "hook qitos_trace_start failed: ValueError" in ended.stderr
        assert "Traceback (most recent call last)" in ended.stderr
        check(ended.stdout, ended.stderr)
        spool = str(tmp_path / "spool")
        assert "refused" in cli("status", spool, MLFLOW_TRACKING_URI=uri)
        cli("status", "--json", spool, MLFLOW_TRACKING_URI=uri)
        cli("sync", "--patience", "1", spool, MLFLOW_TRACKING_URI=uri)


@pytest.mark.parametrize("password", [f"a%{OPAQUE}", f"%({OPAQUE})s", f"\n{OPAQUE}"])
def test_the_file_of_credentials(password: str, tmp_path: Path) -> None:
    """What is wrong in ~/.mlflow/credentials is not quoted."""
    file = tmp_path / "home/.mlflow/credentials"
    file.parent.mkdir(parents=True)
    file.write_text(
        f"[mlflow]\nmlflow_tracking_username = bob\nmlflow_tracking_password={password}"
    )
    with answering(401, {}) as address:
        variables = {"HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI": f"http://{address}"}
        ended = run("-c", AGENT, **variables)
        assert "records are not delivered yet" in ended.stderr
        check(ended.stdout, ended.stderr)
        cli("status", **variables)


def test_a_value_in_the_wrong_variable() -> None:
    """An error about a setting does not repeat what may be a credential."""
    for name in ("QUEUE_BYTES", "OFFLINE", "EXIT_TIMEOUT_S", "TAGS", "LOG_TRACES"):
        shown = cli("status", **{f"QITOS_MLFLOW_{name}": OPAQUE})
        assert f"environment variable QITOS_MLFLOW_{name}" in shown
    assert "='64MB' cannot be used" in cli("status", QITOS_MLFLOW_QUEUE_BYTES="64MB")


def test_installed_plugins(tmp_path: Path) -> None:
    """Name, version, value and error of an installed plugin are clean in `plugins`."""
    (tmp_path / "evil.py").write_text(f"raise ImportError({EVIL!r})")
    made = tmp_path / "evil-1.dist-info"
    made.mkdir()
    evil = EVIL.replace("\n", " ").replace("\r", "")
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: evil\nVersion: 1{evil}\n")
    (made / "entry_points.txt").write_text("[qitos.trace_plugins]\ne\x1b[31mvil = evil\n")
    variables = {"PYTHONPATH": str(tmp_path), "QITOS_TRACE_PLUGINS": f"all,{EVIL}"}
    assert "ImportError" in cli("plugins", **variables)
    cli("plugins", "--json", **variables)


def test_arguments_and_names_of_files(tmp_path: Path) -> None:
    """What a command is given, and the names of files in the spool, are shown clean."""
    evil = EVIL.replace("/", "")
    # A directory that the user names is shown as it is called, but for control characters.
    spool = tmp_path / evil.replace(KEY, "token=1")
    spool.mkdir()
    (spool / f"host{evil}-1-2-3.0.seg").write_bytes(b"damaged")
    assert "token=1" in cli("status", str(spool))
    cli("sync", str(spool))
    cli("status", str(spool / "nothing"))
    cli(evil)
    cli("run", evil)
    cli("sync", f"--{evil}")
