"""What can be set: one frozen `Settings`, each option declared once.

A value comes from the argument in code, else from its environment variable, else from its
default. Nothing here imports mlflow or qitos or touches the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Mapping
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
"""The tracking stores of MLflow itself; packages add others in the entry-point group below."""

STORE_GROUP = "mlflow.tracking_store"

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"

PREFIX = "QITOS_MLFLOW_"
"""What our variables begin with."""


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in TRUE_WORDS:
        return True
    if word in FALSE_WORDS:
        return False
    raise ValueError("expected true or false (1/0, yes/no, on/off)")


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


def _optional_text(value: object) -> str | None:
    return None if value == "" else _text(value)


def _optional_uri(value: object) -> str | None:
    return None if value == "" else usable_uri(value)


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


def usable_uri(value: object) -> str:
    """`value` as a tracking URI of a kind that MLflow has a store for; a plain path is one too.

    Asks the installed packages only where MLflow itself has no such store. Connects to nothing.

    Raises:
        ValueError: it is none; the text says what to give instead, and may repeat parts of it.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text.strip():
        raise ValueError("expected a URI such as http://localhost:5000, or a path")
    text = text.strip()
    scheme, colon, rest = text.partition(":")
    scheme = scheme.lower()
    if scheme in {"http", "https"}:
        _check_host(text)
    # One letter is a drive of Windows; "mysql+pymysql" names the driver as well.
    elif colon and re.fullmatch(r"[\w.+-]{2,}", scheme) and scheme.split("+")[0] not in SCHEMES:
        if rest.partition("/")[0].isdigit():
            raise ValueError(f"it has no scheme; did you mean http://{text}?")
        if scheme[0].isalpha() and not _added(scheme):
            known = ", ".join(sorted(SCHEMES))
            raise ValueError(f"MLflow has no store {scheme!r}; it has: {known}")
    return text


def _check_host(uri: str) -> None:
    try:
        parts = urlsplit(uri)
        host, _port = parts.hostname, parts.port  # Each of the three may raise.
    except ValueError:  # Its text may hold a part of the password.
        raise ValueError(
            "its host or port is not valid; expected a URI such as http://localhost:5000"
        ) from None
    if not host:
        raise ValueError("it names no host; expected a URI such as http://localhost:5000")


def _added(scheme: str) -> bool:
    from importlib_metadata import entry_points

    return any(entry.name == scheme for entry in entry_points(group=STORE_GROUP))


def default_spool_dir() -> Path:
    """The spool's directory below the user's state directory (XDG on Linux)."""
    return Path(platformdirs.user_state_dir("qitos-mlflow")) / "spool"


def _option(parse: Any, default: Any, help: str, *, env: str | None = None) -> Any:
    factory = default if callable(default) else lambda: default
    return field(default_factory=factory, metadata={"parse": parse, "help": help, "env": env})


