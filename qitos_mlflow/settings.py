"""The settings: one frozen `Settings`, with each option declared once.

A value comes from the argument in code, else from its environment variable, else from its
default. This module imports neither mlflow nor qitos and writes nothing to the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs

from qitos_mlflow._guard import warn
from qitos_mlflow.errors import SettingsError

MIB = 1024 * 1024

TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off", ""})

SCHEMES = frozenset(
    {"http", "https", "file", "sqlite", "mysql", "mssql", "postgresql"}
    | {"databricks", "databricks-uc", "uc"}
)
"""The tracking stores of MLflow itself."""

STORE_GROUP = "mlflow.tracking_store"
"""Entry-point group in which other packages add stores."""

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"

MOST_SHOWN = 24
"""Longer values are not repeated in an error, because they may be a credential in the wrong
variable (characters)."""

PREFIX = "QITOS_MLFLOW_"
"""Begins the names of our variables."""

EVALUATION_VARIABLE = f"{PREFIX}EVALUATION"
"""The evaluation that a process is part of. No setting: see `mlflow_plugin.evaluations`."""

INSTEAD = {
    "tracking_uri": f"use {TRACKING_VARIABLE}",
    "auto_end_run": "auto_end_run is given in code, to MlflowTraceProcessor or autolog",
}
"""The settings that have no variable of ours, and what to do instead of setting one."""


def _flag(value: object) -> bool:
    word = str(value).strip().lower()
    if word not in TRUE_WORDS | FALSE_WORDS:
        raise ValueError("expected true or false (1/0, yes/no, on/off)")
    return word in TRUE_WORDS


def _seconds(value: object) -> float:
    with contextlib.suppress(ValueError):
        number = float(str(value))
        if 0 <= number < 86_400:
            return number
    raise ValueError("expected a number of seconds from 0 to 86400, such as 2.5")


def _bytes(value: object) -> int:
    with contextlib.suppress(ValueError):
        number = int(str(value))
        if number >= 1:
            return number
    raise ValueError(f"expected a whole number of bytes, at least 1, such as {MIB}")


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text that is not empty, such as 'my-agents'")
    return value


def _optional(parse: Callable[[object], str]) -> Callable[[object], str | None]:
    return lambda value: None if value == "" else parse(value)


def _tags(value: object) -> Mapping[str, str]:
    if isinstance(value, str):  # From the environment.
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, Mapping):
        raise ValueError('expected a mapping, in the environment as JSON, such as {"env": "dev"}')
    return {str(key): str(item) for key, item in value.items() if item is not None}


def _directory(value: object) -> Path:
    path = os.fspath(value) if isinstance(value, (str, os.PathLike)) else None
    if not isinstance(path, str) or not path.strip():
        raise ValueError("expected a directory, such as '/var/spool/qitos'")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{error}: give the directory without ~") from error


def _users(value: object) -> frozenset[int]:
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, Iterable):
        raise ValueError(_USERS_EXPECTED)
    found = {_user_id(name) for name in names if str(name).strip()}
    return frozenset(found)


def _user_id(name: object) -> int:
    text = str(name).strip()
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ImportError, KeyError):  # Windows; there is no such user.
        import pwd

        return pwd.getpwnam(text).pw_uid
    raise ValueError(f"there is no user {text!r}: {_USERS_EXPECTED}")


_USERS_EXPECTED = "expected users, as ids or names, such as '1001,agents'"


def temporary_name() -> str:
    """The name of a spool in the directory for temporary files, the same at each start."""
    return f"qitos-mlflow-{getattr(os, 'getuid', int)()}"


def _state_directories() -> Iterator[Path]:
    with contextlib.suppress(RuntimeError):  # A user without a home.
        yield Path(platformdirs.user_state_dir("qitos-mlflow"))
    yield Path(os.path.expanduser("~/.local/state/qitos-mlflow"))  # noqa: PTH111 - never raises


def default_spool() -> Path:
    """In the user's state directory (XDG on Linux), if it is there or can be made."""
    for state in _state_directories():
        path = state / "spool"
        # A relative path changes with the directory: XDG_STATE_HOME, or ~ of a user without a home.
        if path.is_absolute():
            there = next(one for one in (path, *path.parents) if os.path.exists(one))  # noqa: PTH110
            if os.access(there, os.W_OK | os.X_OK):
                return path
    try:
        return Path(tempfile.gettempdir(), temporary_name())
    except OSError:  # This user can write nowhere.
        return Path(os.path.abspath(os.sep), temporary_name())  # noqa: PTH100


