"""Biases in ONNX Runtime's integer products: every linear, the same numbers, nothing else."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.quantized_graphs import FORMATS, quantized
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit, with_batch
from support.untouched import told

from regcache.passes.base import Result, run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fuse_biases import OP, FuseBiases
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops


def apply(graph: gs.Graph) -> Result:
    """Run the pass, check the graph, and that neither the one given nor a second run changes."""
    original = told(graph)
    result = run(FuseBiases(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    assert not run(FuseBiases(), result.graph).changed
    return result


def assert_close(ours: gs.Graph, theirs: gs.Graph, images: Any) -> None:
    for found, wanted in zip(run_graph(ours, images), run_graph(theirs, images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", FORMATS)
def test_every_linear_takes_its_bias(kind: str) -> None:
    vit = TinyVit(Spec())
    graph = quantized(canonical_graph(vit.model()), kind)
    result, linears = apply(graph), len(view_encoder(graph).linears)
    assert len(result.log.edits) == ops(result.graph)[OP] == linears
    assert ops(graph)["Add"] - ops(result.graph)["Add"] == linears
    assert_close(result.graph, graph, vit.images(3))


def test_biases_fall_out_of_what_onnx_runtime_runs() -> None:
    """The same integer kernels, and Gelu in the place of BiasGelu."""
    graph = quantized(canonical_graph(TinyVit(Spec()).model()))
    before, after = (
        optimised_ops(gs.export_onnx(one).SerializeToString(), threads=1)
        for one in (graph, apply(graph).graph)
    )
    assert integer_matmuls(before) == integer_matmuls(after) == len(view_encoder(graph).linears)
    assert (before["BiasGelu"], after["Gelu"]) == (2, 2)
    assert "BiasGelu" not in after


@pytest.mark.parametrize("spelling", ["fused qkv", "swiglu", "no prefix, pooled"])
def test_unfused_again_it_is_what_it_was(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = quantized(canonical_graph(vit.model()))
    again = run(UnfuseMicrosoft(), apply(graph).graph).graph
    assert ops(again)["MatMul"] == ops(graph)["MatMul"]
    shapes = [[item.weight_shape for item in view_encoder(one).linears] for one in (again, graph)]
    assert shapes[0] == shapes[1]
    assert all(linear.quantized for linear in view_encoder(again).linears)
    assert_close(again, graph, vit.images(2))


def test_a_fixed_batch() -> None:
    """ONNX Runtime would merge MatMul and Add into a float Gemm there."""
    vit = TinyVit(Spec())
    graph = quantized(canonical_graph(with_batch(vit.model(), 2)))
    fused = apply(graph).graph
    found = optimised_ops(gs.export_onnx(fused).SerializeToString(), threads=1)
    assert integer_matmuls(found) == len(view_encoder(graph).linears)
    assert_close(fused, graph, vit.images(2))


@pytest.mark.parametrize("form", ["read twice", "an output", "a number for all", "not quantized"])
def test_what_is_left_alone(form: str) -> None:
    graph = quantized(canonical_graph(TinyVit(Spec(depth=1)).model()))
    linear = view_encoder(graph).linears[0]
    add, product = linear.bias_add, linear.matmul.outputs[0]
    assert add is not None
    if form == "an output":
        graph.outputs.append(product)
    elif form == "read twice":
        second = gs.Variable("second", np.float32, product.shape)
        graph.nodes.append(gs.Node("Relu", "second", {}, [product], [second]))
        graph.outputs.append(second)
    elif form == "a number for all":
        add.inputs = [product, gs.Constant("one", np.array([1], np.float32))]
    else:
        linear.matmul.inputs[1] = gs.Constant("float", np.ones(linear.weight_shape, np.float32))
    graph.cleanup().toposort()
    result = apply(graph)
    assert linear.matmul.name not in {edit.site for edit in result.log.edits}
    assert len(result.log.edits) == 5
