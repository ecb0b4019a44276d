"""Rotate the residual stream where it is made: in the weights of the patch embedding.

RotateStream multiplies what the first block reads by a matrix. Where that is patches of a
convolution or a linear, with constants joined and added, the matrix goes into these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.rotated_stream import first_product
from regcache.passes.walk import is_constant, is_output, name_of

# A constant of a node, by its place among the inputs, and the axis of it that holds the channels.
_Turned = tuple[gs.Node, int, int]


@dataclass(frozen=True)
class FoldStreamRotation:
    """Fold the first product of a rotated stream into the constants behind it.

    Matched, from the product back: Add of a constant or of another such tensor, Concat and Pad of
    zeros along the tokens, Expand, Reshape and Transpose that leave the channels whole, down to a
    Conv of one group or a MatMul with a constant weight, and constants.
    Refused, and then nothing changes: a norm or anything else between, and a tensor on the way that
    something else reads. The blocks and `stream_rotation`'s other end stay as they are.
    """

    name: ClassVar[str] = "fold_stream_rotation"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-3)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a stream that is not rotated is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Turn the constants, and let the first block read the stream as it is made."""
        product = first_product(graph)
        if product is None:
            return Log()
        source, (rotated,) = product.inputs[0], product.outputs
        try:
            turned = list(_constants(graph, source, len(source.shape or ()) - 1))
        except _CannotFoldError as error:
            return Log((), (Skip(name_of(product), str(error)),))
        matrix = product.inputs[1].values.astype(np.float64)
        for node, slot, axis in turned:
            old = node.inputs[slot]
            last = np.moveaxis(old.values.astype(np.float64), axis, -1)
            values = np.moveaxis(last @ matrix, -1, axis)
            name = f"{old.name}/rotated/{name_of(node)}"
            node.inputs[slot] = gs.Constant(name, np.ascontiguousarray(values, np.float32))
        product.outputs.clear()
        for reader in list(rotated.outputs):
            reader.inputs = [source if item is rotated else item for item in reader.inputs]
        return Log((Edit(name_of(product), f"folded into {len(turned)} constants"),))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """One product less, and nothing else."""
        assert first_product(after) is None
        assert len(before.nodes) == len(after.nodes) + 1


class _CannotFoldError(Exception):
    """Why the matrix cannot go into the constants."""


def _constants(graph: gs.Graph, tensor: gs.Tensor, axis: int) -> Iterator[_Turned]:
    """The constants whose channels make those of a tensor, which are its `axis`."""
    if is_output(graph, tensor) or len(tensor.outputs) != 1 or not tensor.inputs:
        raise _CannotFoldError(f"something else reads or makes {tensor.name}")
    node = tensor.inputs[0]
    if node.op in ("Add", "Concat", "Pad", "Expand"):
        yield from _joined(graph, node, axis)
    elif node.op in ("Reshape", "Transpose"):
        yield from _constants(graph, node.inputs[0], _axis_before(node, axis))
    elif node.op == "Conv" and axis == 1 and node.attrs.get("group", 1) == 1:
        yield from _weights(node, ((1, 0), (2, 0)))
    elif node.op == "MatMul" and axis == len(tensor.shape or ()) - 1:
        yield from _weights(node, ((1, 1),))
    else:
        raise _CannotFoldError(f"{node.op} {name_of(node)} stands behind the stream")


def _weights(node: gs.Node, places: tuple[tuple[int, int], ...]) -> Iterator[_Turned]:
    for slot, axis in places:
        if slot < len(node.inputs) and not node.inputs[slot].is_empty():
            if not is_constant(node.inputs[slot]):
                raise _CannotFoldError(f"the weight of {name_of(node)} is computed")
            yield node, slot, axis


def _joined(graph: gs.Graph, node: gs.Node, axis: int) -> Iterator[_Turned]:
    """What an Add, Concat, Pad or Expand is made of."""
    rank = len(node.outputs[0].shape or ())
    width = node.outputs[0].shape[axis] if rank else None
    if node.op == "Concat" and node.attrs["axis"] % max(rank, 1) == axis:
        raise _CannotFoldError(f"{name_of(node)} joins channels")
    if node.op == "Pad":
        _check_pad(node, axis, rank)
    count = len(node.inputs) if node.op in ("Add", "Concat") else 1
    for slot, item in enumerate(node.inputs[:count]):
        own = axis - rank + len(item.shape or ())  # operands are aligned at their last axis
        if own < 0 or item.shape is None or item.shape[own] != width:
            raise _CannotFoldError(f"{item.name} has no channels of its own")
        if is_constant(item):
            yield node, slot, own
        else:
            yield from _constants(graph, item, own)


def _check_pad(node: gs.Node, axis: int, rank: int) -> None:
    """Raise _CannotFoldError unless a Pad puts zeros along other axes than `axis`."""
    pads, value = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
    plain = node.attrs.get("mode", "constant") == "constant" and is_constant(pads)
    zero = value is None or value.is_empty() or (is_constant(value) and not value.values.any())
    short = len(node.inputs) < 4 and plain and pads.values.size == 2 * rank
    if not (zero and short) or pads.values[axis] or pads.values[axis + rank]:
        raise _CannotFoldError(f"{name_of(node)} pads with more than zeros")


def _axis_before(node: gs.Node, axis: int) -> int:
    """The axis of what a Reshape or Transpose reads that becomes its output's `axis`."""
    if node.op == "Transpose":
        return int(node.attrs["perm"][axis])
    before, after = list(node.inputs[0].shape or ()), list(node.outputs[0].shape or ())
    if isinstance(after[axis], int):
        if axis < len(before) and before[: axis + 1] == after[: axis + 1]:
            return axis
        if axis == len(after) - 1 and before[-1:] == after[-1:]:
            return len(before) - 1
    raise _CannotFoldError(f"{name_of(node)} takes channels apart")
