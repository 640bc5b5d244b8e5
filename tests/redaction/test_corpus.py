"""Recall and precision on the corpus stay what SECURITY.md says; what is cut is redacted before."""

from __future__ import annotations

import json

import pytest

from qitos_mlflow.redaction.redact import MARKER, redact, redact_text
from qitos_mlflow.redaction.trim import MARGIN_CHARS, cut, cut_later
from tests.redaction import corpus
from tests.redaction.corpus import Item

SECRET = "hunter2xyz9"
HARD = [item for name in ("hard", "held_out_hard") for item in corpus.hard(name)]
HARMLESS = [item for name in ("harmless", "held_out_harmless") for item in corpus.harmless(name)]


@pytest.mark.parametrize("name", ["hard", "held_out_hard"])
def test_most_secrets_are_found_in_hard_places(name: str) -> None:
    """At least 9 of 10 secrets are found, also in texts that the rules were not written for."""
    found = corpus.totals(corpus.hard(name), Item.redacted)
    assert found["found"] >= 0.9 * found["secrets"]
    assert found["damaged"] <= 0.05 * found["items"]


def test_the_corpus_is_large() -> None:
    """Recall is measured on hundreds of secrets in at least ten kinds of place."""
    assert len(HARD) >= 250
    assert sum(len(item.secrets) for item in HARD) >= 300
    assert len({item.kind for item in HARD}) >= 10


@pytest.mark.parametrize("vendor", [*corpus.MAIN, *corpus.OTHERS])
def test_keys_of_vendors_are_found_in_any_place(vendor: str) -> None:
    """A vendor's key is known by its shape, without a name beside it."""
    keys = (corpus.MAIN | corpus.OTHERS)[vendor]
    found = corpus.totals(corpus.vendors({vendor: keys}), Item.redacted)
    assert found["found"] == found["secrets"]


def test_keys_behind_another_word_are_found() -> None:
    """``backup_ghp_…``: a joint is no reason to overlook a key of the main vendors."""
    found = corpus.totals(corpus.vendors(corpus.MAIN, corpus.GLUED), Item.redacted)
    assert found["found"] >= 0.97 * found["secrets"]


@pytest.mark.parametrize("name", ["harmless", "held_out_harmless"])
def test_code_and_logs_stay(name: str) -> None:
    """Of ordinary code, configuration, logs and documentation at least 95 % is unchanged."""
    clean = corpus.totals(corpus.harmless(name), Item.redacted)
    assert clean["damaged"] <= 0.05 * clean["items"]


@pytest.mark.parametrize(
    "item", [item for item in HARD if not item.is_json], ids=lambda item: item.kind
)
def test_a_second_pass_finds_nothing_more(item: Item) -> None:
    """What is redacted stays as it is."""
    once = redact_text(item.text)
    assert redact_text(once) == once


def test_json_stays_json() -> None:
    """A text that is JSON is JSON afterwards."""
    found = [item.text for item in HARD + HARMLESS if is_json(item.text)]
    assert len(found) > 20
    assert not [text for text in found if not is_json(redact_text(text))]


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


STRADDLING = [
    f"curl -u user:{SECRET} http://a",
    f"postgres://admin:{SECRET}@db/x",
    "x ghp_0123456789abcdefABCDEF0123456789abcd y",
    f'{{"value": "{SECRET}", "name": "API_KEY"}}',
    f"user,password\nann,{SECRET}\n",
    f"password={SECRET} and more",
]


@pytest.mark.parametrize("text", STRADDLING)
def test_a_credential_at_the_cut_is_redacted_before_the_cut(text: str) -> None:
    """Wherever the cut falls in a credential, no part of it is left."""
    secret = SECRET if SECRET in text else text.split()[1]
    for before in range(len(text)):
        long = "word " * 20 + "\n" + text + " word" * MARGIN_CHARS
        kept = redact(cut_later(long, 101 + before))
        assert secret[:6] not in kept
        assert kept.endswith(f"[cut: {len(long)} characters in all]")
        assert len(kept) <= len(cut(long, 101 + before)) + len(MARKER)


def test_a_cut_text_is_what_it_was() -> None:
    """If there is nothing to hide, the text is cut where it should be."""
    long = "größe " * 5000
    for length in (0, 1, 100, 2000, len(long) - 1):
        assert redact(cut_later(long, length)) == cut(long, length)
