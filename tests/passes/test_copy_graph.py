"""A copied graph is the original to the byte; an edit of one is not seen in the other."""

import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from support.canonical import canonical_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.copy_graph import copy_graph
from regcache.passes.onnx_file import import_graph


def written(graph: gs.Graph) -> bytes:
    return bytes(gs.export_onnx(graph).SerializeToString())


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_copy_is_what_graphsurgeon_copies(name: str) -> None:
    graph = import_graph(TinyVit(SPELLINGS[name]).model())
    before = written(graph)
    assert written(copy_graph(graph)) == before == written(graph.copy())
    assert written(graph) == before


def test_edges_lead_to_the_copy_alone() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    copied = copy_graph(graph)
    theirs = {id(item) for item in (*graph.nodes, *graph.tensors().values())}
    for node in copied.nodes:
        assert id(node) not in theirs
        for tensor in node.inputs:
            assert id(tensor) not in theirs
            assert sum(reader is node for reader in tensor.outputs) == sum(
                item is tensor for item in node.inputs
            )
        assert all(tensor.inputs == [node] for tensor in node.outputs)
    assert {id(item) for item in (*copied.inputs, *copied.outputs)}.isdisjoint(theirs)


def test_weights_are_shared_and_edits_are_not() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    before = written(graph)
    copied = copy_graph(graph)
    for name, tensor in copied.tensors().items():
        if isinstance(tensor, gs.Constant):
            assert tensor.values is graph.tensors()[name].values
    node = next(node for node in copied.nodes if node.op == "MatMul")
    node.attrs["note"], node.name = 1, "another"
    node.inputs[1] = gs.Variable("elsewhere")
    copied.nodes.pop()
    copied.inputs[0].shape = (1, 2, 3, 4)
    copied.outputs.pop()
    copied.opset += 1
    assert written(graph) == before


def test_an_input_left_out_stays_left_out() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy")
    clip = helper.make_node("Clip", ["x", "", ""], ["y"])
    model = helper.make_model(helper.make_graph([clip], "clip", [x], [y]))
    graph = gs.import_onnx(model)
    assert [item.name for item in copy_graph(graph).nodes[0].inputs] == ["x", "", ""]


def test_a_graph_in_a_graph_is_copied_too() -> None:
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    inner = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "then", [], [y])
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "else", [], [y])
    choice = helper.make_node("If", ["if"], ["z"], then_branch=inner, else_branch=other)
    given = [
        helper.make_tensor_value_info("if", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    graph = gs.import_onnx(helper.make_model(helper.make_graph([choice], "g", given, [z])))
    before, copied = written(graph), copy_graph(graph)
    copied.nodes[0].attrs["then_branch"].nodes[0].op = "Exp"
    assert written(graph) == before != written(copied)
