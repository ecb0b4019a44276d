"""Follow the dimensions of a tensor through nodes that only move its numbers about."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.walk import is_constant

Dim = int | str


@dataclass(frozen=True)
class Factor:
    """A factor of a dimension: which `axis` of the source it is from, and its stride there.

    `size` is a name where the dimension is free.
    """

    axis: int
    size: Dim
    stride: int = 1

    def split(self, outer: int) -> tuple["Factor", "Factor"]:
        """Two factors, the first of size `outer`, which divides this one's."""
        assert isinstance(self.size, int)
        inner = self.size // outer
        return (
            Factor(self.axis, outer, self.stride * inner),
            Factor(self.axis, inner, self.stride),
        )


Axes = tuple[tuple[Factor, ...], ...]
"""Of which factors of a source each dimension of a tensor is made, outermost first."""


@dataclass(frozen=True)
class ColumnPart:
    """One of equal parts that a node picks out: which one, along which factor of the source."""

    factor: Factor
    index: int
    tensor: gs.Variable
    axes: Axes


def axes_of(tensor: gs.Variable) -> Axes | None:
    """The axes of a source; None where its rank is not known."""
    if tensor.shape is None:
        return None
    return tuple((Factor(axis, size),) for axis, size in enumerate(tensor.shape))


def moved(node: gs.Node, axes: Axes) -> Axes | None:
    """The axes of what a Reshape, Transpose, Squeeze or Unsqueeze makes; None: cannot be told."""
    if node.op == "Transpose":
        perm = node.attrs.get("perm", range(len(axes))[::-1])
        return tuple(axes[axis] for axis in perm)
    if node.op == "Reshape":
        shape = node.outputs[0].shape
        return None if shape is None else _regrouped(axes, shape)
    given = _constant(node, 1)
    if node.op == "Squeeze":
        gone = [axis for axis, group in enumerate(axes) if _size(group) == 1]
        if given is not None:
            gone = [axis % len(axes) for axis in given]
        return tuple(group for axis, group in enumerate(axes) if axis not in gone)
    if node.op != "Unsqueeze" or given is None:
        return None
    rank = len(axes) + len(given)
    new, rest = {axis % rank for axis in given}, iter(axes)
    return tuple(() if axis in new else next(rest) for axis in range(rank))


def parts(node: gs.Node, axes: Axes, count: int) -> list[ColumnPart]:
    """Those of `count` equal parts of one axis that a Gather, Slice or Split picks; or none."""
    axis, picks = _picks(node, axes, count)
    if axis is None:
        return []
    group = axes[axis % len(axes)]
    first = group[0] if group else None
    if first is None or not isinstance(first.size, int) or first.size % count:
        return []
    factor, inner = first.split(count)
    rest = (() if inner.size == 1 else (inner,)) + group[1:]
    kept = list(axes)
    kept[axis % len(axes)] = rest
    if node.op == "Gather" and node.inputs[1].values.ndim == 0:
        del kept[axis % len(axes)]
    return [ColumnPart(factor, index, tensor, tuple(kept)) for index, tensor in picks]


def indices(factors: Iterable[Factor], start: int = 0) -> NDArray[np.int64]:
    """Where along the source's axis the numbers of some factors stand, outermost first."""
    found = np.array([start], np.int64)
    for factor in factors:
        assert isinstance(factor.size, int)
        found = (found[:, None] + factor.stride * np.arange(factor.size)).ravel()
    return found


def factors_of(axes: Axes, axis: int) -> list[Factor]:
    """The factors that are from one axis of the source, outermost first."""
    found = [factor for group in axes for factor in group if factor.axis == axis]
    return sorted(found, key=lambda factor: -factor.stride)


Way = list[tuple[str, str, list[int]]]
"""Names of steps, "Reshape" or "Transpose", and their shapes and permutations."""


