"""A parity result as Markdown, as GitHub shows it on the page of a workflow run."""

from collections.abc import Sequence
from pathlib import Path

from regcache.passes.errors import InputError
from regcache.runtime.parity import ParityResult
from regcache.runtime.tensor_parity import TensorParity


def append_summary(result: ParityResult, title: str, path: Path) -> None:
    """Append the summary to a file, as GITHUB_STEP_SUMMARY wants it.

    Raises InputError when `path` cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(summary(result, title))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def summary(result: ParityResult, title: str) -> str:
    """Verdict, thresholds, and outputs and blocks one by one."""
    against = "PyTorch" if result.reference == "pytorch" else "the float ONNX"
    verdict = "passed" if result.passed else "FAILED"
    parts = [
        f"### regcache parity: {verdict}",
        f"{_text(title)} against {against}, {result.n_images} images; "
        f"worst {_text(result.worst_image)} at {result.cosine_min:.5f}",
        _table(
            ("threshold", "measured", "limit", ""),
            [
                (check.name, f"{check.value:.5f}", f"{check.bound} {check.limit:g}",
                 "ok" if check.passed else "**falls short**")
                for check in result.checks
            ],
        ),
        _tensors("output", result.outputs),
    ]  # fmt: skip
    if result.blocks:
        jump = result.first_jump
        said = f"The error first jumps in {jump}." if jump else "The error jumps in no block."
        blocks = _tensors("block", result.blocks)
        parts.append(
            f"<details><summary>Blocks, beside the float ONNX's. {said}</summary>\n\n{blocks}\n\n"
            "</details>"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _tensors(kind: str, tensors: tuple[TensorParity, ...]) -> str:
    header = (kind, "cosine, mean", "worst", "relative error", "largest difference")
    rows = [
        (tensor.name, f"{tensor.cosine_mean:.5f}", f"{tensor.cosine_min:.5f}",
         f"{tensor.relative_error:.4f}", f"{tensor.max_abs_error:.4g}")
        for tensor in tensors
    ]  # fmt: skip
    return _table(header, rows) if rows else ""


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _text(text: str) -> str:
    """Text without what Markdown or a table would read as its own."""
    for mark in "\\|`<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