@dataclass(frozen=True)
class Settings:
    """Every setting of one MLflow destination. Build it with `Settings.resolve`."""

    experiment_name: str = _option(
        _text, "qitos", "MLflow experiment, created when missing", env="MLFLOW_EXPERIMENT_NAME"
    )
    run_name: str | None = _option(
        _optional_text,
        None,
        "MLflow run name; falls back to the trace's name, by default the agent's",
    )
    tracking_uri: str | None = _option(
        _optional_uri,
        None,
        "tracking server; when not set, MLflow's own default (MLFLOW_TRACKING_URI, else its "
        "local store)",
        env="",
    )
    tags: Mapping[str, str] = _option(_tags, dict, "tags of every run; in the environment as JSON")
    auto_end_run: bool = _option(_flag, True, "end the run when the trace ends", env="")
    capture_content: bool = _option(
        _flag, True, "log inputs and outputs; off keeps metrics, span tree and timing"
    )
    log_traces: bool = _option(_flag, True, "log an MLflow trace with the span tree for each run")
    log_artifacts: bool = _option(
        _flag, True, "log the final answer and QitOS's run directory as artifacts of the run"
    )
    offline: bool = _option(
        _flag, False, "write to the spool only; `qitos-mlflow sync` delivers it later"
    )
    start_timeout_s: float = _option(
        _seconds, 2.0, "longest wait for the run to be created when a trace starts (seconds)"
    )
    flush_timeout_s: float = _option(
        _seconds, 10.0, "longest wait of force_flush() and shutdown() (seconds)"
    )
    exit_timeout_s: float = _option(
        _seconds, 5.0, "longest time the interpreter's exit is held up (seconds)"
    )
    queue_bytes: int = _option(
        _bytes, 64 * MIB, "memory for records on their way to the spool (bytes)"
    )
    field_bytes: int = _option(
        _bytes, MIB, "longest text kept of one input or output; the rest is cut (bytes)"
    )
    spool_dir: Path = _option(_directory, default_spool_dir, "directory of the spool")
    spool_bytes: int = _option(
        _bytes, 1024 * MIB, "disk space for the spool; newest spans are refused beyond (bytes)"
    )

    @classmethod
    def resolve(cls, **given: Any) -> Settings:
        """Settings from `given`, the environment and the defaults, in that order.

        An argument that is None counts as not given. `env_names` tells which variables an option
        has. One that begins with ``QITOS_MLFLOW_`` and is no option's is one warning.
        ``MLFLOW_TRACKING_URI`` is only checked: it is read when a trace starts.

        Raises:
            TypeError: an option of that name does not exist.
            SettingsError: a value cannot be used; the text names option, value and source.
        """
        known = {option.name: option for option in fields(cls)}
        for name in given:
            if name not in known:
                raise TypeError(f"unknown setting {name!r}; the settings are: {', '.join(known)}")
        values: dict[str, Any] = {}
        for name, option in known.items():
            value, source = given.get(name), f"argument {name}"
            if value is None:
                for variable in env_names(name):
                    if os.environ.get(variable):
                        value, source = os.environ[variable], f"environment variable {variable}"
                        break
            if value is not None:
                values[name] = _parsed(option.metadata["parse"], value, source)
        if not values.get("tracking_uri") and (uri := os.environ.get(TRACKING_VARIABLE)):
            _parsed(usable_uri, uri, f"environment variable {TRACKING_VARIABLE}")
        _warn_of_unknown()
        return cls(**values)


def env_names(option: str) -> tuple[str, ...]:
    """The environment variables that set `option`, the first one set wins."""
    extra = next(f.metadata["env"] for f in fields(Settings) if f.name == option)
    if extra == "":  # Given in code only, or by MLflow's own variable when a trace starts.
        return ()
    own = f"{PREFIX}{option.upper()}"
    return (own, extra) if extra else (own,)


def _parsed(parse: Callable[[Any], Any], value: object, source: str) -> Any:
    try:
        return parse(value)
    except (TypeError, ValueError) as error:
        message = str(error)
    from qitos_mlflow.redaction.uris import redact_text, without_credentials

    # Tags are free text: no rule finds every secret in them.
    shown = f", a {type(value).__name__}," if parse is _tags else f"={value!r}"
    if isinstance(value, str) and parse in (usable_uri, _optional_uri):
        shown = f"={without_credentials(value)!r}"
    message = f"{source}{shown} cannot be used: {message}"
    raise SettingsError(redact_text(message))  # Without a cause: that one is not redacted.


def _warn_of_unknown() -> None:
    known = {name for option in fields(Settings) for name in env_names(option.name)}
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known:
            ours = ", ".join(sorted(other for other in known if other.startswith(PREFIX)))
            instead = INSTEAD.get(name, f"there are: {ours}")
            warn(f"settings.{name}", "%s is set, but there is no such setting; %s", name, instead)


INSTEAD = {
    f"{PREFIX}TRACKING_URI": f"use {TRACKING_VARIABLE}",
    f"{PREFIX}AUTO_END_RUN": "auto_end_run is given in code, to MlflowTraceProcessor or autolog",
}
