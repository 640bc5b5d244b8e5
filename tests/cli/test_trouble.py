"""The commands with passwords, broken spools, and servers that refuse data."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from mlflow import environment_variables

from qitos_mlflow.cli import main
from qitos_mlflow.cli._delivering import Sync
from qitos_mlflow.cli._server import ask
from qitos_mlflow.delivery import RetryLater, backoff, find_segments, inspect_segment
from qitos_mlflow.mlflow_plugin.trust import Way
from tests.cli.conftest import Run
from tests.cli.test_spool import NOWHERE, trace, write_segment
from tests.integration.made_store import make_store

SECRET = "s3cr3t-of-a-user"
UNUSABLE = f"http://user:{SECRET}@a..b:5000"

AGENT = """\
import logging, sys
logging.basicConfig(level=logging.DEBUG)
from qitos_mlflow import MlflowTraceProcessor
from qitos_mlflow.tracing import SpanType, StepSpanData, add_trace_processor, create_trace

processor = MlflowTraceProcessor(tracking_uri=sys.argv[1], exit_timeout_s=0.2)
add_trace_processor(processor)
with create_trace("x") as trace:
    trace.create_span(SpanType.STEP, StepSpanData(1)).start().finish()
processor.force_flush(1.0)
"""

ONE_AFTER_ANOTHER = """\
import contextlib, json, sys
from qitos_mlflow.cli import main
commands = json.loads(sys.argv[1])
for command in commands:
    with contextlib.suppress(SystemExit):
        main(command)
