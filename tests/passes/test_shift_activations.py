"""Shifted channels: the same outputs, shifted activations, and nothing else changed."""

from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.biases import bias_of, drop_biases
from support.equalizing import assert_agree, graph_of, random_factors, ways
from support.running import run_graph
from support.scales import linear_scales
from support.shifting import ADD, CLOSE, NORM, SOME, VALUE, apply, one_site, random_shifts
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.equalize import Equalize
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.shift_activations import ShiftActivations
from regcache.passes.walk import is_constant

Floats = NDArray[np.float32]


def activations(graph: gs.Graph, pictures: Floats) -> dict[str, Floats]:
    """What feeds the linears, by the name of the site."""
    sites = view_encoder(graph).sites
    observed = run(Observe(tuple(site.tensor.name for site in sites)), graph).graph
    outputs = run_graph(observed, pictures)[len(graph.outputs) :]
    return {site.name: values for site, values in zip(sites, outputs, strict=True)}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_encoder_computes_the_same(name: str) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    result = apply(graph)
    gated = vit.spec.activation == "swiglu" and not vit.spec.packed_gate
    behind_norms = {
        "qkv" if vit.spec.qkv == "fused" else "q+k+v": NORM,
        "gate+up" if gated else "fc1": NORM,
    }
    rms = vit.spec.layer_norm == "rms"  # has no bias to move anything into
    assert ways(result) == {"out": VALUE, "fc2": ADD} | ({} if rms else behind_norms)
    assert len(result.log.skips) == (2 * vit.spec.depth if rms else 0)
    assert len(result.log.edits) + len(result.log.skips) == len(view_encoder(graph).sites)
    for batch in (1, 3):
        pictures = vit.images(batch)
        found = run_graph(result.graph, pictures)
        assert_agree(found, run_graph(graph, pictures), CLOSE)
        assert_agree(found, vit.reference(pictures), CLOSE)


@pytest.mark.parametrize("name", SOME)
def test_activations_are_shifted(name: str) -> None:
    graph = graph_of(SPELLINGS[name])
    shifts, pictures = random_shifts(graph), TinyVit(SPELLINGS[name]).images(2)
    before, after = activations(graph, pictures), activations(apply(graph).graph, pictures)
    names = {site.name: site.tensor.name for site in view_encoder(graph).sites}
    assert len(before) == len(after) == len(shifts)
    for site, values in before.items():
        np.testing.assert_allclose(after[site], values - shifts[names[site]], atol=1e-4)


@pytest.mark.parametrize("name", SOME)
def test_biases_by_formula_and_nothing_else(name: str) -> None:
    """Only an Add for each fc2 more; weights as they were; biases as float64 says."""
    graph = graph_of(SPELLINGS[name])
    shifts, after = random_shifts(graph), apply(graph).graph
    added = ops(after)
    added.subtract(ops(graph))
    assert +added == Counter({"Add": SPELLINGS[name].depth})
    assert not -added
    by_name = {node.name: node for node in graph.nodes}
    touched = set[str]()
    for node in after.nodes:
        old = by_name.pop(node.name, None)
        if old is None:
            assert node.op == "Add"
            continue
        assert (node.op, node.attrs) == (old.op, old.attrs)
        assert [t.name for t in node.outputs] == [t.name for t in old.outputs]
        for ours, theirs in zip(node.inputs, old.inputs, strict=True):
            if not is_constant(theirs):
                assert ours.name in (theirs.name, f"{theirs.name}/shifted")
            elif not np.array_equal(ours.values, theirs.values):
                touched.add(node.name)
    assert not by_name
    view = view_encoder(graph)
    adds = {linear.bias_add.name for linear in view.linears if linear.bias_add is not None}
    assert touched == adds | {norm.name for b in view.blocks for norm in (b.norm1, b.norm2)}
    outgoing = {
        block.attention.projections[-1].name: shifts[block.attention.out.input.name]
        for block in view.blocks
    }
    for old_linear, new in zip(view.linears, view_encoder(after).linears, strict=True):
        np.testing.assert_array_equal(new.weight, old_linear.weight)
        wanted = bias_of(old_linear) + shifts[old_linear.input.name] @ old_linear.weight.astype(
            np.float64
        )
        if old_linear.name in outgoing:
            gone = outgoing[old_linear.name]
            wanted[-len(gone) :] -= gone
        np.testing.assert_allclose(bias_of(new), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu"])
def test_linears_without_biases_get_one(name: str) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    bare = [linear.name for linear in view_encoder(graph).blocks[0].linears]
    graph = drop_biases(graph, *bare)
    result = apply(graph)
    assert not result.log.skips
    added = ops(result.graph) - ops(graph)
    assert added == Counter({"Add": len(bare) + vit.spec.depth})
    assert all(linear.bias_add is not None for linear in view_encoder(result.graph).linears)
    pictures = vit.images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures), CLOSE)


