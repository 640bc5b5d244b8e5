"""The record's types: what docs/extending.md says of them, and what plugins are handed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

from qitos_mlflow.recording import record
from qitos_mlflow.recording.normalize import KINDS

DOCS = Path(__file__).parents[2] / "docs" / "extending.md"
BEGIN, END = "<!-- generated from recording/record.py -->\n", "<!-- end -->"
EVERYWHERE = {"version", "kind", "trace_id", "added"}


def fields(kind: type) -> dict[str, str]:
    """The fields that one kind of record has of its own, each with its docstring."""
    (tree,) = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(tree.body, [*tree.body[1:], ast.Pass()], strict=True):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
            found[field.target.id] = str(text.value.value) if is_text else ""
    return {name: text for name, text in found.items() if name not in EVERYWHERE}


def table() -> str:
    """The tables of docs/extending.md: each kind of record that plugins are asked about."""
    found = []
    for kind in get_args(record.Record):
        (name,) = get_args(get_type_hints(kind)["kind"])
        if name in KINDS:
            rows = [f"| `{field}` | {text} |" for field, text in fields(kind).items()]
            says = (kind.__doc__ or "").rstrip(".")
            found.append("\n".join([f"| `{name}` | {says} |", "|---|---|", *rows, ""]))
    return "\n".join(found)


def test_the_docs_have_the_fields_of_the_record() -> None:
    """docs/extending.md has every field of each kind, as `recording.record` describes it."""
    text = DOCS.read_text("utf-8")
    shown = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip()
    assert shown == table().strip(), f"put this into {DOCS.name}:\n\n{table()}"
    assert f"`version` ({record.RECORD_VERSION} today)" in text


def test_every_field_is_described() -> None:
    """A reader of the types finds the meaning and the unit of each field beside it."""
    parts = (record.RunSettings, record.Code, record.Failure, record.Added)
    for kind in (*get_args(record.Record), *parts):
        assert all(fields(kind).values()), kind


def test_the_record_is_known_without_mlflow() -> None:
    """Another durable plugin imports the types without MLflow and without our MLflow plugin."""
    code = (
        "import sys, qitos_mlflow.recording.record; "
        "print([name for name in sys.modules if 'mlflow_plugin' in name or name == 'mlflow'])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
