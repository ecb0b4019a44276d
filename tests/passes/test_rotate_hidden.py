"""Rotated MLP activations: the same outputs, no outliers, and nothing else changed."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.equalizing import assert_agree, site_of
from support.examples import examples
from support.rotating import SOME, apply, changes, graph_of, observe, wide
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import Edit, Skip, run
from regcache.passes.check import check_and_infer
from regcache.passes.encoder import Site
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import ROTATION, rotates
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.rotate_hidden import SIZES, RotateHidden, rotated_channels, rotation
from regcache.passes.walk import is_constant, is_linear, skip_rotation

Floats = NDArray[Any]


def whole(size: int, channels: int) -> Floats:
    """The matrix [channels, channels] that rotates `size` of them at a time, in float64."""
    return np.kron(np.eye(channels // size), rotation(size).astype(np.float64))


def read_by_fc2(graph: gs.Graph) -> list[Site]:
    return [site for site in view_encoder(graph).sites if site.name.endswith(".fc2")]


def rotated_values(values: Floats, size: int) -> Floats:
    """What fc2 reads once hidden activations that are `values` [64] in every token are rotated."""
    graph = graph_of(replace(wide("relu"), depth=1))
    (fc1,) = view_encoder(graph).blocks[0].mlp.fc1
    assert fc1.bias_add is not None
    fc1.matmul.inputs[1] = gs.Constant("none", np.zeros(fc1.weight_shape, np.float32))
    slot = [is_constant(item) for item in fc1.bias_add.inputs].index(True)
    fc1.bias_add.inputs[slot] = gs.Constant("values", np.asarray(values, np.float32))
    after = apply(RotateHidden(size), graph).graph
    (site,) = read_by_fc2(after)
    (found,) = observe(after, [site.tensor.name], TinyVit(Spec()).images(1))
    return found


class TestRotation:
    @pytest.mark.parametrize("size", SIZES)
    def test_the_matrix(self, size: int) -> None:
        matrix = rotation(size)
        assert matrix.shape == (size, size)
        assert matrix.dtype == np.float32
        np.testing.assert_array_equal(np.abs(matrix), np.full((size, size), size**-0.5))
        np.testing.assert_array_equal(matrix.T.astype(np.float64) @ matrix, np.eye(size))
        np.testing.assert_array_equal(matrix.astype(np.float16), matrix)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("channel", [0, 37])
    def test_a_spike_spreads(self, size: int, channel: int) -> None:
        found = rotated_values(1000.0 * (np.arange(64) == channel), size)
        together = np.arange(64) // size == channel // size
        np.testing.assert_allclose(np.abs(found[..., together]), 1000 / size**0.5)
        assert not found[..., ~together].any()

    @pytest.mark.parametrize("size", SIZES)
    def test_a_constant_of_all_channels_stays_spread(self, size: int) -> None:
        found = rotated_values(np.full(64, 3.0), size)
        np.testing.assert_allclose(np.abs(found), 3, rtol=1e-6)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_encoder_computes_the_same(name: str) -> None:
    vit, graph = TinyVit(wide(name)), graph_of(wide(name))
    result = apply(RotateHidden(16), graph)
    depth = vit.spec.depth
    assert not result.log.skips
    assert result.log.edits == tuple(
        Edit(f"blocks.{i}.fc2", "16 channels at a time") for i in range(depth)
    )
    assert ops(result.graph) - ops(graph) == {"Reshape": 2 * depth, "MatMul": depth}
    for batch in (1, 3):
        pictures = vit.images(batch)
        assert_agree(run_graph(result.graph, pictures), vit.reference(pictures))
    after = view_encoder(result.graph)
    assert {block.mlp.activation for block in after.blocks} == {vit.spec.activation}
    rotated = [linear.name for linear in after.linears if rotated_channels(linear) == 16]
    assert rotated == [f"blocks.{i}.fc2" for i in range(depth)]
    assert not any(map(rotated_channels, view_encoder(graph).linears))


@pytest.mark.parametrize(("name", "size"), [*zip(SOME, SIZES, strict=False), ("plain", 4)])
def test_by_formula_and_nothing_else(name: str, size: int) -> None:
    """Each fc2 reads what it did times a matrix, its weight is times the transpose."""
    graph, pictures = graph_of(wide(name)), TinyVit(wide(name)).images(2)
    after, matrix = apply(RotateHidden(size), graph).graph, whole(size, 64)
    pairs = [
        observe(one, [site.tensor.name for site in read_by_fc2(one)], pictures)
        for one in (graph, after)
    ]
    for before, rotated in zip(*pairs, strict=True):
        np.testing.assert_allclose(rotated, before @ matrix, rtol=1e-5, atol=1e-6)
    for old, new in zip(read_by_fc2(graph), read_by_fc2(after), strict=True):
        wanted = matrix.T @ old.weight.astype(np.float64)
        np.testing.assert_allclose(new.weight, wanted, rtol=1e-6, atol=1e-6)
    found = changes(graph, after)
    assert found.changed == {site.linears[0].matmul.name for site in read_by_fc2(graph)}
    assert not found.gone
    assert found.added == {node.name for node in after.nodes if rotates(node)}


def test_flat_activations() -> None:
    """fc2 reads [B T, K], as exporters of Gemm write it."""
    vit, graph = TinyVit(wide("plain")), graph_of(wide("plain"))
    for site in read_by_fc2(graph):
        linear, name = site.linears[0], site.name
        for source, shape, readers in (
            (site.tensor, [-1, 64], [linear.matmul]),
            (linear.output, [-1, vit.spec.tokens, 16], list(linear.output.outputs)),
        ):
            to = gs.Constant(f"{name}/{shape}", np.array(shape, np.int64))
            made = gs.Variable(f"{name}/{shape}/out", dtype=np.float32)
            graph.nodes.append(gs.Node("Reshape", f"{name}/{shape}", {}, [source, to], [made]))
            for reader in readers:
                reader.inputs = [made if item is source else item for item in reader.inputs]
    check_and_infer(graph.toposort())
    result = apply(RotateHidden(16), graph)
    assert len(result.log.edits) == 2
    assert [site.tensor.shape[1:] for site in read_by_fc2(result.graph)] == [[64], [64]]
    for batch in (1, 3):
        pictures = vit.images(batch)
        assert_agree(run_graph(result.graph, pictures), vit.reference(pictures))


@examples(8)
@given(
    head_dim=st.integers(2, 9),
    parts=st.integers(1, 5),
    more=st.sampled_from([0, 0, 1, 3]),
    size=st.sampled_from(SIZES),
    grid=st.integers(1, 3),
    activation=st.sampled_from(["gelu", "swiglu", "relu"]),
)
def test_random_encoders(
    head_dim: int, parts: int, more: int, size: int, grid: int, activation: Any
) -> None:
    hidden = parts * size + more
    spec = Spec(width=2 * head_dim, hidden=hidden, grid=grid, activation=activation)
    vit, graph = TinyVit(spec), graph_of(spec)
    result = apply(RotateHidden(size), graph)
    if more:
        reason = f"{hidden} channels are not a multiple of {size}"
        assert result.log.skips == tuple(Skip(f"blocks.{i}.fc2", reason) for i in range(2))
        assert result.graph is graph
        return
    assert len(result.log.edits) == 2
    pictures = vit.images(2)
    assert_agree(run_graph(result.graph, pictures), vit.reference(pictures))


class TestRefusals:
    @pytest.mark.parametrize("size", [0, 8, 256])
    def test_a_size_that_is_not_listed(self, size: int) -> None:
        with pytest.raises(InputError) as caught:
            run(RotateHidden(size), graph_of(Spec()))
        wanted = f"rotate_hidden: {size} channels at a time: needs one of (64, 16, 4)"
        assert str(caught.value) == wanted

    def test_a_graph_without_blocks(self) -> None:
        with pytest.raises(InputError, match="no transformer block"):
            run(RotateHidden(), graph_of(Spec(depth=0)))

    def test_what_is_rotated_already(self) -> None:
        once = apply(RotateHidden(16), graph_of(Spec())).graph
        for size in (16, 4):
            again = run(RotateHidden(size), once)
            assert again.graph is once
            assert [(skip.site, skip.reason) for skip in again.log.skips] == [
                (f"blocks.{i}.fc2", "rotated already") for i in range(2)
            ]

    @pytest.mark.parametrize(
        "reason",
        [
            "quantized already",
            "its activation is an output of the graph",
            "its activation is read elsewhere",
            "its rank is not known",
        ],
    )
    def test_one_activation(self, reason: str) -> None:
        graph = graph_of(Spec())
        tensor = site_of(graph, "blocks.1.fc2").tensor
        if "quantized" in reason:
            step = QuantizeLinears(linear_scales(graph), only=frozenset({"blocks.1.fc2"}))
            graph = run(step, graph).graph
        elif "output" in reason:
            graph = run(Observe((tensor.name,)), graph).graph
        elif "read" in reason:
            square = gs.Variable("square", dtype=np.float32, shape=tensor.shape)
            graph.nodes.append(gs.Node("Mul", "square", {}, [tensor, tensor], [square]))
            graph.outputs.append(square)
        else:
            tensor.shape = None
        result = apply(RotateHidden(16), graph)
        assert result.log.skips == (Skip("blocks.1.fc2", reason),)
        assert [edit.site for edit in result.log.edits] == ["blocks.0.fc2"]
        pictures = TinyVit(Spec()).images(2)
        assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


class TestNodes:
    def test_products_of_rotations_are_no_linears(self) -> None:
        graph = graph_of(Spec())
        after = apply(RotateHidden(16), graph).graph
        added = [node for node in after.nodes if node.name.startswith(ROTATION)]
        assert len(added) == 6
        assert all(map(rotates, added))
        assert not any(map(rotates, [*graph.nodes, None]))
        assert sum(map(is_linear, after.nodes)) == sum(map(is_linear, graph.nodes))
        for old, new in zip(read_by_fc2(graph), read_by_fc2(after), strict=True):
            assert skip_rotation(new.tensor).name == old.tensor.name
            assert skip_rotation(old.tensor) is old.tensor

    def test_other_products_are_not_skipped(self) -> None:
        after = apply(RotateHidden(16), graph_of(Spec())).graph
        next(node for node in after.nodes if rotates(node) and node.op == "MatMul").name = "other"
        with pytest.raises(InputError, match="not a layer norm"):
            view_encoder(after)

    def test_the_postcondition(self) -> None:
        graph, step = graph_of(Spec()), RotateHidden(16)
        after = apply(step, graph).graph
        step.ensures(graph, after)
        unnamed, more = after.copy(), after.copy()
        [node for node in unnamed.nodes if rotates(node)][-1].name = "whole"
        spare = gs.Variable("spare", dtype=np.float32)
        more.nodes.append(gs.Node("Neg", "spare", {}, [more.outputs[0]], [spare]))
        for wrong in (unnamed, more, graph_of(Spec(depth=1))):
            with pytest.raises(AssertionError):
                step.ensures(graph, wrong)
