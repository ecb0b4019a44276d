"""Packed projections split: the same numbers, three linears, and INT8 in TensorRT."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
import zoo
from building import assert_builds, int8_products, needs_tensorrt
from running import run_graph
from test_passes_canonicalize import SPELLINGS, ops
from test_registers_build import quantized
from tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import load_model
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.split_qkv import SplitQkv


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_and_counts(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonicalize(vit.model())
    result = run(SplitQkv(), graph)
    fused = vit.spec.qkv == "fused"
    assert len(result.log.edits) == (vit.spec.depth if fused else 0)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(3)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not run(SplitQkv(), result.graph).changed


def test_weights_are_the_thirds_of_the_packed_one() -> None:
    vit = TinyVit(Spec(qkv="fused"))
    graph = canonicalize(vit.model())
    result = run(SplitQkv(), graph)
    view = view_encoder(result.graph)
    for block in view.blocks:
        for letter, linear in zip("qkv", block.attention.projections, strict=True):
            assert linear.name == f"blocks.{block.index}.{letter}"
            np.testing.assert_array_equal(linear.weight, vit.weights[f"{block.index}.{letter}"])
    assert view.sites[0].name == "blocks.0.q+k+v"
    assert ops(result.graph)["MatMul"] == ops(graph)["MatMul"] + 2 * vit.spec.depth


def test_another_order_is_left_alone() -> None:
    graph = canonicalize(TinyVit(Spec(qkv="fused")).model())
    packed = view_encoder(graph).blocks[0].attention.projections[0]
    turned = packed.output.outputs[0].outputs[0].outputs[0]
    assert turned.op == "Transpose"
    turned.attrs["perm"] = [2, 0, 1, 3, 4]
    turned.outputs[0].shape = None
    result = SplitQkv().rewrite(graph)
    assert [(skip.site, skip.reason) for skip in result.skips] == [
        ("blocks.0.qkv", "the packed axes are not in timm's order")
    ]
    assert len(result.edits) == 1


def test_a_quantized_projection_is_left_alone() -> None:
    from test_passes_quantize_linears import scales

    graph = canonicalize(TinyVit(Spec(qkv="fused")).model())
    integers = run(QuantizeLinears(scales(graph)), graph).graph
    result = run(SplitQkv(), integers)
    assert not result.changed
    assert len(result.log.skips) == 2


@needs_tensorrt
@pytest.mark.parametrize(
    "name", [p for p in zoo.family_params() if p.values[0] in ("timm-vit-b16", "timm-siglip-b16")]
)
def test_timm_computes_in_int8(name: str, folder: Path) -> None:
    graph = canonicalize(load_model(zoo.export_family(name, folder).path))
    blocks = len(view_encoder(graph).blocks)
    packed = int8_products(assert_builds(quantized(graph)))
    split = int8_products(assert_builds(quantized(run(SplitQkv(), graph).graph)))
    assert packed == 3 * blocks
    assert split == 4 * blocks
