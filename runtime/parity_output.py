"""A parity result as JSON, as a JUnit report for CI, and as a table for people."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.table import Table
from rich.text import Text

from regcache.passes.errors import InputError, printable
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.tensor_parity import TensorParity

_LISTS = {"checks", "outputs", "blocks", "pixels", "worst_images", "compared"}
_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_json(result: ParityResult, path: Path) -> None:
    """Write the result as a JSON object. Raises InputError when `path` cannot be written."""
    _write(path, result.model_dump_json(indent=2) + "\n")


def write_junit(result: ParityResult, path: Path) -> None:
    """Write a JUnit report: one test case per threshold, every metric as a property.

    Raises InputError when `path` cannot be written.
    """
    failures = sum(not check.passed for check in result.checks)
    suite = ElementTree.Element(
        "testsuite",
        {"name": "regcache parity", "errors": "0", "skipped": "0"},
        tests=str(len(result.checks)),
        failures=str(failures),
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in result.model_dump(exclude_none=True, exclude=_LISTS).items():
        text = _NOT_IN_XML.sub("?", str(value))
        ElementTree.SubElement(properties, "property", {"name": name, "value": text})
    for check in result.checks:
        named = {"classname": "regcache.parity", "name": check.name, "time": "0"}
        case = ElementTree.SubElement(suite, "testcase", named)
        if not check.passed:
            told = {"type": "parity", "message": check.describe()}
            ElementTree.SubElement(case, "failure", told)
    suites = ElementTree.Element("testsuites")
    suites.append(suite)
    ElementTree.indent(suites)
    xml = ElementTree.tostring(suites, encoding="unicode")
    _write(path, f'<?xml version="1.0" encoding="utf-8"?>\n{xml}\n')


def parity_table(result: ParityResult) -> Table:
    """The result as a table of two columns, for a terminal."""
    verdict = result.failure() or "passed: " + ", ".join(
        f"{check.name} {check.bound} {check.limit:g}" for check in result.checks
    )
    table = Table(
        title=f"Parity with {reference_name(result)}, {result.n_images} images", caption=verdict
    )
    table.add_column("metric")
    table.add_column("value", justify="right")
    rows = {
        "cosine, mean": f"{result.cosine_mean:.5f}",
        "cosine, worst image": f"{result.cosine_min:.5f}",
        "worst image": result.worst_image,
        "signal to noise": f"{result.sqnr_db:.1f} dB",
        "same nearest neighbour": f"{result.nn_agreement:.1%}",
    }
    pixels = None if result.pixels is None else result.pixels.max_difference
    optional = {
        "cosine of patch tokens, mean": (result.patch_cosine_mean, ".5f"),
        "same top class": (result.top1_agreement, ".1%"),
        "k-NN top-1, float": (result.knn_top1_float, ".1%"),
        "k-NN top-1, quantized": (result.knn_top1_quantized, ".1%"),
        "grey levels between pixels": (pixels, ".3g"),
    }
    rows |= {
        name: format(value, style) for name, (value, style) in optional.items() if value is not None
    }
    for name, value in rows.items():
        table.add_row(name, Text(printable(value)))  # as Text: brackets in a name are no markup
    return table


def shortfall(result: ParityResult, artifact: str) -> str:
    """What a failing test says: every threshold, and the worst images, in a few lines."""
    lines = [
        f"{printable(artifact)} is not close enough to {reference_name(result)}, "
        f"on {result.n_images} images:"
    ]
    lines += [
        f"  {'ok  ' if check.passed else 'MISS'} {check.describe()}" for check in result.checks
    ]
    lines.append("the worst images:")
    lines += [f"  {one.cosine:.6f}  {one.image}" for one in result.worst_images]
    return "\n".join(lines)


def block_table(blocks: Sequence[TensorParity], jump: str | None) -> Table:
    """The blocks one by one, for a terminal, with the first whose error leaps."""
    table = Table(title="Blocks, beside the float ONNX's", caption=jump_sentence(jump))
    table.add_column("block")
    for name in ("cosine, mean", "worst token", "relative error", "largest difference"):
        table.add_column(name, justify="right")
    for block in blocks:
        table.add_row(*tensor_cells(block))
    return table


def reference_name(result: ParityResult) -> str:
    """What the result compares with, in words."""
    return "PyTorch" if result.reference == "pytorch" else "the float ONNX"


def jump_sentence(jump: str | None) -> str:
    """Which block's error leaps first, in words."""
    return f"the error first jumps in {jump}" if jump else "the error jumps in no block"


def tensor_cells(tensor: TensorParity) -> tuple[str, ...]:
    """A row of a table: name, mean and worst cosine, relative error, largest difference."""
    numbers = (f"{tensor.cosine_mean:.5f}", f"{tensor.cosine_min:.5f}")
    return (tensor.name, *numbers, f"{tensor.relative_error:.4f}", f"{tensor.max_abs_error:.4g}")


def _write(path: Path, text: str) -> None:
    """Write a whole file or none; links and devices (/dev/stdout) are written through."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            path.write_text(text, encoding="utf-8")
        else:
            _replace(path, text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
