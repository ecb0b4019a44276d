"""Attention as ONNX Runtime's own operator: found in every spelling, the same numbers."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.registers import FORMS, with_registers
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Result, run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fuse_attention import OP, FuseAttention
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft

# Packed projections whose thirds are taken by head have no queries [B, T, C]; heads that are merged
# with the batch have Reshapes around the softmax.
REFUSED = {
    "fused qkv": "its queries are not a linear's alone",
    "merged heads": "it does not stand between two products alone",
    "einsum": "it does not stand between two products alone",
}
# Of one operator of ONNX's there is no softmax to see.
OTHERS = {"attention operator", "attention operator, rank 3"}


def apply(graph: gs.Graph) -> Result:
    """Run the pass, check the graph, and that neither the one given nor a second run changes."""
    original = told(graph)
    result = run(FuseAttention(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    assert not run(FuseAttention(), result.graph).changed
    return result


def assert_close(ours: gs.Graph, theirs: gs.Graph, images: Any) -> None:
    for optimize in (False, True):
        pair = (run_graph(one, images, optimize=optimize) for one in (ours, theirs))
        for found, wanted in zip(*pair, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "spelling", [name for name in SPELLINGS if name not in OTHERS | REFUSED.keys()]
)
def test_every_spelling(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = canonical_graph(vit.model())
    result, found = apply(graph), ops(apply(graph).graph)
    assert found[OP] == 2, result.log.skips
    assert_close(result.graph, graph, vit.images(3))


@pytest.mark.parametrize("form", FORMS)
def test_registers(form: str) -> None:
    """Keys and values that registers stand before come by head, the keys transposed for it."""
    vit = TinyVit(Spec(grid=4))
    graph = with_registers(view_encoder(canonical_graph(vit.model())), form)
    result = apply(graph)
    assert ops(result.graph)[OP] == 2, result.log.skips
    assert_close(result.graph, graph, vit.images(3))


def test_with_quantized_linears() -> None:
    vit = TinyVit(Spec())
    graph = quantized(canonical_graph(vit.model()))
    attention = apply(graph).graph
    both = run(FuseBiases(), attention).graph
    found = ops(both)
    assert (found[OP], found["MatMul"], found["Transpose"]) == (2, 0, 1)
    for images in (vit.images(1), vit.images(3)):
        for ours, theirs in zip(run_graph(both, images), run_graph(graph, images), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=0.02)
    again = run(UnfuseMicrosoft(), both).graph
    assert len(view_encoder(again).linears) == len(view_encoder(graph).linears)


@pytest.mark.parametrize("spelling", REFUSED)
def test_other_forms_are_refused(spelling: str) -> None:
    result = apply(canonical_graph(TinyVit(SPELLINGS[spelling]).model()))
    assert not result.changed
    assert {skip.reason for skip in result.log.skips} == {REFUSED[spelling]}


@pytest.mark.parametrize("form", ["mask", "weights are read", "other axis", "scaled values"])
def test_refusals(form: str) -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    attention = view_encoder(graph).blocks[0].attention
    softmax, scores = attention.softmax, attention.scores
    if form == "mask":
        masked = gs.Variable("masked", np.float32, scores.outputs[0].shape)
        numbers = gs.Constant("mask", np.ones((1, 1, 1, 10), np.float32))
        graph.nodes.append(gs.Node("Add", "mask", {}, [scores.outputs[0], numbers], [masked]))
        softmax.inputs = [masked]
        reason = "it does not stand between two products alone"
    elif form == "weights are read":
        graph.outputs.append(softmax.outputs[0])
        reason = "it does not stand between two products alone"
    elif form == "other axis":
        softmax.attrs["axis"] = 2
        reason = "it is not over the keys"
    else:
        values = attention.context.inputs[1]
        twice = gs.Variable("twice", np.float32, values.shape)
        two = gs.Constant("two", np.array(2, np.float32))
        graph.nodes.append(gs.Node("Mul", "twice", {}, [values, two], [twice]))
        attention.context.inputs[1] = twice
        reason = "its values are multiplied by a number"
    result = apply(graph.cleanup().toposort())
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == [reason]
