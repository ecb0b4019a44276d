"""Packed projections of every order: one form behind, the same numbers, INT8 in TensorRT."""

import itertools
import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from building import assert_builds, int8_products, needs_tensorrt
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from packed_vit import ORDERS, PackedVit
from running import run_graph
from test_passes_canonicalize import ops
from test_passes_signed_integers import quantized
from tiny_vit import Spec, TinyVit

from regcache.passes.axis_factors import Layout, LostTrackError
from regcache.passes.base import run
from regcache.passes.canonicalize import PASSES, canonicalize
from regcache.passes.check import check_and_infer
from regcache.passes.equalize_sources import find_source
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import import_graph
from regcache.passes.order_qkv import OrderQkv
from regcache.passes.raise_opset import raise_opset
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.split_qkv import SplitQkv, packed_thirds

# These have no packed linear that the passes behind could read: each part gets one of its own.
APART = {"normed", "keys and values"}


def before(vit: TinyVit) -> gs.Graph:
    """The canonical graph without the last pass."""
    graph = import_graph(raise_opset(vit.model()))
    check_and_infer(graph)
    for step in PASSES:
        if step.name != "order_qkv":
            graph = run(step, graph).graph
    return graph


@pytest.mark.parametrize("batch", [None, 1, 3])
@pytest.mark.parametrize("spelling", ORDERS)
def test_every_spelling_becomes_one_form(spelling: str, batch: int | None) -> None:
    vit = PackedVit(Spec(width=24, heads=3), spelling=spelling, batch=batch)
    graph = before(vit)
    original = gs.export_onnx(graph).SerializeToString()
    result = run(OrderQkv(), graph)
    assert gs.export_onnx(graph).SerializeToString() == original
    assert not result.log.skips
    assert len(result.log.edits) == vit.spec.depth
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(batch or 2)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert not run(OrderQkv(), result.graph).changed
    for block in view_encoder(result.graph).blocks:
        names = [linear.name.rpartition(".")[2] for linear in block.attention.projections]
        assert names == (["q", "k", "v"] if spelling in APART else ["qkv"])
        for index, linear in enumerate(block.attention.projections):
            letters = "qkv" if names == ["qkv"] else "qkv"[index]
            weights = [vit.weights[f"{block.index}.{letter}"] for letter in letters]
            np.testing.assert_array_equal(linear.weight, np.concatenate(weights, axis=1))
        if names == ["qkv"]:
            assert packed_thirds(block.attention.projections[0]) is not None


@pytest.mark.parametrize("spelling", ORDERS)
def test_everything_behind_reads_it(spelling: str) -> None:
    """Values can be equalized in the projection, and it is split for TensorRT."""
    vit = PackedVit(Spec(width=24, heads=3), spelling=spelling)
    graph = canonicalize(vit.model())
    view = view_encoder(graph)
    for site in view.sites:
        if site.name.endswith(".out"):
            assert find_source(view, site).where == "folded into the value projection"
    split = run(SplitQkv(), graph)
    assert not split.log.skips
    assert all(len(block.linears) == 6 for block in view_encoder(split.graph).blocks)


def test_nothing_else_changes() -> None:
    vit = PackedVit(Spec(), spelling="torchscript")
    graph = before(vit)
    result = run(OrderQkv(), graph).graph
    added, gone = ops(result), ops(graph)
    assert added - gone == {"Gather": 3 * vit.spec.depth}
    assert gone - added == {"Split": vit.spec.depth, "Squeeze": 3 * vit.spec.depth}
    new = {node.outputs[0].name: node for node in result.nodes}
    for node in graph.nodes:
        kept = new.get(node.outputs[0].name)
        if kept is not None and kept.op == node.op:
            assert [item.name for item in kept.inputs] == [item.name for item in node.inputs]


def test_what_is_in_order_is_left_alone() -> None:
    for spec in (Spec(qkv="fused"), Spec()):
        graph = canonicalize(TinyVit(spec).model())
        assert run(OrderQkv(), graph).graph is graph


