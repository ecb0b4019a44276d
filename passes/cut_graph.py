"""Cut a stretch of blocks out of an encoder, to run it on hidden states that are there."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.errors import InputError
from regcache.passes.walk import is_constant


def cut_graph(graph: gs.Graph, start: str | None, outputs: Sequence[str]) -> gs.Graph:
    """The part of `graph` that computes the tensors `outputs` from the tensor `start`.

    `start` is a hidden state [B, T, width]; None starts at the images. Nodes that read the batch
    size from the images read it from `start`. Weights are shared with `graph`. Raises InputError,
    naming the node and the tensor, where a tensor from before `start` is needed too.
    """
    part = graph.copy()
    tensors = part.tensors()
    missing = [name for name in (*outputs, *([start] if start else [])) if name not in tensors]
    if missing:
        raise InputError(f"cut: no tensor {missing[0]!r} in the graph")
    before: set[int] = set()
    if start is not None and tensors[start] not in part.inputs:
        before = _nodes_before(tensors[start])
        _start_at(part, tensors[start])
    part.outputs = [tensors[name] for name in outputs]
    for tensor in part.outputs:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
    part.cleanup().toposort()
    _check_closed(part, before)
    return part


def _nodes_before(start: gs.Variable) -> set[int]:
    """The ids of the nodes that compute `start`."""
    waiting, found = [start], set[int]()
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) not in found:
                found.add(id(node))
                waiting.extend(node.inputs)
    return found


def _start_at(part: gs.Graph, start: gs.Variable) -> None:
    """Make `start` the only input, and let it stand for the batch of the images."""
    for node in part.nodes:
        if node.op == "Shape" and node.inputs[0] in part.inputs and _reads_batch(node):
            node.inputs[0] = start
            node.attrs.update(start=0, end=1)  # the rank is another
            node.outputs[0].shape = [1]
    start.inputs.clear()
    start.dtype = start.dtype or np.dtype(np.float32)
    part.inputs = [start]


def _reads_batch(node: gs.Node) -> bool:
    """Whether of a Shape node only the first number is read: by its bounds, or by Gather."""
    if node.attrs.get("start", 0) == 0 and node.attrs.get("end") == 1:
        return True
    whole = "start" not in node.attrs and "end" not in node.attrs
    return whole and all(
        reader.op == "Gather"
        and is_constant(reader.inputs[1])
        and not reader.inputs[1].values.any()
        for reader in node.outputs[0].outputs
    )


def _check_closed(part: gs.Graph, before: set[int]) -> None:
    made = {id(item) for item in part.inputs}
    for node in part.nodes:
        variables = [item for item in node.inputs if isinstance(item, gs.Variable)]
        missing = [item for item in variables if not item.is_empty() and id(item) not in made]
        if not missing:
            made |= {id(item) for item in node.outputs}
        elif id(node) not in before:
            raise InputError(f"cut: {node.op} {node.name!r} also needs {missing[0].name!r}")
    for output in part.outputs:
        if id(output) not in made:
            raise InputError(f"cut: {output.name!r} does not come after the start")
