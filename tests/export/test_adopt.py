"""Other exporters' files in our own form: they compute what they did, for any number of images."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.adopted_graphs import SPEC, VIT, masked, mixing
from support.clip_graph import clip
from support.running import run_graph
from support.small_models import Draft, bake
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.export.adopt import Adopted, adopt
from regcache.passes.canonicalize import canonicalize_graph
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import is_constant

SIZE = SPEC.size
IMAGES = VIT.images(5)


@pytest.fixture
def write(tmp_path: Path) -> Callable[[onnx.ModelProto], Path]:
    def save(model: onnx.ModelProto) -> Path:
        path = tmp_path / "theirs.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return save


Write = Callable[[onnx.ModelProto], Path]


def renamed(model: onnx.ModelProto, *dims: Any) -> onnx.ModelProto:
    """The model with other dimensions of its input: numbers, names, or None for nothing."""
    shape = model.graph.input[0].type.tensor_type.shape
    for dim, value in zip(shape.dim, dims, strict=True):
        dim.Clear()
        if value is not None:
            setattr(dim, "dim_value" if isinstance(value, int) else "dim_param", value)
    return model


def assert_adopted(
    adopted: Adopted, vit: TinyVit, batches: tuple[int, ...] = (1, 2, 5), rtol: float = 1e-4
) -> None:
    """Our own form: one input, static shapes but for a free batch, outputs as they were."""
    graph = adopted.graph
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    (image,) = graph.inputs
    assert image.dtype == np.float32
    assert image.shape[1:] == [3, vit.spec.size, vit.spec.size]
    assert adopted.image.shape == tuple(image.shape)
    assert adopted.image.size == (vit.spec.size, vit.spec.size)
    assert graph.opset >= 20
    assert [item.name for item in graph.outputs] == ["pooled", "last_hidden_state"]
    for node in graph.nodes:
        for item in node.outputs:
            free = [dim for dim in item.shape if not isinstance(dim, int)]
            assert len(free) <= 1, (node.name, item.shape)
        assert node.op != "Reshape" or is_constant(node.inputs[1])
    assert len(view_encoder(canonicalize_graph(graph)).blocks) == vit.spec.depth
    for batch in batches:
        images = vit.images(batch)
        for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=rtol, atol=rtol / 10)


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling(name: str, write: Write) -> None:
    """Called free, but its Reshape nodes hold a batch of 8."""
    vit = TinyVit(SPELLINGS[name])
    adopted = adopt(write(bake(vit.model(), 8, "n")))
    assert (adopted.batch, adopted.notes) == (8, ())
    assert adopted.graph.inputs[0].shape[0] == "batch"
    assert_adopted(adopted, vit)


@pytest.mark.parametrize(
    ("batch", "label", "held"),
    [(None, None, None), (1, None, 1), (8, None, 8), (1, "n", 1), (3, "n", 3)],
)
def test_every_form_of_the_batch(
    batch: int | None, label: str | None, held: int | None, write: Write
) -> None:
    """Free; one number everywhere; a number inside that the label does not tell.

    The number is told: the original has to be run with it.
    """
    model = VIT.model() if batch is None else bake(VIT.model(), batch, label)
    adopted = adopt(write(model))
    assert (adopted.batch, adopted.notes, adopted.half) == (held, (), False)
    assert adopted.graph.inputs[0].shape[0] == "batch"
    assert_adopted(adopted, VIT)


def test_the_file_itself_is_left_alone(write: Write) -> None:
    path = write(bake(VIT.model(), 1))
    before = path.read_bytes()
    adopt(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_adopting_again_changes_nothing(write: Write) -> None:
    once = adopt(write(bake(VIT.model(), 8)))
    twice = adopt(write(gs.export_onnx(once.graph)))
    assert twice.notes == ()
    assert ops(twice.graph) == ops(once.graph)
    assert_adopted(twice, VIT)


@pytest.mark.slow
def test_a_batch_of_its_own_is_kept_where_it_is_asked_for(write: Write) -> None:
    kept = adopt(write(bake(VIT.model(), 2)), free_batch=False)
    assert kept.notes == ("compiled for its batch of 2 alone",)
    assert_adopted(kept, VIT, (2,))
    hidden = adopt(write(bake(VIT.model(), 2, "n")), free_batch=False)
    assert hidden.graph.inputs[0].shape[0] in (2, "batch")
    free = adopt(write(VIT.model()), free_batch=False)
    assert free.notes == ()
    assert_adopted(free, VIT)


def test_a_batch_that_cannot_be_freed_is_explained(write: Write) -> None:
    adopted = adopt(write(mixing(4)))
    (note,) = adopted.notes
    assert note.startswith("compiled for its batch of 4 alone, which cannot be freed: ReduceMean ")
    assert "reduces over the batch" in note
    assert adopted.graph.inputs[0].shape[0] == 4
    assert adopted.batch == 4


def test_a_free_batch_that_cannot_be_followed_stays_free(write: Write) -> None:
    """The graph is the file's own, its shapes static but for the batch."""
    adopted = adopt(write(mixing("n")))
    assert adopted.notes == ()
    assert adopted.graph.inputs[0].shape[0] == "batch"
    pooled, _, centred = run_graph(adopted.graph, IMAGES)
    np.testing.assert_allclose(centred, pooled - pooled.mean(0, keepdims=True), atol=1e-6)


