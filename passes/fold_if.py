"""Put the branch that is taken in the place of an If whose condition is known."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import is_constant


@dataclass(frozen=True)
class FoldIf:
    """Replace If nodes by the nodes of one of their branches.

    Matched: an If whose condition is a constant, also inside a branch that is taken. Its nodes and
    tensors are named after what the If makes, so that no two are called alike. Refused: a condition
    that is computed; it may be constant once more shapes are known, so run it again then.
    """

    name: ClassVar[str] = "fold_if"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without branches is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Move the nodes of the branch that is taken into the graph."""
        edits = []
        while (node := next(filter(_decided, graph.nodes), None)) is not None:
            taken = bool(node.inputs[0].values.item())
            branch = node.attrs["then_branch" if taken else "else_branch"]
            _inline(graph, node, branch)
            edits.append(Edit(str(node.name or branch.name), f"its condition is {taken}"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Fewer branches, and none left whose condition is known."""
        assert _count(after) < _count(before)
        assert not any(map(_decided, after.nodes))


def _decided(node: gs.Node) -> bool:
    return bool(node.op == "If" and is_constant(node.inputs[0]) and node.inputs[0].values.size == 1)


def _count(graph: gs.Graph) -> int:
    graphs = [graph, *graph.subgraphs(recursive=True)]
    return sum(node.op == "If" for part in graphs for node in part.nodes)


def _inline(graph: gs.Graph, node: gs.Node, branch: gs.Graph) -> None:
    """Let a branch's nodes make the outputs of its If."""
    results, prefix = list(node.outputs), node.outputs[0].name
    outside = {id(tensor) for tensor in (*graph.tensors().values(), *graph.inputs)}
    nodes, made = list(branch.nodes), list(branch.outputs)
    for item in nodes:
        item.name = f"{prefix}/{item.name}" if item.name else ""
        for tensor in (*item.inputs, *item.outputs):
            if id(tensor) not in outside and not tensor.is_empty():
                outside.add(id(tensor))
                tensor.name = f"{prefix}/{tensor.name}"
    place = graph.nodes.index(node)
    node.outputs.clear()
    branch.nodes.clear()
    graph.nodes[place : place + 1] = nodes
    for result, tensor in zip(results, made, strict=True):
        copy = gs.Node("Identity", f"{result.name}/taken", {}, [tensor], [result])
        graph.nodes.insert(place + len(nodes), copy)
