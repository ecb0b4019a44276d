"""FLOAT16 where nothing is quantized: types node by node, numbers, refusals, and real builds."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.attention_graphs import SPEC, prepared
from support.building import assert_builds, needs_tensorrt
from support.canonical import canonical_graph
from support.halving import STEPS, halved, parse, run_half, types
from support.running import run_graph
from support.scales import attention_scales, linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float8 import Float8
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime.engine_layers import products_by_precision
from regcache.runtime.tensorrt_rtx import build_engine

FLOAT_OPS = {"LayerNormalization", "RMSNormalization", "Softmax"}


@pytest.mark.parametrize("step", STEPS, ids=["half stream", "float stream"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_are_those_of_the_encoder(name: str, step: HalfPrecision) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = halved(graph, step)
    images = vit.images(2)
    for found, truth in zip(run_half(result.graph, images), vit.reference(images), strict=True):
        assert found.dtype == np.float32
        # FLOAT16 rounds to 2 ** -11; a dozen roundings follow each other.
        assert 2e-4 < np.abs(found - truth).max() / np.abs(truth).max() < 4e-3


@pytest.mark.parametrize("name", SPELLINGS)
def test_only_norms_and_softmax_stay_float(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    result = halved(graph)
    for op in ops(result.graph).keys() - {"Cast", "Gather", "Identity", "Reshape"}:
        if any(node.op == op and node.outputs[0].dtype != np.int64 for node in result.graph.nodes):
            assert types(result.graph, op) == {"float32" if op in FLOAT_OPS else "float16"}, op
    assert [item.dtype for item in (*result.graph.inputs, *result.graph.outputs)] == [
        np.float32
    ] * 3
    edited = {edit.site for edit in result.log.edits}
    assert {edit.what for edit in result.log.edits} == {"FLOAT16"}
    assert edited.isdisjoint(skip.site for skip in result.log.skips)
    assert {skip.reason for skip in result.log.skips} <= {
        "a norm, softmax, power or sum",
        "moves FLOAT",
    }


def test_a_float_stream_is_cast_only_beside_the_stream() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    result = halved(graph, STEPS[1])
    for block in view_encoder(result.graph).blocks:
        for tensor in (block.input, block.middle, block.output):
            assert tensor.dtype == np.float32
            assert tensor.inputs[0].op == "Add"
        assert block.norm1.inputs[0] is block.input
        assert {linear.weight.dtype.name for linear in block.linears} == {"float16"}
    reasons = [skip.reason for skip in result.log.skips]
    assert reasons.count("on the residual stream") == 1 + 2 * 2


@pytest.mark.parametrize("step", STEPS, ids=["half stream", "float stream"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_quantized_numbers_and_integers(name: str, step: HalfPrecision) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    graph = run(QuantizeAttention(attention_scales(graph)), graph).graph
    graph = run(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    result = halved(graph, step).graph
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert types(result, op) == {"float16"}
    old = {name: item for name, item in graph.tensors().items() if item.dtype == np.int8}
    for name_, tensor in result.tensors().items():
        if isinstance(tensor, gs.Constant) and tensor.dtype == np.int8:
            np.testing.assert_array_equal(tensor.values, old.pop(name_).values)
    assert not any(isinstance(item, gs.Constant) for item in old.values())
    images = vit.images(8)
    found, wanted = run_half(result, images), run_graph(graph, images)
    for one, other in zip(found, wanted, strict=True):
        # A number on the other side of a tie moves by a step, and moves others.
        assert np.abs(one - other).mean() < 0.035
    truth = vit.reference(images)[1]
    assert np.abs(found[1] - truth).mean() < 1.15 * np.abs(wanted[1] - truth).mean()


def test_integers_and_what_they_stand_for_are_exact() -> None:
    """QuantizeLinear and DequantizeLinear in FLOAT16, against numpy."""
    graph = parse(
        """g (float[500] x) => (int8[500] q, float[500] y)
        <float s = {0.0371}, int8 z = {0}>
        { q = QuantizeLinear(x, s, z)
          y = DequantizeLinear(q, s, z) }"""
    )
    result = halved(graph).graph
    halves = np.random.default_rng(0).normal(0, 2, 500).astype(np.float16)
    integers, floats = run_graph(result, halves.astype(np.float32))
    scale = np.float16(0.0371)
    wanted = np.clip(np.rint(halves.astype(np.float32) / np.float32(scale)), -128, 127)
    np.testing.assert_array_equal(integers, wanted.astype(np.int8))
    np.testing.assert_array_equal(floats, (wanted.astype(np.float16) * scale).astype(np.float32))


def test_registers_and_deleted_sinks() -> None:
    """The choice of what to delete is made from the same norms, in the stream's own type."""
    vit = TinyVit(Spec())
    graph = canonical_graph(vit.model())
    deleted = run(DeleteSinks(1, 2), graph).graph
    images = vit.images(1)
    wanted = vit.reference(images, Registers(start=1, end=2, sinks=2))
    for step in STEPS:
        result = halved(deleted, step).graph
        assert types(result, "TopK") == {"float32" if step.float_stream else "float16"}
        for found, truth in zip(run_half(result, images), wanted, strict=True):
            assert np.abs(found - truth).max() <= 4e-3 * np.abs(truth).max()


