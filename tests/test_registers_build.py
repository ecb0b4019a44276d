"""Graphs with registers, deleted sinks and Q/DQ pairs build with TensorRT-RTX, still in INT8."""

import itertools
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
import zoo
from building import assert_builds, int8_products, needs_tensorrt
from running import run_graph

from regcache.compiler.curation.registers import capture_registers
from regcache.export.source import open_source
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.onnx_file import load_model
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

FORMS = ("kv", "token", "delete", "kv and delete")


def with_registers(view: EncoderView, form: str) -> gs.Graph:
    """Four registers and five deleted sinks from the middle block on."""
    start, end = len(view.blocks) // 2, len(view.blocks)
    tokens = np.random.default_rng(0).standard_normal((4, view.width)).astype(np.float32)
    graph = view.graph
    if "delete" in form:
        graph = run(DeleteSinks(start, 5), graph).graph
    if "kv" in form:
        keys, values = capture_registers(view, start, end, tokens)
        graph = run(SpliceRegisters(start, end, keys, values), graph).graph
    if form == "token":
        graph = run(SpliceRegisterTokens(start, end, tokens), graph).graph
    return graph


def quantized(graph: gs.Graph) -> gs.Graph:
    """Signed Q/DQ pairs with the ranges of one random image."""
    names = tuple(site.tensor.name for site in view_encoder(graph).sites)
    image = np.random.default_rng(0).standard_normal((1, 3, zoo.SIDE, zoo.SIDE), dtype=np.float32)
    outputs = run_graph(run(Observe(names), graph).graph, image, optimize=True)
    scales = {
        name: Affine.from_range(float(x.min()), float(x.max()), "int8", symmetric=True)
        for name, x in zip(names, outputs[len(graph.outputs) :], strict=True)
    }
    return run(QuantizeLinears(scales), graph).graph


def check(path: Path, form: str) -> None:
    view = view_encoder(canonicalize(load_model(path)))
    graph = with_registers(view, form)
    if form in ("token", "kv and delete"):
        assert_builds(graph)  # in float; the others are parts of these
    # One product each for qkv, out, fc1 and fc2 of every block.
    assert int8_products(assert_builds(quantized(graph))) == 4 * len(view.blocks)


@needs_tensorrt
@pytest.mark.sample
@pytest.mark.xdist_group("sample")
@pytest.mark.parametrize("form", FORMS)
def test_dinov2_builds(form: str, tmp_path: Path) -> None:
    path = tmp_path / "dinov2.onnx"
    open_source("sample:dinov2-small").export(path)
    check(path, form)


@needs_tensorrt
@pytest.mark.xdist_group("clip-b16")
@pytest.mark.parametrize("form", FORMS)
def test_clip_builds(form: str, folder: Path) -> None:
    check(zoo.export_family("clip-b16", folder).path, form)


@needs_tensorrt
@pytest.mark.xdist_group("dinov3-s16")
@pytest.mark.parametrize("form", FORMS)
def test_rotary_embeddings_build(form: str, folder: Path) -> None:
    check(zoo.export_family("dinov3-s16", folder).path, form)


def test_forms_differ(folder: Path) -> None:
    """What is built is what it is called: the four graphs hold different nodes."""
    view = view_encoder(canonicalize(load_model(zoo.export_family("dinov2-s14", folder).path)))
    sizes = [len(with_registers(view, form).nodes) for form in FORMS]
    for one, other in itertools.combinations(sizes, 2):
        assert one != other