def way_to(axes: Axes, rank: int) -> Way | None:
    """How a source that has these factors alone, in their order, comes to have these axes.

    None where a shape could not be written: two of its dimensions are free.
    """
    before = [factors_of(axes, axis) for axis in range(rank)]
    order = [factor for group in before for factor in group]
    perm = [order.index(factor) for group in axes for factor in group]
    whole = len(list(takewhile(lambda group: len(group) == 1, before)))
    way: Way = []
    if whole < rank:
        way.append(("reshape", "Reshape", [0] * whole + [_dim(item) for item in order[whole:]]))
    if perm != sorted(perm):
        way.append(("transpose", "Transpose", perm))
    if any(len(group) != 1 for group in axes):
        way.append(("merge", "Reshape", [_dim(*group) for group in axes]))
    return None if any(target.count(-1) > 1 for _, _, target in way) else way


def _dim(*group: Factor) -> int:
    """A dimension as Reshape takes it, -1 where it is free."""
    return _size(group) or -1


def _size(group: Sequence[Factor]) -> int | None:
    """How many numbers a dimension has; None where it is free."""
    size = 1
    for factor in group:
        if not isinstance(factor.size, int):
            return None
        size *= factor.size
    return size


def _regrouped(axes: Axes, shape: Sequence[Dim]) -> Axes | None:
    """The factors of a tensor that is reshaped, in order, split where they have to be."""
    waiting = [factor for group in axes for factor in group]
    found = []
    for dim in shape:
        group = _take(waiting, dim)
        if group is None:
            return None
        found.append(group)
    return None if any(factor.size != 1 for factor in waiting) else tuple(found)


def _take(waiting: list[Factor], dim: Dim) -> tuple[Factor, ...] | None:
    """Take the factors of a dimension off the front; None where they do not make it up."""
    group: list[Factor] = []
    while dim != 1 or (not group and waiting and waiting[0].size == 1):
        if not waiting:
            return None
        first = waiting.pop(0)
        if first.size == dim:
            return (*group, first)
        if not isinstance(first.size, int) or not isinstance(dim, int):
            return None
        if dim % first.size == 0:
            group.append(first)
            dim //= first.size
        elif first.size % dim == 0:
            outer, inner = first.split(dim)
            waiting.insert(0, inner)
            return (*group, outer)
        else:
            return None
    return tuple(group)


def _picks(
    node: gs.Node, axes: Axes, count: int
) -> tuple[int | None, list[tuple[int, gs.Variable]]]:
    """The axis that a node divides, and the parts that it picks, each with its tensor."""
    if node.op == "Split":
        axis = int(node.attrs.get("axis", 0))
        sizes = _constant(node, 1)
        even = len(node.outputs) == count and (sizes is None or len(set(sizes)) == 1)
        return (axis, list(enumerate(node.outputs))) if even else (None, [])
    if node.op == "Gather":
        axis = int(node.attrs.get("axis", 0))
        chosen = _constant(node, 1)
        size = _size(axes[axis % len(axes)])
        if chosen is None or len(chosen) != 1 or size != count:
            return None, []
        return axis, [(chosen[0] % count, node.outputs[0])]
    if node.op != "Slice" or len(node.inputs) < 4:
        return None, []
    start, end, along, step = (_constant(node, slot) for slot in (1, 2, 3, 4))
    if start is None or end is None or along is None or len(along) != 1 or step not in (None, [1]):
        return None, []
    size = _size(axes[along[0] % len(axes)])
    if size is None or size % count:
        return None, []
    begin, stop = (min(value % size if value < 0 else value, size) for value in (start[0], end[0]))
    length = size // count
    if stop - begin != length or begin % length:
        return None, []
    return along[0], [(begin // length, node.outputs[0])]


def _constant(node: gs.Node, slot: int) -> list[int] | None:
    """The integers of a node's constant input; None where there is none."""
    if len(node.inputs) <= slot or not is_constant(node.inputs[slot]):
        return None
    return [int(value) for value in node.inputs[slot].values.ravel()]
