"""The part of a graph that needs the image alone, and masks that mask nothing."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.clip_graph import clip
from support.running import run_graph
from support.small_models import Draft

from regcache.passes.base import run
from regcache.passes.check import check_and_infer
from regcache.passes.drop_neutral import DropNeutral, fill_masks
from regcache.passes.errors import InputError
from regcache.passes.keep_vision import KeepVision, other_inputs
from regcache.passes.onnx_file import import_graph

FLOAT, LONG, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.standard_normal((2, 3, 4, 4)).astype(np.float32)
IDS = RANDOM.integers(0, 9, (2, 5))


def test_an_output_that_is_the_image_itself_goes() -> None:
    model = clip()
    model.graph.output.append(model.graph.input[0])
    graph = import_graph(model)
    check_and_infer(graph)
    result = run(KeepVision("pixel_values"), graph)
    assert [item.name for item in result.graph.outputs] == ["hidden", "image_embeds"]
    assert "pixel_values" in [edit.site for edit in result.log.edits]
    graph.outputs = [item for item in graph.outputs if item.name == "pixel_values"]
    with pytest.raises(InputError, match=r"^no output depends on the image"):
        KeepVision("pixel_values").requires(graph)


def test_the_vision_tower_of_a_whole_clip() -> None:
    graph = import_graph(clip())
    check_and_infer(graph)
    result = run(KeepVision("pixel_values"), graph)
    assert [item.name for item in result.graph.inputs] == ["pixel_values"]
    assert [item.name for item in result.graph.outputs] == ["hidden", "image_embeds"]
    assert sorted(node.op for node in result.graph.nodes) == ["Flatten", "MatMul", "Relu"]
    assert [(edit.site, edit.what) for edit in result.log.edits] == [
        ("logits_per_image", "output dropped"),
        ("text_embeds", "output dropped"),
        ("logit_scale", "output dropped"),
        ("input_ids", "input dropped"),
    ]
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    session = ort.InferenceSession(clip().SerializeToString())
    wanted = session.run(["hidden", "image_embeds"], {"pixel_values": IMAGES, "input_ids": IDS})
    for found, one in zip(run_graph(result.graph, IMAGES), wanted, strict=True):
        np.testing.assert_array_equal(found, one)
    again = run(KeepVision("pixel_values"), result.graph)
    assert again.graph is result.graph


def test_what_every_output_needs() -> None:
    assert other_inputs(import_graph(clip()), "pixel_values") == {
        "logits_per_image": {"pixel_values", "input_ids"},
        "hidden": {"pixel_values"},
        "text_embeds": {"input_ids"},
        "logit_scale": set(),
        "image_embeds": {"pixel_values"},
    }


def test_branches_need_what_they_take_from_outside() -> None:
    inside = helper.make_graph(
        [helper.make_node("Add", ["image", "bias"], ["sum"])],
        "inside",
        [],
        [helper.make_tensor_value_info("sum", FLOAT, None)],
    )
    draft = Draft()
    yes = draft.node("Identity", draft.weight(np.array(True)))
    y = draft.node("If", yes, then_branch=inside, else_branch=inside)
    graph = import_graph(draft.model({"image": [1, 3, 4, 4], "bias": [1]}, [y]))
    assert other_inputs(graph, "image") == {y: {"image", "bias"}}


def test_no_output_of_the_image_alone() -> None:
    draft = Draft()
    outputs = [draft.node("Add", "image", "mask"), draft.node("Neg", "mask")]
    outputs.append(draft.node("Identity", draft.weight(np.ones(1, np.float32))))
    graph = import_graph(draft.model({"image": [1, 3, 4, 4], "mask": [1]}, outputs))
    with pytest.raises(InputError) as caught:
        run(KeepVision("image"), graph)
    assert str(caught.value) == (
        "no output depends on the image 'image' alone: n0_Add needs image, mask; "
        "n1_Neg needs mask; n2_Identity needs no input at all"
    )


def masked(op: str, dtype: int = FLOAT, shape: Any = (1, 1, 1, 4), first: bool = False) -> gs.Graph:
    """Relu(image), the mask, then Exp."""
    draft = Draft()
    x = draft.node("Relu", "image")
    if op == "Where":
        y = draft.node(op, "mask", x, draft.weight(np.full((2, 3, 4, 4), -9, np.float32)))
    else:
        y = draft.node(op, *(("mask", x) if first else (x, "mask")))
    model = draft.model({"image": [2, 3, 4, 4]}, [draft.node("Exp", y)])
    model.graph.input.append(helper.make_tensor_value_info("mask", dtype, shape))
    return import_graph(model)


def cleared(graph: gs.Graph, **fills: float) -> tuple[gs.Graph, list[str]]:
    """The graph with its masks filled and taken out, and what was not neutral."""
    filled, names = fill_masks(graph, fills)
    assert [item.name for item in graph.inputs] == ["image", *fills]
    assert [item.name for item in filled.inputs] == ["image"]
    check_and_infer(filled)
    result = run(DropNeutral(names), filled)
    return result.graph, [skip.reason for skip in result.log.skips]


@pytest.mark.parametrize(
    ("op", "dtype", "fill", "first"),
    [
        ("Mul", FLOAT, 1, False),
        ("Mul", FLOAT, 1, True),
        ("Div", FLOAT, 1, False),
        ("Add", FLOAT, 0, False),
        ("Add", FLOAT, 0, True),
        ("Sub", FLOAT, 0, False),
        ("Where", BOOL, 1, False),
    ],
)
def test_masks_that_mask_nothing_go(op: str, dtype: int, fill: int, first: bool) -> None:
    graph = masked(op, dtype, first=first)
    after, skips = cleared(graph, mask=fill)
    assert not skips
    assert [node.op for node in after.nodes] == ["Relu", "Exp"]
    wanted: NDArray[Any] = np.exp(np.maximum(IMAGES, 0))
    np.testing.assert_allclose(run_graph(after, IMAGES)[0], wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("op", "dtype", "fill", "first"),
    [
        ("Mul", FLOAT, 0, False),
        ("Add", FLOAT, 1, False),
        ("Sub", FLOAT, 0, True),
        ("Div", FLOAT, 1, True),
        ("Pow", FLOAT, 1, False),
        ("Where", BOOL, 0, False),
    ],
)
def test_masks_that_mask_something_stay(op: str, dtype: int, fill: int, first: bool) -> None:
    """The other side of a Where is a constant: everything would be masked."""
    after, skips = cleared(masked(op, dtype, first=first), mask=fill)
    assert skips == [f"{op} masks something"]
    assert [node.op for node in after.nodes] == ["Relu", op, "Exp"]


def test_an_output_keeps_its_name() -> None:
    """What is left of the node before writes it now; an input cannot."""
    draft = Draft()
    x = draft.node("Relu", "image")
    y = draft.node("Mul", x, "mask", outputs=["last"])
    z = draft.node("Mul", "image", "mask")
    graph = import_graph(draft.model({"image": [2, 3, 4, 4], "mask": [1]}, [y, z]))
    after, skips = cleared(graph, mask=1)
    assert skips == ["Mul makes an output of an input"]
    assert [item.name for item in after.outputs] == ["last", z]
    assert sorted(node.op for node in after.nodes) == ["Mul", "Relu"]
    np.testing.assert_array_equal(run_graph(after, IMAGES)[0], np.maximum(IMAGES, 0))


def test_a_mask_that_widens_what_it_meets_stays() -> None:
    after, skips = cleared(masked("Mul", shape=[5, 1, 1, 1, 4]), mask=1)
    assert skips == ["Mul masks something"]
    assert len(after.nodes) == 3


def test_open_dimensions_of_a_mask_are_one_long() -> None:
    filled, _ = fill_masks(masked("Mul", shape=["n", "t", 3, None]), {"mask": 1})
    (constant,) = [item for item in filled.tensors().values() if item.name == "mask"]
    assert constant.shape == (1, 1, 3, 1)
    assert constant.dtype == np.float32


def test_what_is_made_of_masks_alone_is_known() -> None:
    draft = Draft()
    far = draft.node("Sub", draft.weight(np.ones(1, np.float32)), "mask", outputs=["far"])
    bias = draft.node("Mul", far, draft.weight(np.array(-9, np.float32)), outputs=["bias"])
    y = draft.node("Add", "image", bias, outputs=["y"])
    graph = import_graph(draft.model({"image": [2, 3, 4, 4], "mask": [1, 4]}, [y]))
    _, names = fill_masks(graph, {"mask": 1})
    assert names == {"mask", "far", "bias"}


def test_neutral_constants_of_the_file_itself_stay() -> None:
    """Only what comes of the masks is looked at."""
    draft = Draft()
    y = draft.node("Mul", "image", draft.weight(np.ones(1, np.float32)))
    graph = import_graph(draft.model({"image": [2, 3, 4, 4]}, [y]))
    check_and_infer(graph)
    assert run(DropNeutral(frozenset(["mask"])), graph).graph is graph


def test_shapes_are_needed() -> None:
    with pytest.raises(InputError, match="needs shapes"):
        run(DropNeutral(frozenset()), masked("Mul"))
