"""The stream's rotation in the patch embedding: the same numbers with a product less."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Result, run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fold_stream_rotation import FoldStreamRotation
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotated_stream import matrix_in
from regcache.passes.rotation_matrix import rotation_of_stream


def rotated(graph: gs.Graph) -> gs.Graph:
    result = run(RotateStream(), graph)
    assert result.changed, result.log.skips
    return result.graph


def apply(graph: gs.Graph) -> Result:
    """Run the pass, check the graph, and that neither the one given nor a second run changes."""
    original = told(graph)
    result = run(FoldStreamRotation(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    assert not run(FoldStreamRotation(), result.graph).changed
    return result


@pytest.mark.parametrize("spelling", ["plain", "no prefix, pooled", "registers", "gemm, dynamic"])
def test_the_same_numbers(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    plain = canonical_graph(vit.model())
    graph = rotated(plain)
    result = apply(graph)
    assert len(result.log.edits) == 1, result.log.skips
    assert ops(graph)["MatMul"] - ops(result.graph)["MatMul"] == 1
    images = vit.images(3)
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, plain)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
    shapes = [view_encoder(one).linear_shapes for one in (plain, result.graph)]
    assert shapes[0] == shapes[1]


def test_the_rotation_is_still_told() -> None:
    folded = apply(rotated(canonical_graph(TinyVit(Spec()).model()))).graph
    found = matrix_in(gs.export_onnx(folded))
    assert found is not None
    np.testing.assert_allclose(found, rotation_of_stream(16), atol=1e-6)


@pytest.mark.parametrize("form", ["a norm", "read elsewhere"])
def test_refusals(form: str) -> None:
    graph = rotated(canonical_graph(TinyVit(Spec()).model()))
    (product,) = (node for node in graph.nodes if node.name.endswith("stream/in"))
    source = product.inputs[0]
    if form == "a norm":
        normed = gs.Variable("normed", np.float32, source.shape)
        weights = [gs.Constant(name, np.ones(16, np.float32)) for name in ("gamma", "beta")]
        graph.nodes.append(gs.Node("LayerNormalization", "pre", {}, [source, *weights], [normed]))
        product.inputs[0] = normed
        reason = "LayerNormalization pre stands behind the stream"
    else:
        graph.outputs.append(source)
        reason = f"something else reads or makes {source.name}"
    result = apply(graph.toposort())
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == [reason]


def test_a_stream_that_is_not_rotated() -> None:
    result = apply(canonical_graph(TinyVit(Spec()).model()))
    assert not result.changed
    assert not result.log.skips
