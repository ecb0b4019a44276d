"""Compile a tiny encoder into an artifact, as fast as it goes."""

import functools
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from support.command_line import run_regcache
from support.tiny_source import RECIPE, photos
from support.tiny_vit import Spec, TinyVit

from regcache.export.onnx_file import sidecar

SPEC = Spec(width=32, heads=4, hidden=64, depth=1, grid=4)


def tiny_artifact(
    folder: Path, *options: str, batch: int | None = None, depth: int = SPEC.depth
) -> Path:
    """`folder`/artifact, calibrated on `folder`/calibration.

    `batch`: what the encoder's graph fixes it to, if anything. `depth`: its blocks. That of no
    options is compiled once in a process: then `folder` is a copy, and its manifest names the
    original's files.
    """
    if options or batch is not None:
        return _compile(folder, *options, batch=batch, depth=depth)
    shutil.copytree(_plain(depth).name, folder, dirs_exist_ok=True)
    return folder / "artifact"


@functools.cache
def _plain(depth: int) -> "TemporaryDirectory[str]":
    holder = TemporaryDirectory()
    _compile(Path(holder.name), batch=None, depth=depth)
    return holder


def _compile(folder: Path, *options: str, batch: int | None, depth: int) -> Path:
    encoder, artifact = write_tiny(folder, batch=batch, depth=depth), folder / "artifact"
    images = photos(folder / "calibration", 8, seed=1)
    command = ("compile", encoder, "--images", images, "-o", artifact, "--registers", "off")
    fast = ("--rounding", "nearest", "--no-equalize", "--int8-share", "1", "--accept-slower")
    outcome = run_regcache(*command, *fast, "--threads", "1", *options)
    assert outcome.code == 0, outcome
    return artifact


def write_tiny(folder: Path, *, batch: int | None = None, depth: int = SPEC.depth) -> Path:
    """`folder`/tiny.onnx, with its recipe beside it."""
    model = TinyVit(replace(SPEC, depth=depth)).model()
    if batch is not None:
        bake_batch(model, batch)
    encoder = folder / "tiny.onnx"
    onnx.save(model, encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    return encoder


def bake_batch(model: onnx.ModelProto, batch: int) -> None:
    """Fix the batch so that nothing can free it: every image has an offset of its own."""
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    offsets = 1e-6 * np.arange(batch, dtype=np.float32).reshape(batch, 1, 1, 1)
    image = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["own" if name == image else name for name in node.input]
    model.graph.initializer.append(onnx.numpy_helper.from_array(offsets, "offsets"))
    model.graph.node.insert(0, onnx.helper.make_node("Add", [image, "offsets"], ["own"]))
