"""A rotated residual stream: the same outputs, no outliers, and nothing else changed."""

from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.biases import bias_of, drop_biases, widen_biases
from support.canonical import canonical_graph
from support.equalizing import assert_agree, site_of
from support.examples import examples
from support.rotating import apply, changes, graph_of, observe
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import Edit, run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotated_stream import matrix_in, rotated_stream, stream_ends
from regcache.passes.rotation_matrix import rotation_of_stream
from regcache.passes.walk import is_constant, is_linear, keeps_channels

Floats = NDArray[Any]
STREAM = "the residual stream"
DEEP = {
    "scaled": Spec(depth=3, layer_scale=True),
    "fused qkv": Spec(depth=3, layer_scale=True, qkv="fused"),
    "swiglu": Spec(depth=3, activation="swiglu"),
    "merged heads": Spec(depth=4, attention="merged"),
}


def matrix_of(width: int = 16, seed: int = 0) -> Floats:
    return rotation_of_stream(width, seed).astype(np.float64)


def rms_graph(spec: Spec) -> gs.Graph:
    graph = graph_of(replace(spec, attention="op4", opset=23))
    for node in graph.nodes:
        if node.op == "LayerNormalization":
            node.op, node.inputs = "RMSNormalization", node.inputs[:2]
    return graph.cleanup()


