"""Every operator that images are followed through, one at a time; those that mix them are named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from support.batch_graphs import IMAGES, floats, freed, ints, rows, tokens, written
from support.running import run_graph
from support.small_models import Draft

from regcache.passes.base import run
from regcache.passes.free_batch import FreeBatch

Build = Callable[[Draft, int], str]


def squeezed(draft: Draft, batch: int) -> str:
    """A Squeeze of all axes of length 1: of one image too many."""
    mean = draft.node("ReduceMean", "image", ints(draft, 2, 3))
    return draft.node("Squeeze", mean) if batch > 1 else draft.node("Flatten", mean)


def cut(
    draft: Draft, starts: list[int], ends: list[int], axes: list[int], dtype: type = np.int64
) -> str:
    arguments = (ints(draft, *item, dtype=dtype) for item in (starts, ends, axes))
    return draft.node("Slice", "image", *arguments)


def resized(draft: Draft, batch: int, **attributes: Any) -> str:
    sizes = ints(draft, batch, 3, 7, 5)
    return draft.node("Resize", "image", "", "", sizes, mode="linear", **attributes)


def merged_heads(draft: Draft, batch: int) -> str:
    """nn.MultiheadAttention's: tokens first, then the batch merged with its heads."""
    x = draft.node("Transpose", tokens(draft, batch), perm=[1, 0, 2])
    x = draft.node("Reshape", x, ints(draft, 4, batch * 3, 4))
    x = draft.node("Transpose", x, perm=[1, 0, 2])
    x = draft.node("Add", x, floats(draft, 3, 1, 4, batch=batch))  # other numbers for each head
    scores = draft.node("MatMul", x, draft.node("Transpose", x, perm=[0, 2, 1]))
    mixed = draft.node("MatMul", draft.node("Softmax", scores, axis=-1), x)
    x = draft.node("Transpose", mixed, perm=[1, 0, 2])
    x = draft.node("Reshape", x, ints(draft, 4, batch, 12))
    return draft.node("Transpose", x, perm=[1, 0, 2])


def rows_of_tokens(draft: Draft, batch: int) -> str:
    """A Gemm over the tokens of all images, whose bias is written out for each of them."""
    x = draft.node("Reshape", tokens(draft, batch), ints(draft, batch * 4, 12))
    x = draft.node("Gemm", x, floats(draft, 8, 12), floats(draft, 4, 8, batch=batch), transB=1)
    return draft.node("Reshape", x, ints(draft, batch, 4, 8))


def split(draft: Draft, batch: int) -> str:
    draft.node("Split", tokens(draft, batch), outputs=["q", "k", "v"], axis=2, num_outputs=3)
    return draft.node("Sum", "q", "k", "v")


def twice_the_same(draft: Draft, batch: int) -> str:
    token = floats(draft, 1, 1, 12, batch=batch)
    return draft.node("Concat", token, tokens(draft, batch), token, axis=1)


def ranked(draft: Draft, batch: int) -> str:
    draft.node("TopK", rows(draft, batch), ints(draft, 3), outputs=["top", "where"])
    return draft.node("Add", "top", draft.node("Cast", "where", to=TensorProto.FLOAT))


def normal(op: str, *shape: int, **attributes: Any) -> Build:
    def build(draft: Draft, batch: int) -> str:
        inputs = [floats(draft, *shape) for _ in range(2)]
        return draft.node(op, "image", *inputs, **attributes)

    return build


def in_training(flag: int) -> Build:
    def build(draft: Draft, batch: int) -> str:
        ones = draft.weight(np.ones(3, np.float32))
        names = ["y", "mean", "var"] if flag else ["y"]
        inputs = ("image", ones, ones, ones, ones)
        return draft.node("BatchNormalization", *inputs, outputs=names, training_mode=flag)

    return build


def typed_like(draft: Draft, batch: int) -> str:
    scale = draft.node("CastLike", draft.weight(np.array([2], np.int64)), "image")
    return draft.node("Mul", draft.node("CastLike", "image", scale), scale)


def attention(rank: int) -> Build:
    def build(draft: Draft, batch: int) -> str:
        x, attributes = tokens(draft, batch), {"q_num_heads": 3, "kv_num_heads": 3}
        if rank == 4:
            x, attributes = draft.node("Reshape", x, ints(draft, batch, 3, 4, 4)), {}
        return draft.node("Attention", x, x, x, **attributes)  # type: ignore[arg-type]

    return build