print(len(commands), "commands")
"""


def invoke(*args: str) -> Result:
    """Run `qitos-mlflow args…` in this process."""
    return CliRunner().invoke(main, args)


@pytest.fixture
def server() -> Iterator[str]:
    """The URI of a server that says it is MLflow, and refuses all else."""

    class Refusing(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"3.17.2" if self.path == "/version" else b"{}"
            self.send_response(200 if self.path == "/version" else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Refusing) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def break_segment(part: Path) -> None:
    """Make the file of a segment unreadable, for root as well."""
    part.unlink()
    part.mkdir()


@pytest.mark.parametrize("uri", [NOWHERE.replace("//", f"//user:{SECRET}@"), UNUSABLE])
def test_no_password_is_shown_or_kept(tmp_path: Path, python: Run, uri: str) -> None:
    """No log line, no command and no file of the spool has the password."""
    (tmp_path / "agent.py").write_text(AGENT)
    done = python("agent.py", uri)
    assert done.returncode == 0, done.stderr
    shown = [done.stdout + done.stderr]
    environ = {"MLFLOW_TRACKING_URI": uri, "PYTHONWARNINGS": "default"}
    commands = [
        ("status",),
        ("status", "--json"),
        ("status", "--tracking-uri", uri),
        ("sync", "--patience", "0"),
        ("sync", "--patience", "0", "--tracking-uri", uri),
        ("sync", "--tracking-uri", f"user:{SECRET}@host:5000"),
        ("demo", "--tracking-uri", f"http://user:{SECRET}/@host"),
    ]
    done = python("-c", ONE_AFTER_ANOTHER, json.dumps(commands), **environ)
    assert done.stdout.endswith(f"{len(commands)} commands\n"), done.stderr
    shown.append(done.stdout + done.stderr)
    assert "Traceback" not in done.stderr
    shown += [path.read_bytes().decode("latin-1") for path in (tmp_path / "spool").iterdir()]
    assert [text for text in shown if SECRET in text] == []
    (segment,) = find_segments(tmp_path / "spool")
    looked = inspect_segment(segment)
    assert (looked.waiting, looked.dead_letters) == (3, {})


def test_a_server_is_asked_once_and_with_its_password(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments have the server without the password that the configuration has."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.replace("//", f"//user:{SECRET}@"))
    write_segment(tmp_path, server, *trace("qitos"))
    found = json.loads(invoke("status", "--json").output)
    assert [s["uri"] for s in found["servers"]] == [server]


@pytest.mark.parametrize("uri", ["http://a..b", "http://[bad", "http://h:999999", "http://"])
def test_asking_never_raises(uri: str) -> None:
    """`status` shows a URI that cannot be used like a server that does not answer."""
    assert ask(uri, trusted=True).reachable is False


def test_a_broken_file_of_credentials_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a broken credentials file of MLflow, the server counts as not reachable."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".mlflow").mkdir()
    (tmp_path / ".mlflow" / "credentials").write_text("no section\n")
    assert ask(NOWHERE, trusted=True).reachable is False


def test_one_unreadable_segment_does_not_stop_the_others(tmp_path: Path, store: str) -> None:
    """It is named with its reason, the exit code is 1, and all others are delivered."""
    broken = write_segment(tmp_path, store, *trace("broken"))
    write_segment(tmp_path, store, *trace("well"))
    break_segment(broken)
    shown = invoke("status", "--json")
    assert shown.exit_code == 1
    errors = [segment["error"] for segment in json.loads(shown.output)["segments"]]
    assert sorted(map(bool, errors)) == [False, True]
    shown = invoke("status")
    assert shown.exit_code == 1
    assert f"{broken.name.split('.')[0]} cannot be read: It is no regular file" in shown.output
    done = invoke("sync")
    assert done.exit_code == 1
    assert "2 records delivered, 1 segment finished" in done.output
    assert "It is no regular file" in done.output
    purged = invoke("spool", "purge", "--yes")
    assert purged.exit_code == 1
    assert "cannot be deleted: Is a directory" in purged.output


class Unwilling:
    """A sink whose server refuses one experiment, for a long time, and takes all else."""

    patience = 1.0

    def __init__(self, header: bytes) -> None:
        self.locked = False

    def restore(self, state: bytes) -> None: ...

    def prepare(self, records: Any) -> None:
        self.locked = json.loads(records[0])["settings"]["experiment_name"] == "locked"

    def send(self, timeout_s: float) -> list[Any]:
        if self.locked:
            raise RetryLater("HTTP 403: not yours", 300.0)
        return []

    def abandoned(self, last_time_ns: int, *, closed: bool = False) -> bool:
        return False

    def state(self) -> bytes:
        return b""

    def close(self) -> None: ...


def deliver(tmp_path: Path, sink: type[Unwilling], patience_s: float) -> Sync:
    """Have `sync` deliver all segments through sinks of this kind."""
    sync = Sync(
        lambda way, header: sink(header),
        lambda header, segment: Way(header["tracking_uri"], trusted=True, files=True),
        patience_s,
    )
    found = [inspect_segment(segment) for segment in find_segments(tmp_path / "spool")]
    sync.run(found, threading.Event())
    return sync


def test_one_refused_experiment_does_not_stop_the_others(
    tmp_path: Path, server: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Patience also ends while the server asks to retry; the other experiments are delivered."""
    for experiment in ("locked", "open", "locked"):
        write_segment(tmp_path, server, *trace(experiment))
    sync = deliver(tmp_path, Unwilling, 0.1)
    sync.show()
    shown = capsys.readouterr()
    assert shown.out == "2 records delivered, 1 segment finished\n"
    found = [segment.stem for segment in find_segments(tmp_path / "spool")]
    assert shown.err.splitlines() == [
        f"qitos-mlflow: segments {found[0]}, {found[1]}: {server} does not take its data of "
        "experiment 'locked': HTTP 403: not yours",
        "qitos-mlflow: 2 segments not delivered; run it again later: qitos-mlflow sync",
    ]


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("sqlite:////dev/null/mlflow.db", "Not a directory"),
        ("sqlite:////proc/nowhere/mlflow.db", "No such file or directory"),
        ("postgresql+missing://host/db", "Can't load plugin: sqlalchemy.dialects"),
        ("file://{tmp_path}/runs", "to opt out of this exception."),
        ("sqlite:///{tmp_path}/empty.later", "Can't locate revision identified by 'ffffffffffff'"),
        ("sqlite:///{tmp_path}/store.later", "consult your database's documentation"),
    ],
)
def test_a_store_that_can_never_be_opened_ends_it_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    """The reason is there in full, once for all segments, and nothing waits for it to go away."""
    if uri.startswith("file"):
        if not hasattr(environment_variables, "MLFLOW_ALLOW_FILE_STORE"):
            pytest.skip("this version of MLflow opens it")
        (tmp_path / "runs" / "0").mkdir(parents=True)
        (tmp_path / "runs" / "0" / "meta.yaml").touch()
    uri = uri.format(tmp_path=tmp_path)
    if uri.endswith("store.later"):
        make_store(tmp_path / "store.later")
    if uri.endswith("later"):
        of_a_later_mlflow(tmp_path / uri.rpartition("/")[2])
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 1e9)  # A second attempt would never come.
    for _ in range(2):
        write_segment(tmp_path, uri, *trace("qitos"))
    done = invoke("sync", "--patience", "1e8")
    assert done.exit_code == 1
    text = " ".join(done.output.split())
    assert text.count("cannot be opened") == 1
    assert reason in text


