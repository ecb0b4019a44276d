"""Weights packed as MatMulNBits: bytes in a loop, the numbers in ONNX Runtime, nothing else."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from support import zoo
from support.block_weights import block_weight, block_weights
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Edit, Skip, run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.pack_weights import BlockWeight, PackWeights, pack_integers
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime.session import OrtSession

FC1 = "blocks.0.fc1"  # K = 16, N = 32 in the tiny encoder
INTEGERS = hnp.arrays(
    np.int8,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=40),
    elements=st.integers(-8, 7),
)


def rounded(weight: NDArray[np.float32], block_size: int = 32) -> BlockWeight:
    """Integers and scales near a weight, so that a real encoder's numbers stay ordinary."""
    starts = range(0, len(weight), block_size)
    peaks = [np.abs(weight[start : start + block_size]).max(axis=0) for start in starts]
    steps = (np.stack(peaks) / 7).astype(np.float32)
    integers = np.rint(weight / np.repeat(steps, block_size, axis=0)[: len(weight)])
    return BlockWeight(integers.astype(np.int8), steps, block_size)


def in_float(graph: gs.Graph, weights: Mapping[str, BlockWeight]) -> gs.Graph:
    """The same graph with float weights in its matmuls."""
    copy = graph.copy()
    for linear in view_encoder(copy).linears:
        if linear.name in weights:
            values = weights[linear.name].dequantized()
            linear.matmul.inputs[1] = gs.Constant(f"{linear.name}/float", values)
    return copy


def assert_computes_the_same(
    graph: gs.Graph, weights: Mapping[str, BlockWeight], images: NDArray[np.float32]
) -> None:
    packed = run(PackWeights(weights), graph).graph
    for optimize in (False, True):
        found = run_graph(packed, images, optimize=optimize)
        wanted = run_graph(in_float(graph, weights), images, optimize=optimize)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@given(integers=INTEGERS, block_size=st.sampled_from([16, 32, 64]), seed=st.integers(0, 9))
