"""Quantized q, k and v become one linear: the same numbers, and fewer kernels in TensorRT."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.biases import drop_biases
from support.building import assert_builds, needs_tensorrt
from support.canonical import canonical_graph
from support.quantized_graphs import signed_linears
from support.registers import with_registers
from support.running import run_graph
from support.scales import float8_scales, linear_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.merge_qkv import MergeQkv
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.walk import producer
from regcache.runtime.engine_layers import narrow_products

SPEC = Spec(width=64, heads=1, hidden=256, depth=3)


def prepared(name: str) -> gs.Graph:
    return run(SplitQkv(), canonical_graph(TinyVit(SPELLINGS[name]).model())).graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_and_counts(name: str) -> None:
    graph = signed_linears(prepared(name))
    result = run(MergeQkv(), graph)
    depth = SPELLINGS[name].depth
    assert [edit.site for edit in result.log.edits] == [f"blocks.{i}.q+k+v" for i in range(depth)]
    assert not result.log.skips
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = TinyVit(SPELLINGS[name]).images(3)
    for found, wanted in zip(
        run_graph(result.graph, images), run_graph(graph, images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not run(MergeQkv(), result.graph).changed


def dequantized(matmul: gs.Node) -> NDArray[np.float32]:
    node = producer(matmul.inputs[1])
    assert node is not None
    stored, scale = (item.values for item in node.inputs[:2])
    return np.asarray(stored * scale, np.float32)


def test_the_columns_are_those_of_the_three_and_queries_are_twice_as_large() -> None:
    graph = signed_linears(canonical_graph(TinyVit(Spec()).model()))
    merged = view_encoder(run(MergeQkv(), graph).graph)
    for one, other in zip(view_encoder(graph).blocks, merged.blocks, strict=True):
        (packed,) = other.attention.projections
        assert packed.name == f"blocks.{other.index}.qkv"
        query, key, value = (dequantized(item.matmul) for item in one.attention.projections)
        wanted = np.concatenate([2 * query, key, value], axis=1)
        np.testing.assert_array_equal(dequantized(packed.matmul), wanted)
        others = [linear for linear in one.linears if linear not in one.attention.projections]
        for old, new in zip(others, other.linears[1:], strict=True):
            assert old.name == new.name
            np.testing.assert_array_equal(dequantized(old.matmul), dequantized(new.matmul))


@pytest.mark.parametrize("letters", ["k", "qkv"])
def test_linears_without_biases(letters: str) -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    drop_biases(graph, *(f"blocks.{i}.{letter}" for i in range(2) for letter in letters))
    graph = signed_linears(graph)
    result = run(MergeQkv(), graph)
    assert len(result.log.edits) == 2
    (packed,) = view_encoder(result.graph).blocks[0].attention.projections
    assert (packed.bias_add is None) == (letters == "qkv")
    images = TinyVit(Spec()).images(2)
    for found, wanted in zip(
        run_graph(result.graph, images), run_graph(graph, images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_registers_stay_before_the_keys() -> None:
    graph = signed_linears(
        with_registers(view_encoder(canonical_graph(TinyVit(Spec()).model())), "kv")
    )
    result = run(MergeQkv(), graph)
    assert len(result.log.edits) == 2
    images = TinyVit(Spec()).images(2)
    for found, wanted in zip(
        run_graph(result.graph, images), run_graph(graph, images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_float_linears_are_left_alone_and_half_quantized_ones_refused() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    assert not run(MergeQkv(), graph).log.skips
    only = frozenset({"blocks.0.q", "blocks.0.v"})
    some = run(QuantizeLinears(linear_scales(graph, "int8"), only=only), graph).graph
    result = run(MergeQkv(), some)
    assert result.graph is some
    (skip,) = result.log.skips
    assert (skip.site, skip.reason) == ("blocks.0.q+k+v", "they do not read one tensor")
    assert skip.slower is not None


def test_a_weight_with_one_scale_for_all_columns_is_refused() -> None:
    graph = signed_linears(canonical_graph(TinyVit(Spec(depth=1)).model()))
    key = view_encoder(graph).blocks[0].attention.projections[1]
    node = producer(key.matmul.inputs[1])
    assert node is not None
    single = [gs.Constant(f"one/{item.name}", np.array(item.values[0])) for item in node.inputs[1:]]
    node.inputs = [node.inputs[0], *single]
    (skip,) = run(MergeQkv(), graph).log.skips
    assert skip.reason == "a weight is not scaled by column"


@needs_tensorrt
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_tensorrt_takes_one_kernel_from_the_product_to_attention(kind: str) -> None:
    """Three before: one for each of q, k and v, and three products too in FP8 for 12.0."""
    graph = canonical_graph(TinyVit(SPEC).model())
    scales = linear_scales(graph, "int8")
    step = QuantizeLinears(scales) if kind == "int8" else QuantizeFloat8(float8_scales(graph))
    graph = run(step, graph).graph
    capabilities = ("8.6", "8.9", "12.0") if kind == "int8" else ("8.9", "12.0")
    apart, merged = (
        assert_builds(run(HalfPrecision(), one).graph, capabilities)
        for one in (graph, run(MergeQkv(), graph).graph)
    )
    assert narrow_products(merged.layers) == 4 * SPEC.depth
    assert narrow_products(apart.layers) == (4 if kind == "int8" else 6) * SPEC.depth
    fewer = 2 if kind == "int8" else 4
    assert len(merged.layers) <= len(apart.layers) - fewer * SPEC.depth
    assert sum(layer.fused_attention for layer in merged.layers) == SPEC.depth