def of_a_later_mlflow(path: Path) -> None:
    """Have a sqlite store, or an empty file, name a revision that this MLflow does not know."""
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE IF NOT EXISTS alembic_version (version_num TEXT)")
        database.execute("DELETE FROM alembic_version")
        database.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
        database.commit()
    os.utime(path, (0, 0))  # A change of the last 10 s could be by one that still makes the store.


def test_the_demo_ends_at_once_as_well(tmp_path: Path, cli: Run) -> None:
    """A store of a later MLflow: its flush would never be over."""
    of_a_later_mlflow(tmp_path / "store.db")
    store = f"sqlite:///{tmp_path}/store.db"
    done = cli("demo", "--tracking-uri", store, QITOS_MLFLOW_FLUSH_TIMEOUT_S="3600")
    assert done.returncode == 1
    assert "Can't locate revision identified by 'ffffffffffff'" in done.stderr


class Halting(Unwilling):
    """A server that takes one record at a time, and fails after each."""

    left = 30

    def send(self, timeout_s: float) -> list[Any]:
        if self.left:
            self.left -= 1
            later = RetryLater("HTTP 503")
            later.got_on = True
            raise later
        return []


def test_a_server_that_gets_on_is_not_given_up(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patience is for a server that carries out nothing."""
    monkeypatch.setattr(backoff, "FIRST_DELAY_S", 0.05)
    write_segment(tmp_path, server, *trace("qitos"))
    assert deliver(tmp_path, Halting, 0.5).left == 0


@pytest.mark.parametrize("command", [("sync",), ("status",), ("spool", "purge")])
def test_a_spool_that_is_a_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """The error names a wrong setting."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("QITOS_MLFLOW_SPOOL_DIR", str(tmp_path / "file"))
    done = invoke(*command)
    assert done.exit_code == 2
    assert "check QITOS_MLFLOW_SPOOL_DIR" in done.output


@pytest.mark.parametrize("command", [("sync",), ("status",), ("spool", "purge")])
def test_a_directory_that_cannot_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: tuple[str, ...]
) -> None:
    """The message has the reason and the path."""

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    done = invoke(*command, str(tmp_path))
    assert done.exit_code == 2
    assert f"{str(tmp_path)!r} cannot be read: Permission denied" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sync", "--patience", "soon"), "'soon' is not a valid float"),
        (
            ("sync", "--tracking-uri", "http://h:99999"),
            "'http://h:99999' cannot be used: its host or port",
        ),
        (("status", ""), "a path is empty; leave it out for this user's spool"),
        (("spool", "prune"), "no command 'prune'; the commands are: purge"),
        (("stats",), "no command 'stats'; the commands are: compare, demo, "),
    ],
)
def test_a_wrong_word_is_named_with_the_right_ones(args: tuple[str, ...], message: str) -> None:
    """The message names the value and what to give instead."""
    done = invoke(*args)
    assert done.exit_code == 2
    assert message in done.output


def test_the_file_of_refused_records_is_named(tmp_path: Path, store: str) -> None:
    """Their reasons are counted; the records themselves are kept in a file that `status` names."""
    write_segment(tmp_path, store, b"no record")
    assert invoke("sync").exit_code == 0
    shown = invoke("status").output
    assert f"These records are kept in {tmp_path / 'spool' / '*.dead'}; only those" in shown
