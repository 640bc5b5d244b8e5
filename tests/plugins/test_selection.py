"""What QITOS_TRACE_PLUGINS selects."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow._selection import NOTHING_WORDS, VARIABLE, Selection
from qitos_mlflow._startup import OFF

INSTALLED = [("mlflow", "qitos-mlflow"), ("my-sink", "Acme_Traces"), ("wandb", "other")]


def selected(text: str | None) -> list[str]:
    selection = Selection.parse(text)
    ranked = [(selection.rank(name, dist), name) for name, dist in INSTALLED]
    return [name for rank, name in sorted((r, n) for r, n in ranked if r is not None)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (None, ["mlflow", "my-sink", "wandb"]),
        ("all", ["mlflow", "my-sink", "wandb"]),
        ("*", ["mlflow", "my-sink", "wandb"]),
        ("mlflow", ["mlflow"]),
        ("wandb,mlflow", ["wandb", "mlflow"]),
        (" WandB ,, MLFLOW,wandb ", ["wandb", "mlflow"]),
        ("my_sink", ["my-sink"]),
        ("MY-SINK", ["my-sink"]),
        ("acme-traces:my_sink", ["my-sink"]),
        ("other:my-sink", []),
        ("no:mlflow", ["my-sink", "wandb"]),
        ("all,no:MLflow", ["my-sink", "wandb"]),
        ("no: qitos_mlflow:mlflow", ["my-sink", "wandb"]),
        ("mlflow,no:mlflow", []),
        ("wandb,all", ["wandb", "mlflow", "my-sink"]),
        ("none", []),
        ("None", []),
        ("off", []),
        ("0", []),
        ("", []),
        (" , ", []),
        ("none,mlflow", []),
        ("qitos_mlflow.mlflow_plugin.plugin", []),
    ],
)
def test_selection(text: str | None, names: list[str]) -> None:
    """Each form of the variable selects what it promises, in its order."""
    assert selected(text) == names


def test_unknown_names() -> None:
    """Names that no installed plugin has are listed, wanted and excluded ones alike."""
    selection = Selection.parse("mlflow,Nope,no:gone-too,other:mlflow")
    assert selection.unknown(INSTALLED) == ["nope", "other:mlflow", "gone_too"]
    assert Selection.parse("all,no:wandb").unknown(INSTALLED) == []


@pytest.mark.parametrize(
    ("value", "asked"),
    [
        (None, False),
        ("mlflow", True),
        ("qitos-mlflow:MLflow", True),
        ("all", True),
        ("wandb", False),
        ("all,no:mlflow", False),
        ("no:wandb", False),
        ("none", False),
        ("other:all", False),
    ],
)
def test_asks_for(monkeypatch: pytest.MonkeyPatch, value: str | None, asked: bool) -> None:
    """A plugin learns whether the variable asks for it, or it is merely installed."""
    if value is None:
        monkeypatch.delenv(VARIABLE)
    else:
        monkeypatch.setenv(VARIABLE, value)
    assert Selection.from_environ().asks_for("mlflow") is asked


@given(st.text(alphabet="aAlL-_:*,no 0\u00fc\u2028", max_size=30))
def test_every_text_is_a_selection(text: str) -> None:
    """No value of the variable raises, and none selects what it takes out."""
    Selection.parse(text)
    for name, distribution in INSTALLED:
        assert Selection.parse(f"{text},no:{name}").rank(name, distribution) is None


def test_the_start_up_line_has_the_same_words_for_nothing() -> None:
    """It has a list of its own, because it must not import ours."""
    assert {"", *NOTHING_WORDS} == set(OFF)
