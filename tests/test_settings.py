"""Settings: argument before environment before default, each option declared once."""

from __future__ import annotations

import inspect
import os
import re
import sys
import tempfile
import traceback
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.engine import make_url

from qitos_mlflow import MlflowTraceProcessor, _guard
from qitos_mlflow.errors import SettingsError
from qitos_mlflow.mlflow_plugin.destination import Destination, segment_header, tracking_uri
from qitos_mlflow.mlflow_plugin.server.tracking_uri import is_http, is_local
from qitos_mlflow.settings import MIB, Settings, env_names, usable_uri

NAMES = [option.name for option in fields(Settings)]


def test_the_five_parameters_keep_names_order_and_defaults() -> None:
    """`MlflowTraceProcessor` takes the documented parameters, by position too; more by keyword."""
    parameters = list(inspect.signature(MlflowTraceProcessor).parameters.values())
    assert [(p.name, p.default) for p in parameters[:-1]] == [
        ("experiment_name", "qitos"),
        ("run_name", None),
        ("tracking_uri", None),
        ("tags", None),
        ("auto_end_run", True),
    ]
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    processor = MlflowTraceProcessor("runs", "one", "http://here", {"env": "dev"}, False)
    assert processor.mlflow_plugin.settings == Settings(
        experiment_name="runs",
        run_name="one",
        tracking_uri="http://here",
        tags={"env": "dev"},
        auto_end_run=False,
        spool_dir=Settings.resolve().spool_dir,
    )


def test_defaults() -> None:
    """By default everything is on, and waits are short."""
    settings = Settings()
    assert (settings.experiment_name, settings.run_name, settings.tags) == (None, None, {})
    assert settings.parent_run_id is None
    assert (settings.tracking_uri, settings.auto_end_run, settings.offline) == (None, True, False)
    assert (settings.start_timeout_s, settings.flush_timeout_s, settings.exit_timeout_s) == (
        *(2.0, 10.0, 5.0),
    )
    assert settings.local_exit_timeout_s == 60.0
    assert settings.queue_bytes == 64 * MIB


