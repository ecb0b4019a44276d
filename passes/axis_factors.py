"""Follow the axes of a tensor through nodes that only move its numbers about."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx_graphsurgeon as gs

from regcache.passes.walk import is_constant

# Stands for a size that is not known; no other size shares a divisor with it.
UNKNOWN = 1_000_003


class LostTrackError(Exception):
    """Why axes cannot be followed through a node."""


@dataclass(frozen=True)
class Factor:
    """A part of an axis: it counts `size` places of axis `source` of the start, by `stride`."""

    source: int
    size: int
    stride: int = 1


Axis = tuple[Factor, ...]


@dataclass(frozen=True)
class Layout:
    """What the axes of a tensor are, outermost factor first.

    `start`: the place in the last of the axes where one began, of which alone a part may be taken.
    """

    axes: tuple[Axis, ...]
    channels: int
    start: int = 0

    @classmethod
    def of(cls, shape: Sequence[int | str]) -> "Layout":
        """The layout of a tensor itself."""
        sizes = [dim if isinstance(dim, int) else UNKNOWN for dim in shape]
        axes = tuple((Factor(axis, size),) for axis, size in enumerate(sizes))
        return cls(tuple(map(_joined, axes)), len(shape) - 1)

    @property
    def factors(self) -> list[Factor]:
        """All factors in order."""
        return [factor for axis in self.axes for factor in axis]

    @property
    def channel_factors(self) -> list[Factor]:
        """The factors of the channels, in order."""
        return [factor for factor in self.factors if factor.source == self.channels]

    @property
    def count(self) -> int:
        """How many of the channels the tensor has."""
        return prod(factor.size for factor in self.channel_factors)

    def reshaped(self, dims: Sequence[int | str]) -> "Layout":
        """The same numbers in another shape, of which one dimension may be unknown."""
        total = prod(factor.size for factor in self.factors)
        known = prod(dim for dim in dims if isinstance(dim, int))
        sizes = [dim if isinstance(dim, int) else total // known for dim in dims]
        if prod(sizes) != total:
            raise LostTrackError(f"the shape {list(dims)} is not static")
        left, axes = self.factors, []
        for size in sizes:
            axis, missing = list[Factor](), size
            while missing > 1:
                factor = left.pop(0)
                if missing % factor.size and factor.size % missing:
                    raise LostTrackError(f"the shape {list(dims)} tears its axes apart")
                taken = min(missing, factor.size)
                rest = factor.size // taken
                axis.append(Factor(factor.source, taken, factor.stride * rest))
                if rest > 1:
                    left.insert(0, replace(factor, size=rest))
                missing //= taken
            axes.append(_joined(tuple(axis)))
        return replace(self, axes=tuple(axes))

    def transposed(self, perm: Sequence[int]) -> "Layout":
        """The axes in another order."""
        return replace(self, axes=tuple(self.axes[axis] for axis in perm))

    def taken(self, axis: int, start: int, count: int, step: int = 1) -> "Layout":
        """Every `step`-th place of one axis from `start` on."""
        axis %= len(self.axes)
        size = prod(factor.size for factor in self.axes[axis])
        if (start, count, step) == (0, size, 1):
            return self
        kept, offset = _part(self.axes[axis], start, count, step, self.channels)
        axes = (*self.axes[:axis], _joined(kept), *self.axes[axis + 1 :])
        return replace(self, axes=axes, start=self.start + offset)

    def without(self, axis: int) -> "Layout":
        """The axes but one, which has size 1."""
        axis %= len(self.axes)
        if self.axes[axis]:
            raise LostTrackError("an axis of more than one place is dropped")
        return replace(self, axes=(*self.axes[:axis], *self.axes[axis + 1 :]))

    def with_new(self, axes: Sequence[int]) -> "Layout":
        """New axes of size 1 at these places of the result."""
        rank, rest = len(self.axes) + len(axes), list(self.axes)
        places = {axis % rank for axis in axes}
        return replace(
            self, axes=tuple(() if place in places else rest.pop(0) for place in range(rank))
        )


def _joined(axis: Axis) -> Axis:
    """The factors of an axis without those of size 1, neighbours that count on as one."""
    found: list[Factor] = []
    for factor in axis:
        if factor.size == 1:
            continue
        last = found[-1] if found else None
        if last and last.source == factor.source and last.stride == factor.stride * factor.size:
            found[-1] = Factor(factor.source, last.size * factor.size, factor.stride)
        else:
            found.append(factor)
    return tuple(found)


def _part(axis: Axis, start: int, count: int, step: int, channels: int) -> tuple[Axis, int]:
    """A part of an axis, and how far it begins into the channels."""
    if not axis or axis[0].source != channels:
        raise LostTrackError("a part of the images or tokens is taken")
    first, rest = axis[0], axis[1:]
    inner = prod(factor.size for factor in rest)
    if not rest:
        return (replace(first, size=count, stride=first.stride * step),), first.stride * start
    if step == 1 and start % inner == 0 and count % inner == 0:
        return (replace(first, size=count // inner), *rest), first.stride * (start // inner)
    if start // inner == (start + (count - 1) * step) // inner:
        kept, offset = _part(rest, start % inner, count, step, channels)
        return kept, offset + first.stride * (start // inner)
    raise LostTrackError("a part of the heads is taken that is no range of them")


def moved(node: gs.Node, layout: Layout) -> list[Layout] | None:
    """The layouts of what a node makes of a tensor; None for one that does more than move.

    Raises LostTrackError where it moves numbers in a way that cannot be followed.
    """
    if node.op in {"Reshape", "Flatten"}:
        shape = node.outputs[0].shape
        if shape is None:
            raise LostTrackError("its shape is not known")
        return [layout.reshaped(shape)]
    if node.op == "Transpose":
        return [layout.transposed(node.attrs.get("perm", range(len(layout.axes))[::-1]))]
    if node.op == "Identity":
        return [layout]
    if node.op in {"Squeeze", "Unsqueeze"}:
        return [_squeezed(node, layout)]
    if node.op == "Split":
        return _split(node, layout)
    if node.op == "Slice":
        return [_sliced(node, layout)]
    if node.op == "Gather":
        return [_gathered(node, layout)]
    return None


def _squeezed(node: gs.Node, layout: Layout) -> Layout:
    axes = _ints(node, 1) if len(node.inputs) > 1 else None
    if node.op == "Unsqueeze":
        return layout.with_new(axes or [])
    rank = len(layout.axes)
    chosen = [axis for axis in range(rank) if not layout.axes[axis]] if axes is None else axes
    for axis in sorted((axis % rank for axis in chosen), reverse=True):
        layout = layout.without(axis)
    return layout


def _split(node: gs.Node, layout: Layout) -> list[Layout]:
    axis = int(node.attrs.get("axis", 0)) % len(layout.axes)
    size, parts = prod(factor.size for factor in layout.axes[axis]), len(node.outputs)
    given = len(node.inputs) > 1 and not node.inputs[1].is_empty()
    longest = -(-size // parts)
    sizes = _ints(node, 1) if given else [longest] * (parts - 1) + [size - longest * (parts - 1)]
    starts = [sum(sizes[:part]) for part in range(parts)]
    return [layout.taken(axis, *bounds) for bounds in zip(starts, sizes, strict=True)]


def _sliced(node: gs.Node, layout: Layout) -> Layout:
    starts, ends = _ints(node, 1), _ints(node, 2)
    axes = _ints(node, 3) if len(node.inputs) > 3 else list(range(len(starts)))
    steps = _ints(node, 4) if len(node.inputs) > 4 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = prod(factor.size for factor in layout.axes[axis])
        places = range(size)[start:end:step]
        if step < 1 or not places:
            raise LostTrackError("it takes nothing, or backwards")
        layout = layout.taken(axis, places.start, len(places), step)
    return layout


def _gathered(node: gs.Node, layout: Layout) -> Layout:
    axis = int(node.attrs.get("axis", 0)) % len(layout.axes)
    size = prod(factor.size for factor in layout.axes[axis])
    places = [place % size for place in _ints(node, 1)]
    if node.inputs[1].values.ndim > 1:
        raise LostTrackError("it gathers a table")
    step = places[1] - places[0] if len(places) > 1 else 1
    if step < 1 or places != [places[0] + step * place for place in range(len(places))]:
        raise LostTrackError("it gathers in an order of its own")
    taken = layout.taken(axis, places[0], len(places), step)
    return taken if node.inputs[1].values.ndim else taken.without(axis)


def _ints(node: gs.Node, slot: int) -> list[int]:
    tensor = node.inputs[slot]
    if not is_constant(tensor):
        raise LostTrackError("its arguments are computed")
    return [int(item) for item in tensor.values.ravel()]