END = 2**31 - 1
FREE: dict[str, Build] = {
    "Flatten": lambda d, n: d.node("Flatten", "image", axis=1),
    "Flatten of two axes": lambda d, n: d.node(
        "Reshape", d.node("Flatten", "image", axis=2), ints(d, n, 48)
    ),
    "Squeeze of all ones": squeezed,
    "Slice of the whole batch": lambda d, n: cut(d, [0, 1], [n, END], [0, 2]),
    "Slice of the whole batch to the end": lambda d, n: cut(d, [0], [END], [0]),
    "Slice from the front of the batch": lambda d, n: cut(d, [-n], [END], [0]),
    "Slice in int32": lambda d, n: cut(d, [0, 1], [n, END], [0, -1], np.int32),
    "Resize to sizes": resized,
    "Resize to sizes by axes": lambda d, n: resized(d, n, axes=[-4, -3, -2, -1]),
    "Resize by scales": lambda d, n: d.node(
        "Resize", "image", "", d.weight(np.array([1, 1, 2, 2], np.float32)), mode="nearest"
    ),
    "Expand of the images": lambda d, n: d.node(
        "Expand", d.node("Unsqueeze", "image", ints(d, 1)), ints(d, n, 2, 3, 4, 4)
    ),
    "heads merged with the batch": merged_heads,
    "Gemm": lambda d, n: d.node("Gemm", rows(d, n), floats(d, 48, 5), floats(d, 5)),
    "Gemm of all tokens": rows_of_tokens,
    "Gemm, transposed": lambda d, n: d.node(
        "Gemm", d.node("Transpose", rows(d, n), perm=[1, 0]), floats(d, 48, 5), transA=1
    ),
    "MatMul from the left": lambda d, n: d.node("MatMul", floats(d, 5, 4), tokens(d, n)),
    "MatMul, batch in columns": lambda d, n: d.node(
        "Transpose",
        d.node("MatMul", floats(d, 5, 48), d.node("Transpose", rows(d, n), perm=[1, 0])),
        perm=[1, 0],
    ),
    "Split": split,
    "a constant joined twice": twice_the_same,
    "TopK": ranked,
    "LayerNormalization": normal("LayerNormalization", 4, 4, axis=-2),
    "InstanceNormalization": normal("InstanceNormalization", 3),
    "BatchNormalization": in_training(0),
    "Conv": lambda d, n: d.node("Conv", "image", floats(d, 5, 3, 2, 2), floats(d, 5)),
    "GlobalAveragePool": lambda d, n: d.node("GlobalAveragePool", "image"),
    "CastLike": typed_like,
    "Tile": lambda d, n: d.node("Tile", "image", ints(d, 1, 2, 1, 3)),
    "Pad": lambda d, n: d.node("Pad", "image", ints(d, 0, 0, 1, 0, 0, 0, 2, 1)),
    "Where with a mask for every image": lambda d, n: d.node(
        "Where", d.weight(np.array([[[[True]], [[False]], [[True]]]] * n)), "image", floats(d, 1)
    ),
    "Clip": lambda d, n: d.node("Clip", "image", "", d.weight(np.array(0.5, np.float32))),
    "Trilu": lambda d, n: d.node("Trilu", "image"),
    "ArgMax": lambda d, n: d.node(
        "Cast", d.node("ArgMax", rows(d, n), axis=1, keepdims=0), to=TensorProto.FLOAT
    ),
    "ReduceL2": lambda d, n: d.node("ReduceL2", tokens(d, n), ints(d, -1), keepdims=0),
    "Gather": lambda d, n: d.node("Gather", tokens(d, n), ints(d, 3, 0, -1), axis=1),
    "Attention of rank 3": attention(3),
    "Attention of rank 4": attention(4),
}


@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("name", FREE)
def test_operators_that_keep_images_apart(name: str, batch: int) -> None:
    build, opset = FREE[name], 23 if "Attention" in name else 20
    single = written(build, 1, opset=opset)
    wanted = np.concatenate([run_graph(single, IMAGES[n : n + 1])[0] for n in range(5)])
    if name == "Squeeze of all ones" and batch == 1:
        return  # written without it
    graph = freed(written(build, batch, opset=opset))
    for count in (1, 2, 5):
        (found,) = run_graph(graph, IMAGES[:count])
        np.testing.assert_allclose(found, wanted[:count], rtol=1e-5, atol=1e-6)


def branching(draft: Draft, batch: int) -> str:
    """The branch takes the images from outside and adds them up."""
    body = helper.make_graph(
        [helper.make_node("ReduceSum", ["image"], ["sum"], keepdims=1)],
        "b",
        [],
        [helper.make_tensor_value_info("sum", TensorProto.FLOAT, [1, 1, 1, 1])],
    )
    yes = draft.node("Identity", draft.weight(np.array(True)))
    summed = draft.node("If", yes, then_branch=body, else_branch=body)
    return draft.node("Add", "image", summed)


def numbers_of_their_own(draft: Draft, batch: int) -> str:
    return draft.node(
        "Add", "image", draft.weight(np.arange(batch, dtype=np.float32).reshape(-1, 1, 1, 1))
    )


def cropped(draft: Draft, batch: int) -> str:
    region = draft.weight(np.array([0, 0, 0, 0, 1, 1, 0.5, 0.5], np.float32))
    mode = {"coordinate_transformation_mode": "tf_crop_and_resize"}
    return draft.node("Resize", "image", region, "", ints(draft, batch, 3, 4, 4), **mode)


