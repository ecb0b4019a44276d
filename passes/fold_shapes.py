"""Replace Shape nodes, and picks from them, by the numbers they stand for."""

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.walk import is_constant


def fold_shapes(graph: gs.Graph) -> None:
    """Turn what Shape nodes tell of static dimensions into constants, in place.

    Matched: Shape with or without `start` and `end`; Gather and Slice of one where only some
    dimensions are static. Needs shapes on the graph. onnx-graphsurgeon's own folding takes a Shape
    for the whole shape, whatever its `start` and `end`.
    """
    for node in list(graph.nodes):
        if node.op != "Shape" or node.inputs[0].shape is None:
            continue
        dims = list(node.inputs[0].shape)[node.attrs.get("start", 0) : node.attrs.get("end")]
        _replace(node, dims)
        for reader in list(node.outputs[0].outputs) if node.outputs else ():
            picked = _pick(reader, node.outputs[0], dims)
            if picked is not None:
                _replace(reader, picked)


def _replace(node: gs.Node, dims: list[int | str] | int) -> None:
    """Make the node's output a constant where all of `dims` are numbers."""
    numbers = dims if isinstance(dims, list) else [dims]
    if all(isinstance(dim, int) for dim in numbers):
        node.outputs[0].to_constant(np.array(dims, np.int64))
        node.outputs.clear()


def _pick(reader: gs.Node, shape: gs.Tensor, dims: list[int | str]) -> list[int | str] | int | None:
    """What a Gather or Slice takes of a shape; None where that is not known."""
    others = reader.inputs[1:]
    if reader.inputs[0] is not shape or not others or not all(map(is_constant, others)):
        return None
    try:
        if reader.op == "Gather":
            indices = others[0].values
            picked = [dims[int(index)] for index in indices.ravel()]
            if indices.ndim == 0:
                return picked[0] if isinstance(picked[0], int) else None
            return picked if indices.ndim == 1 else None
        if reader.op == "Slice" and len(others) >= 2:
            start, end = (int(item.values.ravel()[0]) for item in others[:2])
            step = int(others[3].values.ravel()[0]) if len(others) > 3 else 1
            return dims[start:end:step]
    except (IndexError, ValueError):  # the file picks what is not there
        return None
    return None
