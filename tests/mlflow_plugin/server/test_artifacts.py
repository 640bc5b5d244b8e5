"""Files of runs stay in their run's directory. Elsewhere they go without credentials."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import requests

from qitos_mlflow.mlflow_plugin.mapping.entities import RunRef, is_inside
from qitos_mlflow.mlflow_plugin.server.http import Request
from qitos_mlflow.mlflow_plugin.server.rest import RestTransport
from qitos_mlflow.mlflow_plugin.server.transport import PutOff
from qitos_mlflow.mlflow_plugin.sink.sink import MlflowSink, open_transport
from tests.fakes.https import RecordingServer, recording_server
from tests.fakes.mlflow_rest import HEADER, MlflowRest
from tests.integration.made_store import make_store

SECRET = "s3cr3t-of-a-user"


@pytest.fixture
def other() -> Iterator[RecordingServer]:
    """Another web server, which records what it gets."""
    with recording_server() as server:
        yield server


@pytest.fixture(autouse=True)
def _credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has credentials of every kind."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    monkeypatch.setenv("MLFLOW_WORKSPACE", SECRET)
    (tmp_path / ".netrc").write_text(f"default login u password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)


def write(artifact_uri: str, tracking_uri: str = "http://tracking.test", **allowed: bool) -> None:
    """Write a file of a run whose server has its files at `artifact_uri`."""
    run = RunRef("r", "0", "n", artifact_uri, 0)
    transport = RestTransport(tracking_uri, **allowed)
    try:
        transport.write_artifact(run, "a b/answer.txt", b"42", 5.0)
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("artifact_uri", "path"),
    [
        ("http://{}/files", "/files/a%20b/answer.txt"),
        ("mlflow-artifacts://{}/7/x", "/api/2.0/mlflow-artifacts/artifacts/7/x/a%20b/answer.txt"),
    ],
)
def test_another_web_server_gets_files_but_no_credentials(
    other: RecordingServer, artifact_uri: str, path: str
) -> None:
    """What a server calls the place of its files is no server that credentials were set for."""
    write(artifact_uri.format(other.uri.partition("//")[2]))
    assert other.paths == [path]
    assert SECRET not in str(other.heads)
    assert "authorization" not in {name.lower() for head in other.heads for name in head}


def test_the_same_server_by_its_full_name_gets_them(other: RecordingServer) -> None:
    """An address of files on the tracking server itself is that server."""
    write(f"mlflow-artifacts://{other.uri.partition('//')[2]}/7", other.uri)
    assert SECRET in str(other.heads)


def test_a_local_store_sends_no_credentials_either(other: RecordingServer, tmp_path: Path) -> None:
    """Neither does a store on this machine whose experiment has its files on a web server."""
    make_store(tmp_path / "mlflow.db")
    transport = open_transport(f"sqlite:///{tmp_path}/mlflow.db")
    transport.write_artifact(RunRef("r", "0", "n", f"{other.uri}/7", 0), "a.txt", b"a", 5.0)
    assert other.paths == ["/7/a.txt"]
    assert SECRET not in str(other.heads)


@pytest.mark.parametrize("place", ["file://{}/.ssh", "{}/.ssh", "http://127.0.0.1:9/x", "s3://b/k"])
@pytest.mark.parametrize("trusted", [False, True])
def test_files_that_may_not_leave_the_server_are_put_off(
    tmp_path: Path, place: str, *, trusted: bool
) -> None:
    """No other place gets what a stranger's segment holds; the reason names the next step."""
    with pytest.raises(PutOff, match=r"`(MLFLOW_TRACKING_URI=\S+ )?qitos-mlflow sync --trust`"):
        write(place.format(tmp_path), trusted=trusted, files=False)
    assert not (tmp_path / ".ssh").exists()