def test_shared_constants_are_not_written_into() -> None:
    """Linears with one weight, one bias, and norms with one bias, of which some are shifted."""
    graph = graph_of(Spec())
    first, second = view_encoder(graph).blocks
    query, key, value = first.attention.projections
    assert query.bias_add is not None
    for linear in (key, value, second.attention.projections[0]):
        assert linear.bias_add is not None
        linear.matmul.inputs[1] = query.matmul.inputs[1]
        linear.bias_add.inputs[1] = query.bias_add.inputs[1]
    second.norm2.inputs = [second.norm2.inputs[0], *first.norm1.inputs[1:]]
    graph.cleanup()
    pictures = TinyVit(Spec()).images(2)
    some = one_site(graph, "blocks.0.q+k+v") | one_site(graph, "blocks.0.out")
    for shifts in (some, None):
        result = apply(graph, shifts)
        assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures), CLOSE)
    blocks = view_encoder(apply(graph, some).graph).blocks
    assert blocks[1].norm2.inputs[2].name == first.norm1.inputs[2].name
    np.testing.assert_array_equal(bias_of(blocks[1].attention.projections[0]), bias_of(query))


@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu", "registers", "merged heads"])
@pytest.mark.parametrize("shift_first", [True, False])
def test_shifting_and_equalizing(name: str, shift_first: bool) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    for shifts in (shift_first, not shift_first):
        factors = random_factors(graph, decades=1)
        step = ShiftActivations(random_shifts(graph)) if shifts else Equalize(factors)
        result = run(step, graph)
        assert not result.log.skips
        graph = result.graph
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    pictures = vit.images(2)
    assert_agree(run_graph(graph, pictures), vit.reference(pictures), 1e-4)
    names = {block.mlp.activation for block in view_encoder(graph).blocks}
    assert names == {vit.spec.activation}


@pytest.mark.parametrize("name", ["plain", "swiglu", "fused qkv"])
def test_shifts_of_zero_change_no_number(name: str) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    zeros = {tensor: values * 0 for tensor, values in random_shifts(graph).items()}
    pictures = vit.images(2)
    found = run_graph(apply(graph, zeros).graph, pictures)
    for ours, theirs in zip(found, run_graph(graph, pictures), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", ["plain", "swiglu", "fused qkv"])
def test_the_opposite_undoes_a_run(name: str) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    shifts, pictures = random_shifts(graph), vit.images(2)
    once = apply(graph, shifts).graph
    opposite = {
        new.tensor.name: -shifts[old.tensor.name]
        for old, new in zip(view_encoder(graph).sites, view_encoder(once).sites, strict=True)
    }
    back = apply(once, opposite).graph
    for one, other in zip(view_encoder(graph).linears, view_encoder(back).linears, strict=True):
        np.testing.assert_allclose(bias_of(other), bias_of(one), atol=1e-5)
    before = activations(graph, pictures)
    for site, values in activations(back, pictures).items():
        np.testing.assert_allclose(values, before[site], atol=1e-4)
    assert {b.mlp.activation for b in view_encoder(back).blocks} == {vit.spec.activation}


@pytest.mark.parametrize("name", ["plain", "tanh", "quick gelu", "relu", "swiglu", "packed swiglu"])
def test_the_activation_keeps_its_name(name: str) -> None:
    graph = graph_of(SPELLINGS[name])
    names = [block.mlp.activation for block in view_encoder(graph).blocks]
    assert "unknown" not in names
    after = view_encoder(apply(graph).graph).blocks
    assert [block.mlp.activation for block in after] == names


@pytest.mark.parametrize("name", ["plain", "swiglu", "fused qkv"])
def test_a_shifted_encoder_is_quantized_whole(name: str) -> None:
    vit, after = TinyVit(SPELLINGS[name]), apply(graph_of(SPELLINGS[name])).graph
    result = run(QuantizeLinears(linear_scales(after, "int8")), after)
    assert all(linear.quantized for linear in view_encoder(result.graph).linears)
    assert len(result.log.edits) == len(view_encoder(after).sites)
    pictures = vit.images(2)
    for found, wanted in zip(
        run_graph(result.graph, pictures), vit.reference(pictures), strict=True
    ):
        assert np.abs(found - wanted).mean() < 0.2


def test_without_shifts_the_graph_is_returned() -> None:
    graph = graph_of(Spec())
    result = run(ShiftActivations({}), graph)
    assert not result.changed
    assert result.graph is graph