def nothing(draft: Draft, batch: int) -> str:
    empty = draft.node("Slice", rows(draft, batch), *(ints(draft, n) for n in (0, 0, 1)))
    return draft.node("Reshape", empty, ints(draft, batch, 0, 1))


STUCK: dict[str, tuple[Build, str]] = {
    "mean of the batch": (
        lambda d, n: d.node("Sub", "image", d.node("ReduceMean", "image", ints(d, 0))),
        "ReduceMean 'n0' reduces over the batch",
    ),
    "mean of everything": (
        lambda d, n: d.node("Sub", "image", d.node("ReduceMean", "image")),
        "ReduceMean 'n0' reduces over the batch",
    ),
    "softmax of the batch": (
        lambda d, n: d.node("Softmax", "image", axis=0),
        "Softmax 'n0' works along the batch",
    ),
    "a norm of the batch": (
        lambda d, n: d.node("LayerNormalization", "image", floats(d, 4), axis=-4),
        "normalises over the batch",
    ),
    "statistics of the batch": (in_training(1), "takes the statistics of the batch"),
    "products of images": (
        lambda d, n: d.node("MatMul", rows(d, n), d.node("Transpose", rows(d, n), perm=[1, 0])),
        "multiplies images with one another",
    ),
    "one image": (
        lambda d, n: d.node("Gather", "image", ints(d, 0), axis=0),
        "picks images of the batch",
    ),
    "the first image": (lambda d, n: cut(d, [0], [1], [0]), "cuts the batch"),
    "the images backwards": (
        lambda d, n: d.node(
            "Slice", "image", ints(d, -1), ints(d, -(2**62)), ints(d, 0), ints(d, -1)
        ),
        "cuts the batch",
    ),
    "images one after another": (
        lambda d, n: d.node("Concat", "image", "image", axis=0),
        "joins images with others",
    ),
    "a constant before the images": (
        lambda d, n: d.node("Concat", floats(d, 1, 3, 4, 4), "image", axis=-4),
        "joins images with others",
    ),
    "numbers of their own": (numbers_of_their_own, "has other numbers for each image"),
    "another number of numbers": (
        lambda d, n: d.node(
            "Add", d.node("ReduceMean", rows(d, n), ints(d, 1), keepdims=0), floats(d, n)
        ),
        "has other numbers for each image",
    ),
    "the batch torn apart": (
        lambda d, n: d.node("Reshape", "image", ints(d, 3, n * 16)),
        "tears the batch apart",
    ),
    "no batch in front": (
        lambda d, n: d.node("Transpose", "image", perm=[1, 0, 2, 3]),
        "the output 'n0_Transpose' has no batch in front",
    ),
    "rows of tokens": (
        lambda d, n: d.node("Reshape", "image", ints(d, n * 3, 16)),
        "has no batch in front",
    ),
    "twice as many images": (
        lambda d, n: d.node("Tile", "image", ints(d, 2, 1, 1, 1)),
        "repeats the batch",
    ),
    "an image of zeros more": (
        lambda d, n: d.node("Pad", "image", ints(d, 1, *[0] * 7)),
        "pads the batch",
    ),
    "images between images": (
        lambda d, n: d.node("Resize", "image", "", "", ints(d, n * 2, 3, 4, 4)),
        "resizes the batch",
    ),
    "a region": (cropped, "crops by a region"),
    "sizes that hang together": (
        lambda d, n: resized(d, n, axes=[0, 1, 2, 3], keep_aspect_ratio_policy="not_larger"),
        "has sizes that depend on one another",
    ),
    "an operator of another kind": (
        lambda d, n: d.node("CumSum", "image", d.weight(np.array(0))),
        "CumSum 'n0' is not known to keep images apart",
    ),
    "a branch": (branching, "If 'n1' takes the images by an input that is not followed"),
    "images as indices": (
        lambda d, n: d.node(
            "Gather", floats(d, 9, 2), d.node("Cast", d.node("Abs", "image"), to=TensorProto.INT64)
        ),
        "takes the images by an input that is not followed",
    ),
    "nothing": (nothing, "tears the batch apart"),
}


@pytest.mark.parametrize("name", STUCK)
def test_operators_that_do_not_are_named(name: str) -> None:
    build, reason = STUCK[name]
    graph = written(build, 4)
    result = run(FreeBatch(), graph)
    assert result.graph is graph
    (skip,) = result.log.skips
    assert skip.site == "batch"
    assert skip.reason.startswith("cannot be freed: ")
    assert reason in skip.reason
    (found,) = run_graph(graph, IMAGES[:4])
    assert np.isfinite(found).all()  # the graph is one that runs


@pytest.mark.parametrize(
    "name", ["mean of the batch", "one image", "softmax of the batch", "a branch"]
)
def test_a_batch_of_one_is_not_freed_by_chance(name: str) -> None:
    """With one image, what mixes images computes the same as what does not."""
    result = run(FreeBatch(), written(STUCK[name][0], 1))
    assert not result.changed
