"""Decomposed softmax as one node, with the same numbers."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import parser
from support.running import run_feeds

from regcache.passes.base import run
from regcache.passes.check import check_and_infer
from regcache.passes.fuse_softmax import FuseSoftmax
from regcache.passes.onnx_file import import_graph


def graph_of(body: str) -> gs.Graph:
    """x [N, 5, 6] -> y; `last` and `middle` are axes."""
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 20]> '
        f"g (float[N, 5, 6] x) => (float[N, 5, 6] y) {{ {body} }}"
    )
    for name, axis in (("last", -1), ("middle", 1)):
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([axis]), name))
    graph = import_graph(model)
    check_and_infer(graph)
    return graph


SHIFTED = "m = ReduceMax(x, last) s = Sub(x, m) e = Exp(s) t = ReduceSum(e, last)"


@pytest.mark.parametrize(
    "body",
    [
        f"{SHIFTED} y = Div(e, t)",
        f"{SHIFTED} r = Reciprocal(t) y = Mul(e, r)",
        f"{SHIFTED} r = Reciprocal(t) y = Mul(r, e)",
        "e = Exp(x) t = ReduceSum(e, last) y = Div(e, t)",
        "m = ReduceMax(x, last) s = Sub(x, m) y = Softmax(s)",
        "m = ReduceMean(x, last) s = Sub(x, m) y = Softmax<axis = 2>(s)",
    ],
)
def test_becomes_one_node(body: str) -> None:
    graph = graph_of(body)
    result = run(FuseSoftmax(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    (node,) = result.graph.nodes
    assert (node.op, node.inputs[0].name) == ("Softmax", "x")
    x = 3 * np.random.default_rng(0).standard_normal((2, 5, 6)).astype(np.float32)
    for one in (graph, result.graph):
        powers = np.exp(x.astype(np.float64))
        wanted = powers / powers.sum(-1, keepdims=True)
        np.testing.assert_allclose(run_feeds(one, {"x": x})[0], wanted, rtol=1e-5, atol=1e-6)
    assert not run(FuseSoftmax(), result.graph).changed


@pytest.mark.parametrize(
    "body",
    [
        "e = Exp(x) t = ReduceSum(e, middle) y = Div(e, t)",
        "e = Exp(x) t = ReduceSum(x, last) y = Div(e, t)",
        "e = Exp(x) t = ReduceSum(e, last) y = Div(t, e)",
        "m = ReduceMax(x, middle) s = Sub(x, m) y = Softmax(s)",
        "m = ReduceMax(x, last) s = Sub(m, x) y = Softmax(s)",
        "m = ReduceMax(x, last) s = Sub(x, m) y = Softmax<axis = 1>(s)",
        "s = Sub(x, x) y = Softmax(s)",
    ],
)
def test_what_is_none_is_left_alone(body: str) -> None:
    graph = graph_of(body)
    assert run(FuseSoftmax(), graph).graph is graph
