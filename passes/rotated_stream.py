"""Whether a graph's residual stream is rotated, where, and by what (see RotateStream)."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.encoder import EncoderView
from regcache.passes.marks import ROTATION

Floats = NDArray[np.float32]

# What the names of the two products begin with, before the first block and in the last.
STREAM = f"{ROTATION}/stream"
ACROSS, WITHIN = f"{STREAM}/out/across", f"{STREAM}/out/within"
"""The names of the two products that FactorRotation makes of the last."""


def rotated_stream(view: EncoderView) -> bool:
    """Whether the stream between a view's first and last block is rotated."""
    return any(map(_is_first, view.graph.nodes))


def stream_ends(graph: gs.Graph) -> tuple[gs.Variable, ...]:
    """The stream before it is rotated and after it is rotated back; nothing where it is not."""
    products = [node for node in graph.nodes if node.name in {f"{STREAM}/in", f"{STREAM}/out"}]
    return tuple(node.inputs[0] if _is_first(node) else node.outputs[0] for node in products)


def stream_rotation(graph: gs.Graph) -> Floats | None:
    """What a graph's residual stream is rotated by [width, width], from the right; None: it is not.

    The inputs of all its blocks are rotated then, and the output of the last is not.
    """
    first = first_product(graph)
    return None if first is None else np.asarray(first.inputs[1].values, np.float32)


def as_stream(graph: gs.Graph, tokens: Floats) -> Floats:
    """Tokens [..., width] as the graph's blocks read them: rotated where its stream is."""
    matrix = stream_rotation(graph)
    return tokens if matrix is None else tokens @ matrix


def first_product(graph: gs.Graph) -> gs.Node | None:
    """The MatMul that rotates what the first block reads; None where there is none."""
    return next(filter(_is_first, graph.nodes), None)


def last_product(graph: gs.Graph) -> gs.Node | None:
    """The MatMul that rotates back in the last block, as one product; None where there is none."""
    return next((node for node in graph.nodes if node.name == f"{STREAM}/out"), None)


def matrix_in(model: onnx.ModelProto) -> Floats | None:
    """What a file's residual stream is rotated by [width, width], from the right; None: it is not.

    The outputs of all its blocks but the last are rotated then. Told by the product that rotates
    back: the first may be folded into weights.
    """
    found = {node.name: node for node in model.graph.node if node.name.startswith(STREAM)}
    stored = {item.name: item for item in model.graph.initializer}

    def constant(name: str, slot: int) -> Floats:
        values = onnx.numpy_helper.to_array(stored[found[name].input[slot]])
        return np.asarray(values, np.float32)

    if f"{STREAM}/out" in found:
        return constant(f"{STREAM}/out", 1).T
    if {ACROSS, WITHIN} <= found.keys():
        return np.kron(constant(ACROSS, 0), constant(WITHIN, 1).T)
    return None


def _is_first(node: gs.Node | onnx.NodeProto) -> bool:
    return bool(node.name == f"{STREAM}/in")
