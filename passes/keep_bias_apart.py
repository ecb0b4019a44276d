"""Keep ONNX Runtime from merging a quantized linear into a Gemm that it computes in float."""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import is_constant, is_output, producer


@dataclass(frozen=True)
class KeepBiasApart:
    """Write the Add behind a quantized MatMul so that ONNX Runtime leaves the two apart.

    ONNX Runtime (1.32) merges MatMul and Add into Gemm, where it knows the shapes, before it looks
    for Q/DQ pairs, and a Gemm with a float bias stays float. It takes an Add that Gemm can
    broadcast, so one of three dimensions more is left alone, at no cost in time.

    Matched: a MatMul of two dequantized operands, its product read by an Add alone: for an input of
    two dimensions, whatever is known of them, with [N], [1, N], [M, 1] or [M, N]; for one of more
    dimensions where all of them are fixed, with [N].
    Rewritten: a constant bias gets leading dimensions of 1; what the graph computes is added to the
    product after an Unsqueeze. Of two dimensions, a Squeeze makes three two again.
    Left alone, as ONNX Runtime does: an input of more dimensions with a free one, a bias that Gemm
    does not broadcast, a product that something else reads.
    """

    name: ClassVar[str] = "keep_bias_apart"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without quantized linears is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Reshape the biases, and widen and narrow around the Adds of two dimensions."""
        return Log(tuple(_keep_apart(graph, *pair) for pair in _merged(graph)))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Nothing left to merge, and nothing new but what changes the number of dimensions."""
        assert not _merged(after)
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        assert (new - old).keys() <= {"Squeeze", "Unsqueeze"}
        assert not old - new


def _merged(graph: gs.Graph) -> list[tuple[gs.Node, gs.Node, int]]:
    """The quantized MatMuls that ONNX Runtime would merge, the Adds, and the slot of the bias."""
    found = []
    for node in graph.nodes:
        if node.op != "MatMul" or not all(map(_dequantized, node.inputs)):
            continue
        (product,) = node.outputs
        if len(product.outputs) != 1 or is_output(graph, product):
            continue
        (add,) = product.outputs
        if add.op == "Add":
            slot = 1 if add.inputs[0] is product else 0
            if _fits_gemm(node, add.inputs[slot]):
                found.append((node, add, slot))
    return found


def _dequantized(tensor: gs.Tensor) -> bool:
    maker = producer(tensor)
    return maker is not None and maker.op == "DequantizeLinear"


def _fits_gemm(matmul: gs.Node, bias: gs.Tensor) -> bool:
    source, weight, added = (tensor.shape for tensor in (*matmul.inputs, bias))
    if source is None or weight is None or added is None or len(weight) != 2:
        return False
    vector = len(added) == 1 and added[0] == weight[1]
    if len(source) > 2:
        return vector and all(isinstance(dim, int) for dim in source)
    return vector or (len(added) == 2 and added[1] in (1, weight[1]))


def _keep_apart(graph: gs.Graph, matmul: gs.Node, add: gs.Node, slot: int) -> Edit:
    (product,), bias = matmul.outputs, add.inputs[slot]
    if is_constant(bias):
        values = bias.values.reshape((1,) * (3 - bias.values.ndim) + bias.values.shape)
        add.inputs[slot] = gs.Constant(f"{product.name}/bias/apart", values)
        what = f"bias {list(values.shape)}"
    else:
        wide = gs.Variable(f"{product.name}/wide", dtype=product.dtype)
        add.inputs[1 - slot] = wide
        _append(graph, "Unsqueeze", product, wide)
        what = "an Unsqueeze before the Add"
    if len(matmul.inputs[0].shape) == 2:
        (output,) = add.outputs
        wide = gs.Variable(f"{output.name}/wide", dtype=output.dtype)
        add.outputs = [wide]
        _append(graph, "Squeeze", wide, output)
    return Edit(str(add.name or product.name), what)


def _append(graph: gs.Graph, op: str, source: gs.Tensor, target: gs.Variable) -> None:
    axis = gs.Constant(f"{target.name}/axis", np.array([0], np.int64))
    name = f"keep_bias_apart/{op.lower()}/{target.name}"
    graph.nodes.append(gs.Node(op, name, {}, [source, axis], [target]))