@pytest.mark.parametrize("held", [1, 4])
def test_a_batch_inside_beside_an_open_dimension(held: int, write: Write) -> None:
    """[held, -1, 12] takes any number of images, and makes tokens of one image of them."""
    draft = Draft()
    tokens = draft.node("Reshape", "image", draft.weight(np.array([held, -1, 12])))
    turned = draft.node("Transpose", tokens, perm=[0, 2, 1])
    mixed = draft.node("Softmax", draft.node("MatMul", tokens, turned))
    y = draft.node("ReduceMean", mixed, draft.weight(np.array([2])), keepdims=0)
    model = draft.model({"image": ["n", 3, SIZE, SIZE]}, [y])
    adopted = adopt(write(model))
    assert (adopted.batch, adopted.notes) == (held, ())
    (found,) = run_graph(adopted.graph, IMAGES)
    rows = IMAGES.reshape(5, -1, 12).astype(np.float64)
    scores = rows @ rows.swapaxes(1, 2)
    powers = np.exp(scores - scores.max(-1, keepdims=True))
    probs = powers / powers.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, probs.mean(2), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dims", [("n", "c", "h", "w"), (None,) * 4, (-1, 3, -1, -1), (1, 3, 0, 0)])
def test_an_open_size_is_given(dims: tuple[Any, ...], write: Write) -> None:
    adopted = adopt(write(renamed(VIT.model(), *dims)), resolution=SIZE)
    assert adopted.notes == ()
    assert_adopted(adopted, VIT)


def test_a_recipe_gives_the_size_where_nothing_else_does(write: Write) -> None:
    path = write(renamed(VIT.model(), "n", 3, "h", "w"))
    assert adopt(path, size=(SIZE, SIZE)).image.size == (SIZE, SIZE)
    assert adopt(path, resolution=SIZE, size=(SIZE * 9, SIZE * 9)).image.size == (SIZE, SIZE)


def test_an_open_size_is_asked_for(write: Write) -> None:
    path = write(renamed(VIT.model(), "n", "c", "h", "w"))
    with pytest.raises(InputError) as caught:
        adopt(path)
    assert str(caught.value) == (
        "height and width are open in the file, ['n', 'c', 'h', 'w']; add --resolution PIXELS"
    )


@pytest.mark.parametrize("resolution", [SIZE + SPEC.patch, 1, 4096])
def test_a_size_that_the_file_does_not_compute_at(resolution: int, write: Write) -> None:
    path = write(renamed(VIT.model(), "n", 3, "h", "w"))
    reason = f"does not compute at {resolution} x {resolution} pixels: the graph's shapes do not"
    with pytest.raises(InputError, match=reason) as caught:
        adopt(path, resolution=resolution)
    assert "\n" not in str(caught.value)


