"""Write Einsum as Transpose, Reshape and MatMul, the form that everything else reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.einsum_equation import EquationError, Labels, Operand, parse_equation, sizes_of
from regcache.passes.errors import InputError
from regcache.passes.walk import consumers, count_ops, is_constant, is_output, name_of
from regcache.passes.write_nodes import NodeWriter

Sizes = dict[str, int]  # -1 where a size is not known


@dataclass(frozen=True)
class LowerEinsum:
    """Replace Einsum of one or two operands (MatMul, Mul, ReduceSum with axes as an input).

    Matched: every product of two operands, contracted or not, every transpose and sum of one, with
    an ellipsis or without, the output's labels written or implied. A constant operand becomes the
    [K, N] weight of a linear, and a constant for each of its columns that is added to the Einsum
    becomes the linear's bias.
    Refused: more than two operands, a label twice in one operand, an ellipsis of unknown rank, a
    dimension of 1 that is repeated under a letter, and axes to be merged whose sizes are not known.
    """

    name: ClassVar[str] = "lower_einsum"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 13, where the axes of ReduceSum became an input."""
        if graph.opset < 13:
            raise InputError(f"lower_einsum needs opset 13, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Write the nodes that take an Einsum's place; it falls to the clean-up."""
        edits, skips = [], []
        for node in [node for node in graph.nodes if node.op == "Einsum"]:
            site = name_of(node)
            try:
                _lower(NodeWriter(graph, f"{node.outputs[0].name}/einsum"), node)
            except EquationError as error:
                skips.append(Skip(site, str(error)))
            else:
                edits.append(Edit(site, str(node.attrs["equation"])))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """There are fewer Einsum nodes."""
        assert count_ops(after, "Einsum") < count_ops(before, "Einsum")


def _lower(write: NodeWriter, node: gs.Node) -> None:
    operands, output = parse_equation(node)
    sizes = sizes_of(operands)
    shared = set.intersection(*(set(one.labels) for one in operands)) if operands[1:] else set()
    if shared - set(output):
        _Contraction(operands, output, sizes).write(write, node)
        return
    factors = []
    for slot, operand in enumerate(operands):
        turned = _ordered(write, f"{slot}", operand, operand.only(output), output)
        missing = [axis for axis, label in enumerate(output) if label not in operand.labels]
        factors.append(_unsqueezed(write, f"{slot}", turned, missing))
    write.node("Mul" if operands[1:] else "Identity", "result", factors, node.outputs[0])


class _Contraction:
    """Two operands summed over `inner`: [batch, left, inner] @ [batch, inner, right].

    What cannot be written is found out before the first node is.
    """

    def __init__(self, operands: list[Operand], output: Labels, sizes: Sizes) -> None:
        if _is_turned(operands, output):
            operands = operands[::-1]
        first, second = operands
        self.operands, self.output, self.sizes = operands, output, sizes
        self.batch = tuple(x for x in output if x in first.labels and x in second.labels)
        left = tuple(x for x in output if x in first.labels and x not in second.labels)
        self.right = tuple(x for x in output if x in second.labels and x not in first.labels)
        inner = tuple(x for x in first.labels if x in second.labels and x not in output)
        self.orders = ((*self.batch, *left, *inner), (*self.batch, *inner, *self.right))
        # Without a batch, a MatMul takes any number of axes on its left.
        rows: list[Labels] = [(x,) for x in left] if left and not self.batch else [left]
        batch: list[Labels] = [(x,) for x in self.batch]
        self.merged = (
            _merge([*batch, *rows, inner], sizes),
            _merge([*batch, inner, self.right], sizes),
        )
        self.apart = _take_apart([*batch, *rows, self.right], sizes)
        self.made = (*self.batch, *left, *self.right)

    def write(self, write: NodeWriter, node: gs.Node) -> None:
        """Write the nodes; the last one makes what the Einsum made, or its bias."""
        factors = []
        for slot, (operand, order) in enumerate(zip(self.operands, self.orders, strict=True)):
            kept = operand.only(order)
            tensor = _ordered(write, f"{slot}", operand, kept, order)
            factors.append(_reshaped(write, f"{slot}/merged", tensor, self.merged[slot]))
        result, bias = node.outputs[0], self._bias(write.graph, node.outputs[0])
        tensor, perm = None, [self.made.index(label) for label in self.output]
        steps: list[Callable[[gs.Tensor, gs.Variable | None], gs.Variable]] = []
        if bias is not None:
            values = write.constant("bias/values", bias)
            steps.append(lambda data, out: write.node("Add", "bias", [data, values], out))
            (add,) = consumers(result)
            result = add.outputs[0]
        if self.apart is not None:
            dims = self.apart
            steps.append(lambda data, out: write.reshape("apart", data, *dims, output=out))
        if perm != sorted(perm):
            steps.append(lambda data, out: write.transpose("order", data, *perm, output=out))
        tensor = write.node("MatMul", "matmul", factors, None if steps else result)
        for step in steps:
            tensor = step(tensor, result if step is steps[-1] else None)

    def _bias(self, graph: gs.Graph, result: gs.Tensor) -> NDArray[np.generic] | None:
        """What is added to each column of the product and to nothing else; None: nothing."""
        following = consumers(result)
        if len(following) != 1 or following[0].op != "Add" or is_output(graph, result):
            return None
        found = [item.values for item in following[0].inputs if is_constant(item)]
        dims = [self.sizes[label] for label in self.right]
        if not found or found[0].ndim > len(self.output) or not dims or -1 in dims:
            return None
        labels = self.output[len(self.output) - found[0].ndim :]
        wide = [x for x, size in zip(labels, found[0].shape, strict=True) if size > 1]
        if not wide or not set(wide) <= set(self.right):
            return None
        values = found[0].reshape([size for size in found[0].shape if size > 1])
        values = values.transpose([wide.index(x) for x in self.right if x in wide])
        spread = [self.sizes[x] if x in wide else 1 for x in self.right]
        return np.ascontiguousarray(np.broadcast_to(values.reshape(spread), dims)).reshape(-1)


def _is_turned(operands: Sequence[Operand], output: Labels) -> bool:
    """Whether the second operand belongs on the left: a weight comes last, queries before keys."""
    constant = [is_constant(operand.tensor) for operand in operands]
    if constant[0] != constant[1]:
        return constant[0]
    first, second = (
        [place for place, x in enumerate(output) if x in one.labels and x not in other.labels]
        for one, other in (operands, operands[::-1])
    )
    return bool(first and second) and max(second) < min(first)


def _merge(groups: Sequence[Labels], sizes: Sizes) -> list[int] | None:
    """The Reshape target that makes one axis of each group of labels; None: they are that."""
    if all(len(group) == 1 for group in groups):
        return None
    target, place = [], 0
    for axis, group in enumerate(groups):
        dims = [sizes[label] for label in group]
        whole = -1 if -1 in dims else prod(dims)
        target.append(0 if len(group) == 1 and axis == place else whole)
        place += len(group)
    return _one_unknown(target, groups)


def _take_apart(groups: Sequence[Labels], sizes: Sizes) -> list[int] | None:
    """The Reshape target that makes an axis of each label again; None: they are that."""
    if all(len(group) == 1 for group in groups):
        return None
    target: list[int] = []
    for axis, group in enumerate(groups):
        if len(group) == 1 and len(target) == axis:
            target.append(0)
        else:
            target += [sizes[label] for label in group]
    return _one_unknown(target, groups)


def _one_unknown(target: list[int], groups: Sequence[Labels]) -> list[int]:
    if target.count(-1) > 1:
        joined = ", ".join(repr("".join(group)) for group in groups if len(group) != 1)
        raise EquationError(f"the sizes of the axes {joined} are not known")
    return target


def _ordered(
    write: NodeWriter, name: str, operand: Operand, kept: Labels, order: Labels
) -> gs.Tensor:
    """An operand summed over the labels that are not kept, its axes in the given order."""
    tensor = operand.tensor
    axes = [axis for axis, label in enumerate(operand.labels) if label not in kept]
    perm = [kept.index(label) for label in order if label in kept]
    turned = perm != sorted(perm)
    if is_constant(tensor):
        if not axes and not turned:
            return tensor
        values = tensor.values.sum(axis=tuple(axes), dtype=tensor.values.dtype)
        return write.constant(name, np.array(values.transpose(perm), order="C"))
    if axes:
        sums = [tensor, write.ints(f"{name}/axes", *axes)]
        tensor = write.node("ReduceSum", f"{name}/sum", sums, keepdims=0)
    return write.transpose(f"{name}/order", tensor, *perm) if turned else tensor


def _reshaped(
    write: NodeWriter, name: str, tensor: gs.Tensor, target: list[int] | None
) -> gs.Tensor:
    if target is None:
        return tensor
    if is_constant(tensor):
        shape = [tensor.shape[axis] if dim == 0 else dim for axis, dim in enumerate(target)]
        return write.constant(name, tensor.values.reshape(shape))
    return write.reshape(name, tensor, *target)


def _unsqueezed(write: NodeWriter, name: str, tensor: gs.Tensor, axes: Sequence[int]) -> gs.Tensor:
    if not axes:
        return tensor
    if is_constant(tensor):
        return write.constant(f"{name}/wide", np.expand_dims(tensor.values, tuple(axes)))
    return write.node("Unsqueeze", f"{name}/wide", [tensor, write.ints(f"{name}/new", *axes)])
