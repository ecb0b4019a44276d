"""Give Reshape nodes a constant shape wherever only the batch is unknown."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity, Skip
from regcache.passes.walk import is_constant


@dataclass(frozen=True)
class ResolveShapes:
    """Replace the shape computed by Shape, Gather and Concat nodes with [-1, T, C] constants.

    Matched: a Reshape whose inferred output has exactly one symbolic dimension. Refused: more
    than one, or an unknown rank. Needs shapes on the graph (check_and_infer).
    """

    name: ClassVar[str] = "resolve_shapes"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without inferred shapes is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Swap the shape inputs; the shape arithmetic falls to the clean-up."""
        edits, skips = [], []
        for node in graph.nodes:
            if node.op != "Reshape" or is_constant(node.inputs[1]):
                continue
            dims = node.outputs[0].shape
            unknown = None if dims is None else [d for d in dims if not isinstance(d, int)]
            if unknown is None or len(unknown) > 1 or (dims and 0 in dims):
                skips.append(Skip(node.name, f"output shape {dims} is not static enough"))
                continue
            target = [dim if isinstance(dim, int) else -1 for dim in dims]
            node.inputs[1] = gs.Constant(
                f"{node.outputs[0].name}/shape", np.array(target, dtype=np.int64)
            )
            edits.append(Edit(node.name, f"shape {target}"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """No node is new."""
        assert len(after.nodes) <= len(before.nodes)