class TestMatrix:
    @pytest.mark.parametrize("width", [2, 3, 16, 257])
    def test_it_turns_and_keeps_the_mean(self, width: int) -> None:
        matrix = rotation_of_stream(width)
        assert matrix.shape == (width, width)
        assert matrix.dtype == np.float32
        exact, ones = matrix.astype(np.float64), np.ones(width)
        np.testing.assert_allclose(exact.T @ exact, np.eye(width), atol=1e-6)
        np.testing.assert_allclose(exact @ ones, ones, atol=1e-5)
        token = np.random.default_rng(1).standard_normal(width)
        assert (token @ exact).mean() == pytest.approx(token.mean(), abs=1e-6)

    def test_no_channel_stays_large(self) -> None:
        assert np.abs(rotation_of_stream(384)).max() < 0.3

    def test_the_seed_draws_it(self) -> None:
        one, same, other = (rotation_of_stream(16, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(one, same)
        assert np.abs(one - other).max() > 0.1
        found = [apply(RotateStream(seed), graph_of(Spec())).graph for seed in (1, 2)]
        for graph, matrix in zip(found, (one, other), strict=True):
            np.testing.assert_array_equal(matrix_in(gs.export_onnx(graph)), matrix)


@pytest.mark.parametrize("name", [name for name in SPELLINGS if "gemm" not in name])
def test_the_encoder_computes_the_same(name: str) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    result = apply(RotateStream(), graph)
    assert (result.log.edits, result.log.skips) == ((Edit(STREAM, "16 channels"),), ())
    wanted = ops(graph)
    wanted.update({"MatMul": 2, "Mul": -2 * vit.spec.layer_scale})
    assert ops(result.graph) == wanted
    for batch in (1, 3):
        pictures = vit.images(batch)
        assert_agree(run_graph(result.graph, pictures), vit.reference(pictures))
    assert {one.mlp.activation for one in view_encoder(result.graph).blocks} == {
        vit.spec.activation
    }


def test_biases_with_leading_dimensions() -> None:
    vit = TinyVit(Spec())
    result = apply(RotateStream(), widen_biases(graph_of(vit.spec)))
    assert result.changed
    assert ops(result.graph) == ops(apply(RotateStream(), graph_of(vit.spec)).graph)
    pictures = vit.images(2)
    assert_agree(run_graph(result.graph, pictures), vit.reference(pictures))


@pytest.mark.parametrize("name", DEEP)
def test_streams_between_the_ends_are_rotated(name: str) -> None:
    spec = DEEP[name]
    graph, pictures = graph_of(spec), TinyVit(spec).images(2)
    after = apply(RotateStream(3), graph).graph
    values = []
    for one in (graph, after):
        blocks = view_encoder(one).blocks
        names = [item.name for block in blocks for item in (block.middle, block.output)]
        values.append(dict(zip(names, observe(one, names, pictures), strict=True)))
    assert values[0].keys() == values[1].keys()
    last = {item.name for item in (blocks[-1].middle, blocks[-1].output)}
    for tensor, stream in values[0].items():
        wanted = stream if tensor in last else stream @ matrix_of(seed=3)
        np.testing.assert_allclose(values[1][tensor], wanted, rtol=1e-4, atol=1e-4)
    assert_agree(run_graph(after, pictures), TinyVit(spec).reference(pictures))


@pytest.mark.parametrize("name", DEEP)
def test_weights_by_formula_and_nothing_else(name: str) -> None:
    """By the encoder's own weights in float64, whatever the pass found in the graph."""
    spec = DEEP[name]
    vit, graph = TinyVit(spec), graph_of(spec)
    after, turn = apply(RotateStream(), graph).graph, matrix_of()
    w = {key: values.astype(np.float64) for key, values in vit.weights.items()}
    old, new = view_encoder(graph), view_encoder(after)
    last = spec.depth - 1
    wanted = {"regcache.rotation/stream/in", "regcache.rotation/stream/out"}, set[str](), set[str]()
    for block, one in zip(new.blocks, old.blocks, strict=True):
        i = block.index
        for linear, original in zip(block.linears, one.linears, strict=True):
            weight, bias = original.weight.astype(np.float64), bias_of(original).astype(np.float64)
            letter = linear.name.rpartition(".")[2]
            if letter not in ("out", "fc2") and (i < last or letter in ("q", "k", "v", "qkv")):
                norm = "norm2" if letter in ("fc1", "gate", "up") else "norm1"
                bias = bias + w[f"{i}.{norm}.b"] @ weight
                weight = turn.T @ (w[f"{i}.{norm}"][:, None] * weight)
            elif i < last:
                scale = w[f"{i}.scale{1 if letter == 'out' else 2}"] if spec.layer_scale else 1
                weight, bias = (weight * scale) @ turn, (bias * scale) @ turn
            else:
                np.testing.assert_array_equal(linear.weight, original.weight)
                np.testing.assert_array_equal(bias_of(linear), bias_of(original))
                continue
            np.testing.assert_allclose(linear.weight, weight, atol=1e-6)
            np.testing.assert_allclose(bias_of(linear), bias, atol=1e-6)
            assert original.bias_add is not None
            wanted[2].update({linear.matmul.name, original.bias_add.name})
        for norm in (block.norm1, block.norm2)[: 2 if i < last else 1]:
            np.testing.assert_array_equal(norm.inputs[1].values, np.ones(16))
            np.testing.assert_array_equal(norm.inputs[2].values, np.zeros(16))
            wanted[2].add(norm.name)
        if i < last:
            factors = [node.name for node in graph.nodes if reads(node, f"{i}.scale")]
            assert len(factors) == 2 * spec.layer_scale
            wanted[1].update(factors)
    adds = [old.blocks[0].middle.inputs[0], old.blocks[-1].middle.inputs[0]]
    wanted[2].update(add.name for add in adds)
    if spec.layer_scale:
        streams = [item for one in old.blocks[:-1] for item in (one.middle, one.output)]
        wanted[2].update(item.inputs[0].name for item in streams)
    assert changes(graph, after) == wanted
    assert [one.name for one in old.linears] == [one.name for one in new.linears]
    assert sum(map(is_linear, graph.nodes)) == sum(map(is_linear, after.nodes))


def reads(node: gs.Node, prefix: str) -> bool:
    return any(is_constant(item) and item.name.startswith(prefix) for item in node.inputs)


@examples(8)
@given(
    head_dim=st.integers(1, 9),
    depth=st.integers(2, 4),
    activation=st.sampled_from(["gelu", "swiglu", "relu"]),
    qkv=st.sampled_from(["separate", "fused"]),
    layer_scale=st.booleans(),
    norms=st.sampled_from(["layer", "rms"]),
    seed=st.integers(0, 1000),
)
def test_random_encoders(
    head_dim: int, depth: int, activation: Any, qkv: Any, layer_scale: bool, norms: str, seed: int
) -> None:
    spec = Spec(
        width=2 * head_dim, depth=depth, activation=activation, qkv=qkv, layer_scale=layer_scale
    )
    graph = graph_of(spec) if norms == "layer" else rms_graph(spec)
    result = apply(RotateStream(seed), graph)
    assert result.changed
    pictures = TinyVit(spec).images(2, seed)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures), 1e-4)


