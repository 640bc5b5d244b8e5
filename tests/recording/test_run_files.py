"""The files of a run, as they are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qitos_mlflow.recording.run_files import read


def test_a_file_keeps_its_newlines(tmp_path: Path) -> None:
    """What is logged is what the file holds."""
    file = tmp_path / "steps.jsonl"
    file.write_bytes(b"one\r\ntwo\rthree\n")
    record = read({"file": str(file)})
    assert record is not None
    assert record["content"].encode() == file.read_bytes()


def test_a_file_that_is_not_there_is_no_loss(tmp_path: Path) -> None:
    """A run directory need not hold every file, or be one at all."""
    (tmp_path / "file").touch()
    assert read({"file": str(tmp_path / "steps.jsonl")}) is None
    assert read({"file": str(tmp_path / "file" / "steps.jsonl")}) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EACCES, errno.EIO])
def test_a_file_that_cannot_be_read_is_a_loss(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable file raises, so that the spooling thread counts it as lost."""
    file = tmp_path / "events.jsonl"
    file.touch()

    def fail(path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        read({"file": str(file)})