def usable_uri(value: object) -> str:
    """`value` as a tracking URI that MLflow has a store for. A path is such a URI too.

    Asks the installed packages only if MLflow itself has no such store. Connects to nothing.

    Raises:
        ValueError: there is no such store; the text says what to give instead, and may repeat
            parts of `value`.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError("expected a URI such as http://localhost:5000, or a path")
    text = text.strip()
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme in {"http", "https"}:
        _check_host(text)
    # One letter is a drive of Windows. "mysql+pymysql" names store and driver.
    elif colon and re.fullmatch(r"[\w.+-]{2,}", scheme) and scheme.split("+")[0] not in SCHEMES:
        if rest.partition("/")[0].isdigit():
            raise ValueError(f"it has no scheme; did you mean http://{text}?")
        from qitos_mlflow._entry_points import entry_points

        stores = {found.name for found in entry_points(STORE_GROUP)}
        if scheme[0].isalpha() and scheme not in stores:
            known = ", ".join(sorted(SCHEMES))
            raise ValueError(f"MLflow has no store {scheme!r}; it has: {known}")
    return text


def _check_host(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        wrong = "" if (parts.hostname, parts.port)[0] else "it names no host"
    except ValueError:  # Its text may hold a part of the password.
        wrong = "its host or port is not valid"
    if wrong:
        raise ValueError(f"{wrong}; expected a URI such as http://localhost:5000")


def _option(parse: Any, default: Any, help: str) -> Any:
    factory = default if callable(default) else lambda: default
    return field(default_factory=factory, metadata={"parse": parse, "help": help})


@dataclass(frozen=True)
class Settings:
    """Every setting of one MLflow destination. Build it with `Settings.resolve`."""

    experiment_name: str | None = _option(
        _optional(_text),
        None,
        "MLflow experiment, created when missing; if not set, that of the parent run, else the one "
        "that MLflow itself uses, else `qitos`",
    )
    run_name: str | None = _option(
        _optional(_text), None, "MLflow run name; if not set, the trace's name, such as the agent's"
    )
    tracking_uri: str | None = _option(
        _optional(usable_uri),
        None,
        "tracking server or store; if not set, MLFLOW_TRACKING_URI, else MLflow's local store",
    )
    parent_run_id: str | None = _option(
        _optional(_text),
        None,
        "MLflow's id of the run that each run is a child of; if not set, the run that is open "
        "where the agent runs",
    )
    tags: Mapping[str, str] = _option(_tags, dict, "tags of every run; in the environment as JSON")
    auto_end_run: bool = _option(_flag, True, "end the run when the trace ends")
    capture_content: bool = _option(
        _flag, True, "log inputs and outputs; if off, metrics, span tree and times remain"
    )
    log_traces: bool = _option(_flag, True, "log the span tree of each run as an MLflow trace")
    log_artifacts: bool = _option(
        _flag, True, "log the final answer and QitOS's run directory as artifacts"
    )
    offline: bool = _option(
        _flag, False, "write to the spool only; `qitos-mlflow sync` delivers later"
    )
    start_timeout_s: float = _option(
        _seconds, 2.0, "longest wait for the new run when a trace starts (seconds)"
    )
    flush_timeout_s: float = _option(
        _seconds, 10.0, "longest wait of force_flush() and shutdown() (seconds)"
    )
    exit_timeout_s: float = _option(
        _seconds, 5.0, "longest delay of the interpreter's exit (seconds)"
    )
    local_exit_timeout_s: float = _option(
        _seconds,
        60.0,
        "the same for a local store, sqlite or files, while it makes progress (seconds)",
    )
    queue_bytes: int = _option(
        _bytes,
        64 * MIB,
        "memory for records on their way to the spool (bytes); processors with the same "
        "destination share it, and the first one decides",
    )
    field_bytes: int = _option(
        _bytes, MIB, "largest input, output or other field; the rest is cut (bytes)"
    )
    spool_dir: Path = _option(_directory, default_spool, "directory of the spool")
    spool_owners: frozenset[int] = _option(
        _users,
        frozenset(),
        "users whose files and directories are trusted in a spool that is shared, as ids or names",
    )
    spool_bytes: int = _option(
        _bytes,
        1024 * MIB,
        "disk space for all segments in the spool's directory (bytes); beyond it, new spans are "
        "dropped; as with `queue_bytes`, the first one decides",
    )
    spool_fsync: bool = _option(
        _flag,
        False,
        "bring each write to the disk at once, so that records survive a power cut; as with "
        "`queue_bytes`, the first one decides",
    )

    @classmethod
    def resolve(cls, **given: Any) -> Settings:
        """Settings from `given`, the environment and the defaults, in that order.

        An argument that is None counts as not given, and so does an empty variable. A variable
        that begins with ``QITOS_MLFLOW_`` and belongs to no setting causes one warning.
        ``MLFLOW_TRACKING_URI`` is only checked here; its value is read when a trace starts.

        Raises:
            TypeError: there is no setting of that name.
            SettingsError: a value cannot be used; the text names setting, value and source.
        """
        options = [option.name for option in fields(cls)]
        for name in given:
            if name not in options:
                raise TypeError(f"unknown setting {name!r}; the settings are: {', '.join(options)}")
        values: dict[str, Any] = {}
        for name in options:
            value, source = given.get(name), f"argument {name}"
            for variable in env_names(name):
                if value is None and (text := os.environ.get(variable)):
                    value, source = text, f"environment variable {variable}"
            if value is not None:
                values[name] = parsed(name, value, source)
        if not values.get("tracking_uri") and (uri := os.environ.get(TRACKING_VARIABLE)):
            parsed("tracking_uri", uri, f"environment variable {TRACKING_VARIABLE}")
        _warn_of_unknown()
        return cls(**values)


def env_names(option: str) -> tuple[str, ...]:
    """The environment variables of `option`."""
    return () if option in INSTEAD else (f"{PREFIX}{option.upper()}",)


def parsed(name: str, value: object, source: str) -> Any:
    """`value` as the setting `name` takes it; raises `SettingsError`, which names `source`."""
    try:
        return Settings.__dataclass_fields__[name].metadata["parse"](value)
    except (TypeError, ValueError) as error:
        reason = str(error)
    from qitos_mlflow.redaction.redact import redact_text, without_credentials

    shown = f"={value!r}"
    if name == "tracking_uri" and isinstance(value, str):
        shown = f"={without_credentials(value)!r}"
    elif name == "tags" or len(shown) > MOST_SHOWN:  # No rule finds every secret in free text.
        shown = f", a {type(value).__name__},"
    # Outside the except clause, and so without a cause: the cause is not redacted.
    raise SettingsError(redact_text(f"{source}{shown} cannot be used: {reason}"))


def _warn_of_unknown() -> None:
    known = [name for option in fields(Settings) for name in env_names(option.name)]
    ours = ", ".join(sorted(name for name in known if name.startswith(PREFIX)))
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in (*known, EVALUATION_VARIABLE):
            advice = INSTEAD.get(name[len(PREFIX) :].lower(), f"the variables are: {ours}")
            warn(f"settings.{name}", "%s is set, but no such setting exists; %s", name, advice)
