"""What does not depend on the image is computed ahead; what must not be is left."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.examples import examples
from support.running import run_graph
from support.small_models import Draft, Shape, with_shapes
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.fold_constants import FoldConstants
from regcache.passes.onnx_file import import_graph
from regcache.passes.pin_image import PinImage
from regcache.passes.raise_opset import raise_opset
from regcache.passes.settle import settle
from regcache.passes.walk import is_constant

IMAGE = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype(np.float32)
DIMS: Shape = ["n", 3, 4, "w"]
LONG = TensorProto.INT64


def ints(draft: Draft, *values: int) -> str:
    return draft.weight(np.array(values, np.int64))


def folded(graph: gs.Graph, *left: str) -> gs.Graph:
    """The graph with its constants folded, and what has to hold of it."""
    result = run(FoldConstants(), graph)
    after = result.graph
    assert sorted(node.op for node in after.nodes) == sorted(left)
    onnx.checker.check_model(gs.export_onnx(after), full_check=True)
    for found, wanted in zip(run_graph(after, IMAGE), run_graph(graph, IMAGE), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)
    again = run(FoldConstants(), after)
    assert not again.log.edits
    assert again.graph is after
    return after


def shape_of(build: Callable[[Draft, str], str], dims: Any = DIMS, **attributes: Any) -> gs.Graph:
    """What `build` makes of the image's Shape, beside the image itself."""
    draft = Draft()
    y = build(draft, draft.node("Shape", "image", **attributes))
    model = draft.model({"image": dims}, [draft.node("Relu", "image"), y])
    model.graph.output[1].type.tensor_type.elem_type = LONG
    return with_shapes(model)


def itself(draft: Draft, shape: str) -> str:
    return draft.node("Neg", shape)


@examples(60)
@given(start=st.integers(-6, 6), end=st.none() | st.integers(-6, 6))
def test_parts_of_a_static_shape(start: int, end: int | None) -> None:
    """Any `start` and `end`, beyond the rank too; ONNX Runtime says what they mean."""
    more: dict[str, Any] = {} if end is None else {"end": end}
    graph = folded(shape_of(itself, [2, 3, 4, 5], start=start, **more), "Relu")
    found = graph.outputs[1]
    assert is_constant(found)
    assert (-found.values).tolist() == [2, 3, 4, 5][start:end]


@pytest.mark.parametrize(
    ("start", "end", "left"),
    [(1, 3, 0), (1, 2, 0), (-3, -1, 0), (0, 2, 2), (2, 4, 2), (0, 4, 2)],
)
def test_parts_that_are_open_stay(start: int, end: int, left: int) -> None:
    graph = shape_of(itself, start=start, end=end)
    folded(graph, "Relu", *(["Shape", "Neg"] if left else []))


@pytest.mark.parametrize(
    ("index", "stays"),
    [(1, False), (-2, False), (0, True), (3, True), ([1, 2], False), ([2, 1, 1], False),
     ([0, 1], True), ([[1, 2]], True)],
)  # fmt: skip
def test_picks_of_an_open_shape(index: Any, stays: bool) -> None:
    def pick(draft: Draft, shape: str) -> str:
        return draft.node("Neg", draft.node("Gather", shape, draft.weight(np.array(index))))

    after = folded(shape_of(pick), "Relu", *(["Shape", "Gather", "Neg"] if stays else []))
    if not stays:
        np.testing.assert_array_equal(-after.outputs[1].values, np.take([0, 3, 4, 0], index))


@pytest.mark.parametrize(
    ("start", "end", "step", "values"),
    [(1, 3, 1, [3, 4]), (1, -1, 1, [3, 4]), (-3, 3, 1, [3, 4]), (2, 0, -1, [4, 3]),
     (1, 2**62, 9, [3]), (0, 2, 1, None), (1, 2**62, 1, None)],
)  # fmt: skip
def test_slices_of_an_open_shape(start: int, end: int, step: int, values: list[int] | None) -> None:
    def cut(draft: Draft, shape: str) -> str:
        numbers = [ints(draft, n) for n in (start, end, 0, step)]
        return draft.node("Neg", draft.node("Slice", shape, *numbers))

    after = folded(shape_of(cut), "Relu", *(["Shape", "Slice", "Neg"] if values is None else []))
    if values is not None:
        assert (-after.outputs[1].values).tolist() == values


