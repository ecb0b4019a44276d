"""Floating-point operations of a graph, for one image."""

from dataclasses import dataclass
from math import prod

import onnx_graphsurgeon as gs

from regcache.passes.errors import InputError


@dataclass(frozen=True)
class Flops:
    """Operations for a batch of one; a multiply-accumulate counts as two.

    `matmul`: MatMul, Gemm and Attention; `conv`: Conv; `elementwise`: one per output element of
    every other node that computes (norms and softmax count 5, activations 8, shape ops nothing).
    """

    matmul: int
    conv: int
    elementwise: int

    @property
    def total(self) -> int:
        """The operations of all three kinds."""
        return self.matmul + self.conv + self.elementwise


# Operations per output element of what is neither a matmul nor a move, rounded as profilers do.
_PER_ELEMENT = {
    "LayerNormalization": 5,
    "RMSNormalization": 4,
    "Softmax": 5,
    "Gelu": 8,
    "Erf": 8,
    "Tanh": 8,
    "Sigmoid": 4,
}
_ARITHMETIC = frozenset({"Add", "Sub", "Mul", "Div", "Neg", "Abs", "Pow", "Relu", "Sqrt", "Exp"})


def count_flops(graph: gs.Graph) -> Flops:
    """Count a graph with inferred shapes, its batch taken as one.

    Raises InputError, naming the node, where a shape other than the batch is not known.
    """
    matmul = conv = elementwise = 0
    for node in graph.nodes:
        if node.op in {"MatMul", "Gemm"}:
            matmul += product_flops(node)
        elif node.op == "Attention":
            matmul += _attention(node)
        elif node.op == "Conv":
            conv += product_flops(node)
        elif node.op in _PER_ELEMENT or node.op in _ARITHMETIC:
            elementwise += _PER_ELEMENT.get(node.op, 1) * prod(_dims(node, node.outputs[0]))
    return Flops(matmul, conv, elementwise)


def product_flops(node: gs.Node) -> int:
    """The operations of a MatMul, Gemm or Conv; see count_flops."""
    if node.op == "Conv":
        inner = prod(_dims(node, node.inputs[1])[1:])
    else:
        source = _dims(node, node.inputs[0])
        inner = source[0] if node.attrs.get("transA", 0) else source[-1]
    return 2 * prod(_dims(node, node.outputs[0])) * inner


def _attention(node: gs.Node) -> int:
    query, key, value = (_dims(node, item) for item in node.inputs[:3])
    heads = 1 if len(query) == 3 else query[1]
    return 2 * heads * query[-2] * key[-2] * (query[-1] + value[-1])


def _dims(node: gs.Node, tensor: gs.Tensor) -> list[int]:
    """The shape with a symbolic first dimension as one."""
    shape = tensor.shape
    if shape is None:
        raise InputError(f"flops: the shape of {tensor.name!r} at {node.name!r} is not known")
    dims = [1 if axis == 0 and not isinstance(dim, int) else dim for axis, dim in enumerate(shape)]
    if not all(isinstance(dim, int) for dim in dims):
        raise InputError(f"flops: the shape of {tensor.name!r} is {shape}, not static")
    return [int(dim) for dim in dims]
