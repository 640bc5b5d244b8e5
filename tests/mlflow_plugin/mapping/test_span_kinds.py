"""The table of span types agrees with the data classes, and with what the docs say of them."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from qitos_mlflow.mlflow_plugin.mapping.span_kinds import SPAN_KINDS
from qitos_mlflow.tracing import span_data

DOCS = Path(__file__).parents[3] / "docs" / "plugins.md"


def data_classes() -> dict[str, set[str]]:
    """Each type of span that has a data class, with the fields of the class."""
    found = [one for one in vars(span_data).values() if isinstance(one, type)]
    return {
        one.kind.value: {field.name for field in dataclasses.fields(one)} - {"_", "task"}
        for one in found
        if issubclass(one, span_data.SpanData) and dataclasses.is_dataclass(one)
    }


def test_every_span_type_has_a_row() -> None:
    """No type of the tracing API is missing from the table, and the table has no other."""
    assert SPAN_KINDS.keys() == {kind.value for kind in span_data.SpanType}
    assert data_classes().keys() <= SPAN_KINDS.keys()


def test_the_docs_have_the_fields_of_each_span_type() -> None:
    """docs/plugins.md names every field that plugins find in `span.data`, by type."""
    shown: dict[str, set[str]] = {}
    for types, fields in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*) \|$", DOCS.read_text(), re.M):
        for kind in re.findall(r"`(\w+)`", types):
            shown.setdefault(kind, set()).update(re.findall(r"`(\w+)`", fields))
    for kind, fields in data_classes().items():
        assert fields <= shown[kind], kind