def test_each_integer_has_its_half_of_a_byte_and_its_scale(
    integers: NDArray[np.int8], block_size: int, seed: int
) -> None:
    rows, columns = integers.shape
    blocks = -(-rows // block_size)
    packed = pack_integers(integers, block_size)
    assert packed.dtype == np.uint8
    assert packed.shape == (columns, blocks, block_size // 2)
    steps = block_weight(rows, columns, block_size, seed).scales
    floats = BlockWeight(integers, steps, block_size).dequantized()
    assert floats.dtype == np.float32
    assert floats.shape == integers.shape
    for column in range(columns):
        for row in range(blocks * block_size):
            block, place = divmod(row, block_size)
            byte = int(packed[column, block, place // 2])
            integer = (byte // 16 if place % 2 else byte % 16) - 8
            if row < rows:
                assert integer == integers[row, column]
                assert floats[row, column] == np.float32(integer) * steps[block, column]
            else:
                assert integer == 0


@given(
    integers=hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)),
    block_size=st.sampled_from([16, 32, 64]),
)
def test_integers_of_8_bits_have_a_byte_each(integers: NDArray[np.int8], block_size: int) -> None:
    rows, columns = integers.shape
    blocks = -(-rows // block_size)
    packed = pack_integers(integers, block_size, 8)
    assert packed.dtype == np.uint8
    assert packed.shape == (columns, blocks, block_size)
    for column in range(columns):
        for row in range(blocks * block_size):
            integer = int(packed[column, row // block_size, row % block_size]) - 128
            assert integer == (integers[row, column] if row < rows else 0)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_graph_computes_the_encoder_with_the_integers(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    weights = block_weights(graph, bits=(4, 8))
    assert all((weight.scales < 0).any() for weight in weights.values())
    assert_computes_the_same(graph, weights, vit.images(2))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_blocks_that_do_not_divide_the_input_channels(block_size: int, bits: int) -> None:
    vit = TinyVit(Spec(width=42, hidden=75, depth=1))
    graph = canonical_graph(vit.model())
    assert_computes_the_same(graph, block_weights(graph, block_size, (bits,)), vit.images(3))


# so400m's MLP has 4,304 channels: 134 blocks of 32 and a half.
@pytest.mark.parametrize(
    "name",
    [zoo.family_param(name) for name in ("dinov2-s14", "siglip2-so400m14")],
)
def test_real_architectures(name: str, folder: Path) -> None:
    graph = zoo.canonical_family(name, folder)
    side = (1, 3, zoo.SIDE, zoo.SIDE)
    images = np.random.default_rng(0).standard_normal(side, dtype=np.float32)
    linears = view_encoder(graph).linears
    weights = {linear.name: rounded(linear.weight) for linear in linears}
    assert_computes_the_same(graph, weights, images)


@pytest.mark.parametrize("name", SPELLINGS)
def test_edits_and_nothing_else(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    original = told(graph)
    linears = view_encoder(graph).linears
    weights = block_weights(graph, bits=(4, 8))
    result = run(PackWeights(weights), graph)
    edits = tuple(
        Edit(linear.name, f"{weights[linear.name].bits} bits, blocks of 32") for linear in linears
    )
    assert (result.log.edits, result.log.skips) == (edits, ())
    by_bits = {linear.matmul.name: weights[linear.name].bits for linear in linears}
    by_name = {node.name: node for node in graph.nodes}
    assert {node.name for node in result.graph.nodes} == by_name.keys()
    for node in result.graph.nodes:
        old = by_name[node.name]
        assert [t.name for t in node.outputs] == [t.name for t in old.outputs]
        if node.name in by_bits:
            assert (node.op, node.domain) == ("MatMulNBits", "com.microsoft")
            assert node.inputs[0].name == old.inputs[0].name
            assert node.attrs["bits"] == by_bits[node.name]
            continue
        assert (node.op, node.domain, node.attrs) == (old.op, old.domain, old.attrs)
        for ours, theirs in zip(node.inputs, old.inputs, strict=True):
            assert ours.name == theirs.name
            if isinstance(theirs, gs.Constant):
                np.testing.assert_array_equal(ours.values, theirs.values)
    types = {key: tensor.dtype for key, tensor in graph.tensors().items()}
    for key, tensor in result.graph.tensors().items():
        assert key not in types or tensor.dtype == types[key]
    for ours, theirs in zip(result.graph.outputs, graph.outputs, strict=True):
        assert (ours.name, ours.shape) == (theirs.name, theirs.shape)
    assert told(graph) == original


def test_linears_that_are_not_named_stay_float() -> None:
    vit = TinyVit(Spec())
    graph = canonical_graph(vit.model())
    weights = {name: block_weights(graph)[name] for name in (FC1, "blocks.1.q")}
    result = run(PackWeights(weights), graph)
    assert [edit.site for edit in result.log.edits] == [FC1, "blocks.1.q"]
    old, new = (Counter(node.op for node in one.nodes) for one in (graph, result.graph))
    assert new == old - Counter(MatMul=2) + Counter(MatMulNBits=2)
    assert_computes_the_same(graph, weights, vit.images(2))
    assert not run(PackWeights({}), graph).changed


def test_linears_with_the_same_weight_share_its_constants() -> None:
    vit = TinyVit(Spec(depth=1))
    graph = canonical_graph(vit.model())
    shared = block_weight(16, 16)
    weights = {f"blocks.0.{name}": shared for name in "qk"}
    weights["blocks.0.v"] = block_weight(16, 16)
    assert_computes_the_same(graph, weights, vit.images(1))
    result = run(PackWeights(weights), graph).graph
    packed = [node.inputs[1] for node in result.nodes if node.op == "MatMulNBits"]
    assert len(packed) == 3
    assert len({id(constant) for constant in packed}) == 2


@pytest.mark.parametrize("bits", [4, 8])
def test_a_saved_file_is_checked_small_and_runs(tmp_path: Path, bits: int) -> None:
    vit = TinyVit(Spec(width=64, hidden=256))
    graph = canonical_graph(vit.model())
    weights = block_weights(graph, bits=(bits,))
    packed = run(PackWeights(weights), graph).graph
    files = {"float": graph, "packed": packed}
    for name, one in files.items():
        save_graph(one, tmp_path / f"{name}.onnx")
    path = tmp_path / "packed.onnx"
    onnx.checker.check_model(path, full_check=True)
    saved = onnx.load(path)
    assert {(item.domain, item.version) for item in saved.opset_import} == {
        ("", 20),
        ("com.microsoft", 1),
    }
    # Half a byte or one for an integer and 4 / 32 for its scale, where the float weight has 4.
    numbers = sum(weight.integers.size for weight in weights.values())
    sizes = {name: (tmp_path / f"{name}.onnx").stat().st_size for name in files}
    saved_bytes = numbers * (4 - 0.125 - bits / 8)
    assert sizes["float"] - sizes["packed"] == pytest.approx(saved_bytes, rel=0.02)
    images = vit.images(2)
    wanted = run_graph(in_float(graph, weights), images, optimize=True)
    again = tmp_path / "again.onnx"
    save_graph(import_graph(saved), again)
    for file in (path, again):
        with OrtSession(file, threads=1) as session:
            for ours, theirs in zip(session.run(images), wanted, strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_quantized_linears_are_left_alone() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    step = QuantizeLinears(linear_scales(graph), only=frozenset({FC1}))
    result = run(PackWeights(block_weights(graph)), run(step, graph).graph)
    assert result.log.skips == (Skip(FC1, "quantized already"),)
    assert len(result.log.edits) == 5


def test_a_packed_graph_is_refused() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    step = PackWeights({FC1: block_weight(16, 32)})
    with pytest.raises(InputError, match="the graph has packed weights already"):
        run(step, run(step, graph).graph)


FITTING = block_weight(16, 32)
TOO_LARGE, TOO_SMALL = FITTING.integers.copy(), FITTING.integers.copy()
TOO_LARGE[3, 4], TOO_SMALL[3, 4] = 8, -9


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("blocks.9.fc1", {}, "no linear 'blocks.9.fc1'"),
        ("blocks.0.q", {}, r"blocks.0.q: the integers are int8 \[16, 32\], not int8 \[16, 16\]"),
        (FC1, {"scales": FITTING.scales[:, 1:]}, r"float32 \[1, 31\], not float32 \[1, 32\]"),
        (FC1, {"scales": FITTING.scales.astype(np.float64)}, "the scales are float64"),
        (FC1, {"integers": FITTING.integers.astype(np.int32)}, "the integers are int32"),
        (FC1, {"block_size": 8}, "blocks of 8, not a power of two from 16 on"),
        (FC1, {"block_size": 48}, "blocks of 48, not a power of two"),
        (FC1, {"block_size": -16}, "blocks of -16, not a power of two"),
        (FC1, {"integers": TOO_LARGE}, "integers from -8 to 8 do not fit"),
        (FC1, {"integers": TOO_SMALL}, "integers from -9 to 7 do not fit"),
        (FC1, {"bits": 5}, "5 bits, not 4 or 8"),
        (FC1, {"scales": np.full_like(FITTING.scales, np.nan)}, "NaN or infinity"),
        (FC1, {"scales": np.full_like(FITTING.scales, np.inf)}, "NaN or infinity"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    name: str, fields: dict[str, Any], reason: str
) -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    with pytest.raises(InputError, match=f"pack_weights: .*{reason}"):
        run(PackWeights({name: replace(FITTING, **fields)}), graph)
