"""Nodes in any order come out producers first; circles and double writers are named."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from support.examples import examples
from support.small_models import Draft
from support.spellings import shuffled
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError
from regcache.passes.sort_nodes import sort_nodes


def names(graph: onnx.GraphProto) -> list[str]:
    return [node.name for node in graph.node]


def outputs(model: onnx.ModelProto, **feeds: Any) -> list[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[Any] = session.run(None, feeds)
    return found


@examples(20)
@given(seed=st.integers(0, 10**6))
def test_any_order_is_mended(seed: int) -> None:
    """The checker takes the graph, it computes the same, and no node was touched."""
    vit = TinyVit(Spec(depth=1, dynamic_shapes=True))
    model, original = vit.model(), vit.model()
    shuffled(model.graph, seed)
    sort_nodes(model.graph)
    onnx.checker.check_model(model, full_check=True)
    key = onnx.NodeProto.SerializeToString
    assert sorted(map(key, model.graph.node)) == sorted(map(key, original.graph.node))
    again = names(model.graph)
    sort_nodes(model.graph)
    assert names(model.graph) == again
    images = vit.images(2)
    for found, wanted in zip(
        outputs(model, pixel_values=images), outputs(original, pixel_values=images), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_what_is_sorted_keeps_its_order() -> None:
    model = TinyVit(Spec()).model()
    before = model.SerializeToString()
    sort_nodes(model.graph)
    assert model.SerializeToString() == before


def test_only_the_late_node_moves() -> None:
    """A converter's Cast at the end comes before its first reader; the others stay in line."""
    draft = Draft()
    draft.node("Relu", "image", outputs=["a"])
    draft.node("Neg", "late", outputs=["b"])
    draft.node("Abs", "b", outputs=["c"])
    draft.node("Cast", "a", outputs=["late"], to=TensorProto.FLOAT)
    graph = draft.model({"image": [1]}, ["c"]).graph
    sort_nodes(graph)
    assert [node.op_type for node in graph.node] == ["Relu", "Cast", "Neg", "Abs"]


def branches(made: str = "shifted") -> onnx.ModelProto:
    """An If whose branches read `late`, which a later node writes; inside, nodes stand unsorted."""
    then = helper.make_graph(
        [
            helper.make_node("Neg", [made], ["negative"], "neg"),
            helper.make_node("Add", ["late", "late"], [made], "add"),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("negative", TensorProto.FLOAT, None)],
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["late"], ["same"], "same")],
        "else",
        [],
        [helper.make_tensor_value_info("same", TensorProto.FLOAT, None)],
    )
    draft = Draft()
    yes = draft.weight(np.array(True), "yes")
    draft.node("If", yes, outputs=["chosen"], then_branch=then, else_branch=other)
    draft.node("Relu", "image", outputs=["late"])
    draft.node("Abs", "chosen", outputs=["out"])
    return draft.model({"image": [3]}, ["out"])


# The third name is that of a node outside, which the branch writes anew for itself.
@pytest.mark.parametrize("made", ["shifted", "chosen", "out"])
def test_subgraphs_are_sorted_and_read_from_outside(made: str) -> None:
    model = branches(made)
    sort_nodes(model.graph)
    assert [node.op_type for node in model.graph.node] == ["Relu", "If", "Abs"]
    inner = model.graph.node[1].attribute
    (then,) = [item.g for item in inner if item.name == "then_branch"]
    assert [node.op_type for node in then.node] == ["Add", "Neg"]
    values = np.array([-1.0, 0.5, 2.0], np.float32)
    if made == "shifted":  # ONNX Runtime wants names of its own in a branch
        (found,) = outputs(model, image=values)
        np.testing.assert_array_equal(found, 2 * np.maximum(values, 0))


def circle(*edges: tuple[str, str]) -> onnx.GraphProto:
    draft = Draft()
    for source, result in edges:
        draft.node("Relu", source, outputs=[result])
    return draft.model({"image": [1]}, [edges[-1][1]]).graph


@pytest.mark.parametrize(
    "edges",
    [
        [("a", "a")],
        [("b", "a"), ("a", "b")],
        [("image", "x"), ("c", "a"), ("a", "b"), ("b", "c"), ("x", "y")],
    ],
)
def test_circles_are_refused(edges: list[tuple[str, str]]) -> None:
    with pytest.raises(InputError, match=r"the nodes around '[abc]' read each other in a circle"):
        sort_nodes(circle(*edges))


def test_a_circle_inside_a_branch_is_refused() -> None:
    model = branches()
    then = model.graph.node[0].attribute[1].g
    then = then if then.name == "then" else model.graph.node[0].attribute[0].g
    then.node[1].input[0] = "negative"
    with pytest.raises(InputError, match="read each other in a circle"):
        sort_nodes(model.graph)


def test_a_long_circle_is_refused_quickly() -> None:
    """A ring of 30,000 nodes, read in the worst order."""
    count = 30_000
    edges = [(f"t{(number - 1) % count}", f"t{number}") for number in range(count)]
    with pytest.raises(InputError, match="in a circle"):
        sort_nodes(circle(*edges))


def test_two_writers_of_one_tensor_are_refused() -> None:
    with pytest.raises(InputError, match="the tensor 'a' is written by two nodes"):
        sort_nodes(circle(("image", "a"), ("image", "a")))
