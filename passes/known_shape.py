"""Ranks and widths of tensors, told by the nodes behind them before shapes can be inferred."""

import onnx_graphsurgeon as gs

from regcache.passes.walk import data_inputs, is_constant, producer

# Ops whose output has the rank of what they read, and its last axis.
_ALIKE = frozenset(
    {"Add", "Cast", "Clip", "Div", "Dropout", "Erf", "Gelu", "Identity", "LayerNormalization"}
    | {"Mul", "Neg", "Pow", "RMSNormalization", "Relu", "Sigmoid", "Softmax", "Sqrt", "Sub", "Tanh"}
)


def rank_of(tensor: gs.Tensor) -> int | None:
    """How many axes a tensor has, by the nodes behind it; None where they do not tell.

    Of two computed tensors that are added or multiplied, the first decides.
    """
    least = 0
    while tensor.shape is None:
        node = producer(tensor)
        if node is None:
            return None
        if node.op == "Transpose" and "perm" in node.attrs:
            return len(node.attrs["perm"])
        if node.op == "Reshape":
            target = node.inputs[1].shape
            return target[0] if target and isinstance(target[0], int) else None
        if node.op not in _ALIKE | {"Concat", "MatMul", "Split", "Transpose"}:
            return None
        constants = [item for item in node.inputs if is_constant(item)]
        if node.op != "Split":
            least = max([least, *(len(item.shape) for item in constants)])
        data = data_inputs(node)
        if not data:
            return None
        tensor = data[0]
    return max(least, len(tensor.shape))


def width_of(tensor: gs.Tensor) -> int | None:
    """The size of a tensor's last axis, by the nodes behind it; None where they do not tell."""
    while not tensor.shape or not isinstance(tensor.shape[-1], int):
        node = producer(tensor)
        if node is None:
            return None
        if node.op == "Reshape" and is_constant(node.inputs[1]):
            last = int(node.inputs[1].values[-1])
            return last if last > 0 else None
        if node.op == "MatMul":
            tensor = node.inputs[1]
            continue
        if node.op not in _ALIKE:
            return None
        wide = [item for item in node.inputs if is_constant(item) and item.values.size > 1]
        wide = [item for item in wide if item.shape[-1] > 1]
        data = data_inputs(node)
        if not wide and not data:
            return None
        tensor = wide[0] if wide else data[0]
    return int(tensor.shape[-1])
