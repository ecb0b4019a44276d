"""ONNX Runtime's matrix products and convolutions with what it fused into them, apart again."""

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.known_shape import rank_of
from regcache.passes.unfused import CannotUnfuseError, given
from regcache.passes.walk import is_constant, producer
from regcache.passes.write_nodes import NodeWriter

# Activations that are fused into Gemm and Conv under their own names.
_ACTIVATIONS = frozenset(
    {"Elu", "HardSigmoid", "LeakyRelu", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign", "Tanh"}
    | {"ThresholdedRelu"}
)
# Names of FusedConv's activation_params, in their order.
_CONV_PARAMS = {"HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",)}


def unfuse_matmul(write: NodeWriter, node: gs.Node) -> None:
    """FusedMatMul: alpha A B, either operand transposed.

    Alpha goes back to the Mul on the left that it came from (half a Gelu, say), else into a
    constant, else onto the left.
    """
    left = _transposed(write, "a", node.inputs[0], node, "A")
    right = _transposed(write, "b", node.inputs[1], node, "B")
    alpha = float(node.attrs.get("alpha", 1.0))
    before = producer(left)
    if alpha != 1:
        if is_constant(right) and (before is None or before.op != "Mul"):
            scaled = np.asarray(right.values * alpha, right.values.dtype)
            right = write.constant("b/alpha", scaled)
        else:
            factor = write.floats("alpha/value", alpha, left)
            left = write.node("Mul", "alpha", [left, factor])
    write.node("MatMul", "matmul", [left, right], node.outputs[0])


def unfuse_gemm(write: NodeWriter, node: gs.Node) -> None:
    """FusedGemm: Gemm and an activation."""
    activation = str(node.attrs["activation"])
    if activation not in _ACTIVATIONS:
        raise CannotUnfuseError(f"its activation is {activation}")
    prefix = "activation_"
    own = {name: item for name, item in node.attrs.items() if not name.startswith("activation")}
    inner = {
        name.removeprefix(prefix): item
        for name, item in node.attrs.items()
        if name.startswith(prefix)
    }
    product = write.node("Gemm", "gemm", list(node.inputs), **own)
    write.node(activation, "activation", [product], node.outputs[0], **inner)


def unfuse_gemm_fast_gelu(write: NodeWriter, node: gs.Node) -> None:
    """GemmFastGelu: a linear and the approximation of Gelu by tanh."""
    total = write.node("MatMul", "matmul", node.inputs[:2])
    bias = given(node, 2)
    if bias is not None:
        total = write.node("Add", "bias", [total, bias])
    write.node("Gelu", "gelu", [total], node.outputs[0], approximate="tanh")


def unfuse_integer_matmul(write: NodeWriter, node: gs.Node) -> None:
    """MatMulIntegerToFloat: two dequantized operands' product, and a bias.

    Refused: a row of the left operand or a column of a right one that is not a constant [K, N] has
    a scale of its own.
    """
    parts = []
    for slot, name in enumerate("ab"):
        data, scale, zero = node.inputs[slot], node.inputs[slot + 2], given(node, slot + 4)
        alike = is_constant(scale) and scale.values.size == 1
        axis = {} if alike else {"axis": 1}
        if not alike and not (slot and is_constant(data) and data.values.ndim == 2):
            raise CannotUnfuseError(f"its operand {name} has more than one scale")
        numbers = [item for item in (scale, zero) if item is not None]
        if alike:  # DequantizeLinear tells one scale for all from one for each of one column
            numbers = [
                write.constant(f"{name}/{index}", item.values.reshape(()))
                if is_constant(item)
                else item
                for index, item in enumerate(numbers)
            ]
        parts.append(write.node("DequantizeLinear", f"{name}/dq", [data, *numbers], **axis))
    bias = given(node, 6)
    product = write.node("MatMul", "matmul", parts, None if bias is not None else node.outputs[0])
    if bias is not None:
        write.node("Add", "bias", [product, bias], node.outputs[0])


def unfuse_conv(write: NodeWriter, node: gs.Node) -> None:
    """FusedConv: Conv, a sum with what was before the layer, and an activation."""
    attributes = dict(node.attrs)
    activation = str(attributes.pop("activation", ""))
    params = [float(item) for item in attributes.pop("activation_params", [])]
    if activation and activation not in _ACTIVATIONS | {"Clip"}:
        raise CannotUnfuseError(f"its activation is {activation}")
    skip = given(node, 3)
    steps = ([] if skip is None else ["Add"]) + ([activation] if activation else [])
    result = node.outputs[0]
    inputs = [item for item in node.inputs[:3] if not item.is_empty()]
    tensor = write.node("Conv", "conv", inputs, None if steps else result, **attributes)
    for step in steps:
        output = result if step is steps[-1] else None
        if step == "Add":
            tensor = write.node("Add", "skip", [tensor, skip], output)
        elif step == "Clip":
            ends = [
                write.floats(f"clip/{i}", item, node.inputs[1]) for i, item in enumerate(params)
            ]
            tensor = write.node("Clip", "clip", [tensor, *ends], output)
        else:
            names = _CONV_PARAMS.get(step, ())
            tensor = write.node(
                step, "activation", [tensor], output, **dict(zip(names, params, strict=False))
            )


def unfuse_nhwc_conv(write: NodeWriter, node: gs.Node) -> None:
    """NhwcConv: Conv with the channels last, in the weight [M, height, width, C] too."""
    data = write.transpose("data", node.inputs[0], 0, 3, 1, 2)
    weight = node.inputs[1]
    if is_constant(weight):
        values = np.ascontiguousarray(weight.values.transpose(0, 3, 1, 2))
        turned: gs.Tensor = write.constant("weight", values)
    else:
        turned = write.transpose("weight", weight, 0, 3, 1, 2)
    bias = given(node, 2)
    inputs = [data, turned, *([] if bias is None else [bias])]
    product = write.node("Conv", "conv", inputs, **dict(node.attrs))
    write.transpose("back", product, 0, 2, 3, 1, output=node.outputs[0])


def _transposed(
    write: NodeWriter, name: str, tensor: gs.Tensor, node: gs.Node, letter: str
) -> gs.Tensor:
    """An operand of FusedMatMul as MatMul wants it.

    transBatch brings the first axis to the place before the last; then trans swaps the last two.
    """
    batch, last = (bool(node.attrs.get(f"{kind}{letter}", 0)) for kind in ("transBatch", "trans"))
    if not batch and not last:
        return tensor
    rank = rank_of(tensor)
    if rank is None:
        raise CannotUnfuseError(f"the rank of {tensor.name!r} is not known")
    if rank < 2:
        return tensor
    perm = list(range(rank))
    if batch:
        perm = [*perm[1:-1], 0, perm[-1]]
    if last:
        perm = [*perm[:-2], perm[-1], perm[-2]]
    if is_constant(tensor):
        return write.constant(name, np.ascontiguousarray(tensor.values.transpose(perm)))
    return write.transpose(name, tensor, *perm)
