"""Branches whose condition is known: the taken one in place, under names of its own."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import numpy_helper, parser
from support.running import run_feeds

from regcache.passes.base import Result, run
from regcache.passes.check import check_and_infer
from regcache.passes.fold_if import FoldIf
from regcache.passes.onnx_file import import_graph
from regcache.passes.settle import settle

ADD_OR_DOUBLE = """
    then_branch = plus () => (float[N, 3] r) { k = Mul(x, x) r = Add(k, w) },
    else_branch = twice () => (float[N, 3] r) { k = Add(x, x) r = Identity(k) }
"""


def graph_of(body: str, **constants: object) -> gs.Graph:
    """x [N, 3] -> y."""
    text = (
        '<ir_version: 8, opset_import: ["" : 20]> '
        f"g (float[N, 3] x) => (float[N, 3] y) {{ {body} }}"
    )
    model = parser.parse_model(text)
    given = {"w": np.array([1, 2, 3], np.float32)} | constants
    for name, value in given.items():
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    graph = import_graph(model)
    check_and_infer(graph)
    return graph


X = np.arange(6, dtype=np.float32).reshape(2, 3)
PLUS, TWICE = X * X + [1, 2, 3], X + X


def folded(graph: gs.Graph, edits: int) -> Result:
    """Fold, check with onnx, hold the numbers against those of the graph as it was."""
    wanted = run_feeds(graph, {"x": X})
    result = run(FoldIf(), graph)
    assert len(result.log.edits) == edits
    model = gs.export_onnx(result.graph)
    onnx.checker.check_model(model, full_check=True)
    names = [name for node in model.graph.node for name in node.output]
    assert len(set(names)) == len(names)
    for found, truth in zip(run_feeds(result.graph, {"x": X}), wanted, strict=True):
        np.testing.assert_array_equal(found, truth)
    assert not run(FoldIf(), result.graph).changed
    return result


@pytest.mark.parametrize(("condition", "wanted"), [(True, PLUS), (False, TWICE)])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_the_branch_that_is_taken(condition: bool, wanted: object, shape: tuple[int, ...]) -> None:
    graph = graph_of(f"y = If (c) <{ADD_OR_DOUBLE}>", c=np.full(shape, condition))
    result = folded(graph, 1)
    assert not any(node.op == "If" for node in result.graph.nodes)
    np.testing.assert_array_equal(run_feeds(result.graph, {"x": X})[0], wanted)


def test_two_ifs_with_the_same_names_inside() -> None:
    graph = graph_of(
        f"a = If (c) <{ADD_OR_DOUBLE}> b = If (d) <{ADD_OR_DOUBLE}> k = Mul(a, w) y = Add(k, b)",
        c=np.array(True),
        d=np.array(True),
    )
    folded(graph, 2)


def test_an_if_inside_the_branch() -> None:
    body = """y = If (c) <
        then_branch = outer () => (float[N, 3] r) {
            k = Neg(x)
            s = If (d) <
                then_branch = inner () => (float[N, 3] r) { r = Add(k, w) },
                else_branch = other () => (float[N, 3] r) { r = Identity(k) }
            >
            r = Add(s, k)
        },
        else_branch = twice () => (float[N, 3] r) { r = Identity(x) }
    >"""
    folded(graph_of(body, c=np.array(True), d=np.array(True)), 2)


def test_several_outputs_and_an_outer_tensor_read_only_inside() -> None:
    body = """a, b = If (c) <
        then_branch = pair () => (float[N, 3] r, float[N, 3] s) { r = Mul(x, v) s = Add(r, v) },
        else_branch = same () => (float[N, 3] r, float[N, 3] s) { r = Identity(x) s = Identity(x) }
    > y = Sub(a, b)"""
    folded(graph_of(body, c=np.array(True), v=np.array([3, 4, 5], np.float32)), 1)


def test_a_condition_that_is_computed_stays_until_it_is_known() -> None:
    body = f"""n = ReduceSum<keepdims = 0>(x) z = Sub(n, n) c = Cast<to = 9>(z)
        y = If (c) <{ADD_OR_DOUBLE}>"""
    graph = graph_of(body)
    assert run(FoldIf(), graph).graph is graph


def test_a_condition_on_a_shape_is_settled() -> None:
    """As TorchScript writes `squeeze`: the condition follows from a shape, and shapes from it."""
    body = f"""s = Shape(x) l = Gather(s, last) c = Equal(l, three) y = If (c) <{ADD_OR_DOUBLE}>"""
    graph = settle(graph_of(body, last=np.array(1), three=np.array(3)))
    assert [node.op for node in graph.nodes] == ["Mul", "Add"]
    np.testing.assert_array_equal(run_feeds(graph, {"x": X})[0], PLUS)