def test_rms_norms_get_ones_and_no_bias() -> None:
    graph = rms_graph(Spec(depth=3))
    after = apply(RotateStream(), graph).graph
    norms = [norm for block in view_encoder(after).blocks for norm in (block.norm1, block.norm2)]
    for norm in norms[:-1]:
        assert len(norm.inputs) == 2
        np.testing.assert_array_equal(norm.inputs[1].values, np.ones(16))
    pictures = TinyVit(Spec()).images(2)
    assert_agree(run_graph(after, pictures), run_graph(graph, pictures))
    assert ops(after) - ops(graph) == {"MatMul": 2}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", ["scaled", "swiglu"])
def test_biases_may_be_absent(name: str, norms: bool) -> None:
    """A linear gets a bias where a norm had one, and no other does."""
    graph = graph_of(DEEP[name])
    bare = [linear.name for block in view_encoder(graph).blocks for linear in block.linears]
    graph = drop_biases(graph, *bare)
    for block in view_encoder(graph).blocks if norms else ():
        for norm in (block.norm1, block.norm2):
            norm.inputs = norm.inputs[:2]
    after = apply(RotateStream(), graph.cleanup()).graph
    biased = {one.name for one in view_encoder(after).linears if one.bias_add is not None}
    readers = {one for one in bare if not one.endswith((".out", ".fc2"))}
    assert biased == (
        set() if norms else readers - {"blocks.2.fc1", "blocks.2.gate", "blocks.2.up"}
    )
    pictures = TinyVit(DEEP[name]).images(2)
    assert_agree(run_graph(after, pictures), run_graph(graph, pictures))


def test_shared_constants_are_not_written_into() -> None:
    graph = graph_of(Spec(depth=3))
    first, second, third = view_encoder(graph).blocks
    for one, other in ((first, second), (third, first)):
        for norm in (one.norm1, one.norm2):
            norm.inputs = [norm.inputs[0], *other.norm1.inputs[1:]]
        for linear, theirs in zip(one.linears, other.linears, strict=True):
            linear.matmul.inputs[1] = theirs.matmul.inputs[1]
    after = apply(RotateStream(), graph.cleanup()).graph
    pictures = TinyVit(Spec()).images(2)
    assert_agree(run_graph(after, pictures), run_graph(graph, pictures))


def test_an_outlier_channel_spreads() -> None:
    spec = Spec(width=64)
    vit = TinyVit(spec)
    vit.weights["position"][..., 5] += 300
    graph, peaks = canonical_graph(vit.model()), []
    for one in (graph, apply(RotateStream(), graph).graph):
        names = [site_of(one, f"blocks.{name}").tensor.name for name in ("0.fc1", "1.q+k+v")]
        peaks.append([np.abs(values).max() for values in observe(one, names, vit.images(2))])
    assert (np.array(peaks[0]) > 7).all()
    assert (np.array(peaks[1]) < 4).all()


def test_the_ends_and_the_matrix() -> None:
    graph = graph_of(Spec(depth=3))
    after = apply(RotateStream(7), graph).graph
    for one, turned in ((graph, False), (after, True)):
        assert rotated_stream(view_encoder(one)) is turned
    assert matrix_in(gs.export_onnx(graph)) is None
    assert stream_ends(graph) == ()
    np.testing.assert_array_equal(matrix_in(gs.export_onnx(after)), rotation_of_stream(16, 7))
    names = [item.name for item in stream_ends(after)]
    old = view_encoder(graph).blocks
    pictures = TinyVit(Spec()).images(2)
    wanted = observe(graph, [old[0].input.name, old[-1].input.name], pictures)
    for found, stream in zip(observe(after, names, pictures), wanted, strict=True):
        np.testing.assert_allclose(found, stream, atol=1e-4)
    halved = run(HalfPrecision(), after).graph
    assert [item.name for item in stream_ends(halved)] == names
    matrix = matrix_in(gs.export_onnx(halved))
    assert matrix is not None
    np.testing.assert_allclose(matrix, rotation_of_stream(16, 7).astype(np.float64), atol=1e-3)


@pytest.mark.parametrize(
    ("attributes", "kept"), [({"perm": [1, 0, 2]}, True), ({"perm": [0, 2, 1]}, False), ({}, False)]
)
def test_a_transpose_keeps_channels_where_it_leaves_the_last_axis(
    attributes: dict[str, list[int]], kept: bool
) -> None:
    """Without a permutation it reverses the axes."""
    source, result = gs.Variable("x", np.float32, [2, 3, 4]), gs.Variable("y", np.float32)
    assert keeps_channels(gs.Node("Transpose", "t", attributes, [source], [result])) is kept
