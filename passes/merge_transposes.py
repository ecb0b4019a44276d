"""Undo the detour over three dimensions that exporters take to transpose keys."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import consumers, count_ops, name_of


@dataclass(frozen=True)
class MergeTransposes:
    """Replace Reshape, Transpose, Reshape by one Transpose of the last two dimensions.

    Matched: [B, H, X, Y] -> [B H, X, Y] -> [B H, Y, X] -> [B, H, Y, X]. Refused: anything else, and
    a detour whose transposed tensor the graph gives away.
    """

    name: ClassVar[str] = "merge_transposes"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: without inferred shapes nothing matches."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Transpose; the three nodes fall to the clean-up."""
        edits = []
        for node in [
            n for n in graph.nodes if n.op == "Transpose" and n.attrs.get("perm") == [0, 2, 1]
        ]:
            before = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
            following = consumers(node.outputs[0])
            if before is None or before.op != "Reshape" or len(following) != 1:
                continue
            if any(output is node.outputs[0] for output in graph.outputs):
                continue
            after = following[0]
            if after.op != "Reshape" or not _fits(before.inputs[0].shape, after.outputs[0].shape):
                continue
            output = after.outputs[0]
            output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    "Transpose",
                    f"{name_of(node)}/merged",
                    {"perm": [0, 1, 3, 2]},
                    [before.inputs[0]],
                    [output],
                )
            )
            edits.append(Edit(name_of(node), "merged with the Reshape nodes around it"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Reshape nodes go, Transpose nodes stay as many."""
        assert count_ops(after, "Transpose") == count_ops(before, "Transpose")
        assert count_ops(after, "Reshape") < count_ops(before, "Reshape")


def _fits(source: list[int | str] | None, result: list[int | str] | None) -> bool:
    """[B, H, X, Y] against [B, H, Y, X], all but the batch known."""
    if source is None or result is None or len(source) != 4 or len(result) != 4:
        return False
    known = all(isinstance(dim, int) for dims in (source, result) for dim in dims[1:])
    return known and source[1:] == [result[1], result[3], result[2]]
