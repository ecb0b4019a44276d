"""Write quantized linears with their biases as one node of ONNX Runtime: MatMulIntegerToFloat."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.microsoft import DOMAIN, import_microsoft
from regcache.passes.walk import is_bias, is_constant, is_output, producer

OP = "MatMulIntegerToFloat"


@dataclass(frozen=True)
class FuseBiases:
    """Make one com.microsoft MatMulIntegerToFloat of a quantized MatMul and the Add behind it.

    ONNX Runtime (1.32) makes that node of the MatMul alone and adds the bias in a pass of its own
    over the output. With a GELU behind, it makes BiasGelu of Add and Gelu, whose kernel takes 1.6 x
    the time of its Gelu.

    Matched: a MatMul of two DequantizeLinear, the activation's per tensor, the weight's a constant
    [K, N] with one scale or one for each column; its product read by an Add alone, with a constant
    bias [N] that may have leading dimensions of 1.
    Left alone: a product that is a graph output or that something else reads, a bias of another
    size, blocks of weights. Integers and scales are what they were, so sums differ by float
    rounding alone. `view_encoder` does not read the result: this pass is one of the last.
    """

    name: ClassVar[str] = "fuse_biases"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without quantized linears is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Put one node in the place of MatMul and Add; the dequantizations fall to the clean-up."""
        edits = []
        for matmul, add, bias in list(_pairs(graph)):
            left, right = (item.inputs[0] for item in matmul.inputs)
            vector = gs.Constant(f"{matmul.outputs[0].name}/bias/fused", bias.values.ravel())
            (output,) = add.outputs
            inputs = [left.inputs[0], right.inputs[0], left.inputs[1], right.inputs[1]]
            inputs += [left.inputs[2], right.inputs[2], vector]
            add.outputs, matmul.outputs = [], []
            fused = gs.Node(OP, str(matmul.name), {}, inputs, [output], domain=DOMAIN)
            graph.nodes.append(fused)
            edits.append(Edit(str(matmul.name or output.name), f"{OP} with its bias"))
        if edits:
            import_microsoft(graph)
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Nothing left to fuse; for each new node a MatMul and an Add less, and no other node."""
        assert not list(_pairs(after))
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        assert (new - old).keys() == {OP}
        gone, fused = old - new, new[OP] - old[OP]
        assert gone.keys() <= {"MatMul", "Add", "DequantizeLinear"}
        assert gone["MatMul"] == gone["Add"] == fused


def _pairs(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Node, gs.Constant]]:
    """The quantized MatMuls that can take the bias behind them: MatMul, Add and the bias."""
    for node in graph.nodes:
        if node.op != "MatMul" or not _takes_bias(node):
            continue
        (product,) = node.outputs
        if len(product.outputs) != 1 or is_output(graph, product):
            continue
        (add,) = product.outputs
        others = [item for item in add.inputs if item is not product]
        if add.op == "Add" and len(others) == 1 and _fits(others[0], node):
            yield node, add, others[0]


def _takes_bias(matmul: gs.Node) -> bool:
    """Whether both operands are dequantized, the right one a stored weight [K, N]."""
    left, right = map(producer, matmul.inputs)
    if left is None or right is None or {left.op, right.op} != {"DequantizeLinear"}:
        return False
    weight, scale = right.inputs[:2]
    if not is_constant(weight) or weight.values.ndim != 2 or right.attrs.get("block_size"):
        return False
    if not is_constant(left.inputs[1]) or left.inputs[1].values.size != 1:
        return False
    columns = weight.values.shape[1]
    if not is_constant(scale) or scale.values.size not in (1, columns):
        return False
    by_column = scale.values.size == 1 or right.attrs.get("axis", 1) in (1, -1)
    return by_column and all(len(node.inputs) == 3 for node in (left, right))


def _fits(bias: gs.Tensor, matmul: gs.Node) -> bool:
    """Whether a bias is one number for each column, and adds no dimension to the product."""
    weight = producer(matmul.inputs[1])
    assert weight is not None
    if not is_constant(bias) or bias.values.dtype != np.float32 or not is_bias(bias):
        return False
    product = matmul.outputs[0].shape
    rank = 1 if product is None else len(product)
    return bool(
        bias.values.shape[-1:] == weight.inputs[0].values.shape[1:] and bias.values.ndim <= rank
    )