@pytest.mark.parametrize(
    ("given", "variables", "wanted"),
    [
        (None, {}, None),
        (None, {"MLFLOW_EXPERIMENT_NAME": "mlflow's"}, None),  # Looked up at each trace's start.
        (None, {"MLFLOW_EXPERIMENT_NAME": "mlflow's", "QITOS_MLFLOW_EXPERIMENT_NAME": "o"}, "o"),
        (
            "code",
            {"MLFLOW_EXPERIMENT_NAME": "mlflow's", "QITOS_MLFLOW_EXPERIMENT_NAME": "o"},
            "code",
        ),
        ("qitos", {"MLFLOW_EXPERIMENT_NAME": "mlflow's"}, "qitos"),
        (None, {"QITOS_MLFLOW_EXPERIMENT_NAME": ""}, None),
    ],
)
def test_the_argument_goes_before_the_environment(
    given: str | None,
    variables: dict[str, str],
    wanted: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A value given in code counts first, also one equal to the default; then the variables."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    options = {} if given is None else {"experiment_name": given}
    assert Settings.resolve(**options).experiment_name == wanted
    processor = MlflowTraceProcessor(**options)
    assert processor.mlflow_plugin.settings.experiment_name == wanted


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("offline", "1", True),
        ("capture_content", " No ", False),
        ("log_traces", "off", False),
        ("start_timeout_s", "0.5", 0.5),
        ("queue_bytes", "1024", 1024),
        ("spool_dir", "/somewhere", Path("/somewhere")),
        ("tags", '{"env": "dev", "number": 2}', {"env": "dev", "number": "2"}),
    ],
)
def test_texts_of_the_environment_are_read(
    option: str, text: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable's text becomes the option's kind of value."""
    monkeypatch.setenv(env_names(option)[0], text)
    assert getattr(Settings.resolve(), option) == value


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("offline", "maybe"),
        ("start_timeout_s", "soon"),
        ("start_timeout_s", -1),
        ("start_timeout_s", float("nan")),
        ("exit_timeout_s", float("inf")),
        ("queue_bytes", 0),
        ("queue_bytes", "1.5"),
        ("experiment_name", " "),
        ("experiment_name", 7),
        ("tracking_uri", 5000),
        ("spool_dir", ""),
        ("spool_dir", 5),
    ],
)
def test_a_value_that_cannot_be_used_is_named(option: str, value: Any) -> None:
    """The error says which option, which value, and where it came from."""
    with pytest.raises(SettingsError, match=f"argument {option}=") as raised:
        MlflowTraceProcessor(**{option: value})
    assert repr(value) in str(raised.value)
    assert re.search("expected .+", str(raised.value))


@pytest.mark.parametrize(
    ("uri", "advice"),
    [
        ("localhost:5000", "did you mean http://localhost:5000?"),
        ("127.0.0.1:5000/mlflow", "did you mean http://127.0.0.1:5000/mlflow?"),
        ("htp://x", "MLflow has no store 'htp'"),
        ("http://", "names no host"),
        ("http://[::1", "such as http://localhost:5000"),
        ("http://localhost:port", "such as http://localhost:5000"),
    ],
)
def test_a_destination_that_mlflow_cannot_have_is_refused(
    uri: str, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From both sources the value is refused at once, and the error says what to give instead."""
    with pytest.raises(SettingsError, match=f"argument tracking_uri={re.escape(repr(uri))}") as one:
        Settings.resolve(tracking_uri=uri)
    assert advice in str(one.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SettingsError, match="environment variable MLFLOW_TRACKING_URI=") as two:
        Settings.resolve()
    assert advice in str(two.value)
    assert Settings.resolve(tracking_uri="http://here").tracking_uri == "http://here"


@pytest.mark.parametrize(
    "uri",
    [
        "databricks",
        "uc",
        "./mlruns",
        "a:b/c",
        "mysql+pymysql://h/d",
        "HTTP://h",
        " http://h ",
        "C:\\r",
    ],
)
def test_every_kind_of_destination_is_taken(uri: str) -> None:
    """Every URI that MLflow has a store for is accepted, paths included."""
    assert Settings.resolve(tracking_uri=uri).tracking_uri == uri.strip()


def test_no_store_of_mlflow_is_missing() -> None:
    """Every store that the installed MLflow has itself is accepted."""
    from mlflow.tracking._tracking_service.utils import _tracking_store_registry

    for scheme in filter(None, _tracking_store_registry._registry):
        usable_uri(f"{scheme}://host/path")


def test_a_destination_may_be_a_path_and_an_empty_one_is_none() -> None:
    """A `Path` counts as its text; an empty text counts as not given."""
    assert Settings.resolve(tracking_uri=Path("runs")).tracking_uri == "runs"
    assert Settings.resolve(tracking_uri="").tracking_uri is None


@pytest.mark.parametrize("uri", ["http://[::1", "http://u:secret@[::1", "http://h:port", "", ":"])
def test_a_destination_set_later_breaks_nothing(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that becomes unusable later is treated as a destination that does not answer."""
    settings = Settings.resolve()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert is_http(tracking_uri(settings)) is uri.startswith("http")
    assert b"secret" not in segment_header(Destination.of(uri))


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("QITOS_MLFLOW_TAGS", "api_key=sk-proj-secretsecretsecret"),
        ("QITOS_MLFLOW_TAGS", '{"note": "hush, secret"'),
        ("QITOS_MLFLOW_QUEUE_BYTES", "sk-proj-secretsecretsecretsecret"),
        ("MLFLOW_TRACKING_URI", "htp://user:secret@host"),
        ("MLFLOW_TRACKING_URI", "http://user:secret@[::1"),
    ],
)
def test_errors_hold_no_credentials(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors are logged with their causes, so both are without credentials."""
    monkeypatch.setenv(variable, text)
    with pytest.raises(SettingsError, match=variable) as raised:
        Settings.resolve()
    assert "secret" not in "".join(traceback.format_exception(raised.value))


@pytest.mark.parametrize("tags", [["env"], "env=dev", "7"])
def test_tags_that_cannot_be_used_are_named_by_their_kind(tags: Any) -> None:
    """Tags are free text, so the error shows only the type of the value."""
    with pytest.raises(SettingsError, match=r"argument tags, a (list|str), .*expected a mapping"):
        Settings.resolve(tags=tags)


def test_a_directory_may_be_below_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tilde is the home directory, as in a shell; a user who does not exist is an error."""
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    monkeypatch.setenv("QITOS_MLFLOW_SPOOL_DIR", "~/spool")
    assert Settings.resolve().spool_dir == Path("/home/someone/spool")
    with pytest.raises(SettingsError, match="without ~"):
        Settings.resolve(spool_dir="~no-such-user-here/spool")


@pytest.mark.parametrize(
    ("variable", "advice"),
    [
        ("QITOS_MLFLOW_TRACKING_URI", "use MLFLOW_TRACKING_URI"),
        ("QITOS_MLFLOW_AUTO_END_RUN", "in code"),
        ("QITOS_MLFLOW_RUNNAME", "QITOS_MLFLOW_RUN_NAME"),
    ],
)
def test_a_variable_that_sets_nothing_causes_one_warning(
    variable: str, advice: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A misspelt variable causes one warning that lists the valid names."""
    monkeypatch.setattr(_guard, "_last_logged", {})
    monkeypatch.setenv(variable, "x")
    Settings.resolve()
    Settings.resolve()
    (line,) = [record.getMessage() for record in caplog.records]
    assert variable in line
    assert advice in line


def test_the_variable_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for the environment."""
    monkeypatch.setenv("QITOS_MLFLOW_QUEUE_BYTES", "plenty")
    with pytest.raises(SettingsError, match="variable QITOS_MLFLOW_QUEUE_BYTES='plenty'"):
        Settings.resolve()


def test_an_unknown_option_is_an_error_with_the_valid_names() -> None:
    """A misspelt option is a TypeError that lists the right names."""
    with pytest.raises(TypeError, match=r"unknown setting 'experiment'.*experiment_name"):
        MlflowTraceProcessor(experiment="runs")


def test_each_option_can_be_given_and_says_what_it_is() -> None:
    """Every field has a help text, and a variable of its own unless it is for code only."""
    for option in fields(Settings):
        assert option.metadata["help"]
    variables = [name for option in NAMES for name in env_names(option)]
    assert len(variables) == len(set(variables))
    assert env_names("auto_end_run") == ()


def test_settings_do_not_change() -> None:
    """Settings are frozen."""
    with pytest.raises(FrozenInstanceError):
        Settings().offline = True  # type: ignore[misc]


def test_tags_are_texts() -> None:
    """A tag's value becomes text; a tag whose value is None is left out."""
    assert Settings.resolve(tags={"number": 2, 3: True, "a": None}).tags == {
        "number": "2",
        "3": "True",
    }


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("http://server:5000", "http://server:5000"),
        ("sqlite:///runs.db", "sqlite:///{cwd}/runs.db"),
        ("sqlite:////var/runs.db", "sqlite:////var/runs.db"),
        ("sqlite:///runs.db?timeout=60", "sqlite:///{cwd}/runs.db?timeout=60"),
        ("sqlite+pysqlite:///runs.db", "sqlite+pysqlite:///{cwd}/runs.db"),
        ("sqlite:///%41.db", "sqlite:///{cwd}/%41.db"),
        ("sqlite:///file:runs.db?uri=true", "sqlite:///file:{cwd}/runs.db?uri=true"),
        ("sqlite:///file:/var/r.db?uri=true", "sqlite:///file:/var/r.db?uri=true"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("sqlite:///file::memory:?uri=true", "sqlite:///file::memory:?uri=true"),
        ("sqlite://", "sqlite://"),
        ("./mlruns", "{cwd}/mlruns"),
        ("file:mlruns", "file://{cwd}/mlruns"),
        ("file:///var/mlruns", "file:///var/mlruns"),
        ("databricks", "databricks"),
        ("databricks://profile", "databricks://profile"),
        ("postgresql://user@host/db", "postgresql://user@host/db"),
    ],
)
def test_a_destination_means_the_same_in_any_directory(
    uri: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative destination becomes absolute when it is read, from both sources."""
    cwd = tmp_path.as_posix()
    assert tracking_uri(Settings.resolve(tracking_uri=uri)) == wanted.format(cwd=cwd)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking_uri(Settings.resolve()) == wanted.format(cwd=cwd)


@pytest.mark.parametrize("name", ["50%20", "a b", "%41", "ü"])
def test_a_relative_database_is_that_of_its_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever the directory's name, SQLAlchemy finds the file that it finds from within."""
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    uri = tracking_uri(Settings.resolve(tracking_uri="sqlite:///runs.db?timeout=60"))
    assert uri is not None
    assert make_url(uri).database == str(tmp_path / name / "runs.db")
    assert make_url(uri).query == {"timeout": "60"}


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        (None, True),
        ("sqlite:////var/runs.db", True),
        ("sqlite+pysqlite:////var/runs.db", True),
        ("file:///var/mlruns", True),
        ("/var/mlruns", True),
        ("C:\\mlruns", True),
        ("http://host", False),
        ("databricks", False),
        ("databricks://profile", False),
        ("uc", False),
        ("postgresql://host/db", False),
        ("mysql+pymysql://host/db", False),
        ("arn:aws:sagemaker:eu-1:1:mlflow-tracking-server/a", False),
    ],
)
def test_only_what_cannot_hang_is_local(uri: str | None, local: bool) -> None:
    """A database server may hang as an http server may."""
    assert is_local(uri) is local


