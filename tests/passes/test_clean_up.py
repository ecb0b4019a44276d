"""The clean-up leaves what graphsurgeon's own leaves, in the same order."""

import random

import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from onnx_graphsurgeon.util.exception import OnnxGraphSurgeonException
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.clean_up import clean_up
from regcache.passes.copy_graph import copy_graph
from regcache.passes.onnx_file import import_graph


def assert_same(graph: gs.Graph) -> None:
    wanted, found = copy_graph(graph), copy_graph(graph)
    wanted.cleanup().toposort()
    assert clean_up(found) is found
    assert told(found) == told(wanted)


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_is_what_graphsurgeon_leaves(name: str) -> None:
    graph = import_graph(TinyVit(SPELLINGS[name]).model())
    assert_same(graph)
    graph.outputs.pop(0)  # what it alone depends on goes
    assert_same(graph)


@pytest.mark.parametrize("seed", range(5))
def test_nodes_in_any_order(seed: int) -> None:
    graph = import_graph(TinyVit(Spec(depth=1, dynamic_shapes=True)).model())
    random.Random(seed).shuffle(graph.nodes)
    assert_same(graph)
    names = [node.name for node in clean_up(graph).nodes]
    assert [node.name for node in clean_up(graph).nodes] == names


def test_unused_nodes_let_go_of_their_tensors() -> None:
    graph = import_graph(TinyVit(Spec(depth=1)).model())
    read = graph.nodes[3].outputs[0]
    graph.nodes.append(gs.Node("Relu", "unread", inputs=[read], outputs=[gs.Variable("nobody")]))
    readers = len(read.outputs)
    clean_up(graph)
    assert "unread" not in [node.name for node in graph.nodes]
    assert len(read.outputs) == readers - 1


def test_a_node_that_made_an_input_goes() -> None:
    graph = import_graph(TinyVit(Spec(depth=1)).model())
    middle = graph.nodes[5].outputs[0]
    graph.inputs = [middle]
    assert_same(graph)
    clean_up(graph)
    assert not middle.inputs


def chosen() -> gs.Graph:
    """An If whose branches read what a node outside makes."""
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    inner = helper.make_graph([helper.make_node("Neg", ["late"], ["y"])], "then", [], [y])
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "else", [], [y])
    nodes = [
        helper.make_node("Exp", ["x"], ["late"]),
        helper.make_node("If", ["if"], ["z"], then_branch=inner, else_branch=other),
    ]
    given = [
        helper.make_tensor_value_info("if", TensorProto.BOOL, []),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
    ]
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [2])
    graph = gs.import_onnx(helper.make_model(helper.make_graph(nodes, "g", given, [z])))
    graph.nodes.reverse()
    return graph


def test_what_a_branch_reads_stays_and_comes_first() -> None:
    assert [node.op for node in clean_up(chosen()).nodes] == ["Exp", "If"]
    assert_same(chosen())


def test_a_node_that_is_not_the_graphs_is_left_to_graphsurgeon() -> None:
    found, wanted = (import_graph(TinyVit(Spec(depth=1)).model()) for _ in range(2))
    for graph in (found, wanted):
        del graph.nodes[3]
    wanted.cleanup().toposort()
    assert told(clean_up(found)) == told(wanted)


def test_nodes_that_read_each_other_are_named_by_graphsurgeon() -> None:
    graph = import_graph(TinyVit(Spec(depth=1)).model())
    early, late = graph.nodes[4], graph.nodes[9]
    early.inputs.append(late.outputs[0])
    with pytest.raises(OnnxGraphSurgeonException, match="Cycle"):
        clean_up(graph)
