"""Packed projections split: the same numbers, three linears, and INT8 in TensorRT."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support import zoo
from support.biases import drop_biases
from support.building import assert_builds, int8_products, needs_tensorrt
from support.canonical import canonical_graph
from support.packing import FORMS as PACKINGS
from support.packing import repack
from support.quantized_graphs import FORMATS, quantized, signed_linears
from support.registers import with_registers
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit, with_batch
from support.untouched import told

from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.walk import is_constant, producer


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_and_counts(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
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
    graph = canonical_graph(vit.model())
    result = run(SplitQkv(), graph)
    view = view_encoder(result.graph)
    for block in view.blocks:
        for letter, linear in zip("qkv", block.attention.projections, strict=True):
            assert linear.name == f"blocks.{block.index}.{letter}"
            np.testing.assert_array_equal(linear.weight, vit.weights[f"{block.index}.{letter}"])
    assert view.sites[0].name == "blocks.0.q+k+v"
    assert ops(result.graph)["MatMul"] == ops(graph)["MatMul"] + 2 * vit.spec.depth


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["float", *FORMATS])
@pytest.mark.parametrize("form", PACKINGS)
def test_other_ways_to_the_thirds(form: str, kind: str) -> None:
    """Whichever way leads to them, and with the batch free and fixed; float, and quantized."""
    vit = TinyVit(Spec(width=24, heads=3, qkv="fused"))
    for batch in (None, 2):
        graph = repack(canonical_graph(with_batch(vit.model(), batch)), form)
        images = vit.images(2)
        for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
        graph = graph if kind == "float" else quantized(graph, kind)
        result = run(SplitQkv(for_tensorrt=False), graph)
        assert [edit.site for edit in result.log.edits] == ["blocks.0.qkv", "blocks.1.qkv"]
        assert not result.log.skips
        onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
        assert [one.name for one in view_encoder(result.graph).blocks[1].linears[:3]] == [
            "blocks.1.q",
            "blocks.1.k",
            "blocks.1.v",
        ]
        pair = (run_graph(one, images) for one in (result.graph, graph))
        for found, wanted in zip(*pair, strict=True):
            np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert not run(SplitQkv(for_tensorrt=False), result.graph).changed


@pytest.mark.parametrize("form", PACKINGS)
def test_thirds_in_place_stay_together_for_tensorrt(form: str) -> None:
    graph = repack(canonical_graph(TinyVit(Spec(qkv="fused")).model()), form)
    result = run(SplitQkv(), graph)
    assert result.changed == (form not in ("slice columns", "gather columns"))
    assert not result.log.skips


def test_no_other_way_is_followed() -> None:
    """What else reads the packed tensor, and a step that changes numbers, are said."""
    graph = canonical_graph(TinyVit(Spec(depth=3, qkv="fused")).model())
    first, second, third = (
        block.attention.projections[0].output.outputs[0] for block in view_encoder(graph).blocks
    )
    size = gs.Variable("size", np.float32, first.outputs[0].shape)
    graph.nodes.append(gs.Node("Abs", "size", {}, [first.outputs[0]], [size]))
    graph.outputs.append(size)
    (turned,) = second.outputs[0].outputs
    scaled = gs.Variable("scaled", np.float32)
    two = gs.Constant("two", np.array(2, np.float32))
    graph.nodes.append(gs.Node("Mul", "scaled", {}, [turned.outputs[0], two], [scaled]))
    for node in list(turned.outputs[0].outputs):
        if node.op == "Gather":
            node.inputs[0] = scaled
    result = run(SplitQkv(), graph.toposort())
    assert [(skip.site, skip.slower) for skip in result.log.skips] == [
        (f"blocks.{index}.qkv", "TensorRT computes it in float") for index in (0, 1)
    ]
    assert [edit.site for edit in result.log.edits] == ["blocks.2.qkv"]
    assert third.op == "Reshape"


def signed(graph: gs.Graph) -> gs.Graph:
    """Quantized as TensorRT takes it."""
    return run(QuantizeLinears(linear_scales(graph, "int8")), graph).graph


def weight_of(matmul: gs.Node) -> gs.Node:
    """The DequantizeLinear of a quantized linear's weight."""
    found = producer(matmul.inputs[1])
    assert found is not None
    return found


def rescale(weight: gs.Node, *numbers: NDArray[Any]) -> None:
    """Give the DequantizeLinear of a weight another scale and zero point."""
    constants = [gs.Constant(f"other/{slot}", item) for slot, item in enumerate(numbers)]
    weight.inputs = [weight.inputs[0], *constants]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("form", ["none", "kv and delete", "no bias"])
