"""Cut a stretch of blocks out of an encoder, to run it on known hidden states."""

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regcache.passes.clean_up import clean_up
from regcache.passes.copy_graph import copy_graph
from regcache.passes.errors import InputError
from regcache.passes.walk import is_constant


def cut_graph(
    graph: gs.Graph, start: str | None, outputs: Sequence[str], also: Sequence[str] = ()
) -> gs.Graph:
    """The part of `graph` that computes the tensors `outputs` from the tensor `start`.

    `start` is a hidden state [B, T, width]; None starts at the images. Nodes that read the batch
    size from the images read it from `start`. Weights are shared with `graph`. `also`: tensors from
    before `start` that are inputs too, behind it (see needed_before); all inputs are float32, what
    is of another type is cast back. Raises InputError, naming the node and the tensor, where
    another tensor from before `start` is needed.
    """
    part = copy_graph(graph)
    tensors = part.tensors()
    known = [start] if start else []
    missing = [name for name in (*outputs, *known, *also) if name not in tensors]
    if missing:
        raise InputError(f"cut: no tensor {missing[0]!r} in the graph")
    before: set[int] = set()
    if start is not None and tensors[start] not in part.inputs:
        before = _nodes_before(tensors[start])
        _start_at(part, tensors[start], [tensors[name] for name in also])
    part.outputs = [tensors[name] for name in outputs]
    for tensor in part.outputs:
        tensor.dtype = tensor.dtype or np.dtype(np.float32)
    clean_up(part)
    _check_closed(part, before)
    return part


def needed_before(graph: gs.Graph, start: str, outputs: Sequence[str]) -> list[str]:
    """The tensors from before `start` that `outputs` need besides it, in the order of the graph.

    An output that does not come after `start` is among them. Tensors that depend on nothing but the
    images' shape are not: they can be computed anew.
    """
    tensors = graph.tensors()
    behind, images = _reached([tensors[start]]), _reached(graph.inputs)
    waiting, seen, needed = [tensors[name] for name in outputs], {id(tensors[start])}, set[str]()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if id(tensor) in behind:
            waiting.extend(item for node in tensor.inputs for item in node.inputs)
        elif id(tensor) in images:
            needed.add(tensor.name)
    return [name for name in tensors if name in needed]


def _reached(starts: Sequence[gs.Tensor]) -> set[int]:
    """The ids of the tensors that carry data of `starts`, themselves included."""
    waiting, found = list(starts), set[int]()
    while waiting:
        tensor = waiting.pop()
        if id(tensor) not in found:
            found.add(id(tensor))
            readers = [node for node in tensor.outputs if node.op != "Shape"]
            waiting.extend(item for node in readers for item in node.outputs)
    return found


def _nodes_before(start: gs.Variable) -> set[int]:
    """The ids of the nodes that compute `start`."""
    waiting, found = [start], set[int]()
    while waiting:
        for node in waiting.pop().inputs:
            if id(node) not in found:
                found.add(id(node))
                waiting.extend(node.inputs)
    return found


def _start_at(part: gs.Graph, start: gs.Variable, also: Sequence[gs.Variable]) -> None:
    """Make `start` the first input, and let it stand for the batch of the images."""
    for node in part.nodes:
        if node.op == "Shape" and node.inputs[0] in part.inputs and _reads_batch(node):
            node.inputs[0] = start
            node.attrs.update(start=0, end=1)  # the rank is another
            node.outputs[0].shape = [1]
    for tensor in (start, *also):
        tensor.inputs.clear()
    start.dtype = start.dtype or np.dtype(np.float32)
    part.inputs = [start, *(_as_float(part, tensor) for tensor in also)]


def _as_float(part: gs.Graph, tensor: gs.Variable) -> gs.Variable:
    """An input of floats that a tensor can be, or be cast from: indices are exact up to 2^24."""
    if tensor.dtype is None or tensor.dtype == np.float32:
        tensor.dtype = np.dtype(np.float32)
        return tensor
    source = gs.Variable(f"{tensor.name}/float", np.float32, tensor.shape)
    code = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype))
    part.nodes.append(gs.Node("Cast", source.name, {"to": code}, [source], [tensor]))
    return source


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