@pytest.mark.parametrize("place", ["s3://bucket/key", "dbfs:/x", "sftp://host/x", "gs://b/k"])
def test_a_place_that_takes_credentials_needs_a_trusted_server(place: str) -> None:
    """With files allowed, but the server not named by the user, no credentials are used."""
    with pytest.raises(PutOff, match="MLFLOW_TRACKING_URI=http://"):
        write(place, trusted=False, files=True)


@pytest.mark.parametrize("place", ["runs:/abc/x", "models:/m/1", "mlflow-artifacts:/../../../x"])
def test_a_place_that_leads_anywhere_is_none(place: str) -> None:
    """Places that stand for other places, or leave the server's own directory, are not followed."""
    with pytest.raises(PutOff):
        write(place)


NAMES = [
    *("../x", "/etc/x", "a/../../x", "..", "", "a/", "a//b", "./x", "a\\..\\..\\x"),
    *("%2e%2e/x", "a/%2E%2e/x", "%2fetc/x", "a\0b", "a/%2e%2e%2f%2e%2e/x"),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_leaves_its_directory_is_a_dead_letter(name: str) -> None:
    """Such a record is refused before anything is sent; the others of its batch are delivered."""
    server = MlflowRest()
    start = {"kind": "trace_start", "trace_id": "t", "time_ns": 1, "name": "n", "metadata": {}}
    bad = [
        {"kind": "artifact", "trace_id": "t", "path": name, "content": "x"},
        {"kind": "pictures", "trace_id": "t", "pictures": {name: "aGk="}},
    ]
    good = {"kind": "artifact", "trace_id": "t", "path": "ok/100%.txt", "content": "x"}
    sink = server.sink()
    sink.prepare([orjson.dumps(record) for record in [start, *bad, good]])
    dead = sink.send(60.0)
    assert len(dead) == 2
    assert all("no name for a file" in letter.reason for letter in dead)
    assert [path.rpartition("/artifacts/")[2] for path in server.artifacts] == ["ok/100%25.txt"]
    sink.close()


def test_no_record_has_a_file_of_this_machine_read(tmp_path: Path) -> None:
    """Only the agent that records reads files; what names one in the spool may be anybody's."""
    file = tmp_path / "picture.png"
    while sum(character.isalnum() or character in "+/" for character in str(file)) % 4 != 1:
        file = file.with_name(f"a{file.name}")  # So that no path happens to be base64.
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + SECRET.encode())
    content = file.read_bytes()
    server, sent = MlflowRest(), list[bytes]()
    named = {"file": str(file), "path": "a.txt", "content": None, "picture_files": {str(file): {}}}
    block = [{"role": "user", "content": [{"type": "image_file", "path": str(file)}]}]
    ids = {"trace_id": "t", "span_id": "s", "start_ns": 1, "end_ns": 2, "time_ns": 1, "name": "n"}
    records: list[dict[str, Any]] = [
        {"kind": "trace_start", "metadata": {"run_dir": str(tmp_path)}},
        {"kind": "span", "type": "generation", "data": {"input_content": block}},
        {"kind": "artifact"},
        {"kind": "pictures", "pictures": {"picture.png": str(file)}},
        {"kind": "trace_end", "status": "FINISHED", "metadata": {}},
    ]

    def receive(request: Request) -> requests.Response:
        sent.append(request.body or b"")
        return server(request)

    sink = MlflowSink(HEADER, RestTransport("http://mlflow.test", receive))
    sink.prepare([orjson.dumps({**ids, **record, **named}) for record in records])
    sink.send(60.0)
    sink.close()
    assert len(server.spans) == 2  # With the root.
    for form in (content, SECRET.encode(), b64encode(content)):
        assert form not in b"".join([*sent, *server.artifacts.values()])


@pytest.mark.parametrize("name", ["a", "a/b.txt", "..a/b..", "100%", "a%20b", "é/日本.txt"])
def test_ordinary_names_are_names(name: str) -> None:
    """Dots, percent signs and letters of any language are fine."""
    assert is_inside(name)