def test_a_quantized_projection_keeps_its_numbers(form: str, kind: str) -> None:
    """To the bit, whether ONNX Runtime computes in float, as written, or in integers."""
    vit = TinyVit(Spec(width=32, hidden=64, grid=4, qkv="fused"))
    graph = canonical_graph(vit.model())
    if form == "no bias":
        graph = drop_biases(graph, "blocks.0.qkv", "blocks.1.qkv")
    elif form != "none":
        graph = with_registers(view_encoder(graph), form)
    packed = quantized(graph, kind)
    original = told(packed)
    result = run(SplitQkv(), packed)
    assert told(packed) == original
    assert [edit.site for edit in result.log.edits] == ["blocks.0.qkv", "blocks.1.qkv"]
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(3)
    for optimize in (False, True):
        pair = (run_graph(one, images, optimize=optimize) for one in (result.graph, packed))
        for found, wanted in zip(*pair, strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert not run(SplitQkv(), result.graph).changed


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_else_of_a_quantized_graph_changes(kind: str) -> None:
    depth = 2
    packed = quantized(canonical_graph(TinyVit(Spec(depth=depth, qkv="fused")).model()), kind)
    result = run(SplitQkv(), packed).graph
    chain = ("DequantizeLinear", "MatMul", "Add", "Reshape", "Transpose")
    assert ops(result) - ops(packed) == Counter(dict.fromkeys(chain, 2 * depth))
    assert ops(packed) - ops(result) == Counter({"Gather": 3 * depth})
    new = {node.outputs[0].name: node for node in result.nodes}
    gone = []
    for node in packed.nodes:
        kept = new.get(node.outputs[0].name)
        if kept is None or kept.op != node.op:
            gone.append(node.op)
            continue
        assert (kept.name, kept.attrs) == (node.name, node.attrs)
        for ours, theirs in zip(kept.inputs, node.inputs, strict=True):
            assert ours.name == theirs.name
            if is_constant(theirs):
                np.testing.assert_array_equal(ours.values, theirs.values)
    assert Counter(gone) == Counter({**dict.fromkeys(chain, depth), "Gather": 3 * depth})


def test_integers_scales_and_zero_points_are_thirds() -> None:
    packed = quantized(canonical_graph(TinyVit(Spec(qkv="fused")).model()), "U8U8")
    old, new = view_encoder(packed), view_encoder(run(SplitQkv(), packed).graph)
    assert [site.name for site in new.sites][:2] == ["blocks.0.q+k+v", "blocks.0.out"]
    for before, after in zip(old.blocks, new.blocks, strict=True):
        weights = [weight_of(linear.matmul) for linear in after.attention.projections]
        whole = weight_of(before.attention.projections[0].matmul)
        for part, values in enumerate(item.values for item in whole.inputs):
            thirds = [node.inputs[part].values for node in weights]
            assert len({third.shape for third in thirds}) == 1
            assert {third.dtype for third in thirds} == {values.dtype}
            np.testing.assert_array_equal(np.concatenate(thirds, axis=-1), values)


def test_one_scale_for_all_columns() -> None:
    vit = TinyVit(Spec(depth=1, qkv="fused"))
    packed = quantized(canonical_graph(vit.model()))
    weight = weight_of(view_encoder(packed).linears[0].matmul)
    rescale(weight, np.array(0.02, np.float32), np.array(3, np.int8))
    del weight.attrs["axis"]
    result = run(SplitQkv(), packed)
    assert result.changed
    for found, wanted in zip(
        *(run_graph(one, vit.images(2)) for one in (result.graph, packed)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("scaled", ["in blocks", "by row", "by an input"])
def test_other_scales_are_left_alone(scaled: str) -> None:
    packed = quantized(canonical_graph(TinyVit(Spec(depth=1, qkv="fused")).model()))
    weight = weight_of(view_encoder(packed).linears[0].matmul)
    rows, columns = weight.inputs[0].shape
    if scaled == "by an input":
        weight.inputs[1] = gs.Variable("scales", np.float32, [columns])
        packed.inputs.append(weight.inputs[1])
    else:
        shape = [rows] if scaled == "by row" else [2, columns]
        rescale(weight, np.ones(shape, np.float32), np.zeros(shape, np.int8))
        weight.attrs.update({"axis": 0} | ({"block_size": rows // 2} if len(shape) > 1 else {}))
    result = run(SplitQkv(), packed)
    assert result.graph is packed
    assert [(skip.site, skip.reason) for skip in result.log.skips] == [
        ("blocks.0.qkv", "its weight is not scaled by column")
    ]


@needs_tensorrt
@pytest.mark.parametrize(
    "name", [p for p in zoo.family_params() if p.values[0] in ("timm-vit-b16", "timm-siglip-b16")]
)
def test_timm_computes_in_int8(name: str, folder: Path) -> None:
    graph = zoo.canonical_family(name, folder)
    blocks = len(view_encoder(graph).blocks)
    packed = int8_products(assert_builds(signed_linears(graph)))
    split = int8_products(assert_builds(signed_linears(run(SplitQkv(), graph).graph)))
    assert packed == 3 * blocks
    assert split == 4 * blocks


@needs_tensorrt
@pytest.mark.parametrize("name", [p for p in zoo.family_params() if p.values[0] == "timm-vit-b16"])
def test_integers_of_onnx_runtime_compute_in_int8(name: str, folder: Path) -> None:
    """What is quantized before it is split, as an artifact for ort-cpu is."""
    packed = quantized(zoo.canonical_family(name, folder), "U8U8")
    split = run(SignedIntegers(), run(SplitQkv(), packed).graph).graph
    blocks = len(view_encoder(packed).blocks)
    assert int8_products(assert_builds(run(SignedIntegers(), packed).graph)) == 3 * blocks
    assert int8_products(assert_builds(split)) == 4 * blocks


@needs_tensorrt
@pytest.mark.parametrize("form", ["split heads", "gather columns"])
def test_torchscript_and_multihead_attention_compute_in_int8(form: str) -> None:
    """timm's unbind as TorchScript writes it, split; nn.MultiheadAttention's thirds, left whole."""
    spec = Spec(width=64, heads=2, hidden=128, patch=8, grid=4, qkv="fused")
    graph = repack(canonical_graph(TinyVit(spec).model()), form)
    assert int8_products(assert_builds(signed(run(SplitQkv(), graph).graph))) == 4 * spec.depth
