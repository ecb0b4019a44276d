"""Corrected biases: the numbers of a float64 formula, linears that share constants, refusals."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.biases import bias_of, drop_biases
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Edit, Result, run
from regcache.passes.correct_bias import CorrectBias
from regcache.passes.encoder import Linear
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears

Floats = NDArray[np.float32]


def corrections_of(graph: gs.Graph, seed: int = 0) -> dict[str, Floats]:
    """A correction for every linear."""
    random = np.random.default_rng(seed)
    return {
        linear.name: random.standard_normal(linear.weight_shape[1]).astype(np.float32)
        for linear in view_encoder(graph).linears
    }


def apply(graph: gs.Graph, corrections: dict[str, Floats]) -> Result:
    """Correct, check the graph with onnx in full, and that the one given is untouched."""
    original = told(graph)
    result = run(CorrectBias(corrections), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    assert not result.log.skips
    return result


def linear_of(graph: gs.Graph, name: str) -> Linear:
    return next(linear for linear in view_encoder(graph).linears if linear.name == name)


def outputs_of(graph: gs.Graph, name: str, images: Floats) -> Floats:
    """What a linear computes, its bias added."""
    tensor = linear_of(graph, name).output.name
    values: Floats = run_graph(run(Observe((tensor,)), graph).graph, images)[-1]
    return values


def correct_reference(vit: TinyVit, corrections: dict[str, Floats]) -> None:
    """Add the corrections to the reference's biases, in float64."""
    names = {"up": "fc1", "fc1": "fc1"}
    for linear, values in corrections.items():
        block, name = linear.split(".")[1:]
        width = vit.spec.width
        parts = (
            [(letter, values[i * width : (i + 1) * width]) for i, letter in enumerate("qkv")]
            if name == "qkv"
            else [(names.get(name, name), values)]
        )
        if name == "fc1" and vit.spec.packed_gate:
            parts = [("gate", values[: vit.spec.hidden]), ("fc1", values[vit.spec.hidden :])]
        for part, numbers in parts:
            key = f"{block}.{part}.b"
            vit.weights[key] = vit.weights[key].astype(np.float64) + numbers


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_encoder_computes_with_the_corrected_biases(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    corrections = corrections_of(graph)
    result = apply(graph, corrections)
    assert result.log.edits == tuple(
        Edit(linear.name, "corrected") for linear in view_encoder(graph).linears
    )
    assert ops(result.graph) == ops(graph)
    correct_reference(vit, corrections)
    images = vit.images(2)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", SPELLINGS)
def test_only_the_biases_named_change(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    chosen = [linear.name for linear in view_encoder(graph).linears][::2]
    corrections = {name: corrections_of(graph)[name] for name in chosen}
    result = apply(graph, corrections)
    assert [edit.site for edit in result.log.edits] == chosen
    adds = {linear_of(graph, name).bias_add.name for name in chosen}  # type: ignore[union-attr]
    for node, old in zip(result.graph.nodes, graph.nodes, strict=True):
        assert (node.name, node.op, node.attrs) == (old.name, old.op, old.attrs)
        assert [t.name for t in node.outputs] == [t.name for t in old.outputs]
        same = [
            ours.name == theirs.name for ours, theirs in zip(node.inputs, old.inputs, strict=True)
        ]
        assert same.count(False) == (node.name in adds)
    for linear in view_encoder(graph).linears:
        wanted = bias_of(linear).astype(np.float64) + corrections.get(linear.name, 0)
        found = bias_of(linear_of(result.graph, linear.name))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, wanted.astype(np.float32))


LINEARS = ["q", "k", "v", "out", "gate", "up", "fc2"]


@pytest.mark.parametrize("missing", [*([name] for name in LINEARS), LINEARS])
def test_a_linear_without_a_bias_gets_one(missing: list[str]) -> None:
    vit = TinyVit(Spec(activation="swiglu"))
    names = [f"blocks.0.{name}" for name in missing]
    graph = drop_biases(canonical_graph(vit.model()), *names)
    assert all(linear_of(graph, name).bias_add is None for name in names)
    corrections = corrections_of(graph)
    result = apply(graph, corrections)
    assert {edit.site for edit in result.log.edits if edit.what == "added"} == set(names)
    assert ops(result.graph) - ops(graph) == {"Add": len(names)}
    for name in names:
        bias = bias_of(linear_of(result.graph, name))
        np.testing.assert_array_equal(bias, corrections[name])
        vit.weights[f"{name.removeprefix('blocks.').replace('up', 'fc1')}.b"][:] = 0
    correct_reference(vit, corrections)
    images = vit.images(2)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
def test_a_second_run_adds_again(biased: bool) -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    name = "blocks.0.fc1"
    if not biased:
        drop_biases(graph, name)
    first, second = (corrections_of(graph, seed)[name] for seed in range(2))
    once = apply(graph, {name: first}).graph
    twice = apply(once, {name: second})
    assert twice.log.edits == (Edit(name, "corrected"),)
    images = TinyVit(Spec()).images(2)
    shift = outputs_of(twice.graph, name, images) - outputs_of(graph, name, images)
    np.testing.assert_allclose(shift, np.broadcast_to(first + second, shift.shape), atol=1e-5)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("name", ["plain", "fused qkv", "gemm", "swiglu"])
def test_quantized_linears(name: str, biased: bool) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    chosen = "blocks.0.out"
    if not biased:
        drop_biases(graph, chosen)
    quantized = run(QuantizeLinears(linear_scales(graph)), graph).graph
    corrections = corrections_of(graph)
    result = apply(quantized, corrections)
    assert all(linear.quantized for linear in view_encoder(result.graph).linears)
    images = vit.images(2)
    only = apply(quantized, {chosen: corrections[chosen]}).graph
    before, after = (outputs_of(one, chosen, images) for one in (quantized, only))
    wanted = before.astype(np.float64) + corrections[chosen]
    np.testing.assert_allclose(after, wanted, rtol=1e-5, atol=1e-5)


def test_a_shared_bias_is_left_to_the_other() -> None:
    vit = TinyVit(Spec(depth=1))
    graph = canonical_graph(vit.model())
    projections = view_encoder(graph).blocks[0].attention.projections
    shared = bias_of(projections[0])
    for linear in projections[1:]:
        assert linear.bias_add is not None
        linear.bias_add.inputs[1] = projections[0].bias_add.inputs[1]  # type: ignore[union-attr]
    graph.cleanup()
    before = shared.copy()
    corrections = {name: corrections_of(graph)[name] for name in ("blocks.0.q", "blocks.0.v")}
    result = apply(graph, corrections)
    for name in ("blocks.0.q", "blocks.0.k", "blocks.0.v"):
        wanted = before + corrections.get(name, np.float32(0))
        np.testing.assert_array_equal(bias_of(linear_of(result.graph, name)), wanted)
    np.testing.assert_array_equal(shared, before)


def test_a_bias_on_the_left_and_one_for_all_channels() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    left, one = linear_of(graph, "blocks.0.fc1"), linear_of(graph, "blocks.0.q")
    assert left.bias_add is not None
    assert one.bias_add is not None
    left.bias_add.inputs = left.bias_add.inputs[::-1]
    one.bias_add.inputs[1] = gs.Constant("one", np.array(0.5, np.float32))
    corrections = corrections_of(graph)
    result = apply(graph, corrections)
    for linear in (left, one):
        found = bias_of(linear_of(result.graph, linear.name))
        np.testing.assert_array_equal(found, bias_of(linear) + corrections[linear.name])


@pytest.mark.parametrize("biased", [True, False])
def test_a_graph_output_is_corrected_and_keeps_its_name(biased: bool) -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    name = "blocks.0.q"
    if not biased:
        drop_biases(graph, name)
    graph = run(Observe((linear_of(graph, name).output.name,)), graph).graph
    correction = corrections_of(graph)[name]
    result = apply(graph, {name: correction}).graph
    images = TinyVit(Spec()).images(2)
    before, after = (run_graph(one, images)[-1] for one in (graph, result))
    np.testing.assert_allclose(after, before + correction, rtol=1e-5, atol=1e-5)
    assert [output.name for output in result.outputs] == [output.name for output in graph.outputs]


def test_without_corrections_the_graph_is_returned() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    result = run(CorrectBias({}), graph)
    assert not result.changed
    assert result.graph is graph


@pytest.mark.parametrize(
    ("name", "correction", "reason"),
    [
        ("blocks.2.q", np.ones(16), r"no linear 'blocks\.2\.q'"),
        ("blocks.0.fc1", np.ones(16), r"blocks\.0\.fc1 needs 32 finite numbers"),
        ("blocks.0.q", np.ones(1), r"blocks\.0\.q needs 16 finite numbers"),
        ("blocks.0.q", np.ones((1, 16)), r"blocks\.0\.q needs 16 finite numbers"),
        ("blocks.0.q", np.full(16, np.nan), r"blocks\.0\.q needs 16 finite numbers"),
        ("blocks.0.q", np.full(16, -np.inf), r"blocks\.0\.q needs 16 finite numbers"),
    ],
)
def test_refusals(name: str, correction: NDArray[np.float64], reason: str) -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    with pytest.raises(InputError, match=reason):
        run(CorrectBias({name: correction.astype(np.float32)}), graph)