@pytest.mark.parametrize(
    ("attribute", "value", "dtype"),
    [
        ("value_float", 0.1, np.float32),
        ("value_floats", [0.1, 0.2, 0.3, 0.4, 0.5], np.float32),
        ("value_int", 3, np.int64),
        ("value_ints", [1, 2, 3, 4, 5], np.int64),
        ("value", numpy_helper.from_array(np.full((2, 1, 1, 1), 0.1)), np.float64),
    ],
)
def test_constant_nodes_of_every_spelling(attribute: str, value: Any, dtype: type) -> None:
    draft = Draft()
    constant = draft.node("Constant", **{attribute: value})
    like = draft.node("Cast", "image", to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    model = draft.model({"image": DIMS}, [draft.node("Add", like, constant)], output_dtype=kind)
    after = folded(with_shapes(model), "Cast", "Add")
    (found,) = [item for item in after.nodes[1].inputs if is_constant(item)]
    assert found.values.dtype == dtype


def test_what_weights_alone_make_is_computed() -> None:
    """A positional embedding resized in the graph, a scale of several steps."""
    draft = Draft()
    position = draft.weight(np.random.default_rng(1).standard_normal((1, 3, 2, 2), np.float32))
    sizes = ints(draft, 1, 3, 4, 5)
    resized = draft.node("Resize", position, "", "", sizes, mode="cubic")
    root = draft.node("Sqrt", draft.node("Cast", ints(draft, 9), to=TensorProto.FLOAT))
    y = draft.node("Div", draft.node("Add", "image", resized), root)
    graph = with_shapes(draft.model({"image": DIMS}, [y]))
    after = folded(graph, "Add", "Div")
    assert after.nodes[1].inputs[1].values.tolist() == [3.0]


def gigabytes(draft: Draft) -> str:
    """A number expanded to more than is stored."""
    one = draft.weight(np.ones(1, np.float32))
    wide = draft.node("Expand", one, ints(draft, 1 << 15, 1 << 15))
    return draft.node("ReduceMax", wide, keepdims=0)


def noise(draft: Draft) -> str:
    return draft.node("RandomNormal", shape=[1], seed=1.0)


def foreign(draft: Draft) -> str:
    return draft.node("Gelu", draft.weight(np.ones(1, np.float32)), domain="com.microsoft")


def looping(draft: Draft) -> str:
    """It need not end."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["still"]), helper.make_node("Neg", ["x"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", LONG, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1]),
        ],
        [
            helper.make_tensor_value_info("still", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1]),
        ],
    )
    count, on = draft.weight(np.array(3)), draft.weight(np.array(True))
    return draft.node("Loop", count, on, draft.weight(np.ones(1, np.float32)), body=body)


@pytest.mark.parametrize(
    ("build", "left"),
    [
        (gigabytes, ["Expand", "ReduceMax"]),
        (noise, ["RandomNormal"]),
        (foreign, ["Gelu"]),
        (looping, ["Loop"]),
    ],
)
def test_what_is_not_computed_ahead(build: Callable[[Draft], str], left: list[str]) -> None:
    """The rest is: shape arithmetic beside it."""
    draft = Draft()
    scaled = draft.node("Mul", build(draft), draft.node("Cast", ints(draft, 2), to=1))
    y = draft.node("Add", "image", scaled)
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    graph = with_shapes(draft.model({"image": DIMS}, [y], opset_imports=imports))
    result = run(FoldConstants(), graph)
    assert sorted(node.op for node in result.graph.nodes) == sorted([*left, "Mul", "Add"])


def test_sizes_that_are_not_known_yet_wait() -> None:
    """A Range to a computed end is folded once the end is: it may be of gigabytes."""
    draft = Draft()
    end = draft.node(
        "Cast", draft.node("Pow", draft.weight(np.array([2], np.float32)), ints(draft, 2)), to=LONG
    )
    end = draft.node("Squeeze", end)
    steps = draft.node("Range", draft.weight(np.array(1)), end, draft.weight(np.array(1)))
    y = draft.node("Add", "image", draft.node("ReduceMax", draft.node("Cast", steps, to=1)))
    graph = with_shapes(draft.model({"image": DIMS}, [y]))
    once = run(FoldConstants(), graph).graph
    assert "Range" in ops(once)
    assert sorted(node.op for node in settle(graph).nodes) == ["Add"]


def test_a_row_of_gigabytes_is_refused() -> None:
    draft = Draft()
    numbers = [draft.weight(np.array(n)) for n in (0, 2**40, 1)]
    y = draft.node("Cast", draft.node("ReduceMax", draft.node("Range", *numbers)), to=1)
    graph = import_graph(draft.model({"image": DIMS}, [draft.node("Add", "image", y)]))
    with pytest.raises(InputError, match=r"'n0_Range' has 1099511627776 numbers in a row"):
        settle(graph)


def test_what_the_runtime_cannot_compute_is_left() -> None:
    """An index beyond the end; the integers of shapes are folded all the same."""
    draft = Draft()
    beyond = draft.node("Gather", draft.weight(np.ones(3, np.float32)), ints(draft, 99))
    size = draft.node("Mul", ints(draft, 2, 3), ints(draft, 1, 20))
    rows = draft.node("Reshape", "image", size)
    graph = with_shapes(draft.model({"image": [2, 3, 4, 5]}, [draft.node("Add", rows, beyond)]))
    after = run(FoldConstants(), graph).graph
    assert sorted(node.op for node in after.nodes) == ["Add", "Gather", "Reshape"]


@pytest.mark.parametrize("name", [name for name, spec in SPELLINGS.items() if spec.dynamic_shapes])
def test_no_shape_arithmetic_is_left_of_a_pinned_encoder(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    model = raise_opset(vit.model())
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            dim.dim_param = f"open{dim.dim_value}"
    graph = import_graph(model)
    PinImage((2, 3, vit.spec.size, vit.spec.size)).rewrite(graph)
    settled = settle(graph)
    left = {"Shape", "Slice", "Cast", "ConstantOfShape", "Expand", "Identity", "Constant"}
    assert not left & ops(settled).keys()
    assert all(is_constant(n.inputs[1]) for n in settled.nodes if n.op == "Reshape")
    images = vit.images(2)
    for found, wanted in zip(run_graph(settled, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    assert settle(settled) is settled


def test_shapes_that_contradict_one_another_are_refused() -> None:
    vit = TinyVit(Spec())
    graph = import_graph(vit.model())
    graph.inputs[0].shape = [2, 3, vit.spec.size + vit.spec.patch, vit.spec.size]
    with pytest.raises(InputError, match="the graph's shapes do not fit: ") as caught:
        settle(graph)
    assert "\n" not in str(caught.value)


def test_an_operator_that_there_is_not_is_named() -> None:
    draft = Draft()
    graph = import_graph(draft.model({"image": DIMS}, [draft.node("Frobnicate", "image")]))
    with pytest.raises(InputError, match="No Op registered for Frobnicate"):
        settle(graph)


def test_sequences_have_no_shape() -> None:
    """Nor a type of numbers: inference leaves them alone."""
    draft = Draft()
    draft.node("SplitToSequence", "image", outputs=["parts"], axis=1)
    y = draft.node("SequenceAt", "parts", draft.weight(np.array(1)))
    graph = with_shapes(draft.model({"image": [2, 3, 4, 5]}, [y]))
    parts = graph.tensors()["parts"]
    assert (parts.dtype, parts.shape) == (None, None)
    np.testing.assert_array_equal(run_graph(graph, IMAGE)[0], IMAGE[:, 1:2])
