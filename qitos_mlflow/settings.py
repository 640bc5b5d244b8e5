"""What can be set: one frozen `Settings`, each option declared once.

A value comes from the argument in code, else from its environment variable, else from its
default. Nothing here imports mlflow or qitos or touches the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import platformdirs

from qitos_mlflow.errors import SettingsError

MIB = 1024 * 1024

TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off", ""})


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
    number = float(str(value))
    if not 0 <= number < 86_400:
        raise ValueError("expected a number of seconds from 0 to 86400")
    return number


def _bytes(value: object) -> int:
    number = int(str(value))
    if number < 1:
        raise ValueError("expected a whole number of bytes, at least 1")
    return number


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("expected a text that is not empty")
    return value


def _optional_text(value: object) -> str | None:
    return None if value is None or value == "" else _text(value)


def _tags(value: object) -> Mapping[str, str]:
    if isinstance(value, str):  # From the environment.
        value = json.loads(value)
    if not isinstance(value, Mapping):
        raise ValueError('expected tags such as {"env": "dev"}')
    return {str(key): str(item) for key, item in value.items()}


def _directory(value: object) -> Path:
    return Path(os.fspath(value) if isinstance(value, (str, os.PathLike)) else str(value))


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
        _optional_text, None, "MLflow run name; falls back to the trace's name"
    )
    tracking_uri: str | None = _option(
        _optional_text,
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

        An argument that is None counts as not given. Each option's variable is
        ``QITOS_MLFLOW_`` and its name in capitals; the experiment is also taken from
        ``MLFLOW_EXPERIMENT_NAME``.

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
            if value is None:
                continue
            try:
                values[name] = option.metadata["parse"](value)
            except (TypeError, ValueError, OverflowError) as error:
                raise SettingsError(f"{source}={value!r} cannot be used: {error}") from error
        return cls(**values)


def env_names(option: str) -> tuple[str, ...]:
    """The environment variables that set `option`, the first one set wins."""
    extra = next(f.metadata["env"] for f in fields(Settings) if f.name == option)
    if extra == "":  # Given in code only, or by MLflow's own variable when the sink asks.
        return ()
    own = f"QITOS_MLFLOW_{option.upper()}"
    return (own, extra) if extra else (own,)
