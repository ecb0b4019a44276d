"""Take out attention masks that mask nothing, as torch's SDPA decomposition exports them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity, Skip
from regcache.passes.walk import is_constant, producer, replace_everywhere


@dataclass(frozen=True)
class DropMasks:
    """Remove what adds nothing to attention scores, and the guard for rows masked whole.

    Matched: Add of a mask that is zero everywhere (a constant, or an Expand or Where of uniform
    values); Where(IsNaN(p), 0, p) behind a Softmax, which a score without -inf never needs.
    Refused: a mask that is not uniformly zero, or that widens what it is added to; a guard behind
    a Softmax that still has a mask.
    """

    name: ClassVar[str] = "drop_masks"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without masks is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Rewire around the Add and Where nodes; they fall to the clean-up."""
        edits, skips = [], []
        for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
            mask = producer(softmax.inputs[0])
            if mask is not None and mask.op == "Add" and mask.name:
                scores = _unmasked(mask)
                if scores is None:
                    skips.append(Skip(mask.name, "the mask is not zero everywhere"))
                    continue
                softmax.inputs[0] = scores
                edits.append(Edit(mask.name, "mask removed"))
            for guard in _nan_guards(softmax):
                replace_everywhere(graph, guard.outputs[0], softmax.outputs[0])
                edits.append(Edit(guard.name, "NaN guard removed"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Nodes are only removed."""
        assert len(after.nodes) < len(before.nodes)


def uniform_value(tensor: gs.Tensor, depth: int = 0) -> float | None:
    """The one value that every element of a tensor has, or None."""
    if is_constant(tensor):
        values = tensor.values.ravel()
        same = values.size > 0 and bool((values == values[0]).all())
        return float(values[0]) if same else None
    node = producer(tensor)
    if node is None or depth > 8:
        return None
    if node.op in {"Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity"}:
        return uniform_value(node.inputs[0], depth + 1)
    if node.op == "ConstantOfShape":
        value = node.attrs.get("value")
        return 0.0 if value is None else float(np.ravel(value.values)[0])
    if node.op == "Where":
        condition = uniform_value(node.inputs[0], depth + 1)
        if condition is None:
            return None
        return uniform_value(node.inputs[1 if condition else 2], depth + 1)
    return None


def _unmasked(add: gs.Node) -> gs.Tensor | None:
    """The operand of an Add whose other operand is zero everywhere and does not widen it."""
    for scores, mask in (add.inputs, reversed(add.inputs)):
        if uniform_value(mask) == 0.0 and scores.shape is not None:
            same_rank = len(scores.shape) == len(add.outputs[0].shape or ())
            return scores if same_rank else None
    return None


def _nan_guards(softmax: gs.Node) -> list[gs.Node]:
    probabilities = softmax.outputs[0]
    found = []
    for node in probabilities.outputs:
        if node.op != "Where" or node.inputs[2] is not probabilities:
            continue
        test = producer(node.inputs[0])
        if test is not None and test.op == "IsNaN" and test.inputs[0] is probabilities:
            found.append(node)
    return found