def test_a_size_that_the_file_fixes(write: Write) -> None:
    path = write(VIT.model())
    assert adopt(path, resolution=SIZE).image.size == (SIZE, SIZE)
    with pytest.raises(InputError, match=f"the image is fixed at {SIZE} x {SIZE} in the file"):
        adopt(path, resolution=SIZE * 2)
    assert adopt(path, size=(1, 1)).image.size == (SIZE, SIZE)  # a recipe is judged later
    path = write(renamed(VIT.model(), "n", 3, SIZE, "w"))
    with pytest.raises(InputError, match=f"the image is fixed at {SIZE} x w in the file"):
        adopt(path, resolution=SIZE * 2)
    assert_adopted(adopt(path, resolution=SIZE), VIT)


def halved(model: onnx.ModelProto, kind: int, dtype: Any) -> onnx.ModelProto:
    """The whole model in another precision, its input and outputs too."""
    for tensor in model.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype == np.float32:
            tensor.CopyFrom(numpy_helper.from_array(values.astype(dtype), tensor.name))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    return model


@pytest.mark.parametrize(
    ("kind", "dtype", "rtol"),
    [(TensorProto.FLOAT16, np.float16, 2e-2), (TensorProto.DOUBLE, np.float64, 1e-4)],
)
def test_other_precisions_are_taken_in_float32(
    kind: int, dtype: Any, rtol: float, write: Write
) -> None:
    adopted = adopt(write(halved(VIT.model(), kind, dtype)))
    assert adopted.half
    assert "taken in FP32" in adopted.notes[0]
    assert_adopted(adopted, VIT, rtol=rtol)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.UINT8])
