"""Compute what does not depend on the input (onnx-graphsurgeon's constant folding)."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.walk import is_constant


@dataclass(frozen=True)
class FoldConstants:
    """Replace every node whose inputs are constant, Shape nodes of static tensors included.

    Matched: Constant nodes, shape arithmetic, positional embeddings resized in the graph.
    Refused: nodes that ONNX Runtime cannot evaluate alone, left as they are.
    Needs shapes on the graph (check_and_infer) to fold Shape nodes.
    """

    name: ClassVar[str] = "fold_constants"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: every graph has constants to look at."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Fold in place; the nodes that are left without consumers fall to the clean-up."""
        before = [(node.op, node.name, node.outputs[0]) for node in graph.nodes if node.outputs]
        graph.fold_constants(partitioning="basic")
        tensors = graph.tensors()
        return Log(
            tuple(
                Edit(name or output.name, f"{op} folded")
                for op, name, output in before
                if output.name in tensors and is_constant(tensors[output.name])
            )
        )

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Folding only removes nodes."""
        assert len(after.nodes) <= len(before.nodes)
