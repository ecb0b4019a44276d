"""Where the batch is in a tensor, and where each operator carries it.

Everything but the batch is static here, the batch itself a number: its axis is followed from the
image input through the graph, so that a later pass can put a symbol in the number's place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_graphsurgeon as gs

from regcache.passes.walk import is_constant


@dataclass(frozen=True)
class Place:
    """The batch is part of dimension `axis`, which is `outer` x batch x `inner` long."""

    axis: int
    outer: int = 1
    inner: int = 1

    def moved(self, axis: int) -> "Place":
        """The same part of another axis."""
        return Place(axis, self.outer, self.inner)


class StuckError(Exception):
    """An operator that mixes images, or whose handling of the batch is not known."""

    def __init__(self, node: gs.Node | None, reason: str) -> None:
        where = "" if node is None else f"{node.op} {node.name or node.outputs[0].name!r} "
        super().__init__(f"{where}{reason}")


def static_shape(tensor: gs.Tensor, node: gs.Node) -> tuple[int, ...]:
    """The tensor's shape; raises StuckError where part of it is not known."""
    shape = tensor.shape
    if shape is None or not all(isinstance(dim, int) for dim in shape):
        raise StuckError(node, f"has a tensor of unknown shape, {tensor.name!r}")
    return tuple(shape)


def reshaped_places(
    place: Place, source: Sequence[int], result: Sequence[int], batch: int
) -> list[Place]:
    """Where a Reshape from one static shape to another may put the batch, likeliest first.

    There is one answer at most for a batch of 2 or more, none where the batch is torn apart. For a
    batch of 1 several compute the same. Then an axis of length 1 with as many numbers before it as
    the batch has comes first; next the batch merged into the first axis that changes, as heads are,
    but not into the last one, which holds the channels.
    """
    before = prod(source[: place.axis]) * place.outer
    fits = [
        Place(axis, before // prod(result[:axis]), rest)
        for axis in range(len(result))
        if (rest := _inner(before, result, axis, batch)) is not None
    ]
    same = 0
    while same < min(place.axis, len(result)) and source[same] == result[same]:
        same += 1
    exact = [fit for fit in fits if fit.outer == fit.inner == 1]
    merged = [fit for fit in fits if same <= fit.axis < len(result) - 1]
    earlier = [fit for fit in reversed(fits) if fit.axis < same]
    return list(dict.fromkeys([*exact, *merged, *earlier, *fits]))


def _inner(before: int, result: Sequence[int], axis: int, batch: int) -> int | None:
    """How often the batch repeats within `axis`, when `before` numbers stand before the batch."""
    outside = prod(result[:axis])
    if not outside or before % outside or not result[axis]:
        return None
    outer = before // outside
    if result[axis] % (outer * batch):
        return None
    return result[axis] // (outer * batch)


def int_values(tensor: gs.Tensor, node: gs.Node) -> list[int]:
    """The integers of a constant; raises StuckError where they are computed."""
    if not is_constant(tensor):
        raise StuckError(node, f"takes {tensor.name!r}, which is computed")
    return [int(value) for value in tensor.values.ravel()]


def axes_of(node: gs.Node, slot: int) -> list[int] | None:
    """Axes as an attribute or as input `slot`; None where all are meant."""
    if "axes" in node.attrs:
        return [int(axis) for axis in node.attrs["axes"]]
    if len(node.inputs) > slot and not node.inputs[slot].is_empty():
        return int_values(node.inputs[slot], node)
    return None


def slice_axes(node: gs.Node) -> list[int]:
    """The axes that a Slice cuts, counted from the front, in the order of its starts."""
    rank = len(static_shape(node.inputs[0], node))
    if len(node.inputs) > 3 and not node.inputs[3].is_empty():
        return [axis % rank for axis in int_values(node.inputs[3], node)]
    return list(range(len(int_values(node.inputs[1], node))))
