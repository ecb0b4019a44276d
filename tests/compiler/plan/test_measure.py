"""What a quick look sees of an encoder."""

import io
from pathlib import Path

import onnx
from rich.console import Console
from support.tiny_artifact import SPEC
from support.tiny_source import RECIPE, photos
from support.tiny_vit import TinyVit

from regcache.compiler.job.options import CompileOptions
from regcache.compiler.plan.measure import TIMING, look
from regcache.compiler.plan.memory import child_peak, resident
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.runtime.list_images import list_images


def test_a_look_measures_the_encoder(tmp_path: Path) -> None:
    encoder, scratch = tmp_path / "tiny.onnx", tmp_path / "scratch"
    onnx.save(TinyVit(SPEC).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    images = photos(tmp_path / "images", 3, seed=1)
    scratch.mkdir()
    said = io.StringIO()
    reporter = Reporter(Console(file=said, soft_wrap=True, width=200))
    options = CompileOptions(source=str(encoder), images=str(images), threads=1)
    seen = look(options, list_images(images), scratch, reporter)
    width, hidden, tokens = SPEC.width, SPEC.hidden, SPEC.grid**2 + 1
    assert seen.sizes.linears == SPEC.depth * (4 * width**2 + 2 * width * hidden)
    assert seen.sizes.tokens == tokens
    # What q, k and v read, the output projection, fc1 and fc2.
    assert seen.sizes.activations == 4 * tokens * SPEC.depth * (3 * width + hidden)
    assert seen.sizes.streams == 4 * tokens * width * (SPEC.depth + 1)
    assert seen.sizes.pixels == 4 * 3 * RECIPE.height * RECIPE.width
    assert seen.sizes.weights == (scratch / "float.onnx").stat().st_size
    assert min(seen.image_seconds, seen.decode_seconds, seen.export_seconds) > 0
    assert seen.process > 10_000_000
    assert TIMING in said.getvalue()


def test_memory_is_told_in_bytes() -> None:
    before = resident()
    block = bytearray(50_000_000)
    assert before > 10_000_000
    assert resident() - before > 0.5 * len(block)
    assert child_peak() >= 0
