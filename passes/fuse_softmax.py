"""Turn a decomposed softmax back into one node, without the shift that does not change it."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.root_mean_square import reduces_last_axis, same_values
from regcache.passes.walk import count_ops, name_of, producer
from regcache.passes.write_nodes import NodeWriter


@dataclass(frozen=True)
class FuseSoftmax:
    """Replace Exp, ReduceSum and Div by Softmax over the last axis; let it read bare scores.

    Matched: e / sum(e), as Div or as Mul with Reciprocal, of e = exp(x); what is taken off all of a
    row before, its largest number or any other, changes no softmax and is left out. Refused:
    another axis, and a sum over other numbers than are divided.
    """

    name: ClassVar[str] = "fuse_softmax"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 13, where Softmax is over one axis."""
        if graph.opset < 13:
            raise InputError(f"fuse_softmax needs opset 13, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert Softmax nodes, then rewire them; the old nodes fall to the clean-up."""
        edits = []
        for node in list(graph.nodes):
            exponent = _exponent(node)
            if exponent is not None:
                site = name_of(node)
                NodeWriter(graph, site).node(
                    "Softmax", "softmax", [exponent], node.outputs[0], axis=-1
                )
                edits.append(Edit(site, "Softmax"))
        for node in graph.nodes:
            bare = _unshifted(node) if node.op == "Softmax" else None
            if bare is not None:
                node.inputs[0] = bare
                edits.append(Edit(name_of(node), "without what is taken off a row"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Exp nodes go as Softmax nodes come."""
        come = count_ops(after, "Softmax") - count_ops(before, "Softmax")
        assert come >= count_ops(before, "Exp") - count_ops(after, "Exp")
        assert len(after.nodes) < len(before.nodes)


def _exponent(node: gs.Node) -> gs.Tensor | None:
    """What a Div or Mul node is the softmax of."""
    if node.op not in {"Div", "Mul"}:
        return None
    for power, divisor in (node.inputs, node.inputs[::-1]):
        exp, total = producer(power), producer(divisor)
        if node.op == "Mul" and total is not None:
            total = producer(total.inputs[0]) if total.op == "Reciprocal" else None
        if exp is None or total is None or (exp.op, total.op) != ("Exp", "ReduceSum"):
            continue
        kept = total.attrs.get("keepdims", 1) == 1
        if kept and reduces_last_axis(total) and same_values(total.inputs[0], power):
            return exp.inputs[0] if node.op == "Mul" or power is node.inputs[0] else None
    return None


def _unshifted(softmax: gs.Node) -> gs.Tensor | None:
    """The scores of a Softmax before a number for each row was taken off."""
    shifted, rank = producer(softmax.inputs[0]), len(softmax.inputs[0].shape or ())
    if softmax.attrs.get("axis", -1) not in (-1, rank - 1):
        return None
    if shifted is None or shifted.op != "Sub":
        return None
    scores, rows = (item.shape for item in shifted.inputs)
    if not scores or not rows or len(scores) != len(rows) or rows[-1] != 1 or scores[-1] == 1:
        return None
    return shifted.inputs[0] if scores == softmax.inputs[0].shape else None