@pytest.mark.skipif(sys.platform != "linux", reason="XDG's directories")
@pytest.mark.parametrize(
    ("home", "xdg", "wanted"),
    [
        ("{home}", None, "{home}/.local/state/qitos-mlflow/spool"),
        ("{home}", "", "{home}/.local/state/qitos-mlflow/spool"),
        ("{home}", "relative", "{home}/.local/state/qitos-mlflow/spool"),
        ("{home}", "{home}/xdg", "{home}/xdg/qitos-mlflow/spool"),
        ("{home}/missing", None, "{home}/missing/.local/state/qitos-mlflow/spool"),
        ("{home}/file", None, "{tmp}/qitos-mlflow-{uid}"),
        ("/proc", None, "{tmp}/qitos-mlflow-{uid}"),
        ("/proc", "relative", "{tmp}/qitos-mlflow-{uid}"),
        ("/proc", "{home}/xdg", "{home}/xdg/qitos-mlflow/spool"),
        (None, None, "{tmp}/qitos-mlflow-{uid}"),
        ("relative", None, "{tmp}/qitos-mlflow-{uid}"),
    ],
)
def test_the_spool_is_where_the_user_can_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str | None, xdg: str | None, wanted: str
) -> None:
    """In the state directory, if it can be made; never in a relative one; else a temporary one."""
    place = tmp_path / "home"
    place.mkdir()
    (place / "file").touch()
    names = {"home": place, "tmp": tempfile.gettempdir(), "uid": os.getuid()}
    monkeypatch.delenv("QITOS_MLFLOW_SPOOL_DIR")
    for name, value in (("HOME", home), ("XDG_STATE_HOME", xdg)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value.format(**names))
    if home in (None, "relative"):  # And a user without a name.
        monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    if os.getuid() == 0:  # Who may write everywhere, also where the kernel then refuses it.
        access = os.access
        monkeypatch.setattr(os, "access", lambda at, mode: at != Path("/proc") and access(at, mode))
    assert Settings.resolve().spool_dir == Path(wanted.format(**names))
    assert list(place.iterdir()) == [place / "file"]


def test_no_destination_is_mlflows_default() -> None:
    """Without a destination the result is None: MLflow chooses when the trace starts."""
    assert tracking_uri(Settings.resolve()) is None