def test_a_part_that_is_read_with_another_is_refused() -> None:
    graph = before(PackedVit(Spec(), spelling="torchscript"))
    packed = view_encoder(graph).blocks[0].attention.projections[0]
    reshape = packed.output.outputs[0]
    scale = gs.Constant("eights", np.ones(8, np.float32))
    scaled = gs.Variable("scaled", np.float32, reshape.outputs[0].shape)
    (turned,) = reshape.outputs[0].outputs
    graph.nodes.append(gs.Node("Mul", "scale", {}, [reshape.outputs[0], scale], [scaled]))
    turned.inputs[0] = scaled
    log = run(OrderQkv(), graph.toposort()).log
    reason = "Mul 'scale' reads several of its parts"
    assert [(skip.site, skip.reason) for skip in log.skips] == [("blocks.0.qkv", reason)]
    assert [edit.site for edit in log.edits] == ["blocks.1.qkv"]


def test_a_projection_that_is_an_output_is_refused() -> None:
    graph = before(PackedVit(Spec(), spelling="split at the end"))
    packed = view_encoder(graph).blocks[1].attention.projections[0]
    graph.outputs.append(packed.output)
    (skip,) = run(OrderQkv(), graph).log.skips
    assert (skip.site, skip.reason) == ("blocks.1.qkv", "it is an output of the graph")


@needs_tensorrt
@pytest.mark.parametrize("spelling", ["torchscript", "by head, joined", "tokens first"])
def test_split_projections_are_int8_in_tensorrt(spelling: str) -> None:
    vit = PackedVit(Spec(width=64, heads=2, hidden=128, grid=4), spelling=spelling)
    packed = quantized(canonicalize(vit.model()), "U8U8")
    split = run(SignedIntegers(), run(SplitQkv(), packed).graph).graph
    assert int8_products(assert_builds(split)) == 4 * vit.spec.depth


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_layouts_say_where_numbers_come_from(data: st.DataObject) -> None:
    """Any chain of moves, against an array that holds its own indices."""
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=3))
    shape.append(data.draw(st.sampled_from([4, 6, 12])))
    array = np.arange(math.prod(shape)).reshape(shape)
    layout = Layout.of(shape)
    for _ in range(data.draw(st.integers(1, 6))):
        try:
            array, layout = data.draw(moves(array, layout))
        except LostTrackError:
            break
    np.testing.assert_array_equal(indices(layout, shape), array)


@st.composite
def moves(draw: Any, array: NDArray[Any], layout: Layout) -> tuple[NDArray[Any], Layout]:
    """One move of an array, and of its layout."""
    kind = draw(st.sampled_from(["reshape", "transpose", "take", "drop", "new"]))
    axis = draw(st.integers(0, max(array.ndim - 1, 0)))
    if kind == "transpose":
        perm = draw(st.permutations(range(array.ndim)))
        return array.transpose(perm), layout.transposed(perm)
    if kind == "reshape":
        sizes = [part for size in array.shape for part in factors(size)]
        cuts = sorted(draw(st.sets(st.integers(0, len(sizes)), max_size=4)))
        ends = [0, *cuts, len(sizes)]
        dims = [math.prod(sizes[a:b]) for a, b in itertools.pairwise(ends)]
        return array.reshape(dims), layout.reshaped(dims)
    if kind == "new":
        return np.expand_dims(array, axis), layout.with_new([axis])
    if not array.ndim:
        return array, layout
    if kind == "drop":
        if array.shape[axis] != 1:
            return array, layout
        return array.squeeze(axis), layout.without(axis)
    size = array.shape[axis]
    start, step = draw(st.integers(0, size - 1)), draw(st.integers(1, 2))
    count = draw(st.integers(1, len(range(start, size, step))))
    places = np.arange(start, start + count * step, step)
    return array.take(places, axis), layout.taken(axis, start, count, step)


def factors(size: int) -> list[int]:
    return [2] * 2 if size == 4 else [2, 3] if size == 6 else [3, 4] if size == 12 else [size]


def indices(layout: Layout, shape: list[int]) -> NDArray[Any]:
    """The index that each number of a layout had where it began."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    found = np.array(layout.start * strides[layout.channels])
    dims = []
    for axis in layout.axes:
        for factor in axis:
            steps = np.arange(factor.size) * factor.stride * strides[factor.source]
            found = found[..., None] + steps
        dims.append(math.prod(factor.size for factor in axis))
    return found.reshape(dims)
