"""Round what attention hands on before its heads are put together, not behind."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import is_constant, is_output, name_of, producer, stored_weight

_MOVES = frozenset({"Reshape", "Transpose"})


@dataclass(frozen=True)
class RoundBeforeMoving:
    """Move a QuantizeLinear in front of the Reshapes and Transposes that it reads.

    OpenVINO (2026.4) then rounds in the kernel that computes attention, where numbers are still
    float32, and moves bytes. Behind these nodes it rounds in FP32 what it had written in bf16.
    Matched: one scale for all, behind a MatMul of two activations (probabilities times values), and
    nothing else reads what stands between.
    Left alone: all else. Of q k^T's operands OpenVINO moves the pairs itself.
    """

    name: ClassVar[str] = "round_before_moving"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without such nodes is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Rewire; no node is new."""
        edits = []
        for rounding, moves in list(_late(graph)):
            first, last = moves[0].inputs[0], moves[-1].outputs[0]
            (integers,) = rounding.outputs
            for reader in list(integers.outputs):
                reader.inputs = [last if item is integers else item for item in reader.inputs]
            rounding.inputs[0], moves[0].inputs[0] = first, integers
            integers.shape = first.shape
            for move in moves:
                move.outputs[0].dtype = integers.dtype
            edits.append(Edit(name_of(rounding), f"before {len(moves)} nodes that move numbers"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same nodes, and nothing left to move."""
        assert not list(_late(after))
        old, new = (sorted((node.op, node.name) for node in one.nodes) for one in (before, after))
        assert old == new


def _late(graph: gs.Graph) -> Iterator[tuple[gs.Node, list[gs.Node]]]:
    """The QuantizeLinears to move, and the nodes in front of each, from attention on."""
    for node in graph.nodes:
        if node.op != "QuantizeLinear" or is_output(graph, node.outputs[0]):
            continue
        if not is_constant(node.inputs[1]) or node.inputs[1].values.size != 1:
            continue
        moves, tensor = list[gs.Node](), node.inputs[0]
        while (maker := producer(tensor)) is not None and maker.op in _MOVES:
            if len(tensor.outputs) != 1 or is_output(graph, tensor):
                break
            moves.insert(0, maker)
            tensor = maker.inputs[0]
        product = maker is not None and maker.op == "MatMul" and stored_weight(maker) is None
        if moves and product and len(tensor.outputs) == 1 and not is_output(graph, tensor):
            yield node, moves