@needs_tensorrt
@pytest.mark.parametrize("step", STEPS, ids=["half stream", "float stream"])
@pytest.mark.parametrize("name", ["plain", "sdpa", "attention operator"])
def test_tensorrt_fuses_attention(name: str, step: HalfPrecision) -> None:
    """Float encoders: projections, patches and the rest in FP16, attention in one kernel."""
    spec = Spec(**{**SPELLINGS[name].__dict__, "width": 128, "hidden": 256})
    built = assert_builds(run(step, canonical_graph(TinyVit(spec).model())).graph)
    fused = [layer.precision for layer in built.layers if layer.fused_attention]
    assert fused == ["FP16"] * spec.depth
    assert products_by_precision(built.layers).keys() == {"FP16"}


@needs_tensorrt
@pytest.mark.parametrize("shrink", ["weight", "activation"])
def test_tensorrt_takes_scales_too_small_for_half(shrink: str) -> None:
    """A channel, or all, that FLOAT16 scales would lose: still INT8 with fused attention."""
    graph = canonical_graph(TinyVit(SPEC).model())
    site = view_encoder(graph).sites[0]
    chosen = linear_scales(graph, "int8")
    if shrink == "activation":
        chosen[site.tensor.name] = Affine(1e-6, 0, "int8")
    else:
        weight = site.linears[0].weight.copy()
        weight[:, 3] *= 1e-4
        site.linears[0].matmul.inputs[1] = gs.Constant("small", weight)
    result = run(HalfPrecision(), run(QuantizeLinears(chosen), graph).graph)
    small = [skip for skip in result.log.skips if skip.reason.startswith("its scale is below")]
    assert len(small) == (2 if shrink == "activation" else 1)
    built = assert_builds(result.graph)
    assert products_by_precision(built.layers) == {"FP16": 3, "INT8": 8}
    assert sum(layer.fused_attention for layer in built.layers) == SPEC.depth


@needs_tensorrt
def test_float8_products_stay_float8(tmp_path: Path) -> None:
    """Also as built: FP8 linears, FP16 attention in one kernel."""
    graph = canonical_graph(TinyVit(SPEC).model())
    sites = view_encoder(graph).sites
    chosen = {site.tensor.name: Float8.from_range(-4.0, 5.0) for site in sites}
    result = halved(run(QuantizeFloat8(chosen), graph).graph)
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert types(result.graph, op) == {"float16", "float8_e4m3fn"}
    path = tmp_path / "model.onnx"
    save_graph(result.graph, path)
    built = build_engine(path, compute_capabilities=["8.9"])
    assert products_by_precision(built.layers) == {"FP16": 3, "FP8": 8}
    assert sum(layer.fused_attention for layer in built.layers) == SPEC.depth


@needs_tensorrt
def test_products_hand_on_half() -> None:
    """What FLOAT16 scales are for: INT8 products write FP16, not FP32."""
    built = assert_builds(prepared(SPEC, True, False, True, 0))
    written = {
        kind
        for layer in built.layers
        if layer.multiplies and layer.precision == "INT8"
        for kind in (made.format for made in layer.outputs)
    }
    assert "FP32" not in written
