"""What is sent keeps to MLflow's limits, and what does not fit is counted."""

from __future__ import annotations

import math
import posixpath
import re
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qitos_mlflow.mlflow_plugin.mapping import limits
from qitos_mlflow.mlflow_plugin.mapping.limits import (
    clean_key,
    clean_metric,
    clean_ms,
    clean_step,
    clean_text,
)


def is_legal(key: str) -> bool:
    """MLflow's own rule, in its own words (mlflow/utils/validation.py)."""
    normal = posixpath.normpath(key)
    unique = normal == key and normal != "." and not normal.startswith(("..", "/"))
    return bool(re.fullmatch(r"[/\w.\- :]+", key)) and unique and len(key) <= 250


@given(st.text())
def test_any_text_becomes_a_legal_key(text: str) -> None:
    """Whatever a tool is called, its name becomes a key that MLflow takes."""
    assert is_legal(clean_key(text))


@given(st.text(alphabet="./_- :a#\n\ud800é", max_size=12))
def test_awkward_paths_become_legal_keys(text: str) -> None:
    """Dots, slashes and lone surrogates in any order become a key that MLflow takes."""
    key = clean_key(text)
    assert is_legal(key)
    key.encode()


@pytest.mark.parametrize(
    "key", ["a", "tool/search/calls", "gpt-4o:free", "計算/結果", "Über größe", "a.b"]
)
def test_legal_keys_stay(key: str) -> None:
    """A name MLflow takes is not touched."""
    assert clean_key(key) == key


def test_different_names_keep_different_keys() -> None:
    """Names that differ only in illegal characters do not become one."""
    names = [
        "what?",
        "what!",
        "what%",
        "what_",
        "what",
        "/what",
        "what/",
        "what\n",
        "w" * 300,
        "w" * 301,
    ]
    assert len({clean_key(name) for name in names}) == len(names)


def test_changed_keys_stay_readable() -> None:
    """A changed key still begins with what can be read of the name; no name gets one."""
    assert clean_key("search[web]").startswith("search_web_-")
    assert clean_key("../etc//passwd").startswith("__/etc/passwd-")
    assert clean_key("") == "unnamed"


def test_mlflow_agrees_with_the_key_rule() -> None:
    """MLflow's own validation takes every cleaned key."""
    from mlflow.utils.validation import _validate_metric_name

    for name in [
        "",
        "a//b",
        "#",
        "../x",
        "..x",
        ".",
        "..",
        "a/../b",
        "🙂",
        "a\0b",
        "x" * 999,
        " a",
        "a ",
        "/",
    ]:
        _validate_metric_name(clean_key(name))


def test_the_table_is_what_mlflow_says() -> None:
    """The limits MLflow's package states for itself are the ones in the table."""
    from mlflow.utils import validation

    assert validation.MAX_METRICS_PER_BATCH == limits.BATCH_METRICS
    assert validation.MAX_PARAMS_TAGS_PER_BATCH == limits.BATCH_PARAMS == limits.BATCH_TAGS
    assert validation.MAX_ENTITIES_PER_BATCH == limits.BATCH_TOTAL
    assert validation.MAX_ENTITY_KEY_LENGTH == limits.KEY_CHARS
    assert validation.MAX_PARAM_VAL_LENGTH == limits.PARAM_CHARS
    assert validation.MAX_TAG_VAL_LENGTH == limits.TAG_CHARS


@given(st.text(alphabet=st.characters(), max_size=40), st.integers(1, 30))
def test_any_text_becomes_storable(text: str, length: int) -> None:
    """Cleaned text fits, has no NUL and can be encoded."""
    clean = clean_text(text, length)
    assert len(clean) <= length
    assert "\0" not in clean
    clean.encode()


def test_losses_of_text_are_counted() -> None:
    """A trimmed text and a replaced character are counted, an untouched text is not."""
    lost: Counter[str] = Counter()
    assert clean_text("x" * 20_000, 6000, lost) == "x" * 5999 + "…"
    assert clean_text("a\0b\ud800", 100, lost) == "a\ufffdb\ufffd"
    assert clean_text("fine, größer", 100, lost) == "fine, größer"
    assert clean_text(5, 100, lost) == "5"
    assert lost == {"text_trimmed": 1, "text_characters": 1}


@pytest.mark.parametrize(
    "value",
    ["abc", math.nan, math.inf, -math.inf, "nan", "1e999", 10**400, [], {}, 1j],
)
def test_what_is_no_number_is_left_out_and_counted(value: object) -> None:
    """One bad value loses only itself, and is counted."""
    lost: Counter[str] = Counter()
    assert clean_metric(value, lost) is None
    assert lost == {"bad_value": 1}


def test_numbers_stay_numbers() -> None:
    """Numbers of any type arrive as floats, an absent one is not a loss."""
    lost: Counter[str] = Counter()
    assert [clean_metric(v, lost) for v in (3, -1.5, "2.5", Decimal("0.1"), 0)] == [
        3,
        -1.5,
        2.5,
        0.1,
        0,
    ]
    assert clean_metric(None, lost) is None
    assert clean_metric(True, lost) == 1.0
    assert not lost


@given(st.one_of(st.none(), st.integers(), st.floats(), st.text(max_size=5)))
def test_steps_and_times_fit(value: object) -> None:
    """Steps and times are whole numbers within 64 bits, whatever they were."""
    assert isinstance(clean_step(value), int)
    assert abs(clean_step(value)) < 2**63
    assert 0 <= clean_ms(value) < 2**63


def test_milliseconds_are_exact() -> None:
    """Nanoseconds become milliseconds without passing through a float."""
    assert clean_ms(1_700_000_000_123_999_999) == 1_700_000_000_123
