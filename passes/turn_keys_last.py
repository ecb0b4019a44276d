"""Turn quantized keys in the product that reads them, not before they are rounded."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import consumers, data_inputs, is_constant, is_output, name_of, producer


@dataclass(frozen=True)
class TurnKeysLast:
    """Let channels and tokens of quantized keys change places behind their Q/DQ pair.

    OpenVINO (2026.4) makes one product of a Transpose of the last two axes and the MatMul behind
    it. In front of the pair, it moves every byte by itself, and one CPU does most of that. What
    else a Transpose does, heads to the front, stays there and moves whole rows.
    Matched: q k^T's right operand, dequantized; its QuantizeLinear with one scale; and the
    Transpose in front that puts channels last but one, with products with one number between.
    Left alone: keys that something else reads on the way, and all else, such as registers in front.
    """

    name: ClassVar[str] = "turn_keys_last"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without quantized keys is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Change the order of axes, and append a Transpose; one that is left idle goes."""
        edits = []
        for keys in list(_turned_first(graph)):
            transpose, behind = keys[0], keys[1:]
            (floats,) = behind[-1].outputs
            rank = len(transpose.attrs["perm"])
            swap = [*range(rank - 2), rank - 1, rank - 2]
            perm = [transpose.attrs["perm"][axis] for axis in swap]
            for node in keys:
                (output,) = node.outputs
                if output.shape is not None:
                    output.shape = [output.shape[axis] for axis in swap]
            name = f"{name_of(transpose)}/last"
            before = gs.Variable(f"{name}/keys", floats.dtype, floats.shape)
            if floats.shape is not None:
                floats.shape = [floats.shape[axis] for axis in swap]
            behind[-1].outputs = [before]
            graph.nodes.append(gs.Node("Transpose", name, {"perm": swap}, [before], [floats]))
            if perm == sorted(perm):
                (old,) = transpose.outputs
                inputs = behind[0].inputs
                behind[0].inputs = [transpose.inputs[0] if item is old else item for item in inputs]
                transpose.outputs = []
            else:
                transpose.attrs["perm"] = perm
            edits.append(Edit(name_of(transpose), "channels and tokens change places last"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """At most one Transpose more for each, no other node, and nothing left to turn."""
        assert not list(_turned_first(after))
        old, new = (
            sorted(node.op for node in one.nodes if node.op != "Transpose")
            for one in (before, after)
        )
        assert old == new
        grown = len(after.nodes) - len(before.nodes)
        assert 0 <= grown <= len(list(_turned_first(before)))


def _turned_first(graph: gs.Graph) -> Iterator[list[gs.Node]]:
    """The nodes from a Transpose to change to the DequantizeLinear that a product reads."""
    for product in graph.nodes:
        back = producer(product.inputs[1]) if product.op == "MatMul" else None
        if back is None or back.op != "DequantizeLinear" or not _alone(graph, back):
            continue
        rounding = producer(back.inputs[0])
        if rounding is None or rounding.op != "QuantizeLinear" or not _alone(graph, rounding):
            continue
        if not is_constant(rounding.inputs[1]) or rounding.inputs[1].values.size != 1:
            continue
        keys = [rounding, back]
        while (node := producer(keys[0].inputs[0])) is not None and _alone(graph, node):
            perm = list(node.attrs.get("perm", ())) if node.op == "Transpose" else []
            if len(perm) > 1 and perm[-2] == len(perm) - 1:
                yield [node, *keys]
            numbers = [item for item in node.inputs if is_constant(item)]
            scales = node.op == "Mul" and len(numbers) == 1 and numbers[0].values.size == 1
            if not scales or node.inputs[0] not in data_inputs(node):
                break
            keys.insert(0, node)


def _alone(graph: gs.Graph, node: gs.Node) -> bool:
    """Whether one node reads a node's only output, and it is no output of the graph."""
    output = node.outputs[0]
    return len(node.outputs) == 1 and len(consumers(output)) == 1 and not is_output(graph, output)
