"""What may be said of a destination."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import orjson
import pytest

from qitos_mlflow.errors import QitosMlflowError, SettingsError
from qitos_mlflow.mlflow_plugin.destination import (
    Destination,
    MlflowPipeline,
    run_settings,
    segment_header,
)
from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http
from qitos_mlflow.redaction.redact import without_credentials
from qitos_mlflow.settings import Settings

SECRET = "s3cr3t-of-a-user"


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("http://u:{}@host:5000/base", "http://host:5000/base"),
        ("http://{}@host", "http://host"),
        ("https://u:a@{}@host", "https://host"),
        ("https://u:a/{}@host", "https://host"),
        ("https://u:#{}@host", "https://host"),
        ("http://u:{}@[bad:5000", "http://[bad:5000"),
        ("http://u:{}@a..b", "http://a..b"),
        ("http:/u:{}@host", "host"),
        ("user:{}@host:5000", "host:5000"),
        ("postgresql+psycopg2://u:{}@host:5432/db", "postgresql+psycopg2://host:5432/db"),
        ("postgresql://host/db?password={}", "postgresql://host/db?password=[redacted]"),
        ("http://host/?token={}", "http://host/?token=[redacted]"),
        ("postgresql://host/db?pw={}&x=1", "postgresql://host/db?pw=[redacted]&x=1"),
        ("postgresql://host/db?sslpassword={}#x", "postgresql://host/db?sslpassword=[redacted]#x"),
        ("http://host/?a=1&sig={}", "http://host/?a=1&sig=[redacted]"),
        ("sqlite:////x.db?key={}", "sqlite:////x.db?key=[redacted]"),
        ("databricks://scope:{}", "databricks://scope:[redacted]"),
        ("databricks-uc://profile:{}", "databricks-uc://profile:[redacted]"),
    ],
)
def test_credentials_are_left_out(uri: str, shown: str) -> None:
    """Whatever the form of a URI, and whether it can be used or not."""
    for secret in (SECRET, "hunter2", "ab"):
        assert without_credentials(uri.format(secret)) == shown


@pytest.mark.parametrize(
    "uri",
    [
        *("http://localhost:5000", "http://host:5000/path@x", "http://[::1]:5000/"),
        *("sqlite:////home/a@b/mlflow.db", "file:///home/a:b@c", "file:a@b", "/home/u:p@h/mlruns"),
        *("databricks", "databricks://profile", "C:\\a@b\\mlruns", "s3://bucket/a@b", ""),
    ],
)
def test_all_else_stays(uri: str) -> None:
    """It is where the records are delivered to."""
    assert without_credentials(uri) == uri


@pytest.mark.parametrize("name", ["token=abcdef123456", "password=x y", "auth=[a, b],key=c@d"])
@pytest.mark.parametrize(
    "form", ["sqlite:///{}/m.db", "sqlite+pysqlite:///{}/m.db?timeout=9", "file://{}", "{}", None]
)
def test_a_place_on_disk_is_recorded_as_it_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, form: str | None
) -> None:
    """A directory's name is no credential: without it the records go to another one."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    uri = None if form is None else form.format(tmp_path / name)
    header = orjson.loads(segment_header(Destination.of(uri)))
    assert (header["tracking_uri"], header["cwd"]) == (uri, str(tmp_path / name))


@pytest.mark.parametrize(
    ("uri", "recorded"),
    [
        ("sqlite+pysqlcipher://:{}@/m/token=1.db", "sqlite+pysqlcipher:///m/token=1.db"),
        ("sqlite:////m/token=1.db?password={}", "sqlite:////m/token=1.db?password=[redacted]"),
    ],
)
def test_a_credential_of_a_local_store_is_left_out(uri: str, recorded: str) -> None:
    """User info and query are no place, on disk as in the network."""
    header = orjson.loads(segment_header(Destination.of(uri.format(SECRET))))
    assert header["tracking_uri"] == recorded


@pytest.mark.parametrize(
    ("uri", "another", "same"),
    [
        ("http://u:{}@host", "http://u:new@host", True),
        ("postgresql://host/db?password={}", "postgresql://host/db?password=new", True),
        ("http://host/token={}", "http://host/token=new", False),
        ("sqlite:////token={}/m.db", "sqlite:////token=new/m.db", False),
    ],
)
def test_leftovers_of_another_place_are_left_alone(uri: str, another: str, same: bool) -> None:
    """Another password opens the same place; another path is another one."""
    settings = Settings.resolve()
    pipeline = MlflowPipeline(Destination.of(another), another, settings)
    header = segment_header(Destination.of(uri.format(SECRET)))
    assert (pipeline.open_leftovers(header) is not None) is same


@pytest.mark.parametrize(
    "uri", ["http://u:{}@h:x", "http://u:a/{}@h", "http://u:{}@[bad", "foo://u:{}@h", "user:{}@h:1"]
)
def test_a_refused_setting_does_not_tell_its_password(uri: str) -> None:
    """The message goes to a screen or a log."""
    with pytest.raises(SettingsError) as refusal:
        Settings.resolve(tracking_uri=uri.format(SECRET))
    assert SECRET not in str(refusal.value)


@pytest.mark.parametrize(
    ("uri", "http"),
    [
        *((uri, True) for uri in ("http://h", "HTTPS://h", "http://[bad", "http:/h")),
        *((uri, False) for uri in (None, "", "http", "httpx://h", "/http:/x", "sqlite:///a")),
    ],
)
def test_what_is_reached_over_http(uri: str | None, http: bool) -> None:
    """The scheme alone says it."""
    assert is_http(uri) is http


@pytest.mark.parametrize(
    "variable", ["WORKSPACE", "TRACKING_TOKEN", "TRACKING_USERNAME", "TRACKING_PASSWORD"]
)
def test_another_tenant_is_another_destination(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that a server tells apart share no connection, even if the address is the same."""
    keys = {Destination.of("http://host")}
    for tenant in ("a", "b"):
        monkeypatch.setenv(f"MLFLOW_{variable}", tenant)
        keys.add(Destination.of("http://host"))
    assert len(keys) == 3
    assert Destination.of("http://host") in keys


@pytest.fixture
def latin_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory, a script and a tag that are named in another encoding."""
    name = os.fsdecode(b"M\xfcller")
    directory = tmp_path / name
    try:
        directory.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    monkeypatch.chdir(directory)
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    monkeypatch.setenv("QITOS_MLFLOW_TAGS", f'{{"owner": "{name}"}}')


@pytest.mark.usefixtures("latin_1")
def test_names_in_another_encoding_are_written_with_question_marks() -> None:
    """They are there for people to read; the records arrive all the same."""
    settings = run_settings(Settings.resolve())
    assert (settings["source"], settings["tags"]) == ("M?ller.py", {"owner": "M?ller"})
    assert (
        orjson.loads(segment_header(Destination.of("http://host")))["tracking_uri"] == "http://host"
    )


@pytest.mark.usefixtures("latin_1")
@pytest.mark.parametrize("uri", [None, os.fsdecode(b"sqlite:////M\xfcller/mlflow.db")])
def test_a_destination_in_another_encoding_is_no_other_one(uri: str | None) -> None:
    """Where the name itself is the destination, nothing is written beside it."""
    with pytest.raises(QitosMlflowError, match="not UTF-8"):
        segment_header(Destination.of(uri))
