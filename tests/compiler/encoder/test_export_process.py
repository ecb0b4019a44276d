"""What becomes of an export in a process of its own that fails."""

import re
import sys
from pathlib import Path

import pytest

from regcache.compiler.encoder.export_process import export_apart
from regcache.passes.errors import InputError


@pytest.mark.slow
def test_what_the_export_raises_is_raised_here(tmp_path: Path) -> None:
    source = tmp_path / "broken.onnx"  # opened without PyTorch, which takes seconds to import
    source.write_bytes(b"no model")
    with pytest.raises(InputError, match=f"^{re.escape(str(source))}: ") as caught:
        export_apart(str(source), tmp_path / "never.onnx", None)
    assert "in answer" in caught.value.__notes__[0], "where it was raised is told, too"
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(("does", "message"), [
    ("kill -9 $$", r"was killed \(out of memory\?\)"),
    ("exit 3", "ended with code 3"),
])  # fmt: skip
def test_a_process_without_an_answer_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, does: str, message: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(InputError, match=f"timm:x: the exporting process {message}"):
        export_apart("timm:x", tmp_path / "never.onnx", None)
