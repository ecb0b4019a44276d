"""Random chains of operators that keep images apart, and the same in float64 numpy.

Every axis is a list of factors, so that the batch may be an axis of its own or part of a longer
one, as attention merges it with its heads.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from support.small_models import Draft
from support.tiny_vit import softmax

Array = NDArray[Any]
Factor = int | None
"""A number of entries, or None for the batch."""
Step = Callable[[Array, int], Array]

_LARGEST = 400


class BatchChain:
    """A model of [batch, 3, 4, 4] -> [batch, n], written for one batch size.

    `reference(images)` computes it for any number of images.
    """

    def __init__(self, seed: int, batch: int, steps: int = 8) -> None:
        self.batch, self.random = batch, np.random.default_rng(seed)
        self.draft, self.tensor = Draft(), "image"
        self.axes: list[list[Factor]] = [[None], [3], [4], [4]]
        self.steps: list[Step] = []
        moves = [
            self._regroup,
            self._transpose,
            self._multiply,
            self._add,
            self._join,
            self._cut,
            self._softmax,
            self._average,
            self._attend,
            self._lengthen,
            self._pick,
        ]
        for number in self.random.integers(0, len(moves), steps):
            moves[int(number)]()
            while prod(self._sizes(1)) > _LARGEST:
                self._average()
        self._finish()

    def model(self) -> onnx.ModelProto:
        """The graph with its batch size in every shape."""
        return self.draft.model({"image": [self.batch, 3, 4, 4]}, [self.tensor])

    def reference(self, images: Array) -> Array:
        """What the chain computes, in float64."""
        x = images.astype(np.float64)
        for step in self.steps:
            x = step(x, len(images))
        return x

    def _sizes(self, batch: int) -> list[int]:
        return _sizes(self.axes, batch)

    def _emit(self, compute: Step, op: str, *more: str, **attributes: Any) -> None:
        self.tensor = self.draft.node(op, self.tensor, *more, **attributes)
        self.steps.append(compute)

    def _ints(self, *values: int) -> str:
        return self.draft.weight(np.array(values, np.int64))

    def _floats(self, shape: list[int]) -> Array:
        return self.random.standard_normal(shape).astype(np.float32)

    def _free_axis(self) -> int | None:
        """An axis that the batch has no part in."""
        free = [i for i, axis in enumerate(self.axes) if None not in axis]
        return int(self.random.choice(free)) if free else None

    def _batch_axis(self) -> int:
        return next(i for i, axis in enumerate(self.axes) if None in axis)

    def _reshape(self, axes: list[list[Factor]]) -> None:
        self.axes = [list(axis) for axis in axes]  # which later steps change
        target = self._sizes(self.batch)
        if self.random.random() < 0.3:
            target[int(self.random.integers(len(target)))] = -1
        self._emit(lambda x, n: x.reshape(_sizes(axes, n)), "Reshape", self._ints(*target))

    def _regroup(self) -> None:
        """Merge neighbours, or part what is merged."""
        factors = [factor for axis in self.axes for factor in axis]
        cuts = self.random.random(len(factors) - 1) < 0.6
        axes: list[list[Factor]] = [[factors[0]]]
        for factor, cut in zip(factors[1:], cuts, strict=True):
            if cut:
                axes.append([factor])
            else:
                axes[-1].append(factor)
        self._reshape(axes)

    def _transpose(self) -> None:
        order = [int(axis) for axis in self.random.permutation(len(self.axes))]
        self.axes = [self.axes[axis] for axis in order]
        self._emit(lambda x, n: x.transpose(order), "Transpose", perm=order)

    def _multiply(self) -> None:
        """A linear layer, where the last axis holds channels of one image."""
        if None in self.axes[-1] or len(self.axes) < 2:
            return
        width = self._sizes(1)[-1]
        weight = self._floats([width, 4]) / np.float32(np.sqrt(width))
        self.axes[-1] = [4]
        self._emit(lambda x, n: x @ weight.astype(np.float64), "MatMul", self.draft.weight(weight))

    def _add(self) -> None:
        """A constant, which may be as long as the batch, with the same numbers for each image."""
        kept = self.random.random(len(self.axes)) < 0.5
        axes = [list(axis) if keep else [] for axis, keep in zip(self.axes, kept, strict=True)]
        one = self._floats(_sizes(axes, 1))
        if self.random.random() < 0.3 and not kept[0]:
            axes, one = axes[1:], one[0]
        stored = self.draft.weight(_repeated(one, axes, self.batch))
        self._emit(lambda x, n: np.tanh(x + _repeated(one, axes, n)), "Add", stored)
        self.tensor = self.draft.node("Tanh", self.tensor)

    def _join(self) -> None:
        """A constant in front or behind, as class tokens are."""
        axis = self._free_axis()
        if axis is None:
            return
        axes: list[list[Factor]] = [list(factors) for factors in self.axes]
        axes[axis] = [1]
        one = self._floats(_sizes(axes, 1))
        stored = self.draft.weight(_repeated(one, axes, self.batch))
        length = self._sizes(1)[axis] + 1
        self.axes[axis] = [length]
        twice = self.random.random() < 0.3
        self.axes[axis] = [length + twice]
        inputs = [stored, self.tensor, *[stored] * twice]
        self.tensor = self.draft.node("Concat", *inputs, axis=axis)

        def compute(x: Array, n: int) -> Array:
            given = _repeated(one, axes, n)
            return np.concatenate([given, x, *[given] * twice], axis=axis)

        self.steps.append(compute)

    def _cut(self) -> None:
        """All but the first entry of an axis, and all of the batch's."""
        axis = self._free_axis()
        if axis is None or self._sizes(1)[axis] < 2:
            return
        starts, axes = [1], [axis - len(self.axes)]
        if self.random.random() < 0.5:
            starts, axes = [*starts, 0], [*axes, self._batch_axis()]
        ends = [int(self.random.choice([size, 2**62])) for size in self._sizes(self.batch)]
        arguments = [starts, [ends[a] for a in axes], axes]
        self.axes[axis] = [self._sizes(1)[axis] - 1]
        rows = (*[slice(None)] * axis, slice(1, None))
        self._emit(lambda x, n: x[rows], "Slice", *(self._ints(*item) for item in arguments))

    def _softmax(self) -> None:
        axis = self._free_axis()
        if axis is not None:
            self._emit(
                lambda x, n: softmax(x.swapaxes(axis, -1)).swapaxes(axis, -1), "Softmax", axis=axis
            )

    def _average(self) -> None:
        """Over one axis, which is kept or not."""
        axis = self._free_axis()
        if axis is None:
            return
        keep = bool(self.random.integers(2)) or len(self.axes) == 1
        self.axes[axis : axis + 1] = [[1]] if keep else []
        axes = self._ints(axis)
        self._emit(lambda x, n: x.mean(axis, keepdims=keep), "ReduceMean", axes, keepdims=int(keep))

    def _attend(self) -> None:
        """Products of the tensor with itself, batch by batch."""
        if len(self.axes) < 3 or self._batch_axis() >= len(self.axes) - 2:
            return
        order = [*range(len(self.axes) - 2), len(self.axes) - 1, len(self.axes) - 2]
        self._emit(
            lambda x, n: np.tanh(x @ x.swapaxes(-1, -2)),
            "MatMul",
            self.draft.node("Transpose", self.tensor, perm=order),
        )
        self.tensor = self.draft.node("Tanh", self.tensor)
        self.axes[-1] = list(self.axes[-2])

    def _lengthen(self) -> None:
        """A new axis, repeated."""
        at = int(self.random.integers(len(self.axes) + 1))
        self.axes.insert(at, [])
        self._emit(lambda x, n: np.expand_dims(x, at), "Unsqueeze", self._ints(at))
        shape = [*self._sizes(self.batch)]
        shape[at] = 2
        self.axes[at] = [2]
        self._emit(lambda x, n: np.repeat(x, 2, at), "Expand", self._ints(*shape))

    def _pick(self) -> None:
        """One entry of an axis."""
        axis = self._free_axis()
        if axis is None:
            return
        del self.axes[axis]
        index = self.draft.weight(np.array(-1, np.int64))
        self._emit(lambda x, n: x.take(-1, axis), "Gather", index, axis=axis)

    def _finish(self) -> None:
        """The batch in front, all else in one axis behind it."""
        self._reshape([[factor] for axis in self.axes for factor in axis])
        at = self._batch_axis()
        order = [at, *(axis for axis in range(len(self.axes)) if axis != at)]
        self._emit(lambda x, n: x.transpose(order), "Transpose", perm=order)
        self.axes = [self.axes[axis] for axis in order]
        self._reshape([self.axes[0], [factor for axis in self.axes[1:] for factor in axis]])


def _sizes(axes: list[list[Factor]], batch: int) -> list[int]:
    return [prod(batch if factor is None else factor for factor in axis) for axis in axes]


def _repeated(one: Array, axes: list[list[Factor]], batch: int) -> Array:
    """One image's numbers for each of a batch of images."""
    split = [1 if factor is None else factor for axis in axes for factor in axis]
    flat: list[Factor] = [factor for axis in axes for factor in axis]
    times = [batch if factor is None else 1 for factor in flat]
    return np.tile(one.reshape(split), times).reshape(_sizes(axes, batch))
