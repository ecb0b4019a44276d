"""Take out nodes that hand on what they were given."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.to_float32 import type_number
from regcache.passes.walk import hand_on, is_constant, is_output


@dataclass(frozen=True)
class DropIdentities:
    """Let readers of an Identity, of a Dropout or of a Cast to the same type read its input.

    Rewritten: CastLike becomes a Cast where the type that it is like is known. Refused, left as
    they are: a Dropout that may be training, or whose mask is read; a node that gives a graph input
    or a constant out as the graph's output under another name.
    """

    name: ClassVar[str] = "drop_identities"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: types of tensors are looked at where they are known."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Rewire around the nodes, from first to last."""
        edits = [edit for node in graph.nodes for edit in _name_type(node)]
        for node in list(graph.nodes):
            if not _hands_on(graph, node):
                continue
            name = node.name or node.outputs[0].name
            if hand_on(graph, node, node.inputs[0]):
                edits.append(Edit(name, f"{node.op} dropped"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """No node is new, and the outputs keep their names."""
        assert len(after.nodes) <= len(before.nodes)
        assert [item.name for item in after.outputs] == [item.name for item in before.outputs]


def _name_type(node: gs.Node) -> list[Edit]:
    """Write a CastLike as the Cast that it is."""
    wanted = type_number(node.inputs[1].dtype) if node.op == "CastLike" else 0
    if not wanted:
        return []
    node.op, node.attrs, node.inputs = "Cast", {"to": wanted}, node.inputs[:1]
    return [Edit(node.name or node.outputs[0].name, "CastLike as Cast")]


def _hands_on(graph: gs.Graph, node: gs.Node) -> bool:
    if node.op == "Identity":
        return True
    if node.op == "Dropout":
        training = node.inputs[2] if len(node.inputs) > 2 else None
        off = training is None or training.is_empty()
        if not off and is_constant(training):
            off = not bool(training.values.any())
        masks = node.outputs[1:]
        return off and not any(mask.outputs or is_output(graph, mask) for mask in masks)
    if node.op != "Cast" or node.inputs[0].dtype is None:
        return False
    own, wanted = type_number(node.inputs[0].dtype), type_number(node.attrs.get("to"))
    return own == wanted != 0
