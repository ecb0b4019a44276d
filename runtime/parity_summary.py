"""A parity result as Markdown, as GitHub shows it on the page of a workflow run."""

from collections.abc import Sequence
from pathlib import Path

from regcache.passes.errors import InputError
from regcache.runtime.parity_output import jump_sentence, reference_name, tensor_cells
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.tensor_parity import TensorParity


def append_summary(result: ParityResult, title: str, path: Path) -> None:
    """Append the summary to a file, as GITHUB_STEP_SUMMARY wants it.

    Raises InputError when `path` cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8", errors="backslashreplace") as stream:
            stream.write(summary(result, title))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def summary(result: ParityResult, title: str) -> str:
    """Verdict, thresholds, and outputs and blocks one by one."""
    verdict = "passed" if result.passed else "FAILED"
    parts = [
        f"### regcache parity: {verdict}",
        f"{_text(title)} against {reference_name(result)}, {result.n_images} images; "
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
        said = jump_sentence(result.first_jump).capitalize()
        blocks = _tensors("block", result.blocks)
        parts.append(
            f"<details><summary>Blocks, beside the float ONNX's. {said}.</summary>\n\n{blocks}\n\n"
            "</details>"
        )
    return "\n\n".join(part for part in parts if part) + "\n"


def _tensors(kind: str, tensors: tuple[TensorParity, ...]) -> str:
    header = (kind, "cosine, mean", "worst", "relative error", "largest difference")
    return _table(header, [tensor_cells(tensor) for tensor in tensors]) if tensors else ""


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_text, line))} |" for line in lines)


def _text(text: str) -> str:
    """Text without what Markdown or a table would read as its own."""
    for mark in "\\|`<>[]":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
