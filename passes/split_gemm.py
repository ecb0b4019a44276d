"""Write fully connected layers in one form: MatMul with a [K, N] weight, then Add."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.walk import is_constant, name_of


@dataclass(frozen=True)
class SplitGemm:
    """Replace Gemm by MatMul + Add.

    Matched: constant weight, transA = 0; alpha goes into the weight, beta into a constant bias.
    Refused: any other Gemm.
    """

    name: ClassVar[str] = "split_gemm"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: Gemm nodes that do not fit are skipped."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Turn each Gemm into a MatMul in place, followed by an Add for the bias."""
        edits, skips = [], []
        for node in [node for node in graph.nodes if node.op == "Gemm"]:
            reason = _refusal(node)
            if reason:
                skips.append(Skip(node.name, reason))
                continue
            weight, bias = _weight(node), _bias(node)
            source, output = node.inputs[0], node.outputs[0]
            node.op, node.attrs = "MatMul", {}
            node.inputs = [source, weight]
            if bias is not None:
                product = gs.Variable(f"{output.name}/matmul", dtype=output.dtype)
                node.outputs = [product]
                graph.nodes.append(
                    gs.Node(
                        "Add",
                        name=f"{name_of(node)}/bias",
                        inputs=[product, bias],
                        outputs=[output],
                    )
                )
            edits.append(Edit(node.name, "MatMul + Add" if bias is not None else "MatMul"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Every Gemm that is left has a reason to be."""
        assert all(_refusal(node) for node in after.nodes if node.op == "Gemm")


def _refusal(node: gs.Node) -> str | None:
    if not is_constant(node.inputs[1]):
        return "the weight is not constant"
    if node.attrs.get("transA", 0):
        return "transA is set"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and not is_constant(bias) and _factor(node, "beta") != 1:
        return "beta is not 1 and the bias not constant"
    return None


def _factor(node: gs.Node, name: str) -> np.float32:
    return np.float32(node.attrs.get(name, 1.0))


def _weight(node: gs.Node) -> gs.Constant:
    """The weight [K, N], alpha in it."""
    weight, alpha = node.inputs[1], _factor(node, "alpha")
    if not node.attrs.get("transB", 0) and alpha == 1:
        return weight
    values = weight.values.T if node.attrs.get("transB", 0) else weight.values
    values = np.ascontiguousarray(values if alpha == 1 else values * alpha)
    return gs.Constant(f"{weight.name}/{name_of(node)}/transposed", values)


def _bias(node: gs.Node) -> gs.Tensor | None:
    """What is added to the product, beta in it; None where nothing is."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None or bias.is_empty() or _factor(node, "beta") == 1:
        return None if bias is None or bias.is_empty() else bias
    return gs.Constant(f"{bias.name}/{name_of(node)}/scaled", bias.values * _factor(node, "beta"))
