"""The files of a run, as they are read."""

from __future__ import annotations

from pathlib import Path

from qitos_mlflow.mlflow_plugin.artifacts import read


def test_a_file_keeps_its_newlines(tmp_path: Path) -> None:
    """What is logged is what the file holds."""
    file = tmp_path / "steps.jsonl"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    record = read({"file": str(file)})
    assert record is not None
    assert record["content"].encode() == file.read_bytes()
