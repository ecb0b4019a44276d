"""What files are called and hold reaches the terminal as plain text of bounded length."""

import doctest
from pathlib import Path

import pytest
from onnx import TensorProto
from onnx_graphsurgeon.logger import G_LOGGER
from rich.console import Console
from support.command_line import run_regcache
from support.onnx_mutations import SPECS
from support.tiny_vit import TinyVit

from regcache.compiler.reporter import Reporter
from regcache.passes import errors
from regcache.passes.errors import one_line

ESCAPES = "\x1b[31mred\x1b[0m \x07\u202e\x9b2J"


def test_the_examples_of_the_module() -> None:
    found = doctest.testmod(errors)
    assert found.attempted >= 3
    assert not found.failed


def test_plain_text_stays_as_it_is() -> None:
    for text in ("no such file: Größe/写真.onnx", "[/b] is 1 µm", "a \\ b", ""):
        assert one_line(text) == text
    assert one_line("two\n\tlines  and\r\nspaces ") == "two lines and spaces"


def test_control_characters_are_written_out() -> None:
    line = one_line(f"operator {ESCAPES}, file \udcff")
    assert line.isprintable()
    assert line == r"operator \x1b[31mred\x1b[0m \x07\u202e\x9b2J, file \udcff"


@pytest.mark.parametrize("sign", ["x", "\x1b", "\n x", "é"])
def test_what_is_wrong_is_told_at_both_ends(sign: str) -> None:
    line = one_line(f"no operator {sign * 5000} is known")
    assert len(line) < 900
    assert line.startswith("no operator ")
    assert line.endswith(" is known")


def test_steps_and_warnings_are_plain_text() -> None:
    console = Console(record=True, soft_wrap=True, highlight=False, width=10_000)
    reporter = Reporter(console)
    reporter.step(f"reading {ESCAPES}")
    reporter.warn(f"{ESCAPES} [/b]")
    lines = console.export_text().splitlines()
    written = one_line(ESCAPES)
    assert lines == [f"reading {written}", f"warning: {written} [/b]"]


def test_an_error_is_one_plain_line(tmp_path: Path) -> None:
    model = TinyVit(SPECS[0]).model()
    model.graph.node[3].op_type = f"{ESCAPES}{'x' * 5000}"
    path = tmp_path / "[bold]hostile.onnx"
    path.write_bytes(model.SerializeToString())
    outcome = run_regcache("inspect", path)
    assert outcome.code == 2
    assert not outcome.out
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("regcache: error: ")]
    assert f"{path}: " in line
    assert r"\x1b[31mred" in line
    assert line.isprintable()
    assert len(line) < 1000


def test_what_a_file_calls_its_outputs_is_printed_as_text(tmp_path: Path) -> None:
    model = TinyVit(SPECS[0]).model()
    name = f"[/b]{ESCAPES}"
    for node in model.graph.node:
        node.output[:] = [name if item == "pooled" else item for item in node.output]
    model.graph.output[0].name = name
    path = tmp_path / "[bold]hostile.onnx"
    path.write_bytes(model.SerializeToString())
    outcome = run_regcache("inspect", path)
    assert outcome.code == 0, outcome.err
    assert one_line(name) in outcome.out
    assert str(path) in outcome.out
    assert all(line.isprintable() for line in (outcome.out + outcome.err).splitlines())


def test_no_library_writes_to_standard_output(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """onnx-graphsurgeon warns there, of BF16 for one."""
    model = TinyVit(SPECS[0]).model()
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.BFLOAT16
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 5  # so that it is refused
    G_LOGGER.once_logged.clear()
    path = tmp_path / "bf16.onnx"
    path.write_bytes(model.SerializeToString())
    outcome = run_regcache("inspect", path)
    assert "needs one image input" in outcome.err
    assert not outcome.out
    assert not capfd.readouterr().out
