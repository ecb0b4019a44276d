"""Nodes that hand on what they were given are gone, outputs keep their names."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from support.running import run_graph
from support.small_models import Draft, with_shapes

from regcache.passes.base import run
from regcache.passes.drop_identities import DropIdentities

IMAGE = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def graph_of(draft: Draft, *outputs: str, opset: int = 20) -> gs.Graph:
    return with_shapes(draft.model({"image": ["n", 3, 4, 4]}, outputs, opset=opset))


def dropped(graph: gs.Graph, *left: str, edits: int) -> gs.Graph:
    """The graph without its identities, and what has to hold of it."""
    result = run(DropIdentities(), graph)
    assert len(result.log.edits) == edits
    assert sorted(node.op for node in result.graph.nodes) == sorted(left)
    assert [item.name for item in result.graph.outputs] == [item.name for item in graph.outputs]
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    for found, wanted in zip(run_graph(result.graph, IMAGE), run_graph(graph, IMAGE), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    again = run(DropIdentities(), result.graph)
    assert not again.changed
    assert again.graph is result.graph
    return result.graph


def no_ratio(draft: Draft, source: str) -> str:
    return draft.node("Dropout", source, draft.weight(np.array(0.5, np.float32)))


def not_training(draft: Draft, source: str) -> str:
    return draft.node("Dropout", source, "", draft.weight(np.array(False)))


def with_unread_mask(draft: Draft, source: str) -> str:
    return draft.node(
        "Dropout", source, outputs=[f"kept{len(draft.nodes)}", f"m{len(draft.nodes)}"]
    )


HANDING_ON: dict[str, Callable[[Draft, str], str]] = {
    "Identity": lambda draft, source: draft.node("Identity", source),
    "Cast to the same type": lambda draft, source: draft.node("Cast", source, to=FLOAT),
    "CastLike itself": lambda draft, source: draft.node("CastLike", source, "image"),
    "Dropout": lambda draft, source: draft.node("Dropout", source),
    "Dropout with a ratio": no_ratio,
    "Dropout that is not training": not_training,
    "Dropout with a mask": with_unread_mask,
}


@pytest.mark.parametrize("name", HANDING_ON)
def test_readers_read_what_was_handed_on(name: str) -> None:
    """Two in a row, in the middle, with two readers."""
    draft, step = Draft(), HANDING_ON[name]
    kept = step(draft, step(draft, draft.node("Relu", "image")))
    y = draft.node("Add", draft.node("Exp", kept), kept)
    edits = 4 if "CastLike" in name else 2  # a Cast first
    dropped(graph_of(draft, y), "Relu", "Exp", "Add", edits=edits)


@pytest.mark.parametrize("name", HANDING_ON)
def test_outputs_keep_their_names(name: str) -> None:
    """The node before writes the output now; its other readers read that."""
    draft = Draft()
    plain = draft.node("Relu", "image")
    handed = HANDING_ON[name](draft, plain)
    other = draft.node("Exp", plain)
    graph = dropped(graph_of(draft, handed, other), "Relu", "Exp", edits=1 + ("Like" in name))
    assert graph.nodes[0].outputs[0].name == handed


def test_the_image_itself_is_handed_on_inside() -> None:
    draft = Draft()
    y = draft.node("Relu", draft.node("Identity", "image"))
    dropped(graph_of(draft, y), "Relu", edits=1)


def test_what_has_no_other_name_stays() -> None:
    """The image or a constant as an output; one tensor under two names of outputs."""
    draft = Draft()
    plain = draft.node("Relu", "image")
    outputs = [
        draft.node("Identity", "image"),
        draft.node("Identity", draft.weight(np.ones(3, np.float32))),
        draft.node("Identity", plain),
        draft.node("Identity", plain),
    ]
    dropped(graph_of(draft, *outputs), "Identity", "Identity", "Relu", "Identity", edits=1)


def test_an_output_is_not_renamed_to_another() -> None:
    draft = Draft()
    plain = draft.node("Relu", "image")
    graph = graph_of(draft, plain, draft.node("Identity", plain))
    assert run(DropIdentities(), graph).graph is graph


@pytest.mark.parametrize("read", ["as an output", "by a node"])
def test_a_mask_that_is_read_keeps_its_dropout(read: str) -> None:
    draft = Draft()
    kept = draft.node("Dropout", "image", outputs=["kept", "mask"])
    mask = draft.node("Not", "mask") if read == "by a node" else "mask"
    y = draft.node("Relu", kept)
    model = draft.model({"image": ["n", 3, 4, 4]}, [y, mask])
    model.graph.output[1].type.tensor_type.elem_type = TensorProto.BOOL
    graph = with_shapes(model)
    assert run(DropIdentities(), graph).graph is graph


def test_a_dropout_that_may_be_training_stays() -> None:
    for training in (np.array(True), None):
        draft = Draft()
        inputs = [draft.weight(np.array(0.5, np.float32))]
        if training is None:
            mean = draft.node("ReduceMean", "image", keepdims=0)
            inputs.append(draft.node("Greater", mean, draft.weight(np.array(0, np.float32))))
        else:
            inputs.append(draft.weight(training))
        graph = graph_of(draft, draft.node("Relu", draft.node("Dropout", "image", *inputs)))
        assert run(DropIdentities(), graph).graph is graph


def test_casts_to_other_types_stay() -> None:
    draft = Draft()
    y = draft.node("Cast", draft.node("Cast", "image", to=HALF), to=FLOAT)
    graph = graph_of(draft, y)
    assert run(DropIdentities(), graph).graph is graph


def test_a_type_that_another_tensor_has_is_named() -> None:
    """So that a constant's CastLike can be folded."""
    draft = Draft()
    scale = draft.node("CastLike", draft.weight(np.array([2], np.int64)), "image")
    graph = dropped(graph_of(draft, draft.node("Mul", "image", scale)), "Cast", "Mul", edits=1)
    assert graph.nodes[0].attrs == {"to": FLOAT}


def test_types_that_are_not_known_are_left_alone() -> None:
    draft = Draft()
    y = draft.node("CastLike", draft.node("Cast", "image", to=FLOAT), "image")
    graph = graph_of(draft, y)
    for tensor in graph.tensors().values():
        tensor.dtype = None
    after = graph.copy()
    assert not DropIdentities().rewrite(after).edits
    assert [node.op for node in after.nodes] == ["Cast", "CastLike"]


def test_branches_read_what_was_handed_on() -> None:
    draft = Draft()
    plain = draft.node("Relu", "image")
    handed = draft.node("Identity", plain)
    branch = helper.make_graph(
        [helper.make_node("Exp", [handed], ["inner"])],
        "branch",
        [],
        [helper.make_tensor_value_info("inner", FLOAT, None)],
    )
    mean = draft.node("ReduceMean", "image", keepdims=0)
    yes = draft.node("Greater", mean, draft.weight(np.array(9, np.float32)))
    y = draft.node("If", yes, then_branch=branch, else_branch=branch)
    result = run(DropIdentities(), graph_of(draft, y))
    assert sorted(node.op for node in result.graph.nodes) == ["Greater", "If", "ReduceMean", "Relu"]
    wanted = np.exp(np.maximum(IMAGE, 0))
    np.testing.assert_allclose(run_graph(result.graph, IMAGE)[0], wanted, rtol=1e-6)
