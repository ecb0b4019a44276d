"""Take out a mask that masks nothing: products with 1, sums with 0, choices that are always one."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity, Skip
from regcache.passes.copy_graph import copy_graph
from regcache.passes.errors import InputError
from regcache.passes.walk import hand_on, is_constant, replace_everywhere


def fill_masks(graph: gs.Graph, fills: Mapping[str, float]) -> tuple[gs.Graph, frozenset[str]]:
    """Replace inputs by constants of one number each.

    `fills`: the number by the input's name. A dimension that the file leaves open is 1 long, which
    is broadcast. Returns a copy of the graph, and the names of all tensors that depend on nothing
    but the masks: what is left of them after folding has to be neutral (see DropNeutral).
    """
    filled = copy_graph(graph)
    tainted: set[str] = set()
    for item in list(filled.inputs):
        if item.name not in fills:
            continue
        shape = [dim if isinstance(dim, int) else 1 for dim in item.shape or ()]
        values = np.full(shape, fills[item.name], item.dtype or np.float32)
        replace_everywhere(filled, item, gs.Constant(item.name, values))
        tainted.add(item.name)
    filled.inputs = [item for item in filled.inputs if item.name not in fills]
    for node in filled.nodes:  # sorted
        names = {item.name for item in node.inputs if not is_constant(item)}
        masks = {item.name for item in node.inputs} & tainted
        if masks and names <= tainted:
            tainted |= {item.name for item in node.outputs}
    return filled, frozenset(tainted)


@dataclass(frozen=True)
class DropNeutral:
    """Let readers of x * 1, x / 1, x + 0, x - 0 and of a one-sided Where read x.

    `masks`: names of the constants to look at. Refused: another operator or value, or a constant
    that widens what it meets; each is a Skip, and a graph with one still depends on the mask.
    """

    masks: frozenset[str]
    name: ClassVar[str] = "drop_neutral"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Shapes on the tensors."""
        if any(item.shape is None for node in graph.nodes for item in node.outputs):
            raise InputError("drop_neutral needs shapes")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Rewire around the nodes, from first to last; they fall to the clean-up."""
        edits, skips = [], []
        for node in list(graph.nodes):
            if not any(is_constant(item) and item.name in self.masks for item in node.inputs):
                continue
            kept, name = self._kept(node), node.name or node.outputs[0].name
            if kept is None or not _same_shape(kept, node.outputs[0]):
                skips.append(Skip(name, f"{node.op} masks something"))
                continue
            if hand_on(graph, node, kept):
                edits.append(Edit(name, f"{node.op} dropped"))
            else:
                skips.append(Skip(name, f"{node.op} makes an output of an input"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Nodes are only removed."""
        assert len(after.nodes) < len(before.nodes)

    def _kept(self, node: gs.Node) -> gs.Tensor | None:
        """The input that a node hands on unchanged; None where the mask changes it."""
        if node.op == "Where":
            condition = _uniform(node.inputs[0])
            chosen = None if condition is None else node.inputs[1 if condition else 2]
            return None if chosen is None or is_constant(chosen) else chosen
        neutral = {"Mul": 1.0, "Div": 1.0, "Add": 0.0, "Sub": 0.0}.get(node.op)
        slots = (0, 1) if node.op in {"Add", "Mul"} else (1,)
        for slot in slots if neutral is not None else ():
            if _uniform(node.inputs[slot]) == neutral:
                other: gs.Tensor = node.inputs[1 - slot]
                return other
        return None


def _same_shape(one: gs.Tensor, other: gs.Tensor) -> bool:
    """Whether two shapes agree; a free batch may be called by several names."""
    dims, others = (
        [dim if isinstance(dim, int) else None for dim in tensor.shape] for tensor in (one, other)
    )
    return dims == others


def _uniform(tensor: gs.Tensor) -> float | None:
    if not is_constant(tensor) or not tensor.values.size:
        return None
    first = tensor.values.ravel()[0]
    return float(first) if (tensor.values == first).all() else None
