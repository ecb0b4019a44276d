"""Graphs with block-scaled floats build with TensorRT-RTX, and what it makes of them."""

from pathlib import Path

import onnx_graphsurgeon as gs
import pytest
from support.building import needs_tensorrt
from support.canonical import canonical_graph
from support.scales import block_scales, float8_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit, with_batch

from regcache.passes.base import run, run_all
from regcache.passes.block_floats import BlockFormat
from regcache.passes.encoder import Role
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_block_floats import QuantizeBlockFloats
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.split_qkv import SplitQkv
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_layers import narrow_products, products_by_precision
from regcache.runtime.tensorrt_rtx import build_engine, kernels_at

SPEC = Spec(width=64, hidden=128)
pytestmark = needs_tensorrt


def quantized(graph: gs.Graph, kind: BlockFormat) -> gs.Graph:
    """With what is not quantized in FP16."""
    step = QuantizeBlockFloats(block_scales(graph, kind))
    return run_all([step, HalfPrecision()], graph)[0]


def build(graph: gs.Graph, folder: Path, *capabilities: str) -> EngineBuild:
    save_graph(graph, folder / "model.onnx")
    built = build_engine(folder / "model.onnx", compute_capabilities=capabilities)
    assert not built.warnings
    return built


@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu"])
def test_tensorrt_multiplies_in_four_bits(name: str, tmp_path: Path) -> None:
    """Linears that read one tensor become one product."""
    spec = Spec(**{**SPELLINGS[name].__dict__, "width": 64, "hidden": 128})
    graph = run(SplitQkv(), canonical_graph(TinyVit(spec).model())).graph
    built = build(quantized(graph, BlockFormat.NVFP4), tmp_path, "12.0")
    assert products_by_precision(built.layers)["FP4"] == len(view_encoder(graph).sites)
    assert narrow_products(built.layers) == len(view_encoder(graph).sites)


def test_of_a_fixed_batch_too(tmp_path: Path) -> None:
    graph = canonical_graph(with_batch(TinyVit(SPEC).model(), 2))
    built = build(quantized(graph, BlockFormat.NVFP4), tmp_path, "12.0", "12.1")
    assert products_by_precision(built.layers)["FP4"] == len(view_encoder(graph).sites)


def test_kernels_are_told_with_all_their_shapes(tmp_path: Path) -> None:
    graph = canonical_graph(TinyVit(SPEC).model())
    save_graph(quantized(graph, BlockFormat.NVFP4), tmp_path / "model.onnx")
    kernels = kernels_at(tmp_path / "model.onnx", ("12.0",), 1)
    products = [kernel for kernel in kernels if kernel.format == "FP4" and kernel.operations]
    tokens = SPEC.grid**2 + SPEC.prefix
    linears = view_encoder(graph).linears
    wanted = 2 * tokens * sum(linear.work for linear in linears)
    assert sum(kernel.operations for kernel in products) == wanted


def test_tensorrt_rtx_multiplies_mxfp8_in_half(tmp_path: Path) -> None:
    """Why no target of its offers that: once this fails, one can."""
    graph = canonical_graph(TinyVit(SPEC).model())
    built = build(quantized(graph, BlockFormat.MXFP8), tmp_path, "12.0")
    assert products_by_precision(built.layers).keys() == {"FP16"}


def test_four_and_eight_bits_multiply_in_one_engine(tmp_path: Path) -> None:
    """E4M3 of one scale for a tensor, where E2M1 would do too much damage."""
    graph = canonical_graph(TinyVit(SPEC).model())
    view = view_encoder(graph)
    eights = frozenset(linear.name for linear in view.linears if linear.role is Role.FC2)
    fours = frozenset(linear.name for linear in view.linears) - eights
    names = {site.tensor.name for site in view.sites if site.linears[0].name in eights}
    scales = {name: scale for name, scale in float8_scales(graph).items() if name in names}
    blocks = block_scales(graph, BlockFormat.NVFP4)
    in_blocks = {name: scale for name, scale in blocks.items() if name not in names}
    eight, four = QuantizeFloat8(scales, eights), QuantizeBlockFloats(in_blocks, fours)
    mixed = run_all([eight, four, HalfPrecision()], graph)[0]
    built = build(mixed, tmp_path, "12.0")
    products = products_by_precision(built.layers)
    assert (products["FP8"], products["FP4"]) == (len(eights), len(view.sites) - len(eights))


def test_nothing_below_blackwell(tmp_path: Path) -> None:
    graph = quantized(canonical_graph(TinyVit(SPEC).model()), BlockFormat.NVFP4)
    with pytest.raises(InputError, match="HW-specific datatypes: fp4_e2m1"):
        build(graph, tmp_path, "8.9", "12.0")
