"""Dimensions followed through moves: where every number stands, as numpy has it."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.passes.follow_axes import Axes, Factor, axes_of, indices, moved, parts, way_to

SOURCE = (2, 5, 12)
Step = tuple[str, Any]


def node(op: str, shape: tuple[int, ...], *constants: Any, outs: int = 1, **attrs: Any) -> gs.Node:
    """A node with one data input, whose outputs have a shape."""
    inputs = [
        gs.Variable("x"),
        *(gs.Constant(str(i), np.array(c)) for i, c in enumerate(constants)),
    ]
    outputs = [gs.Variable(f"y{i}", np.float32, list(shape)) for i in range(outs)]
    return gs.Node(op, "n", attrs, inputs, outputs)


def numbers(axes: Axes, source: tuple[int, ...] = SOURCE) -> NDArray[np.int64]:
    """Which number of the source, counted from its first, stands where."""
    steps = [int(np.prod(source[axis + 1 :])) for axis in range(len(source))]
    found = np.zeros((), np.int64)
    for group in axes:
        along = np.zeros(1, np.int64)
        for factor in group:
            along = (along[:, None] + indices([factor]) * steps[factor.axis]).ravel()
        found = found[..., None] + along
    return found


def start() -> tuple[Axes, NDArray[np.int64]]:
    axes = axes_of(gs.Variable("x", np.float32, list(SOURCE)))
    assert axes is not None
    return axes, np.arange(np.prod(SOURCE)).reshape(SOURCE)


RESHAPES = [(2, 5, 3, 4), (2, 5, 3, 2, 2), (10, 12), (2, 1, 5, 12), (1, 2, 5, 12), (2, 5, 12, 1)]


@given(st.lists(st.integers(0, 2**16), max_size=6))
@examples(80)
def test_moves_as_numpy_does(draws: list[int]) -> None:
    axes, values = start()
    for draw in draws:
        kind, rank = draw % 4, values.ndim
        if kind == 0:
            perm = np.random.default_rng(draw).permutation(rank).tolist()
            step, values = node("Transpose", (), perm=perm), values.transpose(perm)
        elif kind == 1:
            shape = RESHAPES[draw % len(RESHAPES)] if draw % 3 else (*values.shape[:-1], -1, 1)
            values = values.reshape(shape)
            step = node("Reshape", values.shape)
        elif kind == 2:
            axis = draw % (2 * rank + 2) - rank - 1
            step, values = node("Unsqueeze", (), [axis]), np.expand_dims(values, axis)
        else:
            step, values = node("Squeeze", ()), values.squeeze()
        found = moved(step, axes)
        if found is None:  # a Reshape that takes dimensions across one another
            assert step.op == "Reshape"
            return
        axes = found
        np.testing.assert_array_equal(numbers(axes), values)
    way = way_to(axes, len(SOURCE))
    assert way is not None
    _, again = start()
    for _, op, target in way:
        if op == "Transpose":
            again = again.transpose(target)
        else:
            copied = [again.shape[i] if dim == 0 else dim for i, dim in enumerate(target)]
            again = again.reshape(copied)
    np.testing.assert_array_equal(again, values)


@pytest.mark.parametrize(
    ("picker", "wanted"),
    [
        (node("Split", (), [4, 4, 4], outs=3, axis=-1), [0, 1, 2]),
        (node("Split", (), outs=3, axis=2, num_outputs=3), [0, 1, 2]),
        (node("Split", (), [4, 6, 2], outs=3, axis=2), []),
        (node("Split", (), [6, 6], outs=2, axis=2), []),
        (node("Slice", (), [4], [8], [2]), [1]),
        (node("Slice", (), [-4], [2**63 - 1], [-1], [1]), [2]),
        (node("Slice", (), [0], [8], [2]), []),
        (node("Slice", (), [2], [6], [2]), []),
        (node("Slice", (), [0], [12], [2], [3]), []),
        (node("Gather", (), 1, axis=2), []),
        (node("Relu", ()), []),
    ],
)
def test_equal_parts(picker: gs.Node, wanted: list[int]) -> None:
    axes, _ = start()
    found = parts(picker, axes, 3)
    assert [part.index for part in found] == wanted
    for part in found:
        assert part.factor == Factor(2, 3, 4)
        assert part.axes == (*axes[:2], (Factor(2, 4, 1),))


@pytest.mark.parametrize("kept", [True, False])
def test_a_gather_of_one_index(kept: bool) -> None:
    axes = moved(node("Reshape", (2, 5, 3, 4)), start()[0])
    assert axes is not None
    (part,) = parts(node("Gather", (), [-1] if kept else -1, axis=2), axes, 3)
    assert part.index == 2
    assert part.axes == (*axes[:2], *([()] if kept else []), axes[3])


def test_a_free_dimension_stays_whole() -> None:
    free = axes_of(gs.Variable("x", np.float32, ["batch", 5, 12]))
    assert free is not None
    split = moved(node("Reshape", ("batch", 5, 3, 4)), free)  # type: ignore[arg-type]
    assert split == (*free[:2], (Factor(2, 3, 4),), (Factor(2, 4, 1),))
    assert moved(node("Reshape", ("batch", 12)), free) is None  # type: ignore[arg-type]
    merged = ((*free[0], *free[1]), free[2])
    assert way_to(merged, 3) == [("merge", "Reshape", [-1, 12])]
    assert axes_of(gs.Variable("x")) is None
