"""Weight-only rounding: formulas in float64, the numbers that the graph computes, nothing else."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Skip, run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.round_weights import RoundWeights, round_weight

LINEARS = ("q", "k", "v", "out", "fc1", "fc2", "gate")
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e6, 1e6, width=32),
)


def rounded(weight: NDArray[np.float32], bits: int, block_size: int) -> NDArray[np.float64]:
    """One number after the other."""
    steps = 2 ** (bits - 1) - 1
    result = np.zeros(weight.shape, np.float64)
    for row, column in np.ndindex(weight.shape):
        start = row // block_size * block_size
        step = float(np.abs(weight[start : start + block_size, column]).max()) / steps
        if step:
            result[row, column] = round(float(weight[row, column]) / step) * step
    return result


@given(weight=WEIGHTS, bits=st.integers(2, 8), block_size=st.integers(1, 14))
def test_each_group_of_a_channel_has_its_own_step(
    weight: NDArray[np.float32], bits: int, block_size: int
) -> None:
    before = weight.copy()
    found = round_weight(weight, bits, block_size)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, rounded(weight, bits, block_size).astype(np.float32))
    np.testing.assert_array_equal(round_weight(found, bits, block_size), found)
    np.testing.assert_array_equal(weight, before)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_graph_computes_the_encoder_with_rounded_weights(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = run(RoundWeights(bits=4, block_size=12), graph).graph
    onnx.checker.check_model(gs.export_onnx(result), full_check=True)
    for key in vit.weights:
        if key.partition(".")[2] in LINEARS and not key.startswith("head"):
            vit.weights[key] = rounded(vit.weights[key], 4, 12)
    images = vit.images(2)
    for found, wanted in zip(run_graph(result, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
def test_edits_and_nothing_else(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    original = told(graph)
    linears = view_encoder(graph).linears
    result = run(RoundWeights(), graph)
    assert [edit.site for edit in result.log.edits] == [linear.name for linear in linears]
    assert {edit.what for edit in result.log.edits} == {"4 bits, groups of 32"}
    assert not result.log.skips
    weights = {linear.matmul.name for linear in linears}
    by_name = {node.name: node for node in graph.nodes}
    assert {node.name for node in result.graph.nodes} == by_name.keys()
    for node in result.graph.nodes:
        old = by_name[node.name]
        assert (node.op, node.attrs) == (old.op, old.attrs)
        assert [t.name for t in node.outputs] == [t.name for t in old.outputs]
        kept = slice(0, 1) if node.name in weights else slice(None)
        for ours, theirs in zip(node.inputs[kept], old.inputs[kept], strict=True):
            assert ours.name == theirs.name
            if isinstance(theirs, gs.Constant):
                np.testing.assert_array_equal(ours.values, theirs.values)
    assert told(graph) == original


def test_a_second_run_edits_nothing_and_fewer_bits_edit_again() -> None:
    once = run(RoundWeights(bits=5), canonical_graph(TinyVit(Spec()).model())).graph
    twice = run(RoundWeights(bits=5), once)
    assert not twice.changed
    assert {skip.reason for skip in twice.log.skips} == {"its weight is rounded already"}
    coarser = run(RoundWeights(bits=3), once).graph
    for one, other in zip(view_encoder(once).linears, view_encoder(coarser).linears, strict=True):
        wanted = rounded(one.weight, 3, 32).astype(np.float32)
        np.testing.assert_array_equal(other.weight, wanted)


def test_linears_that_share_a_weight_share_the_rounded_one() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    linears = view_encoder(graph).blocks[0].attention.projections
    linears[1].matmul.inputs[1] = linears[0].matmul.inputs[1]
    result = run(RoundWeights(), graph)
    weights = [linear.matmul.inputs[1] for linear in view_encoder(result.graph).linears]
    assert weights[0] is weights[1]
    assert len({id(weight) for weight in weights}) == 5
    assert len(result.log.edits) == 6


def test_quantized_linears_are_left_alone() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    step = QuantizeLinears(linear_scales(graph), only=frozenset({"blocks.0.fc1"}))
    result = run(RoundWeights(), run(step, graph).graph)
    assert result.log.skips == (Skip("blocks.0.fc1", "quantized already"),)
    assert len(result.log.edits) == 5
    quantized = [linear.quantized for linear in view_encoder(result.graph).linears]
    assert quantized == [False] * 4 + [True, False]


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (RoundWeights(bits=1), "2 to 8 bits, not 1"),
        (RoundWeights(bits=9), "2 to 8 bits, not 9"),
        (RoundWeights(block_size=0), "a group of 0 input channels"),
    ],
)
def test_impossible_numbers_are_refused(step: RoundWeights, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        run(step, canonical_graph(TinyVit(Spec(depth=1)).model()))