def test_pixels_that_the_graph_normalises_itself(dtype: int, write: Write) -> None:
    """Channels last, bytes, with the mean and deviation inside."""
    model = VIT.model()
    mean, std = (np.array(three, np.float32) for three in ([120, 110, 100], [60, 55, 50]))
    for name, values in (("mean", mean), ("std", std)):
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    front = [
        helper.make_node("Cast", ["pixels"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["floats", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        helper.make_node("Transpose", ["normal"], ["pixel_values"], perm=[0, 3, 1, 2]),
    ]
    nodes = [*front, *model.graph.node]
    del model.graph.node[:], model.graph.input[:]
    model.graph.node.extend(nodes)
    image = helper.make_tensor_value_info("pixels", dtype, ["n", SIZE, SIZE, 3])
    model.graph.input.append(image)
    adopted = adopt(write(model))
    assert (adopted.image.layout, adopted.image.pixels) == ("nhwc", "bytes")
    assert adopted.graph.inputs[0].shape == ["batch", SIZE, SIZE, 3]
    assert adopted.image.size == (SIZE, SIZE)
    pixels: NDArray[Any] = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3))
    given: NDArray[Any] = pixels.astype(np.uint8 if dtype == TensorProto.UINT8 else np.float32)
    images = ((pixels - mean.astype(np.float64)) / std).transpose(0, 3, 1, 2)
    wanted = VIT.reference(images)
    for found, one in zip(run_graph(adopted.graph, given), wanted, strict=True):
        np.testing.assert_allclose(found, one, rtol=1e-4, atol=1e-5)


def test_the_vision_tower_of_a_whole_clip(write: Write) -> None:
    adopted = adopt(write(clip()))
    assert [item.name for item in adopted.graph.outputs] == ["hidden", "image_embeds"]
    assert adopted.notes == (
        "only what depends on the image alone is kept, hidden, image_embeds; dropped: "
        "logits_per_image, text_embeds, logit_scale, input_ids",
    )


@pytest.mark.parametrize(("kind", "value"), [("kept", 1.0), ("dropped", 0.0)])
def test_a_mask_is_set_to_what_masks_nothing(kind: str, value: float, write: Write) -> None:
    adopted = adopt(write(masked(kind)))
    assert adopted.masks == {"mask": value}
    assert [item.name for item in adopted.graph.outputs] == ["last_hidden_state"]
    assert adopted.notes[-1] == f"takes the image alone: mask = {value:g}, which masks nothing"
    (found,) = run_graph(adopted.graph, IMAGES)
    np.testing.assert_allclose(found, VIT.reference(IMAGES)[1], rtol=1e-4, atol=1e-5)


def test_an_input_that_is_needed_is_named(write: Write) -> None:
    with pytest.raises(InputError) as caught:
        adopt(write(masked("needed")))
    message = str(caught.value)
    assert message.startswith(
        "its outputs need mask besides the image 'pixel_values', and no value"
    )
    assert message.endswith("export it with the image as its only input")


def test_external_data_is_mapped_not_read(tmp_path: Path) -> None:
    vit = TinyVit(Spec(width=64, hidden=128))
    path = tmp_path / "theirs.onnx"
    onnx.save(vit.model(), path, save_as_external_data=True, location="d.bin", size_threshold=0)
    adopted = adopt(path)
    mapped = [
        item
        for item in adopted.graph.tensors().values()
        if is_constant(item) and isinstance(item.values, np.memmap)
    ]
    assert len(mapped) >= 6 * vit.spec.depth
    assert_adopted(adopted, vit)


def test_an_output_of_a_whole_batch_is_no_encoder(write: Write) -> None:
    draft = Draft()
    y = draft.node("ReduceMean", "image", keepdims=0)
    path = write(draft.model({"image": ["n", 3, SIZE, SIZE]}, [y]))
    with pytest.raises(InputError, match="no output has a row for each image"):
        adopt(path)


def test_inputs_that_are_no_images(write: Write) -> None:
    draft = Draft()
    y = draft.node("Relu", "mel")
    with pytest.raises(InputError, match=r"needs one image input .*, has mel float32 \[1, 80, 9\]"):
        adopt(write(draft.model({"mel": [1, 80, 9]}, [y])))


@pytest.mark.parametrize("seed", range(12))
def test_broken_graphs_never_end_in_a_traceback(seed: int, write: Write) -> None:
    """Names, types, sizes and attributes exchanged for one another."""
    random = np.random.default_rng(seed)
    model = TinyVit(Spec(width=8, hidden=8, grid=2, depth=1)).model()
    nodes, weights = model.graph.node, model.graph.initializer
    names = [name for node in nodes for name in (*node.output, *node.input)]
    for _ in range(int(random.integers(1, 4))):
        node = nodes[int(random.integers(len(nodes)))]
        weight = weights[int(random.integers(len(weights)))]
        changes: list[Callable[[], Any]] = [
            lambda: node.input.__setitem__(0, str(random.choice(names))),  # noqa: B023
            lambda: setattr(node, "op_type", str(random.choice([n.op_type for n in nodes]))),  # noqa: B023
            lambda: setattr(weight, "data_type", int(random.integers(0, 24))),  # noqa: B023
            lambda: weight.dims.append(int(random.integers(-2, 3))),  # noqa: B023
            lambda: setattr(weight, "raw_data", weight.raw_data[:-3]),  # noqa: B023
            lambda: node.output.__setitem__(0, str(random.choice(names))),  # noqa: B023
            lambda: node.input.append(str(random.choice(names))),  # noqa: B023
        ]
        changes[int(random.integers(len(changes)))]()
    with contextlib.suppress(InputError):
        adopt(write(model))


def test_what_is_fused_in_the_text_tower_is_no_reason_to_refuse_the_image(tmp_path: Path) -> None:
    model = TinyVit(Spec()).model()
    kind, name = TensorProto.INT64, model.graph.output[0].name
    model.graph.input.append(helper.make_tensor_value_info("input_ids", kind, ["batch", 7]))
    fused = helper.make_node("EmbedText", ["input_ids"], ["text"], domain="com.microsoft")
    joined = helper.make_node("Mul", ["text", name], ["logits"])
    model.graph.node.extend([fused, joined])
    shape: list[str | int | None] = ["batch", Spec().width]
    model.graph.output.append(helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, tmp_path / "clip.onnx")
    adopted = adopt(tmp_path / "clip.onnx")
    assert [item.name for item in adopted.graph.outputs] == ["pooled", "last_hidden_state"]
    assert any("dropped: logits, input_ids" in note for note in adopted.notes)
