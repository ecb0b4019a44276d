"""The Markdown summary holds every number, whatever the file names."""

from pathlib import Path

import numpy as np
import pytest

from regcache.passes.errors import InputError
from regcache.runtime.parity import ParityMeter
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.parity_summary import append_summary, summary
from regcache.runtime.tensor_parity import TensorParity
from regcache.runtime.thresholds import Thresholds


def result(error: float = 0.0, blocks: bool = False, name: str = "a.jpg") -> ParityResult:
    eye = np.eye(3, dtype=np.float32)
    meter = ParityMeter(output_names=("pooled",))
    meter.update([eye], [eye + np.float32(error)], [name, "b.jpg", "c.jpg"])
    hidden = TensorParity(
        name="blocks.0", cosine_mean=0.9, cosine_min=0.5, relative_error=0.4, max_abs_error=2
    )
    return meter.result(Thresholds(cosine_min=0.99), blocks=(hidden,) if blocks else None)


def rows(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|") and "---" not in line
    ]


def test_passed() -> None:
    text = summary(result(), "my-artifact")
    assert text.startswith("### regcache parity: passed\n")
    assert "my-artifact against PyTorch, 3 images" in text
    assert ["cosine_min", "1.00000", "at least 0.99", "ok"] in rows(text)
    assert ["pooled", "1.00000", "1.00000", "0.0000", "0"] in rows(text)
    assert "details" not in text


def test_failed_names_the_threshold_and_the_block() -> None:
    text = summary(result(error=0.2, blocks=True), "my-artifact")
    assert text.startswith("### regcache parity: FAILED\n")
    failed = [row[0] for row in rows(text) if row[-1] == "**falls short**"]
    assert failed == ["cosine_mean", "cosine_min"]
    assert "The error first jumps in blocks.0." in text
    assert ["blocks.0", "0.90000", "0.50000", "0.4000", "2"] in rows(text)


def test_names_do_not_break_the_markdown() -> None:
    text = summary(result(error=0.2, name="a|`<b>`\n[x](y).jpg"), "x | y")
    assert r"a\|\`\<b\>\`\\n\[x\](y).jpg" in text
    assert r"x \| y against" in text


def test_is_appended(tmp_path: Path) -> None:
    file = tmp_path / "summary.md"
    file.write_text("before\n")
    append_summary(result(), "a", file)
    append_summary(result(), "b", file)
    assert file.read_text() == "before\n" + summary(result(), "a") + summary(result(), "b")
    with pytest.raises(InputError, match="cannot write"):
        append_summary(result(), "a", tmp_path)
