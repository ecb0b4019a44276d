"""Which input is the image, what it wants of the pixels, and giving it a size."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper
from support.running import run_graph
from support.small_models import Draft, with_shapes
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.check import check_and_infer
from regcache.passes.errors import InputError
from regcache.passes.image_input import find_image, is_size
from regcache.passes.onnx_file import import_graph
from regcache.passes.pin_image import PinImage

FLOAT, BYTE, INT = TensorProto.FLOAT, TensorProto.UINT8, TensorProto.INT64
Inputs = Mapping[str, tuple[int, Any]]


def reading(inputs: Inputs, node: Callable[[Draft, str], str] | None = None) -> gs.Graph:
    """A graph that reads its inputs; the first by what `node` writes."""
    draft, first = Draft(), next(iter(inputs))
    for name in inputs:
        if node is None or name != first:
            draft.node("Identity", name)
    output = draft.node("Identity", first if node is None else node(draft, first))
    model = draft.model({}, [output])
    for name, (dtype, shape) in inputs.items():
        model.graph.input.append(helper.make_tensor_value_info(name, dtype, shape))
    return import_graph(model)


@pytest.mark.parametrize(
    ("dtype", "shape", "layout", "found"),
    [
        (FLOAT, ["n", 3, 8, 9], "nchw", ("n", 3, 8, 9)),
        (FLOAT, [2, 8, 9, 3], "nhwc", (2, 8, 9, 3)),
        (BYTE, ["n", 8, 9, 3], "nhwc", ("n", 8, 9, 3)),
        (BYTE, [1, 3, 8, 9], "nchw", (1, 3, 8, 9)),
        (FLOAT, ["a", "b", "c", "d"], "nchw", ("a", "b", "c", "d")),
        (FLOAT, [None, None, None, None], "nchw", ("batch", "channels", "height", "width")),
        (FLOAT, [-1, -1, -1, -1], "nchw", ("batch", "channels", "height", "width")),
        (FLOAT, [0, 3, 0, 0], "nchw", ("batch", 3, "height", "width")),
        (FLOAT, [-1, 0, 0, 3], "nhwc", ("batch", "height", "width", 3)),
        (FLOAT, None, "nchw", ("batch", "channels", "height", "width")),
        (TensorProto.UNDEFINED, [1, 3, 8, 8], "nchw", (1, 3, 8, 8)),
    ],
)
def test_layouts_types_and_open_dimensions(
    dtype: int, shape: Any, layout: str, found: tuple[int | str, ...]
) -> None:
    image = find_image(reading({"any": (dtype, shape)}))
    assert (image.name, image.layout, image.shape) == ("any", layout, found)
    assert image.dtype == ("uint8" if dtype == BYTE else "float32")
    assert image.size == (found[2:] if layout == "nchw" else found[1:3])
    assert image.at(7, 5, 6) == ((7, 3, 5, 6) if layout == "nchw" else (7, 5, 6, 3))


def test_open_channels_that_are_brought_to_the_front() -> None:
    def turn(draft: Draft, name: str) -> str:
        return draft.node("Transpose", name, perm=[0, 3, 1, 2])

    inputs = {"any": (FLOAT, ["n", "h", "w", "c"])}
    assert find_image(reading(inputs, turn)).layout == "nhwc"
    assert find_image(reading(inputs)).layout == "nchw"


@pytest.mark.parametrize(
    ("others", "name"),
    [
        ({"pixel_values": (FLOAT, ["n", 3, 8, 8])}, "pixel_values"),
        ({"other": (FLOAT, ["n", 3, 8, 8]), "my_Image": (FLOAT, ["n", 3, 8, 8])}, "my_Image"),
        ({"one": (FLOAT, ["n", 3, 8, 8]), "two": (FLOAT, ["n", 3, 8, 8])}, "one"),
        ({"image": (INT, ["n", 3, 8, 8]), "one": (FLOAT, ["n", 3, 8, 8])}, "one"),
        ({"image": (FLOAT, ["n", 1, 8, 8]), "one": (FLOAT, ["n", 3, 8, 8])}, "one"),
    ],
)
def test_the_likeliest_of_several(others: Inputs, name: str) -> None:
    """Texts, masks and images of other channels are no images."""
    texts: Inputs = {"input_ids": (INT, ["n", 77]), "attention_mask": (FLOAT, ["n", 77])}
    assert find_image(reading({**texts, **others})).name == name


@pytest.mark.parametrize(
    ("inputs", "listed"),
    [
        ({"ids": (INT, ["n", 77])}, r"has ids int64 \['n', 77\]$"),
        ({"gray": (FLOAT, ["n", 1, 8, 8])}, r"has gray float32 \['n', 1, 8, 8\]$"),
        ({"flat": (FLOAT, ["n", 3, 64])}, r"has flat float32 \['n', 3, 64\]$"),
        ({"deep": (TensorProto.INT32, ["n", 3, 8, 8])}, "has deep int32"),
        ({"a": (INT, None), "b": (FLOAT, [])}, r"has a int64 of unknown shape, b float32 \[\]$"),
        ({"tiny": (TensorProto.FLOAT8E4M3FN, ["n", 3, 8, 8])}, "has tiny float8e4m3fn"),
        ({"text": (TensorProto.STRING, ["n", 3, 8, 8])}, "has text object"),
    ],
)
def test_what_is_no_image_is_listed(inputs: Inputs, listed: str) -> None:
    wanted = rf"needs one image input \[batch, 3, H, W\] or \[batch, H, W, 3\], {listed}"
    with pytest.raises(InputError, match=wanted):
        find_image(reading(inputs))


def test_a_graph_without_inputs() -> None:
    draft = Draft()
    graph = import_graph(draft.model({}, [draft.node("Identity", draft.weight(np.ones(3)))]))
    with pytest.raises(InputError, match=r"has none$"):
        find_image(graph)


def scaled(op: str, *numbers: float, moved: bool = False) -> str | None:
    """What the first arithmetic on an input says of its range."""

    def node(draft: Draft, name: str) -> str:
        if moved:
            name = draft.node("Cast", name, to=FLOAT)
            name = draft.node("Transpose", name, perm=[0, 3, 1, 2])
        values = np.array(numbers, np.float32)
        return draft.node(op, name, draft.weight(values.reshape(-1, 1, 1)))

    shape = ["n", 8, 8, 3] if moved else ["n", 3, 8, 8]
    pixels = find_image(reading({"image": (FLOAT, shape)}, node)).pixels
    return None if pixels is None else str(pixels)


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    ("op", "numbers", "pixels"),
    [
        ("Div", [255.0], "bytes"),
        ("Div", [127.5], "bytes"),
        ("Mul", [1 / 255], "bytes"),
        ("Sub", [123.675, 116.28, 103.53], "bytes"),
        ("Sub", [0.485, 0.456, 0.406], "unit"),
        ("Sub", [0.5], "unit"),
        ("Mul", [2.0], "unit"),
        ("Div", [0.229, 0.224, 0.225], "unit"),
        ("Add", [-0.5], "unit"),
        ("Pow", [2.0], None),
        ("Add", [1.0] * 8, None),  # a number for each row
    ],
)
def test_ranges_of_pixels(op: str, numbers: list[float], pixels: str | None, moved: bool) -> None:
    assert scaled(op, *numbers, moved=moved) == pixels


def test_an_image_that_two_nodes_read_says_nothing_of_its_range() -> None:
    def node(draft: Draft, name: str) -> str:
        draft.node("Relu", name)
        return draft.node("Div", name, draft.weight(np.array(255, np.float32)))

    assert find_image(reading({"image": (FLOAT, ["n", 3, 8, 8])}, node)).pixels is None


@pytest.mark.parametrize(
    ("dim", "size"), [(1, True), (224, True), (0, False), (-1, False), ("n", False), (None, False)]
)
def test_sizes(dim: object, size: bool) -> None:
    assert is_size(dim) is size


def pinned(shape: Any, wanted: tuple[int | str, ...]) -> gs.Graph:
    draft = Draft()
    flat = draft.node("Flatten", draft.node("Relu", "image"))
    graph = import_graph(draft.model({"image": shape}, [flat]))
    result = PinImage(wanted)
    result.requires(graph)
    after = graph.copy()
    log = result.rewrite(after)
    assert len(log.edits) == (0 if shape == list(wanted) else 1)
    result.ensures(graph, after)
    assert not result.rewrite(after).edits
    return after


@pytest.mark.parametrize(
    ("shape", "batch"),
    [
        (["n", 3, "h", "w"], 2),
        (["n", "c", 8, 8], "batch"),
        ([None] * 4, "batch"),
        ([-1, 3, 0, 0], 2),
        (None, "batch"),
        ([2, 3, 8, 8], 2),
    ],
)
def test_sizes_are_given(shape: Any, batch: int | str) -> None:
    graph = pinned(shape, (batch, 3, 8, 8))
    assert graph.inputs[0].shape == [batch, 3, 8, 8]
    check_and_infer(graph)
    assert graph.outputs[0].shape == [batch, 192]
    images = np.random.default_rng(0).standard_normal((2, 3, 8, 8)).astype(np.float32)
    (found,) = run_graph(graph, images)
    np.testing.assert_array_equal(found, np.maximum(images, 0).reshape(2, -1))


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ([2, 3, 8, 8], ("batch", 3, 8, 8)),
        (["n", 3, 16, "w"], (2, 3, 8, 8)),
        (["n", 4, "h", "w"], (2, 3, 8, 8)),
        (["n", 3, 8], (2, 3, 8, 8)),
    ],
)
def test_numbers_in_the_file_are_not_overruled(shape: Any, wanted: tuple[int | str, ...]) -> None:
    with pytest.raises(InputError, match=r"the input 'image' is \[.*\], not \["):
        pinned(shape, wanted)


def test_shapes_of_another_size_are_forgotten() -> None:
    """They would contradict the new ones; weights keep theirs."""
    vit = TinyVit(Spec(dynamic_shapes=True))
    graph = with_shapes(vit.model())
    result = run(PinImage((2, 3, vit.spec.size, vit.spec.size)), graph)
    assert result.graph.outputs[0].shape == [2, vit.spec.width]
    images = vit.images(2)
    for one, other in zip(run_graph(result.graph, images), run_graph(graph, images), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not run(PinImage((2, 3, vit.spec.size, vit.spec.size)), result.graph).changed
