"""Write Reshape nodes so that they do not depend on the number of tokens."""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import consumers, is_constant, is_linear, producer

Dims = list[int | str]


@dataclass(frozen=True)
class FreeTokens:
    """Let tokens be added and removed without touching the Reshape nodes between.

    Matched: a Reshape that keeps its leading dimensions ([B, T, C] -> [B, T, H, D]) copies them
    (0 in the shape); a linear between a Reshape that flattens [B, T, K] to [B T, K] and one that
    undoes it runs on [B, T, K] itself. Refused: any other Reshape, left as it is.
    """

    name: ClassVar[str] = "free_tokens"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: without inferred shapes no Reshape matches."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Unflatten linears first, then copy leading dimensions."""
        edits = []
        for node in list(graph.nodes):
            if is_linear(node) and _unflatten(node):
                edits.append(Edit(node.name, "runs on [B, T, K]"))
        for node in graph.nodes:
            target = _copying_shape(node) if node.op == "Reshape" else None
            if target is not None:
                node.inputs[1] = _shape_constant(node, target)
                node.attrs["allowzero"] = 0
                edits.append(Edit(node.name, f"shape {target}"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """No node is new."""
        assert len(after.nodes) <= len(before.nodes)


def _shape_constant(node: gs.Node, target: list[int]) -> gs.Constant:
    return gs.Constant(f"{node.outputs[0].name}/shape", np.array(target, dtype=np.int64))


def _copying_shape(node: gs.Node) -> list[int] | None:
    """The shape with a 0 for every leading dimension that stays; None where nothing changes."""
    source, result = node.inputs[0].shape, node.outputs[0].shape
    if source is None or result is None or not is_constant(node.inputs[1]):
        return None
    kept = 0
    while kept < min(len(source), len(result)) and _same(source, result, kept):
        kept += 1
    rest: Dims = result[kept:]
    unknown = [dim for dim in rest if not isinstance(dim, int)]
    if kept == 0 or len(unknown) > 1:
        return None
    target = [0] * kept + [dim if isinstance(dim, int) else -1 for dim in rest]
    old = node.inputs[1].values.tolist()
    return None if old == target else target


def _same(source: Dims, result: Dims, axis: int) -> bool:
    """Whether dimension `axis` is the same, given that all before it are."""
    if isinstance(source[axis], int) or isinstance(result[axis], int):
        return source[axis] == result[axis]
    # An unknown dimension stays exactly when what follows it holds as many numbers.
    after = source[axis + 1 :], result[axis + 1 :]
    if not all(isinstance(dim, int) for dims in after for dim in dims):
        return False
    return prod(map(int, after[0])) == prod(map(int, after[1]))


def _unflatten(matmul: gs.Node) -> bool:
    """Remove the Reshape pair around a linear: [B, T, K] -> [B T, K] -> [B T, N] -> [B, T, ...]."""
    flatten = producer(matmul.inputs[0])
    if flatten is None or flatten.op != "Reshape" or len(matmul.inputs[0].shape or ()) != 2:
        return False
    source = flatten.inputs[0]
    if (
        source.shape is None
        or len(source.shape) != 3
        or source.shape[2] != matmul.inputs[0].shape[1]
    ):
        return False
    output = matmul.outputs[0]
    following = consumers(output)
    bias = following[0] if len(following) == 1 and following[0].op == "Add" else None
    if bias is not None:
        output = bias.outputs[0]
        following = consumers(output)
    if not output.shape or not following:
        return False
    if not all(_undoes(node, source.shape) for node in following):
        return False
    width = output.shape[-1]
    matmul.inputs[0] = source
    matmul.outputs[0].shape = None  # which is the output where there is no bias
    output.shape = [*source.shape[:2], width]
    for node in following:
        # The shapes on the tensors let the second step turn this into a copy of both.
        node.inputs[1] = _shape_constant(node, [0, 0, *map(int, node.outputs[0].shape[2:])])
        node.attrs["allowzero"] = 0
    return True


def _undoes(node: gs.Node, source: Dims) -> bool:
    result = node.outputs[0].shape if node.op == "Reshape" else None
    return (
        result is not None
        and len(result) >= 3
        and result[1] == source[1]
        and all(isinstance(dim, int) for dim in result[1:])
    )
